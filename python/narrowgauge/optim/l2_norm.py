"""Squared norms of many tensors in one pass: for clipping, SAM, projections and normalized steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from narrowgauge.ops import system
from narrowgauge.optim.elementwise import Rule


def _update(
    variant: int, p: Tensor, g: Tensor, states: list[Tensor], scalars: Any
) -> tuple[Tensor, list[Tensor]]:
    return p * scalars[0], states


# Sums of g^2, or with variant 1 of (p g)^2. Its step multiplies parameters by what it is given.
l2_norm = Rule(
    name="l2_norm",
    options=(),
    signed=((), ()),
    scalars=lambda variant, lr, step, given: (given[0],),
    update=_update,
    terms=lambda variant, p, g, states, scalars: [(p * g) * (p * g) if variant else g * g],
    sums=(1, 1),
    given=(1, 1),
)


def squared_norms(tensors: list[Tensor], divisor: Tensor | None = None) -> Tensor:
    """The squared norm of each tensor over `divisor`, in float64; the tensors share dtype and device, and are dense."""
    steps = [torch.zeros((), device=tensors[0].device)] * len(tensors)
    sums = l2_norm.reduce(
        *(tensors, tensors, [], [], steps, None, None, 0.0, [], 0, 0, 0, [], False, [], divisor, None)
    )
    return sums[:, 0].double()


system(
    "l2_norm",
    title="Clipping by the global norm inside a step",
    source="as torch.nn.utils.clip_grad_norm_",
    page="optim/mechanics.md",
    operators=("l2_norm_", "l2_norm_sums"),
    reasons={
        "module": "an argument of `step`, for every optimizer",
        "golden": "PyTorch's own clipping is the truth",
        "bench": "part of steps that clip",
    },
)
