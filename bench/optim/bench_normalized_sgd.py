"""Normalized gradient descent: 16 million parameters in 16 tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import narrowgauge as ng
from bench.harness import Case, traffic
from bench.optim.cases import step_case, step_traffic


class Foreach:
    """The same in PyTorch: the norm of all gradients, gradients scaled in place, its own SGD."""

    def __init__(self, params: list[Tensor], momentum: float) -> None:
        self.grads = [p.grad for p in params if p.grad is not None]
        self.sgd = torch.optim.SGD(params, lr=1e-3, momentum=momentum, foreach=True)

    def step(self) -> None:
        size = torch.nn.utils.get_total_norm(self.grads)
        torch._foreach_mul_(self.grads, 1 / (size + 1e-8))
        self.sgd.step()


def moved(optimizer: Any) -> int:
    """The gradient is read for its norm, and again to apply it."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    return step_traffic(optimizer) + traffic(gradients)


def normalized_case(momentum: float) -> Case:
    return step_case(
        "normalized_sgd",
        f"16M in 16 tensors float32, momentum {momentum}",
        lambda params: ng.optim.NormalizedSGD(params, lr=1e-3, momentum=momentum),
        {"torch foreach": lambda params: Foreach(params, momentum)},
        bytes_moved=moved,
    )


CASES = [normalized_case(0.0), normalized_case(0.9)]


def test_normalized_sgd(case: Case, contest: Callable[[Case], None]) -> None:
    contest(case)
