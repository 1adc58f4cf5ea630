"""Lion (Chen et al., "Symbolic Discovery of Optimization Algorithms", NeurIPS 2023, arXiv 2302.06675)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from narrowgauge.ops import system
from narrowgauge.optim.adamw import cautious_rescale
from narrowgauge.optim.base import Call, Common, ElementwiseOptimizer, Params, check_betas, check_range
from narrowgauge.optim.elementwise import Rule, Scalar, interpolate

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Variants: 1: cautious.


def _scalars(
    variant: int,
    lr: Tensor,
    step: Tensor,
    given: list[Tensor],
    beta1: float,
    beta2: float,
    weight_decay: float,
) -> tuple[Scalar, ...]:
    return 1 - lr * weight_decay, beta1, 1 - beta1, beta2, 1 - beta2, lr * given[0] if variant else lr


def _update(
    variant: int, p: Tensor, g: Tensor, states: list[Tensor], scalars: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    decay, first_keep, first_weight, second_keep, second_weight, step_size = scalars
    (m,) = states
    direction = interpolate(m, g, first_keep, first_weight)
    step = torch.where(direction > 0, step_size, torch.where(direction < 0, -step_size, direction))
    if variant:
        step = torch.where(direction * g <= 0, 0.0, step)
    return p * decay - step, [interpolate(m, g, second_keep, second_weight)]


def _terms(variant: int, p: Tensor, g: Tensor, states: list[Tensor], scalars: list[Tensor]) -> list[Tensor]:
    _, first_keep, first_weight, *_ = scalars
    return [(interpolate(states[0], g, first_keep, first_weight) * g > 0).to(g.dtype)]


lion_rule = Rule(
    name="lion",
    options=("beta1", "beta2", "weight_decay"),
    signed=((True,), (True,)),
    scalars=_scalars,
    update=_update,
    terms=_terms,
    sums=(0, 1),
    given=(0, 1),
    sample_options=(0.9, 0.99, 1e-2),
)


class Lion(ElementwiseOptimizer):
    """Steps of one size, in the direction of the sign of a momentum; one state per element.

    Every element moves by `lr`, so `lr` is usually three to ten times smaller than for AdamW, and `weight_decay` larger
    by as much.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, a number or a tensor.
        betas: Weights of the momentum in the direction, and in the next momentum.
        weight_decay: Decoupled weight decay.
        cautious: Leave out elements whose direction points against the gradient, and enlarge the other steps of the
            tensor by as much (Liang et al., arXiv 2411.16085).
        **common: See `narrowgauge.optim.base.Common`.
    """

    _rule = lion_rule
    _counts_no_steps = True

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        cautious: bool = False,
        **common: Unpack[Common],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "cautious": cautious}
        super().__init__(params, defaults, common)

    def _check_options(self, group: dict[str, Any]) -> None:
        check_betas("Lion", group["betas"])
        check_range("Lion", "weight_decay", group["weight_decay"], 0)

    def _variant(self, group: dict[str, Any]) -> int:
        return int(group["cautious"])

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg",)

    def _options(self, group: dict[str, Any]) -> list[float]:
        return [*group["betas"], group["weight_decay"]]

    def _given(self, call: Call) -> tuple[Tensor | None, Tensor | None]:
        return (cautious_rescale(call) if call.group["cautious"] else None), None


system(
    "lion",
    title="Lion",
    source="arXiv 2302.06675; cautious: arXiv 2411.16085",
    page="optim/lion.md",
    modules=("optim.Lion",),
    operators=("lion_", "lion_sums"),
    golden=("extra_optim",),
    bench=("lion",),
)
