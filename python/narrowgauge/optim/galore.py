"""GaLore (Zhao et al., "Memory-Efficient LLM Training by Gradient Low-Rank Projection", ICML 2024)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from narrowgauge.ops import system
from narrowgauge.optim.base import ElementwiseOptimizer, Params
from narrowgauge.optim.low_rank import (
    LowRankOptimizer,
    adam_updates,
    compute_dtype,
    factors,
    matrix,
    project,
)

# Arguments left at None: in groups with a rank, and in groups without.
OWN_DEFAULTS = {"eps": (1e-6, 1e-8), "weight_decay": (0.0, 1e-2)}


def _with_defaults(group: dict[str, Any]) -> dict[str, Any]:
    given = {name: group[name] for name in OWN_DEFAULTS if group[name] is not None}
    number = 0 if group["rank"] is not None else 1
    return group | {name: values[number] for name, values in OWN_DEFAULTS.items()} | given


def _add_product(p: Tensor, left: Tensor, right: Tensor, decay: float | Tensor) -> None:
    """p <- decay p + left right, rounded once."""
    if isinstance(decay, float) and p.dim() == 2 and p.dtype is left.dtype:
        p.addmm_(left, right, beta=decay)
        return
    wide = matrix(p, left.dtype)
    if isinstance(decay, Tensor):
        wide, decay = wide * decay, 1.0
    p.copy_(torch.addmm(wide, left, right, beta=decay).view(p.shape))


class GaLoreAdamW(LowRankOptimizer):
    """AdamW whose moments live in a low-rank basis of each matrix gradient.

    Groups with a `rank` are projected; groups without one are `narrowgauge.optim.AdamW`, bit for bit. For a parameter
    of shape (m, n), m >= n, the moments have shape (m, rank) and the basis (rank, n), instead of two moments of shape
    (m, n). Parameters with more than two dimensions are treated as matrices of shape (shape[0], the rest). Arithmetic
    is float32 (float64 for float64 parameters); gradients are never modified.

    State of a projected parameter: `step`, `exp_avg`, `exp_avg_sq` and the basis, `projection` (with
    ``proj_type="full"``: `projection_left` and `projection_right`), all plain tensors.

    Source: arXiv 2403.03507.

    Args:
        params: Parameters or parameter groups; in those with a rank, of at least two dimensions and real.
        lr: Learning rate, a number or a tensor.
        betas: Decay rates of the first and second moment.
        eps: Added to the denominator; None is 1e-6 in groups with a rank (where it is outside the bias correction),
            and 1e-8 in the others.
        weight_decay: Decoupled weight decay, in groups with a rank applied after the update. None is 0 in groups with a
            rank, and 0.01 in the others, as in `torch.optim.AdamW`.
        amsgrad: Use the largest second moment so far; only in groups without a rank.
        rank: Number of dimensions of the basis (at most min(m, n) are used), or None.
        update_proj_gap: A new basis is found at every so many steps; moments are kept as they are.
        scale: Factor of the update of projected parameters.
        proj_type: ``"std"`` projects the shorter dimension, ``"reverse_std"`` the longer; ``"left"`` the rows,
            ``"right"`` the columns, ``"full"`` both.
        projection: How the basis is found: ``"svd"``; ``"randomized"``, an approximate one many times faster; or
            ``"subspace"``, power iterations that start from the basis before.
        maximize: Go up instead of down.
        foreach, fused, capturable: Accepted for compatibility. Groups with a rank cannot be captured in a CUDA graph.
        differentiable: Must be False.
        state_dtype: ``"fp32"``, or ``"int8"`` for 8-bit blockwise moments of parameters with at least
            `min_quantized_size` elements; the basis is not quantized.
        param_update: As in `narrowgauge.optim.AdamW`, in groups without a rank; ``"nearest"`` in the others.
        seed: Seed of the stochastic rounding and of the randomized basis.
        min_quantized_size: Smaller parameters keep fp32 states.

    Raises:
        ValueError: For arguments out of range, parameters with a rank that are no real matrices or are sharded, and
            state dicts that do not fit; nothing is changed.
        RuntimeError: For sparse gradients.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | None = None,
        weight_decay: float | None = None,
        amsgrad: bool = False,
        *,
        rank: int | None = None,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        projection: str = "svd",
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: str = "fp32",
        param_update: str = "nearest",
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
                "amsgrad": amsgrad,
                "rank": rank,
                "update_proj_gap": update_proj_gap,
                "scale": scale,
                "proj_type": proj_type,
                "projection": projection,
                "maximize": maximize,
                "foreach": foreach,
                "capturable": capturable,
                "differentiable": differentiable,
                "fused": fused,
                "state_dtype": state_dtype,
                "param_update": param_update,
                "seed": seed,
                "min_quantized_size": min_quantized_size,
            },
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(_with_defaults(group))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self.param_groups[-1].update(_with_defaults(self.param_groups[-1]))

    def _low_rank_step(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        lr: float | Tensor,
        grad_scale: Tensor | None,
        skipped: Tensor | None,
    ) -> None:
        states = [self.state[p] for p in params]
        bases, lows = [], []
        for p in params:
            assert p.grad is not None
            g = matrix(p.grad, compute_dtype(p))
            bases.append(self._bases(group, p, g, skipped))
            low = project(g, *bases[-1])
            if grad_scale is not None:
                low.div_(grad_scale)
            lows.append(low.neg_() if group["maximize"] else low)

        moments = [[self._read(state, name) for state in states] for name in ("exp_avg", "exp_avg_sq")]
        if skipped is not None:  # written below, where the flag allows
            moments = [[moment.clone() for moment in each] for each in moments]
        exp_avgs, exp_avg_sqs = moments
        steps = [state["step"] + 1 for state in states]
        updates = adam_updates(lows, exp_avgs, exp_avg_sqs, steps, lr, group["betas"], group["eps"])
        decay = 1.0 - lr * group["weight_decay"] if group["weight_decay"] else 1.0
        for i, (p, state, update) in enumerate(zip(params, states, updates, strict=True)):
            update.mul_(-group["scale"] * decay)
            kept = decay
            if skipped is not None:
                update = torch.where(skipped, 0, update)
                kept = torch.where(skipped, 1.0, decay) if group["weight_decay"] else decay
            _add_product(p, *factors(update, *bases[i]), kept)
            self._write(state, "exp_avg", exp_avgs[i], skipped)
            self._write(state, "exp_avg_sq", exp_avg_sqs[i], skipped)
            self._write(state, "step", steps[i], skipped)


system(
    "galore",
    title="GaLore",
    source="arXiv 2403.03507",
    page="optim/galore.md",
    modules=("optim.GaLoreAdamW",),
    golden=("galore",),
    bench=("galore",),
    reasons={
        "reference": "PyTorch's matmuls and decompositions",
        "cpu": "PyTorch's matmuls and decompositions",
        "cuda": "PyTorch's matmuls and decompositions",
    },
)
