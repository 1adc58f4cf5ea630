"""The gated, per-head, modulated and unit-sphere norms: forward alone, and forward with backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import narrowgauge.nn.functional as ng
from bench.harness import Case, Contest, Setting, compare

EPS = 1e-6
DTYPES = (torch.float32, torch.bfloat16)
SAMPLES = 8


def ours_gated(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    return ng.gated_rms_norm(x, z, weight, EPS, norm_before_gate=False)


def eager_gated(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x * F.silu(z), weight.shape, weight, EPS)


def ours_ada(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return ng.ada_layer_norm(x, scale, shift, EPS)


def eager_ada(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def ours_gated_residual(x: Tensor, residual: Tensor, gate: Tensor) -> Tensor:
    return ng.gated_residual(residual, x, gate)


def eager_gated_residual(x: Tensor, residual: Tensor, gate: Tensor) -> Tensor:
    return residual + gate.unsqueeze(1) * x


def ours_add_ada(
    x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    return ng.add_ada_layer_norm(x, residual, gate, scale, shift, EPS)


def eager_add_ada(
    x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    total = residual + gate.unsqueeze(1) * x
    return eager_ada(total, scale, shift), total


def ours_qk(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    return ng.qk_norm(q, k, q_weight, k_weight, EPS, cos=cos, sin=sin)


def eager_qk(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    def one(x: Tensor, weight: Tensor) -> Tensor:
        x = F.rms_norm(x, weight.shape, weight, EPS)
        a, b = x.chunk(2, -1)
        return x * cos.unsqueeze(-2) + torch.cat((-b, a), -1) * sin.unsqueeze(-2)

    return one(q, q_weight), one(k, k_weight)


def ours_scale(x: Tensor, g: Tensor) -> Tensor:
    return ng.scale_norm(x, g, EPS)


def eager_scale(x: Tensor, g: Tensor) -> Tensor:
    return g * F.normalize(x, dim=-1, eps=EPS)


# Ours, eager, the inputs for n rows of d as shapes, and how many tensors of that size move forward and backward.
Function = Callable[..., object]
Shapes = Callable[[int, int], list[tuple[int, ...]]]


def _ada_shapes(full: int, vectors: int) -> Shapes:
    return lambda n, d: [(SAMPLES, n // SAMPLES, d)] * full + [(SAMPLES, d)] * vectors


CONTESTS: dict[str, tuple[Function, Function, Shapes, int, int]] = {
    "gated_rms_norm": (ours_gated, eager_gated, lambda n, d: [(n, d), (n, d), (d,)], 3, 5),
    "ada_layer_norm": (ours_ada, eager_ada, _ada_shapes(1, 2), 2, 3),
    "gated_residual": (ours_gated_residual, eager_gated_residual, _ada_shapes(2, 1), 3, 3),
    "add_ada_layer_norm": (ours_add_ada, eager_add_ada, _ada_shapes(2, 3), 4, 7),
    "scale_norm": (ours_scale, eager_scale, lambda n, d: [(n, d), (1,)], 2, 3),
}


def row_case(name: str, rows: int, d: int, dtype: torch.dtype, backward: bool) -> Case:
    """One of the contests above."""
    ours, eager, shapes, forward_tensors, backward_tensors = CONTESTS[name]

    def build(setting: Setting) -> Contest:
        inputs = [setting.random(*shape, dtype=dtype, requires_grad=backward) for shape in shapes(rows, d)]
        tensors = forward_tensors + (backward_tensors if backward else 0)
        moved = tensors * rows * d * dtype.itemsize
        return compare(setting, ours, eager, inputs, backward=backward, bytes_moved=moved)

    passes = "fwd+bwd" if backward else "fwd"
    return Case(name, f"{passes} {rows}x{d} {str(dtype).removeprefix('torch.')}", build)


def qk_case(tokens: int, heads: int, kv_heads: int, dtype: torch.dtype, backward: bool, d: int = 128) -> Case:
    """Queries and keys of one layer, four samples."""

    def build(setting: Setting) -> Contest:
        batch, positions = 4, tokens // 4
        inputs = [
            setting.random(*shape, dtype=dtype, requires_grad=backward)
            for shape in ((batch, positions, heads, d), (batch, positions, kv_heads, d), (d,), (d,))
        ]
        inputs += [setting.random(positions, d, dtype=dtype) for _ in range(2)]
        moved = (5 if backward else 2) * tokens * (heads + kv_heads) * d * dtype.itemsize
        return compare(setting, ours_qk, eager_qk, inputs, backward=backward, bytes_moved=moved)

    passes = "fwd+bwd" if backward else "fwd"
    shape = f"{tokens}x{heads}+{kv_heads}x{d}"
    return Case("qk_norm", f"{passes} {shape} {str(dtype).removeprefix('torch.')}", build)


CASES = [
    *(
        row_case(name, rows, d, dtype, backward)
        for name in CONTESTS
        for backward in (False, True)
        for rows, d in ((4096, 4096), (256, 1024))
        for dtype in DTYPES
    ),
    *(
        qk_case(tokens, 32, 8, dtype, backward)
        for backward in (False, True)
        for tokens in (4096, 64)
        for dtype in DTYPES
    ),
]


def test_modulated(case: Case, contest: Callable[[Case], None]) -> None:
    contest(case)
