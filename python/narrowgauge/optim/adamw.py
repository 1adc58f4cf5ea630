"""AdamW (Loshchilov and Hutter, arXiv 1711.05101) and Adam (Kingma and Ba, arXiv 1412.6980)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from narrowgauge.ops import system
from narrowgauge.optim.base import Call, Common, ElementwiseOptimizer, Params, check_betas, check_range
from narrowgauge.optim.elementwise import Rule, Scalar, integer_power, interpolate, square_root

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Variants: amsgrad + 2 l2, then 4 + l2: cautious.


def _is_l2(variant: int) -> int:
    return variant & (1 if variant >= 4 else 2)


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
    decay = weight_decay if _is_l2(variant) else 1 - lr * weight_decay
    step_size = lr / (1 - integer_power(beta1, step))
    correction = (1 - integer_power(beta2, step)).sqrt()
    rescale = given[0] if variant >= 4 else 1.0
    return decay, beta1, 1 - beta1, beta2, 1 - beta2, step_size, correction, eps, rescale


def _update(
    variant: int, p: Tensor, g: Tensor, states: list[Tensor], scalars: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    decay, first_keep, first_weight, second_keep, second_weight, step_size, correction, eps, rescale = scalars
    if _is_l2(variant):
        g = g + decay * p
    m, v, *largest = states
    m = interpolate(m, g, first_keep, first_weight)
    v = v * second_keep + second_weight * g * g
    largest = [torch.maximum(largest[0], v)] if largest else []
    step = step_size * m / (square_root(largest[0] if largest else v) / correction + eps)
    if variant >= 4:
        step = torch.where(step * g <= 0, 0.0, step * rescale)  # a NaN passes
    return (p if _is_l2(variant) else p * decay) - step, [m, v, *largest]


def _terms(variant: int, p: Tensor, g: Tensor, states: list[Tensor], scalars: list[Tensor]) -> list[Tensor]:
    decay, first_keep, first_weight, *_ = scalars
    if _is_l2(variant):
        g = g + decay * p
    return [(interpolate(states[0], g, first_keep, first_weight) * g > 0).to(g.dtype)]


adamw_rule = Rule(
    name="adamw",
    options=("beta1", "beta2", "weight_decay", "eps"),
    signed=((True, False), (True, False, False)) * 2 + ((True, False),) * 2,
    scalars=_scalars,
    update=_update,
    terms=_terms,
    sums=(0, 0, 0, 0, 1, 1),
    given=(0, 0, 0, 0, 1, 1),
    sample_options=(0.9, 0.999, 1e-2, 1e-8),
)


def cautious_rescale(call: Call) -> Tensor:
    """By how much the steps that are left grow: one over the share of elements that take part, at most 1000."""
    share = call.sums()[:, 0] / call.counts().clamp_min(1)
    return (1 / share.clamp_min(1e-3))[:, None]


class _AdamFamily(ElementwiseOptimizer):
    _rule = adamw_rule
    _l2 = False

    def _check_options(self, group: dict[str, Any]) -> None:
        name = type(self).__name__
        check_betas(name, group["betas"])
        check_range(name, "eps", group["eps"], 0)
        check_range(name, "weight_decay", group["weight_decay"], 0)
        if group["cautious"] and group["amsgrad"]:
            raise ValueError(f"{name}: cautious=True and amsgrad=True cannot be combined; leave one out")

    def _variant(self, group: dict[str, Any]) -> int:
        l2 = not group.get("decoupled_weight_decay", True) and group["weight_decay"] != 0
        return 4 + l2 if group["cautious"] else group["amsgrad"] + 2 * l2

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        return names if group["amsgrad"] else names[:2]

    def _options(self, group: dict[str, Any]) -> list[float]:
        return [*group["betas"], group["weight_decay"], group["eps"]]

    def _given(self, call: Call) -> tuple[Tensor | None, Tensor | None]:
        return (cautious_rescale(call) if call.group["cautious"] else None), None


class AdamW(_AdamFamily):
    """A drop-in for `torch.optim.AdamW` in one kernel for all parameters, with narrow states and parameters.

    Arithmetic is float32 (float64 for float64 parameters) whatever the storage. Gradients are never modified, also not
    by a gradient scaler.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, a number or a tensor.
        betas: Decay rates of the first and second moment.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        amsgrad: Use the largest second moment so far.
        cautious: Leave out elements whose momentum points against the gradient, and enlarge the other steps of the
            tensor by as much (Liang et al., arXiv 2411.16085).
        **common: See `narrowgauge.optim.base.Common`.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        cautious: bool = False,
        **common: Unpack[Common],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "cautious": cautious,
        }
        super().__init__(params, defaults, common)


class Adam(_AdamFamily):
    """A drop-in for `torch.optim.Adam`: as `AdamW`, with the weight decay added to the gradient.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, a number or a tensor.
        betas: Decay rates of the first and second moment.
        eps: Added to the denominator.
        weight_decay: L2 penalty, added to the gradient before the moments.
        amsgrad: Use the largest second moment so far.
        decoupled_weight_decay: Decay as `AdamW` does.
        cautious: As for `AdamW`.
        **common: See `narrowgauge.optim.base.Common`.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        decoupled_weight_decay: bool = False,
        cautious: bool = False,
        **common: Unpack[Common],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "decoupled_weight_decay": decoupled_weight_decay,
            "cautious": cautious,
        }
        super().__init__(params, defaults, common)


system(
    "adamw",
    title="AdamW and Adam",
    source="arXiv 1711.05101; 8-bit states: arXiv 2110.02861; cautious: arXiv 2411.16085",
    page="adamw.md",
    modules=("optim.AdamW", "optim.Adam"),
    operators=("adamw_", "adamw_sums"),
    golden=("torch_optim", "torchao_lowbit", "bnb8bit"),
    bench=("adamw",),
)
