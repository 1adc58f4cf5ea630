"""RMSNorm and LayerNorm whose result is quantized in the same pass: the input of a low-precision matmul.

    y = norm(x (+ residual)),    scale = max|y| / largest,    code = round(y / scale)

One scale serves a row, 128 consecutive elements of a row, or everything; the last is given, not found. y is not
rounded to the dtype of x in between, so a code may differ by one step from that of the two separate calls.

The transposed copy holds the same y as a matrix ``(d, N)``, N being the number of rows, quantized by the same scheme
along the rows of that matrix. A matmul that sums over rows of x, as that of a weight's gradient does, needs it.

The gradient is straight-through: that of y.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from narrowgauge.norm import _arguments, _reference
from narrowgauge.norm.layer_norm import layer_norm_backward_op
from narrowgauge.norm.rms_norm import rms_norm_backward_op
from narrowgauge.ops import Sample, SampleMaker, checks, operator, system
from narrowgauge.ops.autograd import fused_function
from narrowgauge.quant.formats import FORMATS, Float, round_nearest, scale_of
from narrowgauge.quant.quantize import amax_of, spread
from narrowgauge.quant.scheme import Quantized, Scheme

NARROW = (torch.float32, torch.bfloat16, torch.float16)
GRANULARITIES = ("tensor", "row", "block")

Results = Quantized | tuple[Any, ...]


def _encode(
    y: Tensor, format: str, granularity: str, given: Tensor | None, upper_bound: float
) -> tuple[Tensor, Tensor]:
    """Codes of y, and the scales that were found."""
    target = FORMATS[format]
    if given is None:
        amax = amax_of(y, granularity)
        scale = scale_of(amax, target)
        scale = torch.where((amax > 0) & (scale > upper_bound), upper_bound, scale)
        return round_nearest(y / spread(scale, granularity, y.shape), target), scale
    v = y / given.float()
    if isinstance(target, Float):  # a scale that was given cannot become NaN; the code can
        nan = torch.full_like(v, torch.nan)
        return torch.where(v.isnan(), nan, v.clamp(-target.fmax, target.fmax)).to(target.dtype), y.new_empty(
            0
        )
    return round_nearest(v, target), y.new_empty(0)


SHAPES = (
    ((3, 64), "a multiple of every vector width"),
    ((2, 3, 17), "three dimensions and an odd row"),
    ((5, 1), "rows of one element"),
    ((0, 8), "no rows"),
    ((4, 0), "rows without elements"),
    ((3, 257), "an odd row of three blocks"),
    ((2, 1028), "longer than one warp's registers, a short block at the end"),
)


def _samples(make: SampleMaker) -> Iterator[Sample]:
    formats = tuple(FORMATS)
    static = make(1, dtype=torch.float32).abs().reshape(()) * 0.05 + 0.01
    none = math.inf

    def call(shape: tuple[int, ...], i: int, granularity: str, **given: Any) -> tuple[Any, ...]:
        x = make(*shape, scale=given.get("scale", 1.0))
        residual = make(*shape, dtype=given.get("residual")) if "residual" in given else None
        weight = make(shape[-1]) if given.get("weight", True) else None
        bias = make(shape[-1], dtype=torch.float32) if given.get("bias", False) else None
        return (
            x,
            residual,
            weight,
            bias,
            1e-5,
            given.get("offset", 0.0),
            bool(i % 2),
            formats[i % 3],
            granularity,
            static if granularity == "tensor" else None,
            given.get("bound", none),
            given.get("transposed", False),
        )

    for i, (shape, why) in enumerate(SHAPES):
        yield Sample(call(shape, i, "row"), why)
        yield Sample(call(shape, i + 1, "block"), why)
    for i, granularity in enumerate(GRANULARITIES):
        yield Sample(
            call((6, 40), i, granularity, bias=True, offset=1.0, residual=make.dtype), "everything beside x"
        )
        yield Sample(
            call((6, 40), i + 1, granularity, weight=False, bias=True, residual=torch.float32),
            "wide residual",
        )
        yield Sample(call((9, 72), i + 2, granularity, transposed=True), "transposed, part of a tile")
        yield Sample(
            call((130, 19), i, granularity, transposed=True, residual=make.dtype),
            "two tiles of rows, odd sizes",
        )
        yield Sample(call((0, 8), i, granularity, transposed=True), "no rows to transpose")
        yield Sample(call((3, 0), i + 1, granularity, transposed=True), "no columns to transpose")
    yield Sample(
        call((32, 80), 1, "block", transposed=True), "columns of whole vectors, two tiles of columns"
    )
    yield Sample(call((3, 48), 0, "row", bound=0.01), "scales bounded from above")
    yield Sample(call((3, 48), 1, "row", scale=1e-4), "eps dominates")
    yield Sample(call((4, 8208), 0, "row"), "rows beyond the registers")
    yield Sample(call((1, 16512), 1, "block"), "blocks of a row beyond the registers")


@operator(
    "norm_quant(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, float weight_offset,"
    " bool centred, str format, str granularity, Tensor? scale, float scale_upper_bound, bool transposed)"
    " -> (Tensor codes, Tensor scale_out, Tensor codes_t, Tensor scale_t, Tensor residual_out, Tensor mean,"
    " Tensor rstd)",
    samples=_samples,
    dtypes=NARROW,
)
def norm_quant_op(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    centred: bool,
    format: str,
    granularity: str,
    scale: Tensor | None,
    scale_upper_bound: float,
    transposed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Codes and scales of the norm, of its transposed copy, the sum and the statistics; empty where not asked for.

    `scale` goes with the granularity "tensor" and with no other. `centred` is LayerNorm.
    """
    y, s, mean, rstd = _reference.forward(
        x, residual, weight, bias, eps, weight_offset, torch.float32, centred
    )
    codes, scale_out = _encode(y, format, granularity, scale, scale_upper_bound)
    codes_t, scale_t = codes.new_empty(0), y.new_empty(0)
    if transposed:
        rows = y.unsqueeze(0).flatten(0, -2)
        codes_t, scale_t = _encode(rows.t().contiguous(), format, granularity, scale, scale_upper_bound)
    return (
        codes,
        scale_out,
        codes_t,
        scale_t,
        y.new_empty(0, dtype=x.dtype) if residual is None else _reference.stored_sum(s, residual),
        mean if centred else y.new_empty(0),
        rstd,
    )


