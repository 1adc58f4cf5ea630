"""NAdam (Dozat, "Incorporating Nesterov Momentum into Adam", ICLR 2016 workshop)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from narrowgauge.ops import system
from narrowgauge.optim.base import Call, Common, ElementwiseOptimizer, Params, check_betas, check_range
from narrowgauge.optim.checkpoint import Entry
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
    decay = 1 - lr * weight_decay if variant else weight_decay
    correction = (1 - integer_power(beta2, step)).sqrt()
    gradient_share, moment_share = given
    sizes = lr * gradient_share, lr * moment_share
    return decay, beta1, 1 - beta1, beta2, 1 - beta2, correction, eps, *sizes


def _update(
    variant: int, p: Tensor, g: Tensor, states: list[Tensor], scalars: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    decay, first_keep, first_weight, second_keep, second_weight, correction, eps, *sizes = scalars
    gradient_size, moment_size = sizes
    if not variant:
        g = g + decay * p
    m = interpolate(states[0], g, first_keep, first_weight)
    v = states[1] * second_keep + second_weight * g * g
    if variant:
        p = p * decay
    return p - (gradient_size * g + moment_size * m) / (square_root(v) / correction + eps), [m, v]


nadam_rule = Rule(
    name="nadam",
    options=("beta1", "beta2", "eps", "weight_decay"),
    signed=((True, False), (True, False)),
    scalars=_scalars,
    update=_update,
    given=(2, 2),
    sample_options=(0.9, 0.999, 1e-8, 1e-2),
)


class NAdam(ElementwiseOptimizer):
    """A drop-in for `torch.optim.NAdam` in one kernel for all parameters.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, a number or a tensor.
        betas: Decay rates of the first and second moment.
        eps: Added to the denominator.
        weight_decay: L2 penalty, added to the gradient.
        momentum_decay: How fast the momentum grows from half of ``betas[0]`` to all of it.
        decoupled_weight_decay: Decay as `AdamW` does.
        **common: See `narrowgauge.optim.base.Common`.
    """

    _rule = nadam_rule

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        **common: Unpack[Common],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum_decay": momentum_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, common)

    def _check_options(self, group: dict[str, Any]) -> None:
        check_betas("NAdam", group["betas"])
        for name in ("eps", "weight_decay", "momentum_decay"):
            check_range("NAdam", name, group[name], 0)

    def _variant(self, group: dict[str, Any]) -> int:
        return int(group["decoupled_weight_decay"])

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return "exp_avg", "exp_avg_sq"

    def _options(self, group: dict[str, Any]) -> list[float]:
        return [*group["betas"], group["eps"], group["weight_decay"]]

    def _own_layout(self, group: dict[str, Any], p: Tensor) -> dict[str, Entry]:
        return {"mu_product": Entry(torch.float32, lambda numel: ())}

    def _init_own(self, group: dict[str, Any], p: Tensor, state: dict[str, Any]) -> None:
        state["mu_product"].fill_(1.0)

    def _given(self, call: Call) -> tuple[Tensor | None, Tensor | None]:
        """The product of all momenta corrects the bias of the first moment; it is float32, as in torch."""
        beta1, decay = call.group["betas"][0], call.group["momentum_decay"]
        step = call.next_steps()
        momentum = beta1 * (1 - 0.5 * 0.96 ** (step * decay))
        next_momentum = beta1 * (1 - 0.5 * 0.96 ** ((step + 1) * decay))
        products = [self.state[p]["mu_product"] for p in call.whole]
        old = torch.stack(products)
        new = old * momentum.float()
        gradient_share = (1 - momentum) / (1 - new.double())
        moment_share = next_momentum / (1 - new.double() * next_momentum)
        if call.found_inf is not None:
            new = torch.where(call.found_inf.reshape(()) != 0, old, new)
        torch._foreach_copy_(products, list(new.unbind()))
        return torch.stack((gradient_share, moment_share), 1), None


system(
    "nadam",
    title="NAdam",
    source="Dozat, ICLR 2016 workshop",
    page="optim/torch_set.md",
    modules=("optim.NAdam",),
    operators=("nadam_",),
    golden=("torch_optim",),
    bench=("nadam",),
)
