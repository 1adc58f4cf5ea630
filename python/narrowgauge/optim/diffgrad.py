"""diffGrad (Dubey et al., IEEE TNNLS 2020, arXiv 1909.11015)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from narrowgauge.ops import system
from narrowgauge.optim.base import Common, ElementwiseOptimizer, Params, check_betas, check_range
from narrowgauge.optim.elementwise import Rule, Scalar, integer_power, interpolate, square_root

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Variants: 1: decoupled weight decay; + 2: amsgrad.


def _scalars(
    variant: int,
    lr: Tensor,
    step: Tensor,
    given: list[Tensor],
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
) -> tuple[Scalar, ...]:
    decay = 1 - lr * weight_decay if variant & 1 else weight_decay
    step_size = lr * (1 - integer_power(beta2, step)).sqrt() / (1 - integer_power(beta1, step))
    return decay, beta1, 1 - beta1, beta2, 1 - beta2, step_size, eps


def _update(
    variant: int, p: Tensor, g: Tensor, states: list[Tensor], scalars: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    decay, first_keep, first_weight, second_keep, second_weight, step_size, eps = scalars
    decoupled = bool(variant & 1)
    if not decoupled:
        g = g + decay * p
    m, v, previous, *largest = states
    m = interpolate(m, g, first_keep, first_weight)
    v = v * second_keep + second_weight * g * g
    largest = [torch.maximum(largest[0], v)] if largest else []
    friction = 1 / (1 + (-(previous - g).abs()).exp())
    step = step_size * (m * friction) / (square_root(largest[0] if largest else v) + eps)
    return (p * decay if decoupled else p) - step, [m, v, g, *largest]


diffgrad_rule = Rule(
    name="diffgrad",
    options=("beta1", "beta2", "weight_decay", "eps"),
    signed=((True, False, True),) * 2 + ((True, False, True, False),) * 2,
    scalars=_scalars,
    update=_update,
    exact=False,
    sample_options=(0.9, 0.999, 1e-2, 1e-8),
)


class DiffGrad(ElementwiseOptimizer):
    """Adam whose step is multiplied, element by element, by a number from 0.5 to 1 that grows with the change of g.

    The factor is 1 / (1 + exp(-|change of the gradient|)), in the units of the gradient: with gradients far below 1, as
    in large models, it is 0.5 and the method is Adam at half the rate. `eps` is added to the uncorrected root of the
    second moment, as in the authors' code.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, a number or a tensor.
        betas: Decay rates of the first and second moment.
        eps: Added to the denominator.
        weight_decay: Weight decay, added to the gradient unless `decoupled_weight_decay`.
        decoupled_weight_decay: Decay the parameters themselves, as AdamW does.
        amsgrad: Use the largest second moment so far.
        **common: See `narrowgauge.optim.base.Common`.
    """

    _rule = diffgrad_rule

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decoupled_weight_decay: bool = False,
        amsgrad: bool = False,
        **common: Unpack[Common],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "amsgrad": amsgrad,
        }
        super().__init__(params, defaults, common)

    def _check_options(self, group: dict[str, Any]) -> None:
        check_betas("DiffGrad", group["betas"])
        check_range("DiffGrad", "eps", group["eps"], 0)
        check_range("DiffGrad", "weight_decay", group["weight_decay"], 0)

    def _variant(self, group: dict[str, Any]) -> int:
        return int(group["decoupled_weight_decay"]) + 2 * int(group["amsgrad"])

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        names = ("exp_avg", "exp_avg_sq", "previous_grad", "max_exp_avg_sq")
        return names if group["amsgrad"] else names[:3]

    def _options(self, group: dict[str, Any]) -> list[float]:
        return [*group["betas"], group["weight_decay"], group["eps"]]


system(
    "diffgrad",
    title="diffGrad",
    source="arXiv 1909.11015",
    page="optim/diffgrad.md",
    modules=("optim.DiffGrad",),
    operators=("diffgrad_",),
    golden=("diffgrad",),
    bench=("diffgrad",),
)
