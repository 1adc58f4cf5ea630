"""Stochastic gradient descent with momentum (Sutskever et al., ICML 2013)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from narrowgauge.ops import system
from narrowgauge.optim.base import Common, ElementwiseOptimizer, Params, check_range
from narrowgauge.optim.elementwise import Rule, Scalar

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Variants: plain, momentum, Nesterov's momentum.


def _scalars(
    variant: int,
    lr: Tensor,
    step: Tensor,
    given: list[Tensor],
    momentum: float,
    dampening: float,
    weight_decay: float,
) -> tuple[Scalar, ...]:
    """The first gradient enters the buffer undamped."""
    first = (step == 1).double()
    return weight_decay, (1 - first) * momentum, first + (1 - first) * (1 - dampening), momentum, lr


def _update(
    variant: int, p: Tensor, g: Tensor, states: list[Tensor], scalars: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    decay, keep, weight, momentum, lr = scalars
    g = g + decay * p
    if variant:
        buffer = states[0] * keep + weight * g
        states = [buffer]
        g = g + momentum * buffer if variant == 2 else buffer
    return p - lr * g, states


sgd_rule = Rule(
    name="sgd",
    options=("momentum", "dampening", "weight_decay"),
    signed=((), (True,), (True,)),
    scalars=_scalars,
    update=_update,
    sample_options=(0.9, 0.25, 1e-2),
)


class SGD(ElementwiseOptimizer):
    """A drop-in for `torch.optim.SGD` in one kernel for all parameters.

    Without momentum it keeps no state that has the size of the parameters.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, a number or a tensor.
        momentum: How much of the buffer of earlier gradients stays; 0 keeps no buffer.
        dampening: By how much less than fully a gradient enters the buffer, except the first.
        weight_decay: L2 penalty, added to the gradient.
        nesterov: Step along the gradient plus `momentum` times the new buffer. Needs a momentum and no dampening.
        **common: See `narrowgauge.optim.base.Common`.
    """

    _rule = sgd_rule
    _counts_no_steps = True

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        **common: Unpack[Common],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(params, defaults, common)

    def _check_options(self, group: dict[str, Any]) -> None:
        for name in ("momentum", "dampening", "weight_decay"):
            check_range("SGD", name, group[name], 0)
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise ValueError(
                "SGD: nesterov=True needs a momentum above 0 and dampening=0, "
                f"got momentum={group['momentum']!r} and dampening={group['dampening']!r}"
            )

    def _variant(self, group: dict[str, Any]) -> int:
        return 0 if group["momentum"] == 0 else 2 if group["nesterov"] else 1

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return () if group["momentum"] == 0 else ("momentum_buffer",)

    def _options(self, group: dict[str, Any]) -> list[float]:
        return [group["momentum"], group["dampening"], group["weight_decay"]]


system(
    "sgd",
    title="SGD",
    source="Sutskever et al., ICML 2013",
    page="optim/torch_set.md",
    modules=("optim.SGD",),
    operators=("sgd_",),
    golden=("torch_optim",),
    bench=("sgd",),
)
