"""Quantizing, dequantizing, and the low-precision linear layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness import OURS, Call, Case, Contest, Setting
from narrowgauge.ops import registry
from narrowgauge.quant import Linear, Scheme, dequantize, quantize

SHAPE = (4096, 4096)
CODES = {"int8": (torch.int8, 127.0), "e4m3": (torch.float8_e4m3fn, 448.0)}


def eager_quantize(x: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The same codes in plain PyTorch."""
    dtype, largest = CODES[scheme.format]
    x = x.float()
    amax = x.abs().amax(dim=-1, keepdim=True) if scheme.granularity == "row" else x.abs().amax()
    scale = torch.where(amax == 0, 1.0, amax / largest)
    scaled = x / scale
    if not dtype.is_floating_point:
        scaled = scaled.round()
    return scaled.clamp(-largest, largest).to(dtype), scale


def contest_of(setting: Setting, ours: Call, eager: Callable[[], Any], bytes_moved: int) -> Contest:
    """Ours beside plain PyTorch, eager and compiled."""
    contest = Contest({OURS: ours, "eager": eager}, bytes_moved)
    if setting.compile:
        contest.contestants["compile"] = torch.compile(eager, dynamic=False)
    return contest


def quantize_case(scheme: Scheme, dtype: torch.dtype) -> Case:
    def build(setting: Setting) -> Contest:
        x = setting.random(*SHAPE, dtype=dtype)
        return contest_of(
            setting,
            lambda: quantize(x, scheme),
            lambda: eager_quantize(x, scheme),
            registry["quantize"].bytes_moved(x, scheme.format, scheme.granularity),
        )

    return Case("quantize", describe(scheme, dtype), build)


def dequantize_case(scheme: Scheme, dtype: torch.dtype) -> Case:
    def build(setting: Setting) -> Contest:
        x = setting.random(*SHAPE, dtype=dtype)
        quantized = quantize(x, scheme)
        codes, scale = eager_quantize(x, scheme)
        return contest_of(
            setting,
            lambda: dequantize(quantized, dtype),
            lambda: (codes.float() * scale).to(dtype),
            registry["dequantize"].bytes_moved(quantized.codes, quantized.scale, scheme.granularity, dtype),
        )

    return Case("dequantize", describe(scheme, dtype), build)


def linear_case(recipe: str, tokens: int, width: int, dtype: torch.dtype, only_on: str | None = None) -> Case:
    """Forward and both backward products."""

    def build(setting: Setting) -> Contest:
        x = setting.random(tokens, width, dtype=dtype, requires_grad=True)
        gradient = setting.random(tokens, width, dtype=dtype)

        def call(layer: nn.Module) -> Call:
            layer.to(setting.device, dtype)
            inputs = [x, *layer.parameters()]
            return lambda: torch.autograd.grad(layer(x), inputs, gradient)

        return Contest(
            {
                OURS: call(Linear(width, width, bias=False, recipe=recipe)),
                "nn.Linear": call(nn.Linear(width, width, bias=False)),
            }
        )

    return Case("linear", f"{recipe} {tokens}x{width}x{width} {name_of(dtype)}", build, only_on=only_on)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe(scheme: Scheme, dtype: torch.dtype) -> str:
    return f"{scheme.format} {scheme.granularity} {SHAPE[0]}x{SHAPE[1]} {name_of(dtype)}"


SCHEMES = [Scheme(format, granularity) for format in CODES for granularity in ("row", "tensor")]
DTYPES = (torch.float32, torch.bfloat16)
CASES = [
    *(quantize_case(scheme, dtype) for scheme in SCHEMES for dtype in DTYPES),
    *(dequantize_case(scheme, dtype) for scheme in SCHEMES for dtype in DTYPES),
    *(linear_case(recipe, 1024, 1024, torch.float32) for recipe in ("int8-row", "fp8-row")),
    *(linear_case(recipe, 8192, 4096, torch.bfloat16, only_on="cuda") for recipe in ("int8-row", "fp8-row")),
]


def test_quant(case: Case, contest: Callable[[Case], None]) -> None:
    contest(case)
