"""Prodigy steps, against the definition tensor by tensor and the authors' package."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

import narrowgauge as ng
from bench.harness import Case, traffic
from bench.optim.cases import LARGE, TINY, step_case, step_traffic


class TensorByTensor:
    """Prodigy with its defaults and two sums per tensor read on the host, as the authors do."""

    def __init__(self, params: list[torch.Tensor]) -> None:
        self.params = params
        self.start = [p.detach().clone() for p in params]
        self.m, self.v, self.s = ([torch.zeros_like(p) for p in params] for _ in range(3))
        self.d = self.largest = 1e-6
        self.numerator = 0.0

    @torch.no_grad()
    def step(self) -> None:
        beta1, beta2, d, d0 = 0.9, 0.999, self.d, 1e-6
        beta3 = math.sqrt(beta2)
        self.numerator, denominator = beta3 * self.numerator, 0.0
        for p, p0, m, v, s in zip(self.params, self.start, self.m, self.v, self.s, strict=True):
            g = p.grad
            self.numerator += d / d0 * d * torch.dot(g.flatten(), (p0 - p).flatten()).item()
            m.mul_(beta1).add_(g, alpha=d * (1 - beta1))
            v.mul_(beta2).addcmul_(g, g, value=d * d * (1 - beta2))
            s.mul_(beta3).add_(g, alpha=d / d0 * d)
            denominator += s.abs().sum().item()
        guess = self.numerator / denominator
        self.largest = max(self.largest, guess)
        self.d = self.largest
        for p, m, v in zip(self.params, self.m, self.v, strict=True):
            p.addcdiv_(m, v.sqrt().add_(self.d * 1e-8), value=-d)


def authors(params: list[torch.Tensor]) -> torch.optim.Optimizer:
    from prodigyopt import Prodigy

    return Prodigy(params)


def prodigy_traffic(optimizer: torch.optim.Optimizer) -> int:
    """The start is only read; parameters, gradients and s are read once more, for the sums."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [optimizer.state[p] for p in params]
    again = traffic(params) + traffic([p.grad for p in params]) + traffic([state["s"] for state in states])
    return step_traffic(optimizer) - traffic([state["p0"] for state in states]) + again


CASES = [
    step_case(
        "prodigy",
        detail,
        ng.optim.Prodigy,
        {"tensor by tensor": TensorByTensor, "authors": authors},
        shapes=shapes,
        requires={"authors": "prodigyopt"},
        bytes_moved=prodigy_traffic,
    )
    for detail, shapes in (
        ("16M in 16 tensors float32", LARGE),
        ("1000 tensors of 64 float32", TINY),
    )
]


def test_prodigy(case: Case, contest: Callable[[Case], None]) -> None:
    contest(case)
