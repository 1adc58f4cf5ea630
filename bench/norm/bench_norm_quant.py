"""Norms with a quantized result, beside a norm and then its quantization, and the norm joined to a linear layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import narrowgauge.nn.functional as ng
from bench.harness import OURS, Case, Contest, Setting, compare, traffic
from narrowgauge.quant import Scheme, dequantize, linear, quantize

EPS = 1e-5
SHAPES = ((4096, 4096), (256, 1024))
CODES = {"int8": (torch.int8, 127.0), "e4m3": (torch.float8_e4m3fn, 448.0)}


def encode(y: Tensor, amax: Tensor, format: str) -> tuple[Tensor, Tensor]:
    dtype, largest = CODES[format]
    scale = torch.where(amax == 0, 1.0, amax / largest)
    scaled = y / scale
    if not dtype.is_floating_point:
        scaled = scaled.round()
    return scaled.clamp(-largest, largest).to(dtype), scale


def eager_codes(y: Tensor, format: str, granularity: str) -> tuple[Tensor, Tensor]:
    """The same codes in plain PyTorch; d is a multiple of 128."""
    y = y.float()
    if granularity == "block":
        y = y.unflatten(-1, (-1, 128))
    codes, scale = encode(y, y.abs().amax(-1, keepdim=True), format)
    return (codes.flatten(-2) if granularity == "block" else codes), scale.squeeze(-1)


def eager_norm(name: str, x: Tensor, weight: Tensor) -> Tensor:
    function = F.layer_norm if name == "layer_norm_quant" else F.rms_norm
    return function(x, weight.shape, weight, eps=EPS)


def norm_quant_case(
    name: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    format: str,
    granularity: str,
    transposed: bool = False,
) -> Case:
    fused = getattr(ng, name)
    plain = ng.layer_norm if name == "layer_norm_quant" else ng.rms_norm
    given = {"qdtype": format, "granularity": granularity, "transposed": transposed}

    def ours(x: Tensor, weight: Tensor) -> tuple[Any, ...]:
        result = fused(x, weight, eps=EPS, **given)
        return tuple((q.codes, q.scale) for q in (result if transposed else (result,)))

    def eager(x: Tensor, weight: Tensor) -> tuple[Any, ...]:
        y = eager_norm(name, x, weight)
        results = [eager_codes(y, format, granularity)]
        if transposed:
            results.append(eager_codes(y.t().contiguous(), format, granularity))
        return tuple(results)

    def unfused(x: Tensor, weight: Tensor) -> tuple[Any, ...]:
        y, scheme = plain(x, x.shape[-1], weight, eps=EPS), Scheme(format, granularity)
        return (quantize(y, scheme), *([quantize(y.t(), scheme)] if transposed else []))

    def build(setting: Setting) -> Contest:
        inputs = setting.random(*shape, dtype=dtype), setting.random(shape[1], dtype=dtype)
        contest = Contest({OURS: lambda: ours(*inputs), "eager": lambda: eager(*inputs)})
        if setting.compile:
            compiled = torch.compile(eager, dynamic=False)
            contest.contestants["compile"] = lambda: compiled(*inputs)
        contest.contestants["narrowgauge unfused"] = lambda: unfused(*inputs)
        contest.bytes_moved = traffic(inputs, ours(*inputs))
        return contest

    both = " and transposed" if transposed else ""
    return Case(name, f"{format} {granularity}{both} {shape[0]}x{shape[1]} {str(dtype)[6:]}", build)


def gradient_case(shape: tuple[int, int], dtype: torch.dtype) -> Case:
    """Fake quantization in training: the dequantized norm, with its straight-through gradient."""

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return dequantize(ng.rms_norm_quant(x, weight, EPS, qdtype="int8"), x.dtype)

    def eager(x: Tensor, weight: Tensor) -> Tensor:
        y = F.rms_norm(x, weight.shape, weight, EPS)
        with torch.no_grad():
            codes, scale = eager_codes(y, "int8", "row")
            rounding = (codes.float() * scale.unsqueeze(-1)).to(x.dtype) - y
        return y + rounding

    def build(setting: Setting) -> Contest:
        x = setting.random(*shape, dtype=dtype, requires_grad=True)
        weight = setting.random(shape[1], dtype=dtype, requires_grad=True)
        return compare(setting, ours, eager, (x, weight), backward=True)

    return Case("rms_norm_quant", f"int8 row fwd+bwd {shape[0]}x{shape[1]} {str(dtype)[6:]}", build)


def linear_case(tokens: int, width: int, dtype: torch.dtype) -> Case:
    """The joined layer beside its two parts; eager is the matmul in high precision."""

    def ours(x: Tensor, norm_weight: Tensor, weight: Tensor) -> Tensor:
        return ng.rms_norm_linear(x, norm_weight, weight, None, EPS, recipe="int8-row")

    def apart(x: Tensor, norm_weight: Tensor, weight: Tensor) -> Tensor:
        return linear(ng.rms_norm(x, width, norm_weight, EPS), weight, recipe="int8-row")

    def eager(x: Tensor, norm_weight: Tensor, weight: Tensor) -> Tensor:
        return F.linear(F.rms_norm(x, norm_weight.shape, norm_weight, EPS), weight)

    def build(setting: Setting) -> Contest:
        sizes = (tokens, width), (width,), (width, width)
        inputs = [setting.random(*size, dtype=dtype, requires_grad=True) for size in sizes]
        return compare(setting, ours, eager, inputs, backward=True, rivals={"narrowgauge unfused": apart})

    return Case("rms_norm_linear", f"int8-row fwd+bwd {tokens}x{width}x{width} {str(dtype)[6:]}", build)


CASES = [
    *(
        norm_quant_case(name, shape, dtype, format, "row")
        for name in ("rms_norm_quant", "layer_norm_quant")
        for format in CODES
        for shape in SHAPES
        for dtype in (torch.float32, torch.bfloat16)
    ),
    norm_quant_case("rms_norm_quant", (131072, 128), torch.bfloat16, "int8", "row"),  # many short rows
    norm_quant_case("rms_norm_quant", SHAPES[0], torch.bfloat16, "e4m3", "block"),
    norm_quant_case("rms_norm_quant", SHAPES[0], torch.bfloat16, "e4m3", "block", transposed=True),
    norm_quant_case("rms_norm_quant", SHAPES[0], torch.bfloat16, "int8", "row", transposed=True),
    *(gradient_case(shape, torch.bfloat16) for shape in SHAPES),
    linear_case(1024, 1024, torch.float32),
]


def test_norm_quant(case: Case, contest: Callable[[Case], None]) -> None:
    contest(case)
