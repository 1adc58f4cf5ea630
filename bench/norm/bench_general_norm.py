"""The full residual form: dropout, two branches and a second output; and the castings of RMSNorm."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import narrowgauge.nn.functional as ng
from bench.harness import Case, Contest, Setting, compare, traffic
from narrowgauge.nn import RMSNorm

P, EPS = 0.1, 1e-6
SHAPES = ((4096, 4096), (256, 1024))
DTYPES = (torch.float32, torch.bfloat16)


def ours_dropout(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return ng.add_rms_norm(x, residual, weight, EPS, dropout_p=P)


def eager_dropout(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    s = F.dropout(x, P) + residual
    return F.rms_norm(s, weight.shape, weight, EPS), s


def ours_parallel(x: Tensor, x1: Tensor, residual: Tensor, *affine: Tensor) -> tuple[Tensor, ...]:
    weight, bias, weight1, bias1 = affine
    return ng.add_layer_norm(x, residual, weight, bias, EPS, x1=x1, weight1=weight1, bias1=bias1)


def eager_parallel(x: Tensor, x1: Tensor, residual: Tensor, *affine: Tensor) -> tuple[Tensor, ...]:
    weight, bias, weight1, bias1 = affine
    s = x + x1 + residual
    return (
        F.layer_norm(s, weight.shape, weight, bias, EPS),
        F.layer_norm(s, weight.shape, weight1, bias1, EPS),
        s,
    )


def eager_llama(x: Tensor, weight: Tensor) -> tuple[Tensor]:
    wide = x.float()
    return (weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype),)


def case(what: str, shape: tuple[int, int], dtype: torch.dtype, backward: bool) -> Case:
    def build(setting: Setting) -> Contest:
        def tensor(*size: int) -> Tensor:
            return setting.random(*size, dtype=dtype, requires_grad=backward)

        d = shape[-1]
        if what == "llama":
            module = RMSNorm(d, EPS, casting="llama", device=setting.device, dtype=dtype).requires_grad_(
                backward
            )
            inputs = [tensor(*shape), module.weight]
            passes = 5 if backward else 2
            return compare(
                setting, lambda x, weight: (module(x),), eager_llama, inputs, backward=backward,
                bytes_moved=passes * traffic(inputs[0]),
            )  # fmt: skip
        if what == "dropout":
            inputs = [tensor(*shape), tensor(*shape), tensor(d)]
            ours, eager = ours_dropout, eager_dropout
            passes = 4 + 5 if backward else 4  # the backward: dy, sum, its gradient, two results
        else:
            inputs = [*(tensor(*shape) for _ in range(3)), *(tensor(d) for _ in range(4))]
            ours, eager = ours_parallel, eager_parallel
            passes = 6 + 5 if backward else 6  # one gradient serves both branches and the residual
        contestants: tuple[Callable[..., tuple[Tensor, ...]], ...] = (ours, eager)
        return compare(
            setting, *contestants, inputs, backward=backward, bytes_moved=passes * traffic(inputs[0])
        )

    passes = "fwd+bwd" if backward else "fwd"
    return Case("general_norm", f"{what} {passes} {shape[0]}x{shape[1]} {str(dtype)[6:]}", build)


CASES = [
    case(what, shape, dtype, backward)
    for what in ("dropout", "parallel", "llama")
    for backward in (False, True)
    for shape in SHAPES
    for dtype in DTYPES
    if what != "llama" or dtype != torch.float32
]


def test_general_norm(case: Case, contest: Callable[[Case], None]) -> None:
    contest(case)
