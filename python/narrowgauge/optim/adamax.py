"""Adamax (Kingma and Ba, "Adam: A Method for Stochastic Optimization", arXiv 1412.6980, section 7)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from narrowgauge.ops import system
from narrowgauge.optim.base import Common, ElementwiseOptimizer, Params, check_betas, check_range
from narrowgauge.optim.elementwise import Rule, Scalar, integer_power, interpolate

if TYPE_CHECKING:
    from typing_extensions import Unpack


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
    return beta1, 1 - beta1, beta2, eps, weight_decay, lr / (1 - integer_power(beta1, step))


def _update(
    variant: int, p: Tensor, g: Tensor, states: list[Tensor], scalars: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    keep, weight, norm_keep, eps, decay, step_size = scalars
    g = g + decay * p
    m = interpolate(states[0], g, keep, weight)
    norm = torch.maximum(states[1] * norm_keep, g.abs() + eps)
    return p - step_size * m / norm, [m, norm]


adamax_rule = Rule(
    name="adamax",
    options=("beta1", "beta2", "eps", "weight_decay"),
    signed=((True, False),),
    scalars=_scalars,
    update=_update,
    sample_options=(0.9, 0.999, 1e-8, 1e-2),
)


class Adamax(ElementwiseOptimizer):
    """A drop-in for `torch.optim.Adamax` in one kernel for all parameters.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, a number or a tensor.
        betas: Decay rates of the first moment and of the largest magnitude.
        eps: Added to the magnitude of every gradient.
        weight_decay: L2 penalty, added to the gradient.
        foreach: As in `narrowgauge.optim.base.Common`.
        **common: See `narrowgauge.optim.base.Common`.
    """

    _rule = adamax_rule

    # `foreach` may be given by position, as in torch.optim.
    def __init__(  # type: ignore[misc]
        self,
        params: Params,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        foreach: bool | None = None,
        **common: Unpack[Common],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        merged: Any = {**common, "foreach": foreach}
        super().__init__(params, defaults, merged)

    def _check_options(self, group: dict[str, Any]) -> None:
        check_betas("Adamax", group["betas"])
        check_range("Adamax", "eps", group["eps"], 0)
        check_range("Adamax", "weight_decay", group["weight_decay"], 0)

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return "exp_avg", "exp_inf"

    def _options(self, group: dict[str, Any]) -> list[float]:
        return [*group["betas"], group["eps"], group["weight_decay"]]


system(
    "adamax",
    title="Adamax",
    source="arXiv 1412.6980, section 7",
    page="optim/torch_set.md",
    modules=("optim.Adamax",),
    operators=("adamax_",),
    golden=("torch_optim",),
    bench=("adamax",),
)