# --- gradient -----------------------------------------------------------------------------------------------


def norm_backward(
    dy: Tensor,
    s: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dresidual: Tensor | None,
    weight_offset: float,
    centred: bool,
    affine_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the norm that was quantized."""
    if centred:
        return layer_norm_backward_op(
            dy, s, mean, rstd, weight, bias, dresidual, weight_offset, affine_gradients
        )
    return rms_norm_backward_op(dy, s, rstd, weight, bias, dresidual, weight_offset, affine_gradients)


def _setup(ctx: Any, args: tuple[Any, ...], results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, residual, weight, bias, _, ctx.weight_offset, ctx.centred, *_ = args
    *quantized, residual_out, mean, rstd = results
    ctx.x_dtype, ctx.with_residual = x.dtype, residual is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if residual is None else residual_out, mean, rstd, weight, bias)
    straight_through = x.new_zeros(()).expand(x.shape)
    if residual is None:
        ctx.mark_non_differentiable(*quantized, residual_out)
    else:
        ctx.mark_non_differentiable(*quantized)
    return (*quantized, residual_out, straight_through)


def _backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    *_, dresidual, dy = gradients
    if not ctx.with_residual:  # zeros under torch.compile, which knows no absent gradients
        dresidual = None
    s, mean, rstd, weight, bias = ctx.saved_tensors
    _, wants_residual, for_weight, for_bias, *_ = ctx.needs_input_grad
    dweight = dbias = None
    if dy is None:  # only the sum was used: its gradient passes through
        ds = dresidual
    else:
        ds, dweight, dbias = norm_backward(
            dy.contiguous(),
            s,
            mean,
            rstd,
            weight,
            bias,
            None if dresidual is None else dresidual.contiguous(),
            ctx.weight_offset,
            ctx.centred,
            for_weight or for_bias,
        )
    return (
        None if ds is None else ds.to(ctx.x_dtype),
        ds if wants_residual else None,
        dweight if for_weight else None,
        dbias if for_bias else None,
        *(None,) * 8,
    )


_NormQuant = fused_function("norm_quant", norm_quant_op, _setup, _backward)


# --- public functions ---------------------------------------------------------------------------------------


def _static_scale(function: str, x: Tensor, granularity: str, scale: Tensor | float | None) -> Tensor | None:
    if granularity != "tensor":
        if scale is not None:
            raise ValueError(
                f'{function}: scale belongs to granularity="tensor", but granularity is {granularity!r}, '
                "which finds its scales; leave scale out"
            )
        return None
    if scale is None:
        raise ValueError(
            f'{function}: granularity="tensor" needs scale, found beforehand, for example as max|y| / 127 for int8; '
            'granularity="row" finds its own'
        )
    if isinstance(scale, Tensor):
        if scale.dtype != torch.float32 or scale.numel() != 1:
            raise ValueError(
                f"{function}: scale must be one float32 number, got {scale.dtype} of shape {tuple(scale.shape)}"
            )
        checks.check_same_device(function, "x", x, scale=scale)
        return scale.detach().reshape(())
    if not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
        raise ValueError(f"{function}: scale must be a finite number > 0 or a tensor of one, got {scale!r}")
    return torch.full((), scale, dtype=torch.float32, device=x.device)


def _norm_quant(
    function: str,
    centred: bool,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    qdtype: str,
    granularity: str,
    scale: Tensor | float | None,
    residual: Tensor | None,
    weight_offset: float,
    transposed: bool,
    scale_upper_bound: float | None,
) -> Results:
    checks.check_choice(function, "qdtype", qdtype, FORMATS)
    checks.check_choice(function, "granularity", granularity, GRANULARITIES)
    sizes = _arguments.last_size(function, x)
    if residual is not None:
        residual = _arguments.residual_as(function, x, residual, None)
    _arguments.check(function, x, sizes, weight, bias, eps, None, residual)
    if x.dtype not in NARROW:
        raise TypeError(f"{function}: x has dtype {x.dtype}; expected float32, bfloat16 or float16")
    scale = _static_scale(function, x, granularity, scale)
    if scale_upper_bound is None:
        upper_bound = math.inf
    elif scale is not None:
        raise ValueError(f'{function}: scale_upper_bound has no meaning beside granularity="tensor"')
    elif not isinstance(scale_upper_bound, (int, float)) or not 0 < scale_upper_bound < math.inf:
        raise ValueError(
            f"{function}: scale_upper_bound must be a finite number > 0, got {scale_upper_bound!r}"
        )
    else:
        upper_bound = float(scale_upper_bound)
    args = (
        x.contiguous(),
        None if residual is None else residual.contiguous(),
        _arguments.packed(weight),
        _arguments.packed(bias),
        eps,
        weight_offset,
        centred,
        qdtype,
        granularity,
        scale,
        upper_bound,
        transposed,
    )
    straight_through = None
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args[:4]):
        *results, straight_through = _NormQuant.apply(*args)
    else:
        results = norm_quant_op(*args)
    codes, found, codes_t, scale_t, residual_out = results[:5]
    scheme = Scheme(qdtype, granularity)
    q = Quantized(codes, found if scale is None else scale, None, scheme, x.shape)
    q.straight_through = straight_through
    returned: list[Any] = [q]
    if transposed:
        returned.append(Quantized(codes_t, scale_t if scale is None else scale, None, scheme, codes_t.shape))
    if residual is not None:
        returned.append(residual_out)
    return q if len(returned) == 1 else tuple(returned)


def rms_norm_quant(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    qdtype: str,
    granularity: str = "row",
    scale: Tensor | float | None = None,
    residual: Tensor | None = None,
    bias: Tensor | None = None,
    weight_offset: float = 0.0,
    transposed: bool = False,
    scale_upper_bound: float | None = None,
) -> Results:
    """RMSNorm over the last dimension with a quantized result, in one pass over memory.

    Args:
        x: Input of shape ``(..., d)``; float32, bfloat16 or float16; any layout.
        weight: Scale of shape ``(d,)``, in the dtype of x or float32. Default: none.
        eps: Added to the mean square. Default 1e-6.
        qdtype: Format of the codes: ``"int8"``, ``"e4m3"`` or ``"e5m2"``.
        granularity: ``"row"`` (default): one scale per row. ``"block"``: one per 128 consecutive elements of a row,
            fewer at its end. ``"tensor"``: `scale`, for everything.
        scale: With granularity ``"tensor"``: what a code is multiplied by, found beforehand. Values beyond the largest
            code saturate; a NaN gives a NaN code, in int8 (which has none) 0.
        residual: Residual stream to add first, shape of x, in the dtype of x or float32.
        bias: Shift of shape ``(d,)``, in the dtype of x or float32. Default: none.
        weight_offset: Added to the weight; 1 for a zero-centred weight, as in Gemma. Default 0.
        transposed: Return the transposed copy as well: the norm as a matrix ``(d, N)`` of all N rows, quantized by
            the same scheme along the rows of that matrix. Default False.
        scale_upper_bound: Upper bound of the scales that are found; values beyond it saturate. Default: none.

    Returns:
        The `narrowgauge.quant.Quantized` result, then the transposed copy where it is asked for, then, with
        `residual`, the new residual stream. `narrowgauge.quant.dequantize` of the first passes its gradient through
        the rounding to x, weight, bias and residual. A NaN or an infinity in a row makes its scale NaN and its codes 0.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, a device, eps, qdtype, granularity, scale or scale_upper_bound does not fit.

    Source: arXiv 1910.07467.
    """
    return _norm_quant(
        "rms_norm_quant",
        False,
        x,
        weight,
        bias,
        eps,
        qdtype,
        granularity,
        scale,
        residual,
        weight_offset,
        transposed,
        scale_upper_bound,
    )


def layer_norm_quant(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    qdtype: str,
    granularity: str = "row",
    scale: Tensor | float | None = None,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
    transposed: bool = False,
    scale_upper_bound: float | None = None,
) -> Results:
    """LayerNorm over the last dimension with a quantized result, in one pass over memory.

    Args:
        x: Input of shape ``(..., d)``; float32, bfloat16 or float16; any layout.
        weight, bias: Of shape ``(d,)``, in the dtype of x or float32. Default: none.
        eps: Added to the variance. Default 1e-5.
        qdtype, granularity, scale, residual, weight_offset, transposed, scale_upper_bound: As in `rms_norm_quant`.

    Returns:
        As `rms_norm_quant`.

    Raises:
        TypeError, ValueError: As `rms_norm_quant`.

    Source: arXiv 1607.06450.
    """
    return _norm_quant(
        "layer_norm_quant",
        True,
        x,
        weight,
        bias,
        eps,
        qdtype,
        granularity,
        scale,
        residual,
        weight_offset,
        transposed,
        scale_upper_bound,
    )


system(
    "norm_quant",
    title="Norm + quantize",
    source="arXiv 1910.07467, arXiv 1607.06450, arXiv 2412.19437",
    page="norm/norm_quant.md",
    functions=("rms_norm_quant", "layer_norm_quant", "rms_norm_linear", "layer_norm_linear"),
    modules=("RMSNormLinear", "LayerNormLinear"),
    operators=("norm_quant",),
    bench=("rms_norm_quant", "layer_norm_quant", "rms_norm_linear"),
    reasons={"golden": "no authors' code; compared with the norm in float64 and with quantize"},
)
