"""Adan (Xie et al., TPAMI 2024, arXiv 2208.06677)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from narrowgauge.ops import system
from narrowgauge.optim.base import Common, ElementwiseOptimizer, Params, check_betas, check_range
from narrowgauge.optim.elementwise import Rule, Scalar, integer_power, interpolate, square_root

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _scalars(
    variant: int,
    lr: Tensor,
    step: Tensor,
    given: list[Tensor],
    beta1: float,
    beta2: float,
    beta3: float,
    weight_decay: float,
    eps: float,
) -> tuple[Scalar, ...]:
    return (
        (step > 1).double(),
        beta1,
        1 - beta1,
        beta2,
        1 - beta2,
        beta3,
        1 - beta3,
        lr / (1 - integer_power(beta1, step)),
        lr * beta2 / (1 - integer_power(beta2, step)),
        (1 - integer_power(beta3, step)).sqrt(),
        eps,
        1 - lr * weight_decay if variant else 1 / (1 + lr * weight_decay),
    )


def _update(
    variant: int, p: Tensor, g: Tensor, states: list[Tensor], scalars: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    has_previous, first_keep, first_weight, diff_keep, diff_weight, second_keep, second_weight, *sizes = (
        scalars
    )
    first_size, diff_size, correction, eps, decay = sizes
    diff = torch.where(has_previous > 0, g + states[3], 0.0)
    ahead = g + diff_keep * diff
    m = interpolate(states[0], g, first_keep, first_weight)
    n = interpolate(states[2], diff, diff_keep, diff_weight)
    v = states[1] * second_keep + second_weight * ahead * ahead
    step = (first_size * m + diff_size * n) / (square_root(v) / correction + eps)
    return p * decay - step if variant else (p - step) * decay, [m, v, n, -g]


# Variants: proximal weight decay, decoupled weight decay.
adan_rule = Rule(
    name="adan",
    options=("beta1", "beta2", "beta3", "weight_decay", "eps"),
    signed=((True, False, True, True),) * 2,
    scalars=_scalars,
    update=_update,
    sample_options=(0.98, 0.92, 0.99, 1e-2, 1e-8),
)


class Adan(ElementwiseOptimizer):
    """Adam with Nesterov's momentum, estimated from the differences of successive gradients.

    ``previous_grad`` in the state is the negated gradient of the step before.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, a number or a tensor.
        betas: Decay rates of the gradient, of the differences and of the second moment; the weight of the new value
            is one less it, which the paper calls beta.
        weight_decay: Weight decay: parameters are divided by ``1 + lr * weight_decay`` after the step.
        decoupled_weight_decay: Multiply by ``1 - lr * weight_decay`` before it, as `AdamW` does.
        eps: Added to the denominator.
        **common: See `narrowgauge.optim.base.Common`.
    """

    _rule = adan_rule

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        *,
        eps: float = 1e-8,
        **common: Unpack[Common],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "eps": eps,
        }
        super().__init__(params, defaults, common)

    def _check_options(self, group: dict[str, Any]) -> None:
        check_betas("Adan", group["betas"], 3)
        check_range("Adan", "weight_decay", group["weight_decay"], 0)
        check_range("Adan", "eps", group["eps"], 0)

    def _variant(self, group: dict[str, Any]) -> int:
        return int(group["decoupled_weight_decay"])

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return "exp_avg", "exp_avg_sq", "exp_avg_diff", "previous_grad"

    def _options(self, group: dict[str, Any]) -> list[float]:
        return [*group["betas"], group["weight_decay"], group["eps"]]


system(
    "adan",
    title="Adan",
    source="arXiv 2208.06677",
    page="optim/adam_relatives.md",
    modules=("optim.Adan",),
    operators=("adan_",),
    golden=("extra_optim",),
    bench=("adan",),
)
