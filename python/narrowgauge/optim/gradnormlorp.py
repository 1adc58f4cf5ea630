"""Weight-normalized low-rank AdamW, after GradNormLoRP (Huang et al., AAAI 2025)."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from narrowgauge.ops import checks, system
from narrowgauge.optim.base import Common, ElementwiseOptimizer, Params, check_range
from narrowgauge.optim.low_rank import (
    LowRankCall,
    LowRankOptimizer,
    compute_dtype,
    low_shape,
    matrix,
    matrix_shape,
)
from narrowgauge.optim.master import join_master
from narrowgauge.optim.projection import project, project_back

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
        state_dtype: How the directions' moments are stored, as in `AdamW`; bases and gains stay float32.
        compat: None, or ``"reference"`` for the behaviour of the released `LowRankWeightNormAdamW`: the gains do not
            accumulate, and a full copy of the parameter is kept. For vectors and matrices, with fp32 states.
        lr_gain: Learning rate of the gains as a multiple of `lr`; 0 freezes the norms of the rows.
        projection: How the basis is found, as in `GaLoreAdamW`.
        **common: See `narrowgauge.optim.base.Common`; `seed` also seeds a randomized basis.

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
        **common: Any,
    ) -> None:
        self._until_look = {}
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": False,
            "cautious": False,
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "proj_type": proj_type,
            "projection": projection,
            "compat": compat,
            "lr_gain": lr_gain,
        }
        storage = cast("Common", {**common, "state_dtype": state_dtype})
        ElementwiseOptimizer.__init__(self, params, defaults, storage)

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
        low, rows = low_shape(group, p), matrix_shape(p)[0]
        if group["compat"] is not None:
            shapes = matrix_shape(p), (rows, 1), low, low, (rows, 1), (rows, 1)
            return dict(zip(("v", "g", *REFERENCE_MOMENTS), shapes, strict=True))
        return {"exp_avg": low, "exp_avg_sq": low, "exp_avg_gain": (rows,), "exp_avg_sq_gain": (rows,)}

    def _init_own(self, group: dict[str, Any], p: Tensor, state: dict[str, Any]) -> None:
        if group["compat"] is not None:
            state["v"].copy_(matrix(p, compute_dtype(p)))

    def _low_rank_step(self, call: LowRankCall) -> None:
        """Every parameter by itself: the gradients of its directions are as large as it is."""
        step = self._normalized_step if call.group["compat"] is None else self._reference_step
        for i, p in enumerate(call.params):
            g = call.gradient(i)
            if call.grad_scale is not None:
                g = g / call.grad_scale
            if call.clip is not None:
                g = g * call.clip
            split = call.param_update == "split"
            w = matrix(join_master(p, call.rests[i]) if split else p, g.dtype)
            call.subtract(i, w - step(call, i, w, -g if call.group["maximize"] else g))

    def _normalized_step(self, call: LowRankCall, i: int, w: Tensor, g: Tensor) -> Tensor:
        group, whole = call.group, call.whole[i : i + 1]
        norms, rows, along, across = tangent(w, g)
        basis = self._bases(call, i, across)
        (update,) = call.adam(whole, [project(across, *basis)], ("exp_avg", "exp_avg_sq"), last=False)
        (gain_update,) = call.adam(whole, [along.flatten()], ("exp_avg_gain", "exp_avg_sq_gain"))
        if basis[1]:
            update.mul_(group["scale"])
        new = rows - project_back(update, *basis)
        gains = (norms - group["lr_gain"] * gain_update[:, None]) * call.decay()
        new_norms = _norm(new)
        # The ratio first: it is exactly 1 for a row that does not move.
        return new * torch.where(new_norms == 0, 0, gains / new_norms)

    def _reference_step(self, call: LowRankCall, i: int, w: Tensor, g: Tensor) -> Tensor:
        """What the released code does: the gain starts every step from the norm of `v`, whatever it was before."""
        group, whole = call.group, call.whole[i : i + 1]
        state = self.state[whole[0]]
        v = state["v"]
        norms = _norm(v)
        # The released projector decomposes in float32.
        basis = self._bases(call, i, g.float())
        along = (g * (v / norms)).sum(1, keepdim=True)
        (update,) = call.adam(whole, [project(g, *basis)], REFERENCE_MOMENTS[:2], last=False)
        (gain_update,) = call.adam(whole, [along], REFERENCE_MOMENTS[2:])
        if basis[1]:
            update.mul_(group["scale"])
        decay = call.decay()
        new_v, gains = (v - project_back(update, *basis)) * decay, (norms - gain_update) * decay
        call.write(state["v"], new_v)
        call.write(state["g"], gains)
        return gains * (new_v / _norm(new_v))


system(
    "gradnormlorp",
    title="GradNormLoRP",
    source="arXiv 2412.19616",
    page="optim/gradnormlorp.md",
    modules=("optim.GradNormLoRP",),
    operators=("low_rank_",),
    golden=("gradnormlorp",),
    bench=("gradnormlorp",),
)
