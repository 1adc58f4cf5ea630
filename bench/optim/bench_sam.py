"""What SAM adds to a step: the climb and the way back, against the same written with torch._foreach."""

from __future__ import annotations

from collections.abc import Callable

import torch

import narrowgauge as ng
from bench.harness import OURS, Case, Contest, Setting, traffic
from bench.optim.cases import LARGE, TINY, parameters


def sam_case(detail: str, shapes: list[tuple[int, ...]], adaptive: bool) -> Case:
    def build(setting: Setting) -> Contest:
        params = [p.detach() for p in parameters(setting, shapes, torch.float32)]
        grads = [torch.randn_like(p) for p in params]

        def ours() -> None:
            ng.optim.sam_restore_(params, ng.optim.sam_perturb_(params, grads, 0.05, adaptive))

        def foreach() -> None:
            weighted = torch._foreach_mul(params, grads) if adaptive else grads
            norm = torch.stack(torch._foreach_norm(weighted)).norm()
            old = [p.clone() for p in params]
            moves = torch._foreach_mul(params, weighted) if adaptive else grads
            moves = torch._foreach_mul(moves, 0.05 / (norm + 1e-12))
            torch._foreach_add_(params, moves)
            torch._foreach_copy_(params, old)

        # The norm reads the gradients; the climb reads both and writes the parameters and their copy; back: two.
        passes = 8 if adaptive else 7
        return Contest({OURS: ours, "foreach": foreach}, passes * traffic(params))

    return Case("sam", detail, build, host_time=shapes is TINY)


CASES = [
    sam_case("climb and back, 16M in 16 tensors float32", LARGE, False),
    sam_case("adaptive climb and back, 16M in 16 tensors float32", LARGE, True),
    sam_case("climb and back, 1000 tensors of 64 float32", TINY, False),
]


def test_sam(case: Case, contest: Callable[[Case], None]) -> None:
    contest(case)
