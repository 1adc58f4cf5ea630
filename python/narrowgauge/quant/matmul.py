"""Matmuls of quantized operands.

    (left codes @ right codes.T) * left scale * right scale

A scale belongs to a row, so it leaves the sum: the product itself is one of codes. Tensor cores compute it
where the device has them for the format; elsewhere a float32 matmul does, which is exact but for its
accumulation. (A CPU has ``torch._int_mm``, but it was 6 to 19 times slower than the float32 matmul on AVX2
with PyTorch 2.13.)
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

from narrowgauge.ops.checks import check_choice
from narrowgauge.quant.quantize import quantize_operator
from narrowgauge.quant.scheme import Quantized, Scheme

Operand = tuple[Tensor, Tensor]
"""Codes with the contraction axis last, and one scale per row."""


def operand(x: Tensor, scheme: Scheme, *, contract: int) -> Operand:
    """Quantizes a matrix for a product that sums over its axis `contract`."""
    if x.dtype == torch.float64:
        x = x.float()
    if contract == 1:
        return quantize_operator(x.contiguous(), scheme.format, "row")
    codes, scale = quantize_operator(x.contiguous(), scheme.format, "column")
    return codes.t(), scale


def _has_tensor_cores(codes: Tensor) -> bool:
    if codes.device.type != "cuda" or torch.version.cuda is None:
        return False
    properties = torch.cuda.get_device_properties(codes.device)
    needed = (8, 0) if codes.dtype == torch.int8 else (8, 9)
    return (properties.major, properties.minor) >= needed


def _padded(codes: Tensor, rows: int, columns: int) -> Tensor:
    """Codes with zeros appended, which add nothing to the product."""
    rows, columns = rows - codes.shape[0], columns - codes.shape[1]
    if rows == 0 and columns == 0:
        return codes.contiguous()
    return F.pad(codes.view(torch.int8), (0, columns, 0, rows)).view(codes.dtype)


def _multiple(size: int, of: int) -> int:
    return (size + of - 1) // of * of


def _int8_product(left: Tensor, right: Tensor) -> Tensor:
    """int32 product; cuBLASLt wants more than 16 rows, and K and N to be multiples of 8."""
    m, k, n = left.shape[0], left.shape[1], right.shape[0]
    left = _padded(left, max(m, 17), _multiple(k, 8))
    right = _padded(right, _multiple(n, 8), _multiple(k, 8))
    return torch._int_mm(left, right.t())[:m, :n]


def _fp8_product(
    left: Operand, right: Operand, bias: Tensor | None, out_dtype: torch.dtype
) -> tuple[Tensor, bool]:
    """The product, and whether the scales and the bias are in it; K and N must be multiples of 16."""
    (a, a_scale), (b, b_scale) = left, right
    m, k, n = a.shape[0], a.shape[1], b.shape[0]
    a = _padded(a, m, _multiple(k, 16))
    b = _padded(b, _multiple(n, 16), _multiple(k, 16))
    if out_dtype == torch.bfloat16:  # the only output type for which scales per row can be fused
        b_scale = F.pad(b_scale, (0, b.shape[0] - n), value=1.0)
        if bias is not None:
            bias = F.pad(bias.bfloat16(), (0, b.shape[0] - n))
        product = torch._scaled_mm(
            a, b.t(), a_scale.unsqueeze(1), b_scale.unsqueeze(0), bias=bias, out_dtype=out_dtype
        )
        return product[:, :n], True
    one = torch.ones((), device=a.device)
    return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.float32)[:, :n], False


def scaled_matmul(
    left: Operand, right: Operand, out_dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """``left @ right.T (+ bias)`` of two quantized operands, rounded once to `out_dtype`."""
    (a, a_scale), (b, b_scale) = left, right
    if not (_has_tensor_cores(a) and a.numel() and b.numel()):
        autocast = torch.is_autocast_enabled(a.device.type)
        with torch.autocast(a.device.type, enabled=False) if autocast else contextlib.nullcontext():
            product = a.float() @ b.float().t()
    elif a.dtype == torch.int8:
        product = _int8_product(a, b)
    else:
        product, done = _fp8_product(left, right, bias, out_dtype)
        if done:
            return product
    product = product * a_scale.unsqueeze(1) * b_scale
    return (product if bias is None else product + bias).to(out_dtype)


def quantized_matmul(a: Quantized, b: Quantized, out_dtype: torch.dtype = torch.float32) -> Tensor:
    """``dequantize(a) @ dequantize(b).T`` with the product taken of the codes.

    Args:
        a: Matrix (M, K) quantized per row.
        b: Matrix (N, K) quantized per row, in the same format.
        out_dtype: Type of the result; the sums and the scaling are float32 or better.
    """
    for name, q in (("a", a), ("b", b)):
        if not isinstance(q, Quantized):
            raise TypeError(f"quantized_matmul: {name} must be a Quantized, got {type(q).__name__}")
        check_choice("quantized_matmul", f"{name}.scheme.granularity", q.scheme.granularity, ("row",))
        if len(q.shape) != 2:
            raise ValueError(f"quantized_matmul: {name} must be a matrix, got shape {tuple(q.shape)}")
    if a.shape[1] != b.shape[1] or a.scheme.format != b.scheme.format:
        raise ValueError(
            "quantized_matmul: a (M, K) and b (N, K) must have the same K and format, "
            f"got {tuple(a.shape)} in {a.scheme.format} and {tuple(b.shape)} in {b.scheme.format}"
        )
    check_choice(
        "quantized_matmul",
        "out_dtype",
        out_dtype,
        (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    )
    return scaled_matmul((a.codes, a.scale), (b.codes, b.scale), out_dtype)
