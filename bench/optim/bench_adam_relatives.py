"""AdaBelief, ADOPT, Adan, LaProp and MARS: 16 million parameters in 16 matrices, and in 1,000.

The rivals are pytorch_optimizer where it is installed, and the same algorithms over lists of tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import narrowgauge as ng
from bench.harness import Case
from bench.optim.cases import Make, cases, step_traffic
from bench.optim.cases import Rival as Lists

Params = list[Tensor]


class Rival(Lists):
    """With eps before the correction of the second moment, as pytorch_optimizer has it."""

    def denominators(self, factor: float, eps: float) -> Params:
        roots = torch._foreach_sqrt(self.second)
        torch._foreach_add_(roots, eps)
        torch._foreach_div_(roots, factor)
        return roots


class AdaBelief(Rival):
    def update(self) -> None:
        torch._foreach_lerp_(self.first, self.grads, 0.1)
        self.average_squares(0.999, list(torch._foreach_sub(self.grads, self.first)))
        torch._foreach_add_(self.second, 1e-16)
        roots = self.denominators((1 - 0.999**self.count) ** 0.5, 1e-16)
        torch._foreach_addcdiv_(self.params, self.first, roots, value=-1e-3 / (1 - 0.9**self.count))


class ADOPT(Rival):
    def update(self) -> None:
        if self.count > 1:
            roots = torch._foreach_sqrt(self.second)
            torch._foreach_clamp_min_(roots, 1e-6)
            normalized = torch._foreach_div(self.grads, roots)
            clip = self.count**0.25
            torch._foreach_clamp_max_(normalized, clip)
            torch._foreach_clamp_min_(normalized, -clip)
            torch._foreach_lerp_(self.first, normalized, 0.1)
            torch._foreach_add_(self.params, self.first, alpha=-1e-3)
        self.average_squares(0.9999 if self.count > 1 else 0.0, self.grads)


class Adan(Rival):
    def update(self) -> None:
        if self.count == 1:
            torch._foreach_copy_(self.last, self.grads)
        change = torch._foreach_sub(self.grads, self.last)
        torch._foreach_lerp_(self.first, self.grads, 0.02)
        torch._foreach_lerp_(self.diff, change, 0.08)
        torch._foreach_mul_(change, 0.92)
        torch._foreach_add_(change, self.grads)
        self.average_squares(0.99, list(change))
        roots = self.denominators((1 - 0.99**self.count) ** 0.5, 1e-8)
        torch._foreach_addcdiv_(self.params, self.first, roots, value=-1e-3 / (1 - 0.98**self.count))
        torch._foreach_addcdiv_(self.params, self.diff, roots, value=-0.92e-3 / (1 - 0.92**self.count))
        torch._foreach_copy_(self.last, self.grads)


class LaProp(Rival):
    def update(self) -> None:
        self.average_squares(0.999, self.grads)
        roots = self.denominators((1 - 0.999**self.count) ** 0.5, 1e-15)
        torch._foreach_mul_(self.first, 0.9)
        torch._foreach_addcdiv_(self.first, self.grads, roots, value=0.1 * 4e-4)
        torch._foreach_add_(self.params, self.first, alpha=-1 / (1 - 0.9**self.count))


class MARS(Rival):
    def update(self) -> None:
        change = torch._foreach_sub(self.grads, self.last)
        torch._foreach_mul_(change, 0.025 * 19)
        torch._foreach_add_(change, self.grads)
        norms = torch._foreach_norm(change)
        torch._foreach_clamp_min_(norms, 1.0)
        torch._foreach_div_(change, norms)
        torch._foreach_lerp_(self.first, change, 0.05)
        self.average_squares(0.99, list(change))
        roots = self.denominators((1 - 0.99**self.count) ** 0.5, 1e-8)
        torch._foreach_addcdiv_(self.params, self.first, roots, value=-3e-3 / (1 - 0.95**self.count))
        torch._foreach_copy_(self.last, self.grads)


def published(name: str) -> Make:
    def make(params: Params) -> Any:
        import pytorch_optimizer

        return getattr(pytorch_optimizer, name)(params)

    return make


def mars_traffic(optimizer: torch.optim.Optimizer) -> int:
    """The norm reads the gradient and the one before, 8 bytes per parameter."""
    return step_traffic(optimizer) + 8 * sum(p.numel() for p in optimizer.param_groups[0]["params"])


RIVALS: list[type[Rival]] = [AdaBelief, ADOPT, Adan, LaProp, MARS]

CASES = [
    case
    for rival in RIVALS
    for case in cases(
        rival.__name__.lower(),
        getattr(ng.optim, rival.__name__),
        {"torch foreach": rival, "pytorch_optimizer": published(rival.__name__)},
        requires={"pytorch_optimizer": "pytorch_optimizer"},
        bytes_moved=mars_traffic if rival is MARS else step_traffic,
    )
]


def test_adam_relatives(case: Case, contest: Callable[[Case], None]) -> None:
    contest(case)
