"""Shampoo steps: the matrices of a small network, and many small ones."""

from __future__ import annotations

from collections.abc import Callable

import torch

import narrowgauge as ng
from bench.harness import OURS, Call, Case, Contest, Setting
from bench.optim.cases import parameters

NETWORK = [(128, 128)] * 4 + [(256, 128), (128, 256)]
SMALL = [(16, 16)] * 50


def shampoo_case(detail: str, shapes: list[tuple[int, ...]], **options: str) -> Case:
    """Each takes roots at every step, the default of both; ours with `options`."""

    def build(setting: Setting) -> Contest:
        def step(optimizer: Callable[..., torch.optim.Optimizer], **chosen: str) -> Call:
            return optimizer(parameters(setting, shapes, torch.float32), lr=1e-3, **chosen).step

        def pytorch_optimizer() -> Call:
            from pytorch_optimizer import Shampoo

            return step(Shampoo)

        contest = Contest({OURS: step(ng.optim.Shampoo, **options)})
        contest.add("pytorch_optimizer", pytorch_optimizer, requires="pytorch_optimizer")
        return contest

    return Case("shampoo", detail, build)


CASES = [
    shampoo_case("6 matrices of width 128 float32", NETWORK),
    shampoo_case("6 matrices of width 128 float32, eigh", NETWORK, root_method="eigh"),
    shampoo_case("50 matrices of 16x16 float32, eigh", SMALL, root_method="eigh"),
]


def test_shampoo(case: Case, contest: Callable[[Case], None]) -> None:
    contest(case)
