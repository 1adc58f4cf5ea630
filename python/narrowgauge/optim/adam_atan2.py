"""Adam-atan2 (Everett et al., ICML 2024, arXiv 2407.05872)."""

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
    weight_decay: float,
    a: float,
    b: float,
) -> tuple[Scalar, ...]:
    correction = b / (1 - integer_power(beta2, step)).sqrt()
    return (
        *(1 - lr * weight_decay, beta1, 1 - beta1, beta2, 1 - beta2),
        *(lr * a, 1 - integer_power(beta1, step), correction),
    )


def _update(
    variant: int, p: Tensor, g: Tensor, states: list[Tensor], scalars: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    decay, first_keep, first_weight, second_keep, second_weight, step_size, first_correction, correction = (
        scalars
    )
    m = interpolate(states[0], g, first_keep, first_weight)
    v = states[1] * second_keep + second_weight * g * g
    return p * decay - step_size * torch.atan2(m / first_correction, square_root(v) * correction), [m, v]


adam_atan2_rule = Rule(
    name="adam_atan2",
    options=("beta1", "beta2", "weight_decay", "a", "b"),
    signed=((True, False),),
    scalars=_scalars,
    update=_update,
    exact=False,
    sample_options=(0.9, 0.999, 1e-2, 1.27, 1.0),
)


class AdamAtan2(ElementwiseOptimizer):
    """AdamW without an eps: the step is ``lr a atan2(m, b sqrt(v))`` of the corrected moments m and v.

    The step does not change when all gradients are multiplied by a number, however small they are.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, a number or a tensor.
        betas: Decay rates of the first and second moment.
        weight_decay: Decoupled weight decay.
        a: Factor on the step. At 1.27, about 4 / pi, a steady gradient moves an element by `lr` when `b` is 1.
        b: Factor on the root of the second moment.
        **common: See `narrowgauge.optim.base.Common`.
    """

    _rule = adam_atan2_rule

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        a: float = 1.27,
        b: float = 1.0,
        **common: Unpack[Common],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "a": a, "b": b}
        super().__init__(params, defaults, common)

    def _check_options(self, group: dict[str, Any]) -> None:
        check_betas("AdamAtan2", group["betas"])
        for name in ("weight_decay", "a", "b"):
            check_range("AdamAtan2", name, group[name], 0)

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def _options(self, group: dict[str, Any]) -> list[float]:
        return [*group["betas"], group["weight_decay"], group["a"], group["b"]]


system(
    "adam_atan2",
    title="Adam-atan2",
    source="arXiv 2407.05872",
    page="optim/adam_atan2.md",
    modules=("optim.AdamAtan2",),
    operators=("adam_atan2_",),
    bench=("adam_atan2",),
    reasons={"golden": "nothing recorded: the tests compare with the formula in float64"},
)
