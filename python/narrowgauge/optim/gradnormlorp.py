"""Weight-normalized low-rank AdamW, after GradNormLoRP (Huang et al., AAAI 2025)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from narrowgauge.ops import checks, system
from narrowgauge.optim.base import ElementwiseOptimizer, Params, check_range
from narrowgauge.optim.low_rank import (
    LowRankOptimizer,
    adam_updates,
    compute_dtype,
    matrix,
    matrix_shape,
    project,
    project_back,
)

# What the released optimizer keeps: the weights before normalization, their gain, and two pairs of moments.
REFERENCE_MOMENTS = ("exp_avg_v", "exp_avg_sq_v", "exp_avg_g", "exp_avg_sq_g")


def _norm(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1, keepdim=True)


def tangent(w: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Splits the gradient of each row of `w` into the part along the row and the part across it.

    A row of zeros has no direction; it takes that of steepest descent.

    Args:
        w: Weights, (m, n).
        g: Their gradient, (m, n).

    Returns:
        The norms of the rows, (m, 1); the rows, with the chosen direction for zero ones; the gradients of the gains,
        (m, 1); the gradients of the directions, orthogonal to the rows.
    """
    norms, steepness = _norm(w), _norm(g)
    zero = norms == 0
    rows = torch.where(zero, -g / torch.where(steepness == 0, 1, steepness), w)
    directions = rows / torch.where(zero, 1, norms)
    along = (g * directions).sum(1, keepdim=True)
    return norms, rows, along, g - along * directions


