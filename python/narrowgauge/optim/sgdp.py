"""SGDP (Heo et al., ICLR 2021, arXiv 2006.08217): SGD with the projection of AdamP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from narrowgauge.ops import system
from narrowgauge.optim.adamp import Projected, ScaleInvariant
from narrowgauge.optim.base import Common, Params, check_range
from narrowgauge.optim.elementwise import Rule, Scalar

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Variants: 1: nesterov, 2: the buffer keeps its radial part.


def _scalars(
    variant: int,
    lr: Tensor,
    step: Tensor,
    given: list[Tensor],
    momentum: float,
    dampening: float,
    weight_decay: float,
) -> tuple[Scalar, ...]:
    return 1 - lr * weight_decay * given[0] / (1 - momentum), momentum, 1 - dampening, lr


def _direction(variant: int, g: Tensor, buffer: Tensor, scalars: list[Tensor]) -> tuple[Tensor, Tensor]:
    _, keep, weight, _ = scalars
    buffer = buffer * keep + weight * g
    return (g + keep * buffer if variant == 1 else buffer), buffer


def _update(
    variant: int, p: Tensor, g: Tensor, states: list[Tensor], scalars: list[Tensor], radial: Tensor
) -> tuple[Tensor, list[Tensor]]:
    u, buffer = _direction(variant, g, states[0], scalars)
    u = u - radial * p
    return p * scalars[0] - scalars[3] * u, [u if variant == 0 else buffer]


def _terms(variant: int, p: Tensor, g: Tensor, states: list[Tensor], scalars: list[Tensor]) -> list[Tensor]:
    u, _ = _direction(variant, g, states[0], scalars)
    return [g * p, g * g, p * p, u * p]


sgdp_rule = Rule(
    name="sgdp",
    options=("momentum", "dampening", "weight_decay"),
    signed=((True,),) * 3,
    scalars=_scalars,
    update=_update,
    terms=_terms,
    sums=(4,) * 3,
    given=(1,) * 3,
    rows=True,
    sample_options=(0.9, 0.1, 1e-2),
)


class SGDP(Projected):
    """SGD that stops the length of scale-invariant weights from growing; see `AdamP`.

    Unlike in `torch.optim.SGD` the weight decay is decoupled (and divided by 1 - `momentum`), and the momentum starts
    at zero, so that the first step is damped as well.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, a number or a tensor.
        momentum: Factor of the momentum.
        dampening: Damping of the gradient in the momentum.
        weight_decay: Decoupled weight decay.
        nesterov: Nesterov's momentum.
        eps: Added to norms.
        delta: How orthogonal gradient and weights must be; 0 never projects.
        wd_ratio: Factor on the weight decay of projected parameters.
        project_buffer: Without `nesterov`, also project the stored momentum, as the authors' implementation does.
        scale_invariant: As for `AdamP`.
        **common: See `narrowgauge.optim.base.Common`.
    """

    _rule = sgdp_rule
    _counts_no_steps = True

    def __init__(
        self,
        params: Params,
        lr: float | Tensor,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        eps: float = 1e-8,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        *,
        project_buffer: bool = True,
        scale_invariant: ScaleInvariant = "auto",
        **common: Unpack[Common],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "eps": eps,
            "delta": delta,
            "wd_ratio": wd_ratio,
            "project_buffer": project_buffer,
            "scale_invariant": scale_invariant,
        }
        super().__init__(params, defaults, common)

    def _check_options(self, group: dict[str, Any]) -> None:
        check_range("SGDP", "momentum", group["momentum"], 0, 1)
        check_range("SGDP", "dampening", group["dampening"], 0)
        self._check_projection(group)

    def _variant(self, group: dict[str, Any]) -> int:
        return 1 if group["nesterov"] else 0 if group["project_buffer"] else 2

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum",)

    def _options(self, group: dict[str, Any]) -> list[float]:
        return [group["momentum"], group["dampening"], group["weight_decay"]]


system(
    "sgdp",
    title="SGDP",
    source="arXiv 2006.08217",
    page="optim/adamp.md",
    modules=("optim.SGDP",),
    operators=("sgdp_", "sgdp_sums"),
    golden=("sgdp",),
    bench=("sgdp",),
)
