"""Token norms: forward alone, forward with backward, and the price of a call on a tiny tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import narrowgauge.nn.functional as ng
from bench.harness import OURS, Call, Case, Contest, Setting, compare
from narrowgauge.ops import registry

EPS = 1e-5
SHAPES = ((4096, 4096), (256, 1024))
DTYPES = (torch.float32, torch.bfloat16)


def ours_rms_norm(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return (ng.rms_norm(x, weight.shape, weight, EPS),)


def eager_rms_norm(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return (F.rms_norm(x, weight.shape, weight, EPS),)


def ours_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return (ng.layer_norm(x, weight.shape, weight, bias, EPS),)


def eager_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return (F.layer_norm(x, weight.shape, weight, bias, EPS),)


def ours_add_rms_norm(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
    return ng.add_rms_norm(x, residual, weight, EPS)


def eager_add_rms_norm(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
    total = x + residual
    return F.rms_norm(total, weight.shape, weight, EPS), total


def ours_add_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
    return ng.add_layer_norm(x, residual, weight, bias, EPS)


def eager_add_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
    total = x + residual
    return F.layer_norm(total, weight.shape, weight, bias, EPS), total


CONTESTANTS = {
    "rms_norm": (ours_rms_norm, eager_rms_norm),
    "add_rms_norm": (ours_add_rms_norm, eager_add_rms_norm),
    "layer_norm": (ours_layer_norm, eager_layer_norm),
    "add_layer_norm": (ours_add_layer_norm, eager_add_layer_norm),
}


def bytes_moved(
    name: str, inputs: list[Tensor], residual: Tensor | None, gradients: list[Tensor] | None
) -> int:
    """Of the operators behind a call; with gradients, those of training and their backward."""
    x, weight, bias = (*inputs, None)[:3]
    arguments = (x, *([] if residual is None else [residual]), weight, bias, EPS, 0.0, None)
    if gradients is None:
        return registry[name].bytes_moved(*arguments)
    forward, backward = registry[f"{name}_forward"], registry[f"{name.removeprefix('add_')}_backward"]
    statistics = forward(*arguments)[len(gradients) :]
    dy, dresidual = (*gradients, None)[:2]
    return forward.bytes_moved(*arguments) + backward.bytes_moved(
        dy, x, *statistics, weight, bias, dresidual, 0.0, True
    )


def norm_case(name: str, shape: tuple[int, int], dtype: torch.dtype, backward: bool) -> Case:
    """Ours, eager and compiled on one input. Parameters and activations have the same dtype."""

    def build(setting: Setting) -> Contest:
        def tensor(*size: int) -> Tensor:
            return setting.random(*size, dtype=dtype, requires_grad=backward)

        ours, eager = CONTESTANTS[name]
        inputs = [tensor(*shape), tensor(shape[1])]
        if name.endswith("layer_norm"):
            inputs.append(tensor(shape[1]))
        residual = tensor(*shape) if name.startswith("add") else None
        gradients = [torch.randn_like(inputs[0])] * (1 if residual is None else 2)
        moved = bytes_moved(name, inputs, residual, gradients if backward else None)
        if residual is not None:
            inputs.append(residual)
        return compare(setting, ours, eager, inputs, backward=backward, bytes_moved=moved)

    passes = "fwd+bwd" if backward else "fwd"
    return Case(name, f"{passes} {shape[0]}x{shape[1]} {str(dtype).removeprefix('torch.')}", build)


def call_case(name: str, grad: bool, backward: bool) -> Case:
    """What a call costs when there is nothing to compute."""

    def build(setting: Setting) -> Contest:
        x, weight, bias = (setting.random(*size, requires_grad=grad) for size in ((1, 64), (64,), (64,)))
        inputs = {"rms_norm": (x, weight), "layer_norm": (x, weight, bias)}
        gradient = torch.randn_like(x)

        def call(function: Callable[..., Any], *inputs: Tensor) -> Call:
            if backward:
                return lambda: torch.autograd.grad(function(*inputs), inputs, (gradient,))
            return lambda: function(*inputs)

        contest = Contest({OURS: call(CONTESTANTS[name][0], *inputs[name])})
        for other in ("rms_norm", "layer_norm"):
            contest.contestants[f"eager {other}"] = call(CONTESTANTS[other][1], *inputs[other])
        return contest

    passes = "fwd+bwd" if backward else "fwd"
    return Case(name, f"call {passes} 1x64 float32 {'with' if grad else 'no'} grad", build, host_time=True)


CASES = [
    *(
        norm_case(name, shape, dtype, backward)
        for name in CONTESTANTS
        for backward in (False, True)
        for shape in SHAPES
        for dtype in DTYPES
    ),
    *(
        call_case(name, grad, backward)
        for name in ("rms_norm", "layer_norm")
        for grad, backward in ((False, False), (True, False), (True, True))
    ),
]


def test_norm(case: Case, contest: Callable[[Case], None]) -> None:
    contest(case)
