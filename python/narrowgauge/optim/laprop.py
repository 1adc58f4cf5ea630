"""LaProp (Ziyin et al., arXiv 2002.04839)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from narrowgauge.ops import system
from narrowgauge.optim.base import Call, Common, ElementwiseOptimizer, Params, check_betas, check_range
from narrowgauge.optim.checkpoint import Entry
from narrowgauge.optim.elementwise import Rule, Scalar, integer_power, square_root

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
    correction = (1 - integer_power(beta2, step)).sqrt()
    first_weight = (1 - beta1) * lr * correction
    return 1 - lr * weight_decay, beta1, first_weight, beta2, 1 - beta2, 1e-15, eps, given[0]


def _update(
    variant: int, p: Tensor, g: Tensor, states: list[Tensor], scalars: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    decay, first_keep, first_weight, second_keep, second_weight, least, eps, step_size = scalars
    v = states[1] * second_keep + second_weight * g * g
    m = states[0] * first_keep + first_weight * g / (square_root(v + least) + eps)
    return (p - step_size * m) * decay, [m, v]


laprop_rule = Rule(
    name="laprop",
    options=("beta1", "beta2", "weight_decay", "eps"),
    signed=((True, False),),
    scalars=_scalars,
    update=_update,
    given=(1,),
    sample_options=(0.9, 0.999, 1e-2, 1e-15),
)


class LaProp(ElementwiseOptimizer):
    """Adam with momentum of normalized gradients rather than normalized momentum, so that any two betas go together.

    The learning rate of its time is in the momentum (``exp_avg_lr_1`` keeps the average rate, which corrects the
    start): a change of the rate takes effect slowly.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, a number or a tensor.
        betas: Decay rates of the momentum and of the second moment.
        weight_decay: Decoupled weight decay, after the step.
        eps: Added to the denominator.
        **common: See `narrowgauge.optim.base.Common`.
    """

    _rule = laprop_rule

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 4e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        *,
        eps: float = 1e-15,
        **common: Unpack[Common],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps}
        super().__init__(params, defaults, common)

    def _check_options(self, group: dict[str, Any]) -> None:
        check_betas("LaProp", group["betas"])
        check_range("LaProp", "weight_decay", group["weight_decay"], 0)
        check_range("LaProp", "eps", group["eps"], 0)

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return "exp_avg", "exp_avg_sq"

    def _options(self, group: dict[str, Any]) -> list[float]:
        return [*group["betas"], group["weight_decay"], group["eps"]]

    def _own_layout(self, group: dict[str, Any], p: Tensor) -> dict[str, Entry]:
        return {"exp_avg_lr_1": Entry(torch.float64, lambda numel: ())}

    def _given(self, call: Call) -> tuple[Tensor | None, Tensor | None]:
        """The rate over the average rate; 1 for a rate of zero."""
        beta1, lr = call.group["betas"][0], call.learning_rate()
        averages = [self.state[p]["exp_avg_lr_1"] for p in call.whole]
        old = torch.stack(averages)
        new = old * beta1 + (1 - beta1) * lr
        if call.found_inf is not None:
            new = torch.where(call.found_inf.reshape(()) != 0, old, new)
        torch._foreach_copy_(averages, list(new.unbind()))
        return torch.where(lr == 0, 1.0, lr / new)[:, None], None


system(
    "laprop",
    title="LaProp",
    source="arXiv 2002.04839",
    page="optim/adam_relatives.md",
    modules=("optim.LaProp",),
    operators=("laprop_",),
    bench=("laprop",),
    reasons={"golden": "no recorded run is here; the tests compare with the definition in float64"},
)
