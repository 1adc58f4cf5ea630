"""RMSprop (Tieleman and Hinton, 2012; centered: Graves, arXiv 1308.0850)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from narrowgauge.ops import system
from narrowgauge.optim.base import Common, ElementwiseOptimizer, Params, check_range
from narrowgauge.optim.elementwise import Rule, Scalar, interpolate, square_root

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Variants: momentum + 2 centered.


def _scalars(
    variant: int,
    lr: Tensor,
    step: Tensor,
    given: list[Tensor],
    alpha: float,
    eps: float,
    weight_decay: float,
    momentum: float,
) -> tuple[Scalar, ...]:
    return alpha, 1 - alpha, eps, weight_decay, momentum, lr


def _update(
    variant: int, p: Tensor, g: Tensor, states: list[Tensor], scalars: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    keep, weight, eps, decay, momentum, lr = scalars
    g = g + decay * p
    square, *others = states
    square = square * keep + weight * g * g
    spread = square
    if variant & 2:
        mean = interpolate(others[-1], g, keep, weight)
        spread = square - mean * mean
        others[-1] = mean
    denominator = square_root(spread) + eps
    if not variant & 1:
        return p - lr * g / denominator, [square, *others]
    buffer = others[0] * momentum + g / denominator
    return p - lr * buffer, [square, buffer, *others[1:]]


rmsprop_rule = Rule(
    name="rmsprop",
    options=("alpha", "eps", "weight_decay", "momentum"),
    signed=((False,), (False, True), (False, True), (False, True, True)),
    scalars=_scalars,
    update=_update,
    sample_options=(0.99, 1e-8, 1e-2, 0.9),
)


class RMSprop(ElementwiseOptimizer):
    """A drop-in for `torch.optim.RMSprop` in one kernel for all parameters.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, a number or a tensor.
        alpha: Decay rate of the mean square, and of the mean when `centered`.
        eps: Added to the denominator.
        weight_decay: L2 penalty, added to the gradient.
        momentum: How much of the buffer of earlier steps stays; 0 keeps no buffer.
        centered: Divide by the standard deviation of the gradient instead of its root mean square.
        capturable, foreach, maximize, differentiable: As in `narrowgauge.optim.base.Common`.
        **common: See `narrowgauge.optim.base.Common`.
    """

    _rule = rmsprop_rule

    # The last four may be given by position, as in torch.optim.
    def __init__(  # type: ignore[misc]
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **common: Unpack[Common],
    ) -> None:
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "centered": centered,
        }
        merged: Any = {
            **common,
            "capturable": capturable,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults, merged)

    def _check_options(self, group: dict[str, Any]) -> None:
        for name in ("alpha", "eps", "weight_decay", "momentum"):
            check_range("RMSprop", name, group[name], 0)

    def _variant(self, group: dict[str, Any]) -> int:
        return (group["momentum"] > 0) + 2 * bool(group["centered"])

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        momentum = ("momentum_buffer",) if group["momentum"] > 0 else ()
        return ("square_avg", *momentum, *(("grad_avg",) if group["centered"] else ()))

    def _options(self, group: dict[str, Any]) -> list[float]:
        return [group["alpha"], group["eps"], group["weight_decay"], group["momentum"]]


system(
    "rmsprop",
    title="RMSprop",
    source="Tieleman and Hinton, 2012; centered: arXiv 1308.0850",
    page="optim/torch_set.md",
    modules=("optim.RMSprop",),
    operators=("rmsprop_",),
    golden=("torch_optim",),
    bench=("rmsprop",),
)
