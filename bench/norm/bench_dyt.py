"""DyT and Derf beside their formula, and beside the LayerNorm whose place they take."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import narrowgauge.nn.functional as ng
from bench.harness import Case, Contest, Setting, compare, traffic


def ours_dyt(x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ng.dyt(x, alpha, weight, bias)


def eager_dyt(x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return weight * torch.tanh(alpha * x) + bias


def ours_derf(x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor, shift: Tensor) -> Tensor:
    return ng.derf(x, alpha, shift, weight, bias)


def eager_derf(x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor, shift: Tensor) -> Tensor:
    return weight * torch.erf(alpha * x + shift) + bias


# With alpha in their weights, so that every input has a gradient.
def torch_layer_norm(x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight * alpha, bias, 1e-5)


def our_layer_norm(x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ng.layer_norm(x, weight.shape[0], weight * alpha, bias, 1e-5)


def dyt_case(name: str, shape: tuple[int, int], dtype: torch.dtype, backward: bool) -> Case:
    def build(setting: Setting) -> Contest:
        sizes = (shape, (1,), (shape[1],), (shape[1],), *([(1,)] if name == "derf" else []))
        inputs = [setting.random(*size, dtype=dtype, requires_grad=backward) for size in sizes]
        x = inputs[0].detach()
        moved = traffic([x] * (5 if backward else 2))  # forward x, y; backward dy, x, dx
        if name == "derf":
            return compare(setting, ours_derf, eager_derf, inputs, backward=backward, bytes_moved=moved)
        rivals = {"torch LayerNorm": torch_layer_norm, "our LayerNorm": our_layer_norm}
        return compare(
            setting, ours_dyt, eager_dyt, inputs, backward=backward, bytes_moved=moved, rivals=rivals
        )

    passes = "fwd+bwd" if backward else "fwd"
    return Case(name, f"{passes} {shape[0]}x{shape[1]} {str(dtype).removeprefix('torch.')}", build)


CASES = [
    dyt_case(name, shape, dtype, backward)
    for name, dtypes in (("dyt", (torch.float32, torch.bfloat16)), ("derf", (torch.float32,)))
    for backward in (False, True)
    for shape in ((4096, 4096), (256, 1024))
    for dtype in dtypes
]


def test_dyt(case: Case, contest: Callable[[Case], None]) -> None:
    contest(case)
