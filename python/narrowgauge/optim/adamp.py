"""AdamP (Heo et al., ICLR 2021, arXiv 2006.08217), and the projection that it shares with SGDP.

The weights in front of a normalization have no use for their length: only a step that is orthogonal to them changes
the function. Momentum makes them longer all the same, which slows training down. Where the gradient is orthogonal to
the weights, as it must be for such weights, the step is projected so that it is too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from narrowgauge.ops import system
from narrowgauge.optim.base import Call, Common, ElementwiseOptimizer, Params, check_betas, check_range
from narrowgauge.optim.elementwise import Rule, Scalar, integer_power, square_root
from narrowgauge.optim.rows import Rows, on_device

if TYPE_CHECKING:
    from typing_extensions import Unpack

ScaleInvariant = bool | Literal["auto"]


def _thresholds(shapes: list[torch.Size], delta: float, always: bool) -> tuple[tuple[float, ...], ...]:
    """Below which squared cosine a parameter is projected, row by row and as a whole; -1 for never."""
    by_rows, whole = [], []
    for shape in shapes:
        numel, matrix = max(shape.numel(), 1), len(shape) > 1
        length = max(numel // shape[0], 1) if matrix and shape[0] else 1
        by_rows.append((4.0 if always else delta**2 / length) if matrix else -1.0)
        whole.append(delta**2 / numel if matrix else -1.0)
    return tuple(by_rows), tuple(whole)


def _is_orthogonal(gp: Tensor, gg: Tensor, pp: Tensor, eps: float, threshold: Tensor) -> Tensor:
    """Whether |cos(g, p)| < threshold, with each norm at least eps; without roots, and False where it is NaN."""
    return gp.square() < threshold * gg.clamp_min(eps * eps) * pp.clamp_min(eps * eps)


class Projected(ElementwiseOptimizer):
    """An optimizer whose rule adds up <g, p>, <g, g>, <p, p>, <p, u> by rows, and takes the part of p to leave out."""

    def _check_projection(self, group: dict[str, Any]) -> None:
        name = type(self).__name__
        for option in ("eps", "weight_decay", "delta", "wd_ratio"):
            check_range(name, option, group[option], 0)
        invariant = group["scale_invariant"]
        if not (isinstance(invariant, bool) or invariant == "auto"):
            raise ValueError(f'{name}: scale_invariant must be True, False or "auto", got {invariant!r}')

    def _given(self, call: Call) -> tuple[Tensor | None, Tensor | None]:
        group, rows = call.group, Rows(call)
        ones = torch.ones(len(call.whole), dtype=torch.float64, device=call.device)
        if group["scale_invariant"] is False or all(p.dim() < 2 for p in call.whole):
            return ones[:, None], torch.zeros(rows.total, dtype=call.compute, device=call.device)
        thresholds = _thresholds(
            [p.shape for p in call.whole], group["delta"], group["scale_invariant"] is True
        )
        by_rows, whole = (on_device(values, torch.float64, call.device) for values in thresholds)
        eps, sums = group["eps"], call.sums()
        gp, gg, pp, pu = sums.unbind(1)
        too_large = ~_is_orthogonal(gp, gg, pp, eps, rows.spread(by_rows))
        row_view = rows.add(too_large.double()) == 0
        gp_all, gg_all, pp_all, pu_all = rows.add(sums).unbind(1)
        whole_view = ~row_view & _is_orthogonal(gp_all, gg_all, pp_all, eps, whole)
        radial = torch.where(
            rows.spread(row_view),
            pu / (pp.sqrt() + eps).square(),
            rows.spread(torch.where(whole_view, pu_all / (pp_all.sqrt() + eps).square(), 0.0)),
        )
        ratio = torch.where(row_view | whole_view, group["wd_ratio"], ones)
        return ratio[:, None], radial.to(call.compute)


# Variant 1: nesterov.


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
    decay = 1 - lr * weight_decay * given[0]
    step_size = lr / (1 - integer_power(beta1, step))
    correction = (1 - integer_power(beta2, step)).sqrt()
    return decay, beta1, 1 - beta1, beta2, 1 - beta2, step_size, correction, eps


def _direction(
    variant: int, g: Tensor, states: list[Tensor], scalars: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    _, first_keep, first_weight, second_keep, second_weight, _, correction, eps = scalars
    m, v = states
    m = m * first_keep + first_weight * g
    v = v * second_keep + second_weight * g * g
    numerator = first_keep * m + first_weight * g if variant == 1 else m
    return numerator / (square_root(v) / correction + eps), [m, v]


def _update(
    variant: int, p: Tensor, g: Tensor, states: list[Tensor], scalars: list[Tensor], radial: Tensor
) -> tuple[Tensor, list[Tensor]]:
    u, states = _direction(variant, g, states, scalars)
    decay, step_size = scalars[0], scalars[5]
    return p * decay - step_size * (u - radial * p), states


def _terms(variant: int, p: Tensor, g: Tensor, states: list[Tensor], scalars: list[Tensor]) -> list[Tensor]:
    u, _ = _direction(variant, g, states, scalars)
    return [g * p, g * g, p * p, u * p]


adamp_rule = Rule(
    name="adamp",
    options=("beta1", "beta2", "weight_decay", "eps"),
    signed=((True, False), (True, False)),
    scalars=_scalars,
    update=_update,
    terms=_terms,
    sums=(4, 4),
    given=(1, 1),
    rows=True,
    sample_options=(0.9, 0.999, 1e-2, 1e-8),
)


class AdamP(Projected):
    """AdamW that stops the length of scale-invariant weights from growing.

    A parameter with two or more dimensions is looked at by rows (the first dimension, output channels), then as a
    whole: when every cosine between gradient and weights is below `delta` / sqrt(elements of the row), the step loses
    its part along the weights, and the weight decay is multiplied by `wd_ratio`. Others take the step of `AdamW`. The
    decision stays on the device.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, a number or a tensor.
        betas: Decay rates of the first and second moment.
        eps: Added to the denominator and to norms.
        weight_decay: Decoupled weight decay.
        delta: How orthogonal gradient and weights must be; 0 never projects.
        wd_ratio: Factor on the weight decay of projected parameters.
        nesterov: Nesterov's momentum.
        scale_invariant: ``"auto"`` decides as above; True projects every row at every step, False never, for
            parameters of which it is known. An option for parameter groups.
        **common: See `narrowgauge.optim.base.Common`.
    """

    _rule = adamp_rule

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
        *,
        scale_invariant: ScaleInvariant = "auto",
        **common: Unpack[Common],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "delta": delta,
            "wd_ratio": wd_ratio,
            "nesterov": nesterov,
            "scale_invariant": scale_invariant,
        }
        super().__init__(params, defaults, common)

    def _check_options(self, group: dict[str, Any]) -> None:
        check_betas("AdamP", group["betas"])
        self._check_projection(group)

    def _variant(self, group: dict[str, Any]) -> int:
        return int(group["nesterov"])

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def _options(self, group: dict[str, Any]) -> list[float]:
        return [*group["betas"], group["weight_decay"], group["eps"]]


system(
    "adamp",
    title="AdamP",
    source="arXiv 2006.08217",
    page="optim/adamp.md",
    modules=("optim.AdamP",),
    operators=("adamp_", "adamp_sums"),
    golden=("adamp",),
    bench=("adamp",),
)
