"""AdaBelief (Zhuang et al., NeurIPS 2020, arXiv 2010.07468)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
    weight_decay: float,
    eps: float,
) -> tuple[Scalar, ...]:
    decay = weight_decay if variant else 1 - lr * weight_decay
    correction = (1 - integer_power(beta2, step)).sqrt()
    step_size = lr * correction / (1 - integer_power(beta1, step))
    return decay, beta1, 1 - beta1, beta2, 1 - beta2, step_size, eps


def _update(
    variant: int, p: Tensor, g: Tensor, states: list[Tensor], scalars: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    decay, first_keep, first_weight, second_keep, second_weight, step_size, eps = scalars
    if variant:
        g = g + decay * p
    m = interpolate(states[0], g, first_keep, first_weight)
    surprise = g - m
    v = states[1] * second_keep + second_weight * surprise * surprise + eps
    if not variant:
        p = p * decay
    return p - step_size * m / (square_root(v) + eps), [m, v]


# Variants: decoupled weight decay, L2 penalty.
adabelief_rule = Rule(
    name="adabelief",
    options=("beta1", "beta2", "weight_decay", "eps"),
    signed=((True, False), (True, False)),
    scalars=_scalars,
    update=_update,
    sample_options=(0.9, 0.999, 1e-2, 1e-16),
)


class AdaBelief(ElementwiseOptimizer):
    """AdamW with the variance of the gradient around its momentum in place of its square.

    Steps are long where gradients agree with their average, whatever their size, and short where they do not.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, a number or a tensor.
        betas: Decay rates of the momentum and the variance.
        weight_decay: Weight decay.
        eps: Added to the variance at every step, and to the denominator.
        decoupled_weight_decay: Whether the decay shrinks parameters, as in `AdamW`, or is added to gradients.
        **common: See `narrowgauge.optim.base.Common`.
    """

    _rule = adabelief_rule

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        *,
        eps: float = 1e-16,
        decoupled_weight_decay: bool = True,
        **common: Unpack[Common],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "eps": eps,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, common)

    def _check_options(self, group: dict[str, Any]) -> None:
        check_betas("AdaBelief", group["betas"])
        check_range("AdaBelief", "weight_decay", group["weight_decay"], 0)
        check_range("AdaBelief", "eps", group["eps"], 0)

    def _variant(self, group: dict[str, Any]) -> int:
        return int(not group["decoupled_weight_decay"])

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return "exp_avg", "exp_avg_var"

    def _options(self, group: dict[str, Any]) -> list[float]:
        return [*group["betas"], group["weight_decay"], group["eps"]]


system(
    "adabelief",
    title="AdaBelief",
    source="arXiv 2010.07468",
    page="optim/adam_relatives.md",
    modules=("optim.AdaBelief",),
    operators=("adabelief_",),
    golden=("extra_optim",),
    bench=("adabelief",),
)
