"""PolyNorm beside its formula."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import narrowgauge.nn.functional as ng
from bench.harness import Case, Contest, Setting, compare, traffic

EPS = 1e-6


def normed(u: Tensor) -> Tensor:
    return u * torch.rsqrt(u.square().mean(-1, keepdim=True) + EPS)


def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ng.poly_norm(x, weight, bias, EPS)


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return weight[0] * normed(x**3) + weight[1] * normed(x**2) + weight[2] * normed(x) + bias


def poly_norm_case(shape: tuple[int, int], dtype: torch.dtype, backward: bool) -> Case:
    def build(setting: Setting) -> Contest:
        inputs = [setting.random(*size, dtype=dtype, requires_grad=backward) for size in (shape, (3,), (1,))]
        moved = traffic([inputs[0].detach()] * (5 if backward else 2))
        return compare(setting, ours, eager, inputs, backward=backward, bytes_moved=moved)

    passes = "fwd+bwd" if backward else "fwd"
    detail = f"{passes} {shape[0]}x{shape[1]} {str(dtype).removeprefix('torch.')}"
    return Case("poly_norm", detail, build)


CASES = [
    poly_norm_case(shape, dtype, backward)
    for backward in (False, True)
    for shape, dtype in (
        ((4096, 4096), torch.float32),
        ((4096, 4096), torch.bfloat16),
        ((256, 1024), torch.float32),
    )
]


def test_poly_norm(case: Case, contest: Callable[[Case], None]) -> None:
    contest(case)
