"""SOAP steps: the matrices of a small network, and many small ones."""

from __future__ import annotations

from collections.abc import Callable

import torch

import narrowgauge as ng
from bench.harness import OURS, Call, Case, Contest, Setting
from bench.optim.bench_shampoo import NETWORK, SMALL
from bench.optim.cases import parameters


def soap_case(detail: str, shapes: list[tuple[int, ...]], calls: int = 10) -> Case:
    """Ten steps, one of which refreshes the eigenvectors."""

    def build(setting: Setting) -> Contest:
        def steps(optimizer: Callable[..., torch.optim.Optimizer]) -> Call:
            step = optimizer(parameters(setting, shapes, torch.float32), lr=1e-3).step
            return lambda: [step() for _ in range(calls)]

        def pytorch_optimizer() -> Call:
            from pytorch_optimizer import SOAP

            return steps(SOAP)

        contest = Contest({OURS: steps(ng.optim.SOAP)})
        contest.add("pytorch_optimizer", pytorch_optimizer, requires="pytorch_optimizer")
        return contest

    return Case("soap", detail, build)


CASES = [
    soap_case("6 matrices of width 128 float32, 10 steps", NETWORK),
    soap_case("50 matrices of 16x16 float32, 10 steps", SMALL),
]


def test_soap(case: Case, contest: Callable[[Case], None]) -> None:
    contest(case)
