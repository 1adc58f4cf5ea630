"""Lion and other rules of one pass: against the same step over lists of tensors, and packages that are installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import narrowgauge as ng
from bench.harness import Case
from bench.optim.cases import Rival, cases, step_case

Params = list[Tensor]


class Lion(Rival):
    def update(self) -> None:
        steps = torch._foreach_lerp(self.first, self.grads, 0.1)
        torch._foreach_sign_(steps)
        torch._foreach_add_(self.params, steps, alpha=-1e-4)
        torch._foreach_lerp_(self.first, self.grads, 0.01)


class DiffGrad(Rival):
    def update(self) -> None:
        t = self.count
        self.moments(0.9, 0.999, self.grads)
        friction = torch._foreach_sub(self.last, self.grads)
        torch._foreach_abs_(friction)
        torch._foreach_sigmoid_(friction)
        torch._foreach_copy_(self.last, self.grads)
        torch._foreach_mul_(friction, self.first)
        roots = torch._foreach_sqrt(self.second)
        torch._foreach_add_(roots, 1e-8)
        size = 1e-3 * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t)
        torch._foreach_addcdiv_(self.params, friction, roots, value=-size)


class AdEMAMix(Rival):
    def update(self) -> None:
        t = self.count
        self.moments(0.9, 0.999, self.grads)
        torch._foreach_lerp_(self.last, self.grads, 1e-4)
        steps = torch._foreach_div(self.first, 1 - 0.9**t)
        torch._foreach_add_(steps, self.last, alpha=5.0)
        roots = torch._foreach_sqrt(self.second)
        torch._foreach_div_(roots, (1 - 0.999**t) ** 0.5)
        torch._foreach_add_(roots, 1e-8)
        torch._foreach_addcdiv_(self.params, steps, roots, value=-1e-3)


class AdamAtan2(Rival):
    def update(self) -> None:
        t = self.count
        self.moments(0.9, 0.999, self.grads)
        steps = torch._foreach_div(self.first, 1 - 0.9**t)
        roots = torch._foreach_sqrt(self.second)
        torch._foreach_div_(roots, (1 - 0.999**t) ** 0.5)
        for step, root in zip(steps, roots, strict=True):  # there is no foreach form
            torch.atan2(step, root, out=step)
        torch._foreach_add_(self.params, steps, alpha=-1.27e-3)


def package(name: str) -> Callable[[Params], Any]:
    def make(params: Params) -> Any:
        import pytorch_optimizer

        return getattr(pytorch_optimizer, name)(params, foreach=True)

    return make


def usual(operator: str, ours: Callable[[Params], Any], rival: type[Rival], name: str | None) -> list[Case]:
    rivals: dict[str, Any] = {"lists": rival}
    if name is not None:
        rivals["pytorch_optimizer"] = package(name)
    return list(cases(operator, ours, rivals, requires={"pytorch_optimizer": "pytorch_optimizer"}))


CASES = [
    *usual("lion", ng.optim.Lion, Lion, "Lion"),
    *usual("diffgrad", ng.optim.DiffGrad, DiffGrad, "DiffGrad"),
    *usual("ademamix", ng.optim.AdEMAMix, AdEMAMix, "AdEMAMix"),
    *usual("adam_atan2", ng.optim.AdamAtan2, AdamAtan2, None),
    step_case("lion", "16M in 16 tensors bfloat16", ng.optim.Lion, {"lists": Lion}, dtype=torch.bfloat16),
]


def test_one_pass(case: Case, contest: Callable[[Case], None]) -> None:
    contest(case)
