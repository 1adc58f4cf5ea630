"""Normalize-and-project: alone and after a step of AdamW, against the same written with torch._foreach."""

from __future__ import annotations

from collections.abc import Callable

import torch

import narrowgauge as ng
from bench.harness import OURS, Case, Contest, Setting, traffic
from bench.optim.cases import LARGE, TINY, parameters, step_case, step_traffic


def foreach_project(params: list[torch.Tensor], targets: list[torch.Tensor]) -> None:
    factors = torch._foreach_div(targets, torch._foreach_norm(params))
    torch._foreach_mul_(params, factors)


def alone(detail: str, shapes: list[tuple[int, ...]]) -> Case:
    def build(setting: Setting) -> Contest:
        params = [p.detach() for p in parameters(setting, shapes, torch.float32)]
        targets = [p.norm() for p in params]
        return Contest(
            {
                OURS: lambda: ng.optim.nap_(params, targets),
                "foreach": lambda: foreach_project(params, targets),
            },
            3 * traffic(params),
        )

    return Case("nap", detail, build, host_time=shapes is TINY)


class FusedThenForeach:
    """torch's fused AdamW, then the projection."""

    def __init__(self, params: list[torch.Tensor]) -> None:
        self.params = [p.detach() for p in params]
        self.targets = [p.norm() for p in self.params]
        self.optimizer = torch.optim.AdamW(params, fused=True)

    def step(self) -> None:
        self.optimizer.step()
        foreach_project(self.params, self.targets)


def projected_traffic(optimizer: torch.optim.Optimizer) -> int:
    return step_traffic(optimizer) + 3 * traffic([group["params"] for group in optimizer.param_groups])


CASES = [
    alone("projection of 16M in 16 tensors float32", LARGE),
    alone("projection of 1000 tensors of 64 float32", TINY),
    step_case(
        "nap",
        "AdamW and projection, 16M in 16 tensors float32",
        lambda params: ng.optim.AdamW(params, project_norm=True),
        {"torch fused, foreach": FusedThenForeach},
        bytes_moved=projected_traffic,
    ),
]


def test_nap(case: Case, contest: Callable[[Case], None]) -> None:
    contest(case)
