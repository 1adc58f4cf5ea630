"""L1 LayerNorm in integers: int8 codes in, int8 codes out. Our own design, in the style of arXiv 2411.10948.

With codes X of a row of d elements, S = sum(X) and A = sum(|d X - S|),

    x_hat = (d X - S) d / (factor A)

depends on the codes alone: the scale of the input cancels. One fixed-point reciprocal per row gives
h = x_hat / range * 2^12, clipped to the range, and the result is (h W / 2^15 + B) / 2^5 with the weight and the bias as
16-bit integers W and B in units of the output's scale. Products and the result are rounded halves up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from narrowgauge.norm import _arguments
from narrowgauge.norm._arguments import Shape
from narrowgauge.norm.l1_norm import (
    L1LayerNorm,
    factor_of,
    l1_layer_norm_backward_op,
    l1_layer_norm_forward_op,
)
from narrowgauge.ops import Sample, SampleMaker, checks, operator, system
from narrowgauge.ops.autograd import fused_function
from narrowgauge.quant.quantize import dequantize, quantize
from narrowgauge.quant.scheme import Quantized, Scheme

RANGE = 4096  # h at the end of the range
MAX_COLUMNS = 2**18


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a * b / 2^15, halves up."""
    return (a * b + 2**14) >> 15


def _samples(make: SampleMaker) -> Iterator[Sample]:
    limit = round(factor_of(True) * 4 * 2**16)

    def call(x: Tensor, limit: int = limit) -> tuple[object, ...]:
        codes, d = x.round().clamp(-128, 127).to(torch.int8), x.shape[-1]
        weight = (make(d, dtype=torch.float32) * 8000).clamp(-30000, 30000).int()
        return codes, weight, (make(d, dtype=torch.float32) * 300).clamp(-1000, 1000).int(), limit

    for shape, why in (
        ((3, 64), "whole vectors"),
        ((2, 3, 17), "three dimensions and an odd row"),
        ((5, 1), "rows of one element"),
        ((129,), "a single row without a batch dimension"),
        ((0, 8), "no rows"),
        ((4, 0), "rows without elements"),
        ((2, 1040), "several vectors a thread"),
        ((1, 2053), "an odd row beyond the registers"),
        ((1, 32784), "vectors beyond the registers"),
    ):
        yield Sample(call(make(*shape, scale=40)), why)
    rows = make(10, 48, scale=40)
    rows[0], rows[1], rows[2] = 0, 127, -128  # constant rows
    rows[3, :-1], rows[3, -1] = 5, 6  # nearly constant: the range is less than a code
    rows[4, :-1], rows[4, -1] = -3, 127
    rows[5] = rows[5] * 0.02
    rows[6, ::2], rows[6, 1::2] = -128, 127  # the widest row
    rows[7, ::2], rows[7, 1::2] = 0, 1  # the mean is half a code
    yield Sample(call(rows), "constant and nearly constant rows, the widest row")
    yield Sample(call(make(4, 48, scale=3), limit=2**20 - 1), "few codes, the widest range")
    yield Sample(call(make(4, 48, scale=40), limit=2**15), "a narrow range")


