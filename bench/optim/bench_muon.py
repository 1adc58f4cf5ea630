"""Muon steps: the matrices of a small transformer, and many matrices where only the calls cost."""

from __future__ import annotations

from collections.abc import Callable

import torch

import narrowgauge as ng
from bench.harness import OURS, Case, Contest, Setting
from bench.optim.cases import parameters

# Four blocks of width 256 on the CPU, twelve of width 768 on a GPU: attention and feed-forward matrices.
BLOCKS = {"cpu": (4, 256), "cuda": (12, 768)}
SMALL = [(64, 64)] * 200


def transformer(device: str) -> list[tuple[int, ...]]:
    blocks, width = BLOCKS[device.partition(":")[0]]
    return [(width, width)] * (4 * blocks) + [(4 * width, width), (width, 4 * width)] * blocks


def muon_case(detail: str, shapes: list[tuple[int, ...]] | None) -> Case:
    def build(setting: Setting) -> Contest:
        def step(optimizer: Callable[..., torch.optim.Optimizer]) -> Callable[[], object]:
            chosen = transformer(setting.device) if shapes is None else shapes
            return optimizer(parameters(setting, chosen, torch.float32), lr=0.02, weight_decay=0.1).step

        def pytorch_optimizer() -> Callable[[], object]:
            from pytorch_optimizer import Muon

            return step(lambda params, **options: Muon([{"params": params, "use_muon": True}], **options))

        contest = Contest({OURS: step(ng.optim.Muon)})
        contest.add("torch", lambda: step(torch.optim.Muon))
        contest.add("pytorch_optimizer", pytorch_optimizer, requires="pytorch_optimizer")
        return contest

    return Case("muon", detail, build)


CASES = [
    muon_case("matrices of a transformer float32", None),
    muon_case("200 matrices of 64x64 float32", SMALL),
]


def test_muon(case: Case, contest: Callable[[Case], None]) -> None:
    contest(case)
