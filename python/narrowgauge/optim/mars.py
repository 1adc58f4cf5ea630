"""MARS (Yuan et al., arXiv 2411.10438) in its AdamW form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from narrowgauge.ops import system
from narrowgauge.optim.base import Call, Common, ElementwiseOptimizer, Params, check_betas, check_range
from narrowgauge.optim.elementwise import Rule, Scalar, integer_power, interpolate, square_root
from narrowgauge.optim.rows import on_device

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _scalars(
    variant: int,
    lr: Tensor,
    step: Tensor,
    given: list[Tensor],
    gamma: float,
    eps: float,
    *options: float,
) -> tuple[Scalar, ...]:
    *pairs, rate_of_vectors = options
    matrix, zero = given[0] >= 1, torch.zeros_like(step)

    def chosen(of_matrix: Scalar, of_vector: Scalar) -> Tensor:
        return torch.where(matrix, of_matrix + zero, of_vector + zero)

    beta1, beta2, weight_decay = (chosen(pairs[i], pairs[i + 3]) for i in range(3))
    powers = [chosen(*(integer_power(pairs[i + k], step) for k in (0, 3))) for i in (0, 1)]
    rate = chosen(lr, lr * rate_of_vectors)
    gain = chosen(gamma * (pairs[0] / (1 - pairs[0])), 0.0)
    step_size = rate * (1 - powers[1]).sqrt() / (1 - powers[0])
    decay = 1 - rate * weight_decay
    return gain, given[1], decay, beta1, 1 - beta1, beta2, 1 - beta2, step_size, 1e-15, eps


def _corrected(g: Tensor, states: list[Tensor], gain: Tensor) -> Tensor:
    return g + gain * (g - states[2])


def _update(
    variant: int, p: Tensor, g: Tensor, states: list[Tensor], scalars: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    gain, clip, decay, first_keep, first_weight, second_keep, second_weight, step_size, least, eps = scalars
    c = _corrected(g, states, gain) * clip
    m = interpolate(states[0], c, first_keep, first_weight)
    v = states[1] * second_keep + second_weight * c * c
    return p * decay - step_size * m / (square_root(v + least) + eps), [m, v, g]


def _terms(variant: int, p: Tensor, g: Tensor, states: list[Tensor], scalars: list[Tensor]) -> list[Tensor]:
    c = _corrected(g, states, scalars[0])
    return [c * c]


mars_rule = Rule(
    name="mars",
    options=(
        *("gamma", "eps", "beta1", "beta2", "weight_decay", "beta1_1d", "beta2_1d", "weight_decay_1d"),
        "rate_of_vectors",
    ),
    signed=((True, False, True),),
    scalars=_scalars,
    update=_update,
    terms=_terms,
    sums=(1,),
    given=(2,),
    sample_options=(0.025, 1e-8, 0.95, 0.99, 1e-2, 0.9, 0.95, 0.1, 2.0),
)


class MARS(ElementwiseOptimizer):
    """AdamW of gradients whose variance is reduced by how they changed since the step before.

    The corrected gradient of a tensor is clipped to the norm 1. Parameters with less than two dimensions take plain
    AdamW with arguments of their own.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, a number or a tensor.
        betas: Decay rates of the first and second moment.
        gamma: Strength of the correction.
        optimize_1d: Treat vectors and scalars as matrices.
        lr_1d: Learning rate of vectors. Its ratio to `lr` is kept in the group as ``lr_1d_factor``, and a schedule
            of ``lr`` moves both.
        betas_1d: Decay rates of vectors.
        weight_decay: Decoupled weight decay.
        weight_decay_1d: Decoupled weight decay of vectors.
        eps: Added to the denominator.
        **common: See `narrowgauge.optim.base.Common`.
    """

    _rule = mars_rule

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.99),
        gamma: float = 0.025,
        *,
        optimize_1d: bool = False,
        lr_1d: float = 3e-3,
        betas_1d: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        weight_decay_1d: float = 0.1,
        eps: float = 1e-8,
        **common: Unpack[Common],
    ) -> None:
        check_range("MARS", "lr_1d", lr_1d, 0)
        rate = lr.flatten()[0].item() if isinstance(lr, Tensor) else lr
        defaults = {
            "lr": lr,
            "betas": betas,
            "gamma": gamma,
            "optimize_1d": optimize_1d,
            "lr_1d_factor": lr_1d / rate if isinstance(rate, (int, float)) and rate else 1.0,
            "betas_1d": betas_1d,
            "weight_decay": weight_decay,
            "weight_decay_1d": weight_decay_1d,
            "eps": eps,
        }
        super().__init__(params, defaults, common)

    def _check_options(self, group: dict[str, Any]) -> None:
        check_betas("MARS", group["betas"])
        check_betas("MARS: betas_1d", group["betas_1d"])
        for name in ("gamma", "lr_1d_factor", "weight_decay", "weight_decay_1d", "eps"):
            check_range("MARS", name, group[name], 0)

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return "exp_avg", "exp_avg_sq", "last_grad"

    def _options(self, group: dict[str, Any]) -> list[float]:
        return [
            *(group["gamma"], group["eps"], *group["betas"], group["weight_decay"]),
            *(*group["betas_1d"], group["weight_decay_1d"], group["lr_1d_factor"]),
        ]

    def _given(self, call: Call) -> tuple[Tensor | None, Tensor | None]:
        """Which parameters are matrices, and the factor that clips the corrected gradient of those."""
        kinds = tuple(float(call.group["optimize_1d"] or p.dim() > 1) for p in call.whole)
        matrix = on_device(kinds, torch.float64, call.device)
        given = torch.stack((matrix, torch.ones_like(matrix)), 1)
        if any(kinds):
            norm = call.sums(given)[:, 0].sqrt()
            given[:, 1] = torch.where((norm > 1) & (matrix > 0), 1 / norm, 1.0)
        return given, None


system(
    "mars",
    title="MARS",
    source="arXiv 2411.10438",
    page="optim/adam_relatives.md",
    modules=("optim.MARS",),
    operators=("mars_", "mars_sums"),
    golden=("extra_optim",),
    bench=("mars",),
)