@operator(
    "quant_l1_norm(Tensor codes, Tensor weight, Tensor bias, int limit) -> Tensor",
    samples=_samples,
    dtypes=(torch.float32,),
    tolerance="exact",
)
def quant_l1_norm_op(codes: Tensor, weight: Tensor, bias: Tensor, limit: int) -> Tensor:
    """Codes of the normalized rows; limit is factor * range * 2^16. All arithmetic is on 64-bit integers."""
    d = codes.shape[-1]
    if d == 0:
        return codes.clone()
    x = codes.long()
    total = x.sum(-1, keepdim=True)
    distances = (d * x - total).abs().sum(-1, keepdim=True)  # A
    pivot = total // d
    centre = pivot + (2 * (total - d * pivot) > d).long()  # the code next to the mean, the lower one of two
    # The range in units of a code, with 32 bits after the point.
    reach = ((limit * ((distances << 14) // d)) << 2) // d
    constant = distances == 0
    divisor = reach.masked_fill(constant, 1)
    clipped = (((reach + 2**31) >> 32) + 1).clamp(max=255)
    # The largest shift that keeps clipped << shift within 15 bits.
    shift = sum((clipped << k <= 32767).long() for k in range(1, 15))
    gain = (((torch.ones_like(total) << (59 - shift)) + divisor // 2) // divisor).clamp(max=32767)
    numerator = centre * d - total
    size = (((numerator.abs() << 44) + divisor * d // 2) // (divisor * d)).clamp(max=RANGE)
    gain, offset = gain.masked_fill(constant, 0), (size * numerator.sign()).masked_fill(constant, 0)

    scaled = (x - centre).clamp(-clipped, clipped) << shift
    h = (_product(scaled, gain) + offset).clamp(-RANGE, RANGE)
    return ((_product(h, weight.long()) + bias.long() + 16) >> 5).to(torch.int8)


def integer_affine(
    weight: Tensor | None, bias: Tensor | None, columns: int, bits: int, limit: float, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight and bias as the integers of `quant_l1_norm`, and the scale of its result.

    The scale is such that the largest code is `limit` times the largest weight, plus the largest bias.
    """
    largest = float(2 ** (bits - 1) - 1)
    w = torch.ones(columns, device=device) if weight is None else weight.detach().float().flatten()
    b = torch.zeros(columns, device=device) if bias is None else bias.detach().float().flatten()
    reach = w.abs().amax() * limit + b.abs().amax() if columns else w.new_ones(())
    scale = torch.where(reach == 0, 1.0, reach / torch.full_like(reach, largest))
    integers = [
        (v / scale).nan_to_num().round().clamp(-bound, bound).int()
        for v, bound in ((w * (limit * 256), largest * 256), (b * 32, largest * 32))
    ]
    return integers[0], integers[1], scale


def _check_options(name: str, bits: int, limit: float) -> None:
    checks.check_choice(name, "bits", bits, range(2, 9))
    if not isinstance(limit, (int, float)) or not 0.5 <= limit <= 8:
        raise ValueError(f"{name}: limit must be between 0.5 and 8, got {limit!r}")


def quant_l1_layer_norm(
    q: Quantized,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int = 8,
    limit: float = 4.0,
    gaussian_scale: bool = True,
) -> Quantized:
    """L1 layer normalization over the last dimension, from int8 codes to int8 codes, in integers alone.

    Args:
        q: Input of shape ``(..., d)`` in int8, with one scale per tensor or per row; d is at most 2**18.
        weight, bias: Floating-point, of shape ``(d,)``; rounded to 16-bit integers in every call. Default: none.
        bits: Bits of the result, 2 to 8; its codes are in int8 whatever their number. Default 8.
        limit: Normalized values are clipped to plus and minus this. Default 4.
        gaussian_scale: As in `l1_layer_norm`. Default True.

    Returns:
        The quantized result, with a scale per tensor or per row as q; the scales are all the same, but NaN where
        that of q is NaN. There is no eps: a row whose codes are all the same gives the bias.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype or shape, or bits or limit do not fit.

    Our own design, in the style of arXiv 2411.10948, whose text was not available.
    """
    name = "quant_l1_layer_norm"
    _check_options(name, bits, limit)
    if not isinstance(q, Quantized):
        raise TypeError(f"{name}: q must be a Quantized (what quantize returns), got {type(q).__name__}")
    if q.scheme.format != "int8" or q.scheme.granularity not in ("tensor", "row"):
        raise ValueError(
            f"{name}: q is {q.scheme}; expected int8 with a scale per tensor or row, which cancels in the norm"
        )
    if q.codes.dim() == 0 or q.codes.shape[-1] > MAX_COLUMNS:
        raise ValueError(
            f"{name}: q has shape {tuple(q.codes.shape)}; expected rows of at most {MAX_COLUMNS}"
        )
    columns = q.codes.shape[-1]
    checks.check_floating(name, weight=weight, bias=bias)
    checks.check_same_device(name, "q", q.codes, weight=weight, bias=bias)
    for argument, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and tuple(vector.shape) != (columns,):
            raise ValueError(f"{name}: {argument} has shape {tuple(vector.shape)}; expected ({columns},)")
    w, b, scale = integer_affine(weight, bias, columns, bits, limit, q.codes.device)
    return _normalized(q, w, b, scale, limit, factor_of(gaussian_scale))


def _normalized(q: Quantized, w: Tensor, b: Tensor, scale: Tensor, limit: float, factor: float) -> Quantized:
    codes = quant_l1_norm_op(q.codes.contiguous(), w, b, round(factor * limit * 2**16))
    return Quantized(codes, torch.where(q.scale.isnan(), torch.nan, scale), None, q.scheme, q.codes.shape)


def _integer_gradients(
    dy: Tensor, q: Quantized, weight: Tensor | None, limit: float, factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward in integers: dy, the weight and x_hat are 8-bit codes, dy rounded stochastically."""
    d = q.codes.shape[-1]
    unit, zero, step = integer_affine(None, None, d, 8, limit, dy.device)
    x_hat = _normalized(q, unit, zero, step, limit, factor).codes.long()
    g = quantize(dy, Scheme("int8", "row"), rounding="stochastic")
    w = None if weight is None else quantize(weight, Scheme("int8"))
    h = g.codes.long() * (1 if w is None else w.codes.long())
    h_scale = g.scale.unsqueeze(-1) * (1.0 if w is None else w.scale)
    x = q.codes.long()
    p = d * x - x.sum(-1, keepdim=True)
    sign = p.sign()
    # Exact sums; from here on one number per row is floating-point.
    mean, dot = (terms.sum(-1, keepdim=True).float() / d for terms in (h, h * x_hat))
    mean_sign = sign.sum(-1, keepdim=True).float() / d
    deviation = p.abs().sum(-1, keepdim=True).double() * (factor / d**2)
    inverse = torch.where(deviation > 0, 1 / deviation, 0).float() / q.scale.unsqueeze(-1)
    dx = (h - mean - factor * step * (sign - mean_sign) * dot) * (h_scale * inverse)
    gradient = (g.codes * g.scale.unsqueeze(-1)).reshape(-1, d)
    return dx, (gradient * (x_hat.reshape(-1, d) * step)).sum(0), gradient.sum(0)


def _run(x: Tensor, weight: Tensor | None, bias: Tensor | None, *options: Any) -> tuple[Tensor, Quantized]:
    bits, limit, factor, _, _ = options
    q = quantize(x, Scheme("int8", "row"))
    w, b, scale = integer_affine(weight, bias, x.shape[-1], bits, limit, x.device)
    return dequantize(_normalized(q, w, b, scale, limit, factor), x.dtype), q


def _setup(ctx: Any, args: tuple[Any, ...], results: tuple[Tensor, Quantized]) -> Tensor:
    x, weight, bias, _, *ctx.options = args
    y, q = results
    ctx.x_dtype, ctx.scheme = x.dtype, q.scheme
    ctx.save_for_backward(q.codes, q.scale, weight, bias)
    return y


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    codes, scale, weight, bias = ctx.saved_tensors
    limit, factor, eps, gradient = ctx.options
    q = Quantized(codes, scale, None, ctx.scheme, codes.shape)
    dy = dy.contiguous()
    if gradient == "quantized":
        dx, dweight, dbias = _integer_gradients(dy, q, weight, limit, factor)
    else:
        x = dequantize(q)
        wide = [None if v is None else v.float() for v in (weight, bias)]
        _, mean, inverse = l1_layer_norm_forward_op(x, None, None, eps, factor)
        dx, dweight, dbias = l1_layer_norm_backward_op(dy.float(), x, mean, inverse, *wide, factor, True)
    return (
        dx.to(ctx.x_dtype),
        None if weight is None else dweight.to(weight.dtype),
        None if bias is None else dbias.to(bias.dtype),
        *[None] * 5,
    )


_straight_through = fused_function("quant_l1_layer_norm", _run, _setup, _gradients)


class QuantL1LayerNorm(L1LayerNorm):
    """L1 layer normalization computed in integers, for quantized networks and their training.

    Takes a quantized tensor (int8, one scale per tensor or row) and returns one; or a floating-point tensor, which it
    quantizes row by row, and returns the result in its dtype. The latter has a gradient, straight through the
    roundings. Parameters are those of `L1LayerNorm`, in floating point.

    Args:
        normalized_shape: Size of the last dimension.
        eps: Of the gradient; the integer form needs none. Default 1e-5.
        gaussian_scale: Multiply the deviation by sqrt(pi / 2). Default True.
        elementwise_affine: Learn a weight (and bias). Default True.
        bits: Bits of the result, 2 to 8. Default 8.
        limit: Normalized values are clipped to plus and minus this. Default 4.
        gradient: ``"float"`` (default): that of `l1_layer_norm` at the quantized input; ``"quantized"``: from 8-bit
            codes of the output's gradient, rounded stochastically, and of weight and normalized values.
        bias: Learn a bias as well. Default True.

    Our own design, in the style of arXiv 2411.10948, whose text was not available.
    """

    def __init__(
        self,
        normalized_shape: Shape,
        eps: float = 1e-5,
        gaussian_scale: bool = True,
        elementwise_affine: bool = True,
        bits: int = 8,
        *,
        limit: float = 4.0,
        gradient: Literal["float", "quantized"] = "float",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        name = "QuantL1LayerNorm"
        _check_options(name, bits, limit)
        checks.check_choice(name, "gradient", gradient, ("float", "quantized"))
        super().__init__(
            normalized_shape, eps, gaussian_scale, elementwise_affine, bias=bias, device=device, dtype=dtype
        )
        if len(self.normalized_shape) != 1 or not 0 < self.normalized_shape[0] <= MAX_COLUMNS:
            raise ValueError(
                f"{name}: normalized_shape is {self.normalized_shape}; expected one size, 1 to {MAX_COLUMNS}"
            )
        self.bits, self.limit, self.gradient = bits, float(limit), gradient

    def forward(self, x: Tensor | Quantized) -> Any:
        if isinstance(x, Quantized):
            return quant_l1_layer_norm(
                x,
                self.weight,
                self.bias,
                bits=self.bits,
                limit=self.limit,
                gaussian_scale=self.gaussian_scale,
            )
        name, factor = "QuantL1LayerNorm", factor_of(self.gaussian_scale)
        _arguments.normalized_sizes(name, x, self.normalized_shape)
        checks.check_floating(name, x=x)
        return _straight_through.apply(
            x.contiguous(), self.weight, self.bias, self.bits, self.limit, factor, self.eps, self.gradient
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}, limit={self.limit}, gradient={self.gradient!r}"


system(
    "quant_l1_norm",
    title="L1 normalization in integers",
    source="our design, in the style of arXiv 2411.10948",
    page="norm/l1.md",
    functions=("quant_l1_layer_norm",),
    modules=("QuantL1LayerNorm",),
    operators=("quant_l1_norm",),
    bench=("quant_l1_norm",),
    reasons={"golden": "no authors' code exists"},
)
