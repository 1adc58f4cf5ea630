"""Normalized gradient descent: 16 million parameters in 16 tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch

import narrowgauge as ng
from bench.harness import OURS, Call, Case, Contest, Setting, traffic
from bench.optim.bench_adamw import LARGE, parameters


def normalized_case(momentum: float) -> Case:
    def build(setting: Setting) -> Contest:
        params = parameters(setting, LARGE, torch.float32)
        ours = ng.optim.NormalizedSGD(params, lr=1e-3, momentum=momentum)
        ours.step()
        states = traffic(list(ours.state.values()))
        # The gradient is read for its norm, and again to apply it.
        contest = Contest(
            {OURS: ours.step}, 2 * traffic([p.grad for p in params]) + 2 * traffic(params) + 2 * states
        )

        def foreach() -> Call:
            stock = parameters(setting, LARGE, torch.float32)
            grads = [p.grad for p in stock if p.grad is not None]
            optimizer = torch.optim.SGD(stock, lr=1e-3, momentum=momentum, foreach=True)

            def step() -> None:
                size = torch.nn.utils.get_total_norm(grads)
                torch._foreach_mul_(grads, 1 / (size + 1e-8))
                optimizer.step()

            return step

        contest.add("torch foreach", foreach)
        return contest

    return Case("normalized_sgd", f"16M in 16 tensors float32, momentum {momentum}", build)


CASES = [normalized_case(0.0), normalized_case(0.9)]


def test_normalized_sgd(case: Case, contest: Callable[[Case], None]) -> None:
    contest(case)
