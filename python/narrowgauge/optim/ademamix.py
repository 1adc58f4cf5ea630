"""AdEMAMix (Pagliardini, Ablin, Grangier, ICLR 2025, arXiv 2409.03137)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from narrowgauge.ops import system
from narrowgauge.optim.base import Call, Common, ElementwiseOptimizer, Params, check_betas, check_range
from narrowgauge.optim.elementwise import Rule, Scalar, integer_power, interpolate, square_root

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Variants: 1: weight decay in the gradient.


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
    alpha, beta3 = given
    decay = weight_decay if variant else 1 - lr * weight_decay
    correction = (1 - integer_power(beta2, step)).sqrt()
    return (
        *(decay, beta1, 1 - beta1, beta2, 1 - beta2, beta3, 1 - beta3, alpha),
        *(1 - integer_power(beta1, step), correction, lr, eps),
    )


def _update(
    variant: int, p: Tensor, g: Tensor, states: list[Tensor], scalars: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    decay, first_keep, first_weight, second_keep, second_weight, slow_keep, slow_weight, *rest = scalars
    alpha, first_correction, correction, lr, eps = rest
    if variant:
        g = g + decay * p
    m, v, slow = states
    m = interpolate(m, g, first_keep, first_weight)
    v = v * second_keep + second_weight * g * g
    slow = interpolate(slow, g, slow_keep, slow_weight)
    step = lr * (m / first_correction + alpha * slow) / (square_root(v) / correction + eps)
    return (p if variant else p * decay) - step, [m, v, slow]


ademamix_rule = Rule(
    name="ademamix",
    options=("beta1", "beta2", "weight_decay", "eps"),
    signed=((True, False, True),) * 2,
    scalars=_scalars,
    update=_update,
    given=(2, 2),
    sample_options=(0.9, 0.999, 1e-2, 1e-8),
)


class AdEMAMix(ElementwiseOptimizer):
    """Adam with a second, slow momentum, whose gradients are of thousands of steps ago.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, a number or a tensor.
        betas: Decay rates of the momentum, of the second moment and of the slow momentum.
        weight_decay: Weight decay, added to the gradient unless `decoupled_weight_decay`.
        alpha: Weight of the slow momentum.
        t_alpha_beta3: Steps over which `alpha` grows from 0 and the slow momentum's decay rate from ``betas[0]``, the
            latter evenly in its half-life; None for none. The paper takes all steps of the run.
        eps: Added to the denominator.
        decoupled_weight_decay: Decay the parameters themselves, as AdamW does.
        **common: See `narrowgauge.optim.base.Common`.
    """

    _rule = ademamix_rule

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        weight_decay: float = 0.0,
        alpha: float = 5.0,
        t_alpha_beta3: float | None = None,
        eps: float = 1e-8,
        *,
        decoupled_weight_decay: bool = False,
        **common: Unpack[Common],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "alpha": alpha,
            "t_alpha_beta3": t_alpha_beta3,
            "eps": eps,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, common)

    def _check_options(self, group: dict[str, Any]) -> None:
        check_betas("AdEMAMix", group["betas"], 3)
        for name in ("weight_decay", "alpha", "eps"):
            check_range("AdEMAMix", name, group[name], 0)
        steps = group["t_alpha_beta3"]
        if steps is not None:
            check_range("AdEMAMix", "t_alpha_beta3", steps, 1)
            first, last = group["betas"][0], group["betas"][2]
            if not 0 < first <= last:
                raise ValueError(
                    f"AdEMAMix: t_alpha_beta3 needs 0 < betas[0] <= betas[2], got {first!r} and {last!r}"
                )

    def _variant(self, group: dict[str, Any]) -> int:
        return int(not group["decoupled_weight_decay"])

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "exp_avg_slow")

    def _options(self, group: dict[str, Any]) -> list[float]:
        return [*group["betas"][:2], group["weight_decay"], group["eps"]]

    def _given(self, call: Call) -> tuple[Tensor | None, Tensor | None]:
        group = call.group
        beta1, _, beta3 = group["betas"]
        steps = call.next_steps()
        if group["t_alpha_beta3"] is None:
            alpha, slow = torch.full_like(steps, group["alpha"]), torch.full_like(steps, beta3)
        else:
            share = (steps / group["t_alpha_beta3"]).clamp(max=1.0)
            first, last = math.log(beta1), math.log(beta3)
            alpha = share * group["alpha"]
            slow = (first * last / ((1 - share) * last + share * first)).exp().clamp(max=beta3)
        return torch.stack((alpha, slow), 1), None


system(
    "ademamix",
    title="AdEMAMix",
    source="arXiv 2409.03137",
    page="optim/ademamix.md",
    modules=("optim.AdEMAMix",),
    operators=("ademamix_",),
    golden=("bnb8bit",),
    bench=("ademamix",),
)
