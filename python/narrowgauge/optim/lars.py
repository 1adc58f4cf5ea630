"""LARS (You, Gitman, Ginsburg, arXiv 1708.03888)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from narrowgauge.ops import system
from narrowgauge.optim.base import Call, Common, ElementwiseOptimizer, Params, check_range
from narrowgauge.optim.elementwise import Rule, Scalar
from narrowgauge.optim.rows import on_device

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Variants: 1: nesterov, 2: no momentum.


def _scalars(
    variant: int, lr: Tensor, step: Tensor, given: list[Tensor], momentum: float, dampening: float
) -> tuple[Scalar, ...]:
    return given[0], given[1], momentum, 1 - dampening, lr


def _update(
    variant: int, p: Tensor, g: Tensor, states: list[Tensor], scalars: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    trust, weight_decay, keep, weight, lr = scalars
    u = (g + weight_decay * p) * trust
    if states:
        buffer = states[0] * keep + weight * u
        u, states = u + keep * buffer if variant == 1 else buffer, [buffer]
    return p - lr * u, states


lars_rule = Rule(
    name="lars",
    options=("momentum", "dampening"),
    signed=((True,), (True,), ()),
    scalars=_scalars,
    update=_update,
    terms=lambda variant, p, g, states, scalars: [p * p, g * g],
    sums=(2, 2, 2),
    given=(2, 2, 2),
    sample_options=(0.9, 0.1),
)


class LARS(ElementwiseOptimizer):
    """SGD with a learning rate per layer, for large batches of images.

    The gradient of a parameter with two or more dimensions, with its weight decay, is multiplied by the trust ratio
    `trust_coefficient` |p| / (|g| + `weight_decay` |p|) (1 when that has a 0). Vectors and scalars take the
    gradient as it is, without weight decay. The momentum starts at zero, so that dampening acts in the first step too.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, a number or a tensor.
        weight_decay: L2 penalty of parameters with two or more dimensions.
        momentum: Factor of the momentum; without it there is no state.
        dampening: Damping of the gradient in the momentum.
        trust_coefficient: Factor on the trust ratio.
        nesterov: Nesterov's momentum.
        **common: See `narrowgauge.optim.base.Common`.
    """

    _rule = lars_rule
    _counts_no_steps = True

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        dampening: float = 0.0,
        trust_coefficient: float = 1e-3,
        nesterov: bool = False,
        **common: Unpack[Common],
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "dampening": dampening,
            "trust_coefficient": trust_coefficient,
            "nesterov": nesterov,
        }
        super().__init__(params, defaults, common)

    def _check_options(self, group: dict[str, Any]) -> None:
        check_range("LARS", "weight_decay", group["weight_decay"], 0)
        check_range("LARS", "momentum", group["momentum"], 0, 1)
        check_range("LARS", "dampening", group["dampening"], 0)
        check_range("LARS", "trust_coefficient", group["trust_coefficient"], 0)
        if group["nesterov"] and group["momentum"] == 0:
            raise ValueError("LARS: nesterov=True needs a momentum above 0")

    def _variant(self, group: dict[str, Any]) -> int:
        return int(group["nesterov"]) if group["momentum"] else 2

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def _options(self, group: dict[str, Any]) -> list[float]:
        return [group["momentum"], group["dampening"]]

    def _given(self, call: Call) -> tuple[Tensor | None, Tensor | None]:
        group, decay = call.group, call.group["weight_decay"]
        adapted = on_device(tuple(p.dim() > 1 for p in call.whole), torch.bool, call.device)
        given = torch.stack((torch.ones_like(adapted, dtype=torch.float64), adapted.double() * decay), 1)
        if any(p.dim() > 1 for p in call.whole):
            norm, grad_norm = call.sums().sqrt().unbind(1)
            ratio = group["trust_coefficient"] * norm / (grad_norm + decay * norm)
            usable = adapted & (norm > 0) & (grad_norm + decay * norm > 0)
            given[:, 0] = torch.where(usable, ratio, 1.0)
        return given, None


system(
    "lars",
    title="LARS",
    source="arXiv 1708.03888",
    page="optim/lars.md",
    modules=("optim.LARS",),
    operators=("lars_", "lars_sums"),
    golden=("extra_optim",),
    bench=("lars",),
)
