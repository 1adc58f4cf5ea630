"""Adadelta (Zeiler, "ADADELTA: An Adaptive Learning Rate Method", arXiv 1212.5701)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from narrowgauge.ops import system
from narrowgauge.optim.base import Common, ElementwiseOptimizer, Params, check_range
from narrowgauge.optim.elementwise import Rule, Scalar, square_root

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _scalars(
    variant: int,
    lr: Tensor,
    step: Tensor,
    given: list[Tensor],
    rho: float,
    eps: float,
    weight_decay: float,
) -> tuple[Scalar, ...]:
    return rho, 1 - rho, eps, weight_decay, lr


def _update(
    variant: int, p: Tensor, g: Tensor, states: list[Tensor], scalars: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    keep, weight, eps, decay, lr = scalars
    g = g + decay * p
    square = states[0] * keep + weight * g * g
    delta = square_root(states[1] + eps) / square_root(square + eps) * g
    return p - lr * delta, [square, states[1] * keep + weight * delta * delta]


adadelta_rule = Rule(
    name="adadelta",
    options=("rho", "eps", "weight_decay"),
    signed=((False, False),),
    scalars=_scalars,
    update=_update,
    sample_options=(0.9, 1e-6, 1e-2),
)


class Adadelta(ElementwiseOptimizer):
    """A drop-in for `torch.optim.Adadelta` in one kernel for all parameters.

    Args:
        params: Parameters or parameter groups.
        lr: Factor of the step, a number or a tensor; the method itself has none.
        rho: Decay rate of both mean squares, in [0, 1].
        eps: Added to both mean squares.
        weight_decay: L2 penalty, added to the gradient.
        foreach: As in `narrowgauge.optim.base.Common`.
        **common: See `narrowgauge.optim.base.Common`.
    """

    _rule = adadelta_rule

    # `foreach` may be given by position, as in torch.optim.
    def __init__(  # type: ignore[misc]
        self,
        params: Params,
        lr: float | Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        foreach: bool | None = None,
        **common: Unpack[Common],
    ) -> None:
        defaults = {"lr": lr, "rho": rho, "eps": eps, "weight_decay": weight_decay}
        merged: Any = {**common, "foreach": foreach}
        super().__init__(params, defaults, merged)

    def _check_options(self, group: dict[str, Any]) -> None:
        for name in ("rho", "eps", "weight_decay"):
            check_range("Adadelta", name, group[name], 0)
        if group["rho"] > 1:
            raise ValueError(f"Adadelta: rho must be a number in [0, 1], got {group['rho']!r}")

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return "square_avg", "acc_delta"

    def _options(self, group: dict[str, Any]) -> list[float]:
        return [group["rho"], group["eps"], group["weight_decay"]]


system(
    "adadelta",
    title="Adadelta",
    source="arXiv 1212.5701",
    page="optim/torch_set.md",
    modules=("optim.Adadelta",),
    operators=("adadelta_",),
    golden=("torch_optim",),
    bench=("adadelta",),
)
