"""L1 normalization beside L2: in floating point, and from int8 codes to int8 codes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import narrowgauge.nn.functional as ng
from bench.harness import OURS, Case, Contest, Setting, compare
from narrowgauge.norm.quant_l1_norm import integer_affine, quant_l1_norm_op
from narrowgauge.quant import Quantized, Scheme, dequantize, quantize

EPS = 1e-5
SHAPES = ((4096, 4096), (256, 1024))
DTYPES = (torch.float32, torch.bfloat16)
KAPPA = math.sqrt(math.pi / 2)


def ours_l1(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ng.l1_layer_norm(x, weight.shape, weight, bias, EPS)


def eager_l1(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    p = x - x.mean(-1, keepdim=True)
    return p / (KAPPA * p.abs().mean(-1, keepdim=True) + EPS) * weight + bias


def l2(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ng.layer_norm(x, weight.shape, weight, bias, EPS)


def torch_l2(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, EPS)


def float_case(shape: tuple[int, int], dtype: torch.dtype, backward: bool) -> Case:
    def build(setting: Setting) -> Contest:
        x, weight, bias = (
            setting.random(*size, dtype=dtype, requires_grad=backward)
            for size in (shape, shape[1:], shape[1:])
        )
        passes = 5 if backward else 2  # x, y; and dy, x, dx
        rivals = {"L2, narrowgauge": l2, "L2, torch": torch_l2}
        return compare(
            setting,
            ours_l1,
            eager_l1,
            (x, weight, bias),
            backward=backward,
            bytes_moved=passes * x.nbytes,
            rivals=rivals,
        )

    passes = "fwd+bwd" if backward else "fwd"
    return Case("l1_layer_norm", f"{passes} {shape[0]}x{shape[1]} {str(dtype)[6:]}", build)


def codes_case(shape: tuple[int, int]) -> Case:
    """The same int8 rows through the integers, and through a float norm between a decoder and an encoder."""

    def build(setting: Setting) -> Contest:
        q = quantize(setting.random(*shape), Scheme("int8", "tensor"))
        weight, bias = setting.random(shape[1]), setting.random(shape[1])
        w, b, scale = integer_affine(weight, bias, shape[1], 8, 4.0, q.codes.device)
        limit = round(KAPPA * 4 * 2**16)

        def ours(codes: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return quant_l1_norm_op(codes, w, b, limit)  # parameters are integers already, as in inference

        def l2_of_codes(norm: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
            def run(codes: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
                x = dequantize(Quantized(codes, q.scale, None, q.scheme, q.shape))
                return quantize(norm(x, weight, bias), Scheme("int8", "row")).codes

            return run

        def eager(codes: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            y = torch_l2(codes.float() * q.scale, weight, bias)
            return (y / scale).round_().clamp_(-127, 127).to(torch.int8)  # to a fixed scale, as ours

        inputs = (q.codes, weight, bias)
        functions = {OURS: ours, "eager L2": eager, "L2, narrowgauge": l2_of_codes(l2)}
        if setting.compile:
            functions["compiled L2"] = torch.compile(eager, dynamic=False)
        calls = {name: partial(function, *inputs) for name, function in functions.items()}
        return Contest(calls, bytes_moved=2 * q.codes.nbytes)

    return Case("quant_l1_norm", f"fwd {shape[0]}x{shape[1]} int8", build)


CASES = [
    *(
        float_case(shape, dtype, backward)
        for backward in (False, True)
        for shape in SHAPES
        for dtype in DTYPES
    ),
    *(codes_case(shape) for shape in SHAPES),
]


def test_l1_norm(case: Case, contest: Callable[[Case], None]) -> None:
    contest(case)
