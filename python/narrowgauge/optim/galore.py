"""GaLore (Zhao et al., "Memory-Efficient LLM Training by Gradient Low-Rank Projection", ICML 2024)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from narrowgauge.ops import system
from narrowgauge.optim.base import Common, ElementwiseOptimizer, Params
from narrowgauge.optim.low_rank import LowRankCall, LowRankOptimizer
from narrowgauge.optim.projection import factors, project

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Arguments left at None: in groups with a rank, and in groups without.
OWN_DEFAULTS = {"eps": (1e-6, 1e-8), "weight_decay": (0.0, 1e-2)}


def _with_defaults(group: dict[str, Any]) -> dict[str, Any]:
    given = {name: group[name] for name in OWN_DEFAULTS if group[name] is not None}
    number = 0 if group["rank"] is not None else 1
    return group | {name: values[number] for name, values in OWN_DEFAULTS.items()} | given


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
        cautious: As in `AdamW`; only in groups without a rank.
        **common: See `narrowgauge.optim.base.Common`. Of a projected parameter `state_dtype` says how the moments are
            stored, not the basis, and `seed` also seeds a randomized basis. Groups with a rank cannot be captured in a
            CUDA graph.

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
        cautious: bool = False,
        **common: Unpack[Common],
    ) -> None:
        self._until_look = {}
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "cautious": cautious,
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "proj_type": proj_type,
            "projection": projection,
        }
        ElementwiseOptimizer.__init__(self, params, defaults, common)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(_with_defaults(group))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self.param_groups[-1].update(_with_defaults(self.param_groups[-1]))

    def _low_rank_step(self, call: LowRankCall) -> None:
        group, bases, lows = call.group, [], []
        for i in range(len(call.params)):
            g = call.gradient(i)
            bases.append(self._bases(call, i, g))
            lows.append(project(g, *bases[i]))
        updates = call.adam(call.whole, lows, ("exp_avg", "exp_avg_sq"), scaled=True)
        decay = call.decay()
        for i, (p, update) in enumerate(zip(call.params, updates, strict=True)):
            if call.is_plain(i):
                # One pass: p <- decay p - (decay scale update) Q.
                if isinstance(decay, Tensor):
                    p.mul_(decay)
                update.mul_(-group["scale"] * decay)
                beta = 1.0 if isinstance(decay, Tensor) else decay
                p.addmm_(*factors(update, *bases[i]), beta=beta)
            else:
                delta = torch.mm(*factors(update.mul_(group["scale"]), *bases[i]))
                call.subtract(i, delta, group["weight_decay"])


system(
    "galore",
    title="GaLore",
    source="arXiv 2403.03507",
    page="optim/galore.md",
    modules=("optim.GaLoreAdamW",),
    operators=("low_rank_",),
    golden=("galore",),
    bench=("galore",),
)
