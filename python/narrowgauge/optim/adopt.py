"""ADOPT (Taniguchi et al., NeurIPS 2024, arXiv 2411.02853)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from narrowgauge.ops import system
from narrowgauge.optim.base import Call, Common, ElementwiseOptimizer, Params, check_betas, check_range
from narrowgauge.optim.elementwise import Rule, Scalar, interpolate, square_root

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
    later = step > 1
    decay = 1 - lr * weight_decay if variant else weight_decay
    first_keep = torch.full_like(step, beta1).where(later, 1.0)
    second_keep = torch.full_like(step, beta2).where(later, 0.0)
    rate = torch.where(later, lr, 0.0)
    return decay, first_keep, 1 - first_keep, second_keep, 1 - second_keep, rate, eps, given[0]


def _update(
    variant: int, p: Tensor, g: Tensor, states: list[Tensor], scalars: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    decay, first_keep, first_weight, second_keep, second_weight, lr, eps, clip = scalars
    if not variant:
        g = g + decay * p
    root = square_root(states[1])
    u = g / torch.where(root < eps, eps, root)
    clipped = torch.where(u > clip, clip, torch.where(u < -clip, -clip, u))
    m = torch.where(first_weight > 0, interpolate(states[0], clipped, first_keep, first_weight), states[0])
    v = states[1] * second_keep + second_weight * g * g
    if variant:
        p = p * decay
    return p - lr * m, [m, v]


# Variants: L2 penalty, decoupled weight decay.
adopt_rule = Rule(
    name="adopt",
    options=("beta1", "beta2", "weight_decay", "eps"),
    signed=((True, False), (True, False)),
    scalars=_scalars,
    update=_update,
    given=(1, 1),
    sample_options=(0.9, 0.9999, 1e-2, 1e-6),
)


class ADOPT(ElementwiseOptimizer):
    """Adam whose convergence does not depend on ``betas[1]``.

    A gradient is divided by the second moment of the steps before it, then averaged. The first step only fills the
    second moment and leaves the parameters alone, but for decoupled weight decay. Normalized gradients are clipped to
    ``(t - clip_offset) ** clip_exponent`` at step t; timm has the exponent 0.333 and the offset 1.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, a number or a tensor.
        betas: Decay rates of the first and second moment.
        eps: Least denominator.
        weight_decay: Weight decay, added to the gradient.
        decoupled_weight_decay: Decay as `AdamW` does.
        clip_exponent: Exponent of the clip; 0 clips to 1.
        clip_offset: Subtracted from the number of the step.
        **common: See `narrowgauge.optim.base.Common`.
    """

    _rule = adopt_rule

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.9999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        clip_exponent: float = 0.25,
        clip_offset: float = 0,
        **common: Unpack[Common],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "clip_exponent": clip_exponent,
            "clip_offset": clip_offset,
        }
        super().__init__(params, defaults, common)

    def _check_options(self, group: dict[str, Any]) -> None:
        check_betas("ADOPT", group["betas"])
        for name in ("eps", "weight_decay", "clip_exponent", "clip_offset"):
            check_range("ADOPT", name, group[name], 0)

    def _variant(self, group: dict[str, Any]) -> int:
        return int(group["decoupled_weight_decay"])

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return "exp_avg", "exp_avg_sq"

    def _options(self, group: dict[str, Any]) -> list[float]:
        return [*group["betas"], group["weight_decay"], group["eps"]]

    def _given(self, call: Call) -> tuple[Tensor | None, Tensor | None]:
        base = (call.next_steps() - call.group["clip_offset"]).clamp_min(0)
        return (base ** call.group["clip_exponent"])[:, None], None


system(
    "adopt",
    title="ADOPT",
    source="arXiv 2411.02853",
    page="optim/adam_relatives.md",
    modules=("optim.ADOPT",),
    operators=("adopt_",),
    golden=("extra_optim",),
    bench=("adopt",),
)
