"""Adagrad (Duchi, Hazan and Singer, "Adaptive Subgradient Methods", JMLR 12, 2011)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from narrowgauge.ops import system
from narrowgauge.optim import codec, tensors
from narrowgauge.optim.base import Common, ElementwiseOptimizer, Params, check_range
from narrowgauge.optim.elementwise import Rule, Scalar, square_root

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _scalars(
    variant: int,
    lr: Tensor,
    step: Tensor,
    given: list[Tensor],
    lr_decay: float,
    weight_decay: float,
    eps: float,
) -> tuple[Scalar, ...]:
    return weight_decay, eps, lr / (1 + (step - 1) * lr_decay)


def _update(
    variant: int, p: Tensor, g: Tensor, states: list[Tensor], scalars: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    decay, eps, step_size = scalars
    g = g + decay * p
    total = states[0] + g * g
    return p - step_size * g / (square_root(total) + eps), [total]


adagrad_rule = Rule(
    name="adagrad",
    options=("lr_decay", "weight_decay", "eps"),
    signed=((False,),),
    scalars=_scalars,
    update=_update,
    sample_options=(1e-2, 1e-2, 1e-10),
)


class Adagrad(ElementwiseOptimizer):
    """A drop-in for `torch.optim.Adagrad` in one kernel for all parameters; gradients must be dense.

    The sums are made at a parameter's first step, those of torch with the optimizer.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, a number or a tensor.
        lr_decay: At step t the rate is divided by 1 + (t - 1) `lr_decay`.
        weight_decay: L2 penalty, added to the gradient.
        initial_accumulator_value: What the sums of squares begin with.
        eps: Added to the denominator.
        foreach: As in `narrowgauge.optim.base.Common`.
        **common: See `narrowgauge.optim.base.Common`.
    """

    _rule = adagrad_rule

    # `foreach` may be given by position, as in torch.optim.
    def __init__(  # type: ignore[misc]
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        **common: Unpack[Common],
    ) -> None:
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
        }
        merged: Any = {**common, "foreach": foreach}
        super().__init__(params, defaults, merged)

    def _check_options(self, group: dict[str, Any]) -> None:
        for name in ("lr_decay", "weight_decay", "initial_accumulator_value", "eps"):
            check_range("Adagrad", name, group[name], 0)

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("sum",)

    def _options(self, group: dict[str, Any]) -> list[float]:
        return [group["lr_decay"], group["weight_decay"], group["eps"]]

    def _init_own(self, group: dict[str, Any], p: Tensor, state: dict[str, Any]) -> None:
        value = group["initial_accumulator_value"]
        if value == 0:
            return
        if "sum" in state:
            state["sum"].fill_(complex(value, value) if p.is_complex() else value)
            return
        shard = tensors.local(p)
        initial = torch.full(shard.shape, value, dtype=torch.float32, device=p.device)
        encoded = codec.encode_state(initial, group["state_dtype"], signed=False)
        tensors.local(state["sum.codes"]).copy_(encoded["codes"])
        scale = encoded["scale"]
        tensors.local(state["sum.scale"])[: len(scale)].copy_(scale)


system(
    "adagrad",
    title="Adagrad",
    source="Duchi, Hazan and Singer, JMLR 12, 2011",
    page="optim/torch_set.md",
    modules=("optim.Adagrad",),
    operators=("adagrad_",),
    golden=("torch_optim",),
    bench=("adagrad",),
)
