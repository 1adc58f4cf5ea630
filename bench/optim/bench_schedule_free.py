"""Schedule-free steps and switches of mode, against the same written with torch._foreach and the authors' package."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

import narrowgauge as ng
from bench.harness import OURS, Case, Contest, Setting
from bench.optim.cases import LARGE, TINY, parameters, step_case


class ForeachAdamW:
    """Schedule-free AdamW over lists of tensors, numbers on the host; it overwrites no gradient."""

    def __init__(self, params: list[torch.Tensor]) -> None:
        self.y = [p.detach() for p in params]
        self.params = params
        self.z = [p.clone() for p in self.y]
        self.v = [torch.zeros_like(p) for p in self.y]
        self.k, self.weights = 0, 0.0

    @torch.no_grad()
    def step(self) -> None:
        lr, beta1, beta2, eps = 0.0025, 0.9, 0.999, 1e-8
        self.k += 1
        self.weights += lr**2
        share = lr**2 / self.weights
        grads = [p.grad for p in self.params]
        torch._foreach_mul_(self.v, beta2)
        torch._foreach_addcmul_(self.v, grads, grads, 1 - beta2)
        below = torch._foreach_sqrt(self.v)
        torch._foreach_div_(below, math.sqrt(1 - beta2**self.k))
        torch._foreach_add_(below, eps)
        directions = torch._foreach_div(grads, below)
        torch._foreach_lerp_(self.y, self.z, share)
        torch._foreach_add_(self.y, directions, alpha=lr * (beta1 * (1 - share) - 1))
        torch._foreach_sub_(self.z, directions, alpha=lr)


def authors(kind: str) -> Callable[[list[torch.Tensor]], torch.optim.Optimizer]:
    def make(params: list[torch.Tensor]) -> torch.optim.Optimizer:
        import schedulefree

        optimizer = getattr(schedulefree, kind)(params, foreach=True)
        optimizer.train()
        return optimizer

    return make


def switch_case() -> Case:
    """To the average and back: twice reading two tensors and writing one."""

    def build(setting: Setting) -> Contest:
        params = parameters(setting, LARGE, torch.float32)
        ours = ng.optim.ScheduleFreeAdamW(params)
        ours.step()
        theirs = ForeachAdamW(parameters(setting, LARGE, torch.float32))
        theirs.step()

        def call() -> None:
            ours.eval()
            ours.train()

        def foreach() -> None:
            torch._foreach_lerp_(theirs.y, theirs.z, 1 - 1 / 0.9)
            torch._foreach_lerp_(theirs.y, theirs.z, 0.1)

        moved = 2 * 3 * sum(p.nbytes for p in params)
        return Contest({OURS: call, "foreach": foreach}, moved)

    return Case("schedule_free", "to the average and back, 16M in 16 tensors float32", build)


CASES = [
    step_case(
        "schedule_free",
        detail,
        ng.optim.ScheduleFreeAdamW,
        {"foreach": ForeachAdamW, "authors": authors("AdamWScheduleFree")},
        shapes=shapes,
        requires={"authors": "schedulefree"},
    )
    for detail, shapes in (
        ("AdamW 16M in 16 tensors float32", LARGE),
        ("AdamW 1000 tensors of 64 float32", TINY),
    )
] + [switch_case()]


def test_schedule_free(case: Case, contest: Callable[[Case], None]) -> None:
    contest(case)
