"""StableAdamW (Wortsman et al., NeurIPS 2023, arXiv 2304.13013)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from narrowgauge.ops import system
from narrowgauge.optim.base import Call, Common, ElementwiseOptimizer, Params, check_betas, check_range
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
    # A number over a tensor is a product with the reciprocal in PyTorch.
    first = (1 - beta1) * (1 / (1 - integer_power(beta1, step)))
    second = (1 - beta2) * (1 / (1 - integer_power(beta2, step)))
    rate = lr * given[0]
    return 1 - rate * weight_decay, 1 - first, first, 1 - second, second, rate, eps, eps * eps


def _update(
    variant: int, p: Tensor, g: Tensor, states: list[Tensor], scalars: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    decay, first_keep, first_weight, second_keep, second_weight, lr, eps, _ = scalars
    m = states[0] * first_keep + first_weight * g
    v = states[1] * second_keep + second_weight * g * g
    return p * decay - lr * m / (square_root(v) + eps), [m, v]


def _terms(variant: int, p: Tensor, g: Tensor, states: list[Tensor], scalars: list[Tensor]) -> list[Tensor]:
    _, _, _, second_keep, second_weight, *_, least = scalars
    v = states[1] * second_keep + second_weight * g * g
    return [g * g / torch.where(v > least, v, least)]


stable_adamw_rule = Rule(
    name="stable_adamw",
    options=("beta1", "beta2", "weight_decay", "eps"),
    signed=((True, False),),
    scalars=_scalars,
    update=_update,
    terms=_terms,
    sums=(1,),
    given=(1,),
    sample_options=(0.9, 0.99, 1e-2, 1e-8),
)


class StableAdamW(ElementwiseOptimizer):
    """AdamW without loss spikes: where gradients outrun the second moment, the parameter's learning rate goes down.

    The learning rate of a parameter is divided by the root mean square of gradient over root second moment, where
    that is above 1 (Adafactor's clipping of updates); so is its weight decay. The moments are corrected for their
    start in the decay rates.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, a number or a tensor.
        betas: Decay rates of the first and second moment.
        weight_decay: Decoupled weight decay.
        eps: Added to the denominator; its square is the least second moment in the ratio.
        **common: See `narrowgauge.optim.base.Common`.
    """

    _rule = stable_adamw_rule

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 1e-2,
        eps: float = 1e-8,
        **common: Unpack[Common],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps}
        super().__init__(params, defaults, common)

    def _check_options(self, group: dict[str, Any]) -> None:
        check_betas("StableAdamW", group["betas"])
        check_range("StableAdamW", "eps", group["eps"], 0)
        check_range("StableAdamW", "weight_decay", group["weight_decay"], 0)

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def _options(self, group: dict[str, Any]) -> list[float]:
        return [*group["betas"], group["weight_decay"], group["eps"]]

    def _given(self, call: Call) -> tuple[Tensor | None, Tensor | None]:
        unit = torch.ones((len(call.params), 1), dtype=torch.float64, device=call.device)
        mean_square = call.sums(unit)[:, 0] / call.counts().clamp_min(1)
        return 1 / mean_square.sqrt().clamp_min(1)[:, None], None


system(
    "stable_adamw",
    title="StableAdamW",
    source="arXiv 2304.13013",
    page="optim/stable_adamw.md",
    modules=("optim.StableAdamW",),
    operators=("stable_adamw_", "stable_adamw_sums"),
    golden=("extra_optim",),
    bench=("stable_adamw",),
)