class GradNormLoRP(LowRankOptimizer):
    """Weight-normalized AdamW: directions of the rows in a low-rank basis, and one gain per row.

    A row of a parameter is its gain, the norm, times its direction. The gradient splits accordingly; Adam moves the
    direction with moments in GaLore's low-rank basis, and the gain with two moments per row. Only the parameter itself
    is kept, no second copy. Rows are the first dimension against the others; a vector or a scalar is one row.

    This is a definition of narrowgauge in the spirit of the paper, not the authors' code, whose optimizers do not
    compute the paper's formula; ``compat="reference"`` repeats the one of them that trains. See the documentation.

    State: `step`, `exp_avg`, `exp_avg_sq`, `exp_avg_gain`, `exp_avg_sq_gain`, with a rank also `projection`
    (`projection_left` and `projection_right` with ``proj_type="full"``); 2 r max(m, n) + r min(m, n) + 2 m numbers.

    Source: arXiv 2412.19616.

    Args:
        params: Parameters or parameter groups, real; in those with a rank, of at least two dimensions.
        lr: Learning rate, a number or a tensor.
        betas: Decay rates of the first and second moments.
        eps: Added to the denominators, outside the bias correction.
        weight_decay: Decoupled decay of the gains, after the update.
        rank: Number of dimensions of the basis (at most min(m, n) are used), or None for moments of full size.
        update_proj_gap: A new basis is found at every so many steps.
        scale: Factor of the update of the directions, where there is a rank.
        proj_type: As in `GaLoreAdamW`; ``"full"`` projects on both sides, as the paper's formula does.
        state_dtype: ``"fp32"``, or ``"int8"`` for 8-bit blockwise moments of the directions of parameters with at
            least `min_quantized_size` elements; bases and gains are not quantized.
        compat: None, or ``"reference"`` for the behaviour of the released `LowRankWeightNormAdamW`: the gains do not
            accumulate, and a full copy of the parameter is kept. For vectors and matrices, with fp32 states.
        lr_gain: Learning rate of the gains as a multiple of `lr`; 0 freezes the norms of the rows.
        projection: How the basis is found, as in `GaLoreAdamW`.
        maximize: Go up instead of down.
        seed: Seed of a randomized basis.
        min_quantized_size: Smaller parameters keep fp32 states.

    Raises:
        ValueError: For arguments out of range, parameters that do not fit, and state dicts that do not; nothing is
            changed.
        RuntimeError: For sparse gradients.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        rank: int | None = None,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        proj_type: str = "std",
        state_dtype: str = "fp32",
        compat: str | None = None,
        *,
        lr_gain: float = 1.0,
        projection: str = "svd",
        maximize: bool = False,
        seed: int = 0,
        min_quantized_size: int = 4096,
    ) -> None:
        self._until_look = {}
        ElementwiseOptimizer.__init__(
            self,
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "amsgrad": False,
                "rank": rank,
                "update_proj_gap": update_proj_gap,
                "scale": scale,
                "proj_type": proj_type,
                "projection": projection,
                "compat": compat,
                "lr_gain": lr_gain,
                "maximize": maximize,
                "differentiable": False,
                "state_dtype": state_dtype,
                "param_update": "nearest",
                "seed": seed,
                "min_quantized_size": min_quantized_size,
            },
        )

    def _is_own(self, group: dict[str, Any]) -> bool:
        return True

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_range("GradNormLoRP", "lr_gain", group["lr_gain"], 0)
        if group["compat"] is not None:
            checks.check_choice("GradNormLoRP", "compat", group["compat"], ("reference",))
            for option, value in (("state_dtype", "fp32"), ("lr_gain", 1)):
                if group[option] != value:
                    raise ValueError(
                        f"GradNormLoRP: {option} must be {value!r} with compat='reference', got {group[option]!r}"
                    )

    def _check_param(self, group: dict[str, Any], p: Tensor) -> None:
        super()._check_param(group, p)
        if group["compat"] is not None and p.dim() not in (1, 2):
            raise ValueError(
                "GradNormLoRP: compat='reference' takes vectors and matrices, got a parameter of shape "
                f"{tuple(p.shape)}"
            )

    def _moment_shapes(self, group: dict[str, Any], p: Tensor) -> dict[str, tuple[int, ...]]:
        low, rows = self._low_shape(group, p), matrix_shape(p)[0]
        if group["compat"] is not None:
            full, gain = matrix_shape(p), (rows, 1)
            return {"v": full, "g": gain} | dict(zip(REFERENCE_MOMENTS, (low, low, gain, gain), strict=True))
        return {"exp_avg": low, "exp_avg_sq": low, "exp_avg_gain": (rows,), "exp_avg_sq_gain": (rows,)}

    def _init_state(self, group: dict[str, Any], p: Tensor) -> dict[str, Any]:
        state = super()._init_state(group, p)
        if group["compat"] is not None:
            state["v"].copy_(matrix(p, compute_dtype(p)))
        return state

    def _low_rank_step(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        lr: float | Tensor,
        grad_scale: Tensor | None,
        skipped: Tensor | None,
    ) -> None:
        step = self._normalized_step if group["compat"] is None else self._reference_step
        decay = 1.0 - lr * group["weight_decay"] if group["weight_decay"] else 1.0
        for p in params:
            assert p.grad is not None
            g = matrix(p.grad, compute_dtype(p))
            if grad_scale is not None:
                g = g / grad_scale
            new = step(group, p, -g if group["maximize"] else g, lr, decay, skipped)
            p.copy_(
                (new if skipped is None else torch.where(skipped, matrix(p, new.dtype), new)).view(p.shape)
            )

    def _normalized_step(
        self,
        group: dict[str, Any],
        p: Tensor,
        g: Tensor,
        lr: float | Tensor,
        decay: float | Tensor,
        skipped: Tensor | None,
    ) -> Tensor:
        state = self.state[p]
        norms, rows, along, across = tangent(matrix(p, g.dtype), g)
        basis = self._bases(group, p, across, skipped)
        names = ("exp_avg", "exp_avg_sq"), ("exp_avg_gain", "exp_avg_sq_gain")
        gradients = project(across, *basis), along.flatten()
        update, gain_update = self._adam(group, state, names, gradients, lr, skipped)
        if basis[1]:
            update.mul_(group["scale"])
        new = rows - project_back(update, *basis)
        gains = (norms - group["lr_gain"] * gain_update[:, None]) * decay
        new_norms = _norm(new)
        # The ratio first: it is exactly 1 for a row that does not move.
        return new * torch.where(new_norms == 0, 0, gains / new_norms)

    def _reference_step(
        self,
        group: dict[str, Any],
        p: Tensor,
        g: Tensor,
        lr: float | Tensor,
        decay: float | Tensor,
        skipped: Tensor | None,
    ) -> Tensor:
        """What the released code does: the gain starts every step from the norm of `v`, whatever it was before."""
        state = self.state[p]
        v = state["v"]
        norms = _norm(v)
        # The released projector decomposes in float32.
        where, bases = self._bases(group, p, g.float(), skipped)
        names = REFERENCE_MOMENTS[:2], REFERENCE_MOMENTS[2:]
        gradients = project(g, where, bases), (g * (v / norms)).sum(1, keepdim=True)
        update, gain_update = self._adam(group, state, names, gradients, lr, skipped)
        if bases:
            update.mul_(group["scale"])
        new_v = (v - project_back(update, where, bases)) * decay
        gains = (norms - gain_update) * decay
        self._write(state, "v", new_v, skipped)
        self._write(state, "g", gains, skipped)
        return gains * (new_v / _norm(new_v))

    def _adam(
        self,
        group: dict[str, Any],
        state: dict[str, Any],
        names: tuple[tuple[str, ...], ...],
        gradients: tuple[Tensor, ...],
        lr: float | Tensor,
        skipped: Tensor | None,
    ) -> list[Tensor]:
        """Adam's updates by pairs of moments, which are written together with the counter."""
        first, second = ([self._read(state, pair[k]) for pair in names] for k in range(2))
        if skipped is not None:
            first, second = ([moment.clone() for moment in moments] for moments in (first, second))
        step = state["step"] + 1
        steps = [step] * len(gradients)
        updates = adam_updates(list(gradients), first, second, steps, lr, group["betas"], group["eps"])
        for pair, values in zip(names, zip(first, second, strict=True), strict=True):
            for name, value in zip(pair, values, strict=True):
                self._write(state, name, value, skipped)
        self._write(state, "step", step, skipped)
        return updates


system(
    "gradnormlorp",
    title="GradNormLoRP",
    source="arXiv 2412.19616",
    page="optim/gradnormlorp.md",
    modules=("optim.GradNormLoRP",),
    golden=("gradnormlorp",),
    bench=("gradnormlorp",),
    reasons={
        "reference": "PyTorch's matmuls and decompositions",
        "cpu": "PyTorch's matmuls and decompositions",
        "cuda": "PyTorch's matmuls and decompositions",
    },
)
