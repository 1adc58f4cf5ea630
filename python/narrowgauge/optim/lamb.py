"""LAMB (You et al., ICLR 2020, arXiv 1904.00962)."""

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
    first_weight: float,
    weight_decay: float,
    decoupled_weight_decay: float,
    eps: float,
    bias_correction: float,
) -> tuple[Scalar, ...]:
    first_factor: Scalar = 1.0
    correction: Scalar = 1.0
    if bias_correction:
        first_factor = 1 / (1 - integer_power(beta1, step))
        correction = (1 - integer_power(beta2, step)).sqrt()
    decay = 1 - lr * decoupled_weight_decay
    return (
        *(given[0], beta1, first_weight, beta2, 1 - beta2, first_factor, correction, eps),
        *(weight_decay, decay, lr * given[1]),
    )


def _direction(
    p: Tensor, g: Tensor, states: list[Tensor], scalars: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    clip, first_keep, first_weight, second_keep, second_weight, first_factor, correction, eps, coupled, *_ = (
        scalars
    )
    g = g * clip
    m = states[0] * first_keep + first_weight * g
    v = states[1] * second_keep + second_weight * g * g
    return m * first_factor / (square_root(v) / correction + eps) + coupled * p, [m, v]


def _update(
    variant: int, p: Tensor, g: Tensor, states: list[Tensor], scalars: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    u, states = _direction(p, g, states, scalars)
    return p * scalars[9] - scalars[10] * u, states


def _terms(variant: int, p: Tensor, g: Tensor, states: list[Tensor], scalars: list[Tensor]) -> list[Tensor]:
    u, _ = _direction(p, g, states, scalars)
    return [p * p, u * u]


lamb_rule = Rule(
    name="lamb",
    options=(
        *(
            "beta1",
            "beta2",
            "first_weight",
            "weight_decay",
            "decoupled_weight_decay",
            "eps",
            "bias_correction",
        ),
    ),
    signed=((True, False),),
    scalars=_scalars,
    update=_update,
    terms=_terms,
    sums=(2,),
    given=(2,),
    sample_options=(0.9, 0.999, 0.1, 1e-2, 1e-3, 1e-6, 1.0),
)


class LAMB(ElementwiseOptimizer):
    """Adam whose step is as long as the parameter, for large batches; timm's form of it.

    The gradients are first clipped together by their global norm, without being changed. The step of each parameter
    is multiplied by its trust ratio, the norm of the parameter over the norm of the step (1 when either is 0).

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, a number or a tensor.
        bias_correction: Divide the moments by what their start from zero takes away.
        betas: Decay rates of the first and second moment.
        eps: Added to the denominator.
        weight_decay: Added to the step as a multiple of the parameter, before the trust ratio.
        grad_averaging: Multiply the gradient by 1 - beta1 in the first moment.
        max_grad_norm: Largest global norm of the gradients; None does not clip. Holds for all groups.
        trust_clip: Let the trust ratio be at most 1.
        always_adapt: Use the trust ratio also without weight decay.
        decoupled_decay: Decay the parameter by lr * `weight_decay` instead.
        **common: See `narrowgauge.optim.base.Common`.
    """

    _rule = lamb_rule

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        grad_averaging: bool = True,
        max_grad_norm: float | None = 1.0,
        trust_clip: bool = False,
        always_adapt: bool = False,
        *,
        decoupled_decay: bool = False,
        **common: Unpack[Common],
    ) -> None:
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "grad_averaging": grad_averaging,
            "max_grad_norm": max_grad_norm,
            "trust_clip": trust_clip,
            "always_adapt": always_adapt,
            "decoupled_decay": decoupled_decay,
        }
        super().__init__(params, defaults, common)

    def _check_options(self, group: dict[str, Any]) -> None:
        check_betas("LAMB", group["betas"])
        check_range("LAMB", "eps", group["eps"], 0)
        check_range("LAMB", "weight_decay", group["weight_decay"], 0)
        if group["max_grad_norm"] is not None:
            check_range("LAMB", "max_grad_norm", group["max_grad_norm"], 0)
            if group["max_grad_norm"] == 0:
                raise ValueError("LAMB: max_grad_norm must be above 0, got 0; None does not clip")

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def _options(self, group: dict[str, Any]) -> list[float]:
        beta1, beta2 = group["betas"]
        decay, decoupled = group["weight_decay"], group["decoupled_decay"]
        return [
            *(beta1, beta2, 1 - beta1 if group["grad_averaging"] else 1.0),
            *(0.0 if decoupled else decay, decay if decoupled else 0.0),
            *(group["eps"], float(group["bias_correction"])),
        ]

    def _begin_step(self, calls: list[Call]) -> None:
        largest = self.defaults["max_grad_norm"]
        self._clip_factor = None
        if largest is not None and calls:
            norm = self._global_norm(calls)
            if calls[0].clip is not None:  # the step itself clips as well
                norm = norm * calls[0].clip.to(norm.device)
            self._clip_factor = 1 / (norm / largest).clamp_min(1)

    def _given(self, call: Call) -> tuple[Tensor | None, Tensor | None]:
        group = call.group
        given = torch.ones((len(call.params), 2), dtype=torch.float64, device=call.device)
        if self._clip_factor is not None:
            given[:, 0] = self._clip_factor.to(call.device)
        if group["weight_decay"] != 0 or group["always_adapt"]:
            param_norm, step_norm = call.sums(given).sqrt().unbind(1)
            if group["decoupled_decay"]:  # the parameter is decayed before it is measured
                param_norm = param_norm * (1 - call.learning_rate() * group["weight_decay"]).abs()
            ratio = param_norm / step_norm
            ratio = torch.where((param_norm > 0) & (step_norm > 0), ratio, 1.0)
            given[:, 1] = ratio.clamp_max(1.0) if group["trust_clip"] else ratio
        return given, None


system(
    "lamb",
    title="LAMB",
    source="arXiv 1904.00962",
    page="optim/lamb.md",
    modules=("optim.LAMB",),
    operators=("lamb_", "lamb_sums"),
    golden=("extra_optim",),
    bench=("lamb",),
)
