"""RMSNorm whose result is quantized row by row in the same pass: the input of a low-precision matmul.

    y = rms_norm(x (+ residual)),    scale = max|y| / largest,    code = round(y / scale)

y is not rounded to the dtype of x in between, so a code may differ by one step from that of the two separate
calls.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from narrowgauge.norm import _arguments, _reference
from narrowgauge.ops import Sample, SampleMaker, checks, operator
from narrowgauge.quant.formats import FORMATS, round_nearest, scale_of
from narrowgauge.quant.scheme import Quantized, Scheme

NARROW = (torch.float32, torch.bfloat16, torch.float16)


def _quantized(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    format: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales, and the sum that was normalized."""
    y, s, _, _ = _reference.forward(
        x, residual, weight, bias, eps, weight_offset, torch.float32, centred=False
    )
    amax = y.abs().amax(-1) if y.numel() else y.new_zeros(y.shape[:-1])
    scale = scale_of(amax, FORMATS[format])
    return round_nearest(y / scale.unsqueeze(-1), FORMATS[format]), scale, s


def _samples_of(make: SampleMaker, residual: bool) -> Iterator[Sample]:
    for index, sample in enumerate(_reference.forward_samples(make, residual)):
        format = tuple(FORMATS)[index % len(FORMATS)]
        yield Sample((*sample.args[:-1], format), sample.why)
    rest = (make(4, 8208),) if residual else ()
    yield Sample((make(4, 8208), *rest, make(8208), None, 1e-6, 0.0, "int8"), "rows beyond the registers")


def _samples(make: SampleMaker) -> Iterator[Sample]:
    return _samples_of(make, residual=False)


def _residual_samples(make: SampleMaker) -> Iterator[Sample]:
    return _samples_of(make, residual=True)


@operator(
    "rms_norm_quant(Tensor x, Tensor? weight, Tensor? bias, float eps, float weight_offset, str format)"
    " -> (Tensor codes, Tensor scale)",
    samples=_samples,
    dtypes=NARROW,
)
def rms_norm_quant_op(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, weight_offset: float, format: str
) -> tuple[Tensor, Tensor]:
    """Codes and scales of the normalized rows."""
    return _quantized(x, None, weight, bias, eps, weight_offset, format)[:2]


@operator(
    "add_rms_norm_quant(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps,"
    " float weight_offset, str format) -> (Tensor codes, Tensor scale, Tensor residual_out)",
    samples=_residual_samples,
    dtypes=NARROW,
)
def add_rms_norm_quant_op(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    format: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """As rms_norm_quant for x + residual, with the sum in the dtype of residual."""
    codes, scale, s = _quantized(x, residual, weight, bias, eps, weight_offset, format)
    return codes, scale, _reference.stored_sum(s, residual)


def rms_norm_quant(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    qdtype: str,
    granularity: str = "row",
    residual: Tensor | None = None,
    bias: Tensor | None = None,
    weight_offset: float = 0.0,
) -> Quantized | tuple[Quantized, Tensor]:
    """RMSNorm over the last dimension with a quantized result, in one pass over memory; has no gradient.

    Args:
        x: Input of shape ``(..., d)``; float32, bfloat16 or float16; any layout.
        weight: Scale of shape ``(d,)``, in the dtype of x or float32. Default: none.
        eps: Added to the mean square. Default 1e-6.
        qdtype: Format of the codes: ``"int8"``, ``"e4m3"`` or ``"e5m2"``.
        granularity: ``"row"``, one scale per normalized row, is what there is.
        residual: Residual stream to add first, shape of x, in the dtype of x or float32.
        bias: Shift of shape ``(d,)``, in the dtype of x or float32. Default: none.
        weight_offset: Added to the weight; 1 for a zero-centred weight, as in Gemma. Default 0.

    Returns:
        The quantized result, as `narrowgauge.quant.quantize` would give it; with `residual` also the
        new residual stream.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, a device, eps, qdtype or granularity does not fit.
        RuntimeError: An argument requires grad and gradients are enabled.
    """
    name = "rms_norm_quant"
    checks.check_choice(name, "qdtype", qdtype, FORMATS)
    checks.check_choice(name, "granularity", granularity, ("row",))
    sizes = _arguments.last_size(name, x)
    if residual is not None:
        residual = _arguments.residual_as(name, x, residual, None)
    _arguments.check(name, x, sizes, weight, bias, eps, None, residual)
    if x.dtype not in NARROW:
        raise TypeError(f"{name}: x has dtype {x.dtype}; expected float32, bfloat16 or float16")
    if torch.is_grad_enabled():
        for argument, tensor in (("x", x), ("weight", weight), ("bias", bias), ("residual", residual)):
            if tensor is not None and tensor.requires_grad:
                raise RuntimeError(
                    f"{name}: {argument} requires grad, but a quantized result has no gradient. Call it "
                    "under torch.no_grad(), or use rms_norm and quantize its result"
                )
    scheme = Scheme(qdtype, granularity)
    x, weight, bias = x.contiguous(), _arguments.packed(weight), _arguments.packed(bias)
    if residual is None:
        codes, scale = rms_norm_quant_op(x, weight, bias, eps, weight_offset, qdtype)
        return Quantized(codes, scale, None, scheme, x.shape)
    codes, scale, residual = add_rms_norm_quant_op(
        x, residual.contiguous(), weight, bias, eps, weight_offset, qdtype
    )
    return Quantized(codes, scale, None, scheme, x.shape), residual
