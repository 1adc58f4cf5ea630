"""RAdam (Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", arXiv 1908.03265, ICLR 2020)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from narrowgauge.ops import system
from narrowgauge.optim.base import Common, ElementwiseOptimizer, Params, check_betas, check_range
from narrowgauge.optim.elementwise import Rule, Scalar, integer_power, interpolate, square_root

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Variants: L2 penalty, decoupled weight decay.


def _scalars(
    variant: int,
    lr: Tensor,
    step: Tensor,
    given: list[Tensor],
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> tuple[Scalar, ...]:
    """While too few gradients are known to estimate the variance, the step does not adapt to it."""
    decay = 1 - lr * weight_decay if variant else weight_decay
    faded = integer_power(beta2, step)
    correction = 1 - faded
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * faded / correction
    adapts = length > 5
    rectified = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length) * correction
    rate = lr / (1 - integer_power(beta1, step))
    step_size = torch.where(adapts, rate * rectified.sqrt(), rate)
    return decay, beta1, 1 - beta1, beta2, 1 - beta2, eps, step_size, adapts


def _update(
    variant: int, p: Tensor, g: Tensor, states: list[Tensor], scalars: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    decay, first_keep, first_weight, second_keep, second_weight, eps, step_size, adapts = scalars
    if not variant:
        g = g + decay * p
    m = interpolate(states[0], g, first_keep, first_weight)
    v = states[1] * second_keep + second_weight * g * g
    if variant:
        p = p * decay
    return p - step_size * m / torch.where(adapts != 0, square_root(v) + eps, 1.0), [m, v]


radam_rule = Rule(
    name="radam",
    options=("beta1", "beta2", "eps", "weight_decay"),
    signed=((True, False), (True, False)),
    scalars=_scalars,
    update=_update,
    sample_options=(0.9, 0.999, 1e-8, 1e-2),
)


class RAdam(ElementwiseOptimizer):
    """A drop-in for `torch.optim.RAdam` in one kernel for all parameters.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, a number or a tensor.
        betas: Decay rates of the first and second moment.
        eps: Added to the denominator.
        weight_decay: L2 penalty, added to the gradient.
        decoupled_weight_decay: Decay as `AdamW` does.
        **common: See `narrowgauge.optim.base.Common`.
    """

    _rule = radam_rule

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        **common: Unpack[Common],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, common)

    def _check_options(self, group: dict[str, Any]) -> None:
        check_betas("RAdam", group["betas"])
        check_range("RAdam", "eps", group["eps"], 0)
        check_range("RAdam", "weight_decay", group["weight_decay"], 0)

    def _variant(self, group: dict[str, Any]) -> int:
        return int(group["decoupled_weight_decay"])

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return "exp_avg", "exp_avg_sq"

    def _options(self, group: dict[str, Any]) -> list[float]:
        return [*group["betas"], group["eps"], group["weight_decay"]]


system(
    "radam",
    title="RAdam",
    source="arXiv 1908.03265",
    page="optim/torch_set.md",
    modules=("optim.RAdam",),
    operators=("radam_",),
    golden=("torch_optim",),
    bench=("radam",),
)
