"""Low-rank projection of a matrix: which side, how the basis is found, there and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")
PROJECTIONS = ("svd", "randomized", "subspace")
OVERSAMPLING, POWER_ITERATIONS = 8, 2


def sides(shape: Sequence[int], proj_type: str) -> tuple[str, ...]:
    """On which sides a matrix of this shape is projected: "left" acts on its rows, "right" on its columns."""
    if proj_type == "full":
        return ("left", "right")
    if proj_type in ("left", "right"):
        return (proj_type,)
    tall = shape[0] >= shape[1]
    return ("right",) if tall == (proj_type == "std") else ("left",)


def find_bases(
    g: Tensor,
    rank: int,
    where: Sequence[str],
    projection: str = "svd",
    old: Sequence[Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, ...]:
    """Orthonormal bases of the dominant part of the matrix `g`: (m, rank) on the left, (rank, n) on the right.

    Elements that are not finite count as zero here; the projected gradient still shows them.

    Args:
        g: Gradient, (m, n).
        rank: At most min(m, n).
        where: Sides, as `sides` gives them.
        projection: How the basis is found, one of `PROJECTIONS`.
        old: Bases to start from, for "subspace"; without them it starts like "randomized".
        generator: CPU generator of the random start.
    """
    g = torch.where(g.isfinite(), g, 0)
    if projection == "svd":
        # Singular vectors in float32 differ by 1e-5 between LAPACKs; in float64 every CPU gives the same float32 basis.
        wide = g.double() if g.device.type == "cpu" else g
        u, _, vh = torch.linalg.svd(wide, full_matrices=False)
        bases = {"left": u[:, :rank], "right": vh[:rank]}
        return tuple(bases[side].to(g.dtype).contiguous() for side in where)
    if g.numel():
        g = g / g.abs().amax().clamp_min(torch.finfo(g.dtype).tiny)
    found = []
    for number, side in enumerate(where):
        columns = g if side == "left" else g.T
        if projection == "subspace" and old is not None:
            basis = _power_iteration(columns, old[number] if side == "left" else old[number].T)
        else:
            basis = _range_finder(columns, rank, generator)
        found.append((basis if side == "left" else basis.T).contiguous())
    return tuple(found)


def _range_finder(a: Tensor, rank: int, generator: torch.Generator | None) -> Tensor:
    """Halko, Martinsson and Tropp, arXiv 0909.4061: the range of a times random vectors, then the best of it."""
    count = min(rank + OVERSAMPLING, *a.shape)
    start = torch.randn(a.shape[1], count, generator=generator, dtype=a.dtype).to(a.device)
    q = torch.linalg.qr(a @ start).Q
    for _ in range(POWER_ITERATIONS):
        q = torch.linalg.qr(a @ torch.linalg.qr(a.T @ q).Q).Q
    small = q.T @ a
    vectors = torch.linalg.eigh(small @ small.T).eigenvectors.flip(1)
    return q @ vectors[:, :rank]


def _power_iteration(a: Tensor, basis: Tensor) -> Tensor:
    for _ in range(POWER_ITERATIONS):
        basis, triangle = torch.linalg.qr(a @ (a.T @ basis))
        # Signs as in the basis before: the moments are kept when it changes.
        basis = basis * torch.where(triangle.diagonal() < 0, -1.0, 1.0)
    return basis


def project(g: Tensor, where: Sequence[str], bases: Sequence[Tensor]) -> Tensor:
    """The coordinates of `g` in the bases; `g` itself without any."""
    for side, basis in zip(where, bases, strict=True):
        g = basis.T @ g if side == "left" else g @ basis.T
    return g


def factors(low: Tensor, where: Sequence[str], bases: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Two matrices whose product has the coordinates `low`."""
    if len(bases) == 2:
        return bases[0] @ low, bases[1]
    return (bases[0], low) if where[0] == "left" else (low, bases[0])


def project_back(low: Tensor, where: Sequence[str], bases: Sequence[Tensor]) -> Tensor:
    """The matrix in the span of the bases that has the coordinates `low`."""
    return torch.mm(*factors(low, where, bases)) if bases else low
