"""Quantizing and dequantizing a tensor.

With ``largest`` the format's largest value, for every group (the whole tensor, a row, a column, or 128 elements of
a row):

    scale = max|x| / largest               1 where that is 0, NaN where the group holds a NaN or an infinity
    code  = round(x / scale)               0 where the scale is NaN

The arithmetic is float32 and both divisions are true divisions, so every backend gives the same bits.
``round`` is half-to-even, or stochastic: up with probability equal to the distance from the lower neighbour.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from narrowgauge.ops import Sample, SampleMaker, operator, system
from narrowgauge.ops.checks import check_choice, check_floating, check_same_device
from narrowgauge.ops.random import philox_words, uniform
from narrowgauge.quant.formats import (
    FORMATS,
    Int,
    round_nearest,
    round_stochastic_uniform,
    round_stochastic_words,
    scale_of,
)
from narrowgauge.quant.scheme import BLOCK, Quantized, Scheme

Rng = Tensor | torch.Generator | int


def amax_of(x: Tensor, granularity: str) -> Tensor:
    """Largest magnitude of each group, in the shape of the scales."""
    columns = x.shape[-1] if x.dim() else 1
    blocks = (columns + BLOCK - 1) // BLOCK
    shape = {
        "tensor": (),
        "row": x.shape[:-1],
        "column": x.shape[-1:],
        "block": (*x.shape[:-1], blocks),
    }[granularity]
    if x.numel() == 0:
        return x.new_zeros(shape)
    rows = x.reshape(-1, columns).abs()
    if granularity == "tensor":
        return rows.amax()
    if granularity == "block":
        rows = F.pad(rows, (0, blocks * BLOCK - columns)).view(-1, BLOCK)
    return rows.amax(0 if granularity == "column" else 1).reshape(shape)


def spread(scale: Tensor, granularity: str, shape: Sequence[int]) -> Tensor:
    """The scales, in a shape that broadcasts against codes of the shape given."""
    if granularity == "row" and scale.dim():
        return scale.unsqueeze(-1)
    if granularity == "block":
        each = scale.unsqueeze(-1).expand(*scale.shape, BLOCK).flatten(-2)
        return each[..., : shape[-1] if shape else 1].reshape(shape)
    return scale


def _special(x: Tensor) -> Tensor:
    """Puts what needs care into the first rows: zeros, an infinity, a NaN, values whose scale underflows."""
    rows = x.view(-1, x.shape[-1])
    rows[0] = 0
    rows[1, -1] = torch.inf
    rows[2, 0] = torch.nan
    rows[3] = rows[3] * 1e-44
    return x


def _samples(make: SampleMaker) -> Iterator[Sample]:
    rng = torch.tensor([-0x123456789ABCDEF, 2**40 + 5], device=make.device)
    yield Sample((make(3, 136), "int8", "block", None, None), "a short block at the end of each row")
    yield Sample((make(2, 257), "e4m3", "block", rng, None), "an odd row, stochastic")
    yield Sample(
        (_special(make(5, 136)), "e5m2", "block", None, None), "blocks of zeros, Inf, NaN, tiny values"
    )
    yield Sample((make(), "int8", "block", None, None), "no dimension")
    yield Sample((make(4, 0), "int8", "block", None, None), "no columns, no blocks")
    for granularity in ("tensor", "row", "column"):
        for format in FORMATS:
            yield Sample((make(6, 64), format, granularity, None, None), "vectors, short rows")
            yield Sample((make(3, 37), format, granularity, rng, None), "odd size, stochastic")
        x = make(5, 2, 24)
        noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)).to(make.device)
        yield Sample((x, "int8", granularity, None, noise), "three dimensions, given noise")
        yield Sample((x, "e5m2", granularity, None, noise), "float format, given noise")
        yield Sample((_special(make(5, 40)), "int8", granularity, None, None), "zeros, Inf, NaN, tiny values")
        yield Sample((_special(make(5, 40)), "e4m3", granularity, rng, None), "the same, stochastic")
        yield Sample((make(2, 2120, scale=1e-3), "e4m3", granularity, None, None), "long rows")
        yield Sample((make(300, 3), "int8", granularity, None, None), "many short odd rows")
        yield Sample((make(260, 24), "int8", granularity, rng, None), "many short rows")
        yield Sample(
            (make(1, 16400), "e4m3", granularity, None, None), "a row beyond the registers of a block"
        )
        yield Sample((make(1, 9001), "int8", granularity, rng, None), "one long odd row")
        yield Sample((make(7), "e5m2", granularity, None, None), "one dimension")
        yield Sample((make(), "int8", granularity, None, None), "no dimension")
        yield Sample((make(0, 8), "int8", granularity, None, None), "no rows")
        yield Sample((make(4, 0), "int8", granularity, None, None), "no columns")


@operator(
    "quantize(Tensor x, str format, str granularity, Tensor? rng=None, Tensor? noise=None)"
    " -> (Tensor, Tensor)",
    samples=_samples,
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    tolerance="exact",
)
def quantize_operator(
    x: Tensor, format: str, granularity: str, rng: Tensor | None = None, noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes and scales of x. Rounds to nearest, or stochastically where `rng` or `noise` is given."""
    target = FORMATS[format]
    scale = scale_of(amax_of(x, granularity), target)
    v = x.contiguous().float() / spread(scale, granularity, x.shape)
    if noise is not None:
        words = (noise * 2.0**32).long()
    elif rng is not None:
        words = philox_words(rng, x.numel()).view(x.shape)
        noise = uniform(words)
    else:
        return round_nearest(v, target), scale
    if isinstance(target, Int):
        return round_stochastic_uniform(v, target, noise), scale
    return round_stochastic_words(v, target, words), scale


def _dequantize_samples(make: SampleMaker) -> Iterator[Sample]:
    codes, scale = quantize_operator.reference(make(2, 257), "int8", "block")
    yield Sample((codes, scale, "block", make.dtype), "an odd row of three blocks")
    codes, scale = quantize_operator.reference(make(3, 136), "e5m2", "block")
    yield Sample((codes, scale, "block", None), "a short block at the end of each row")
    for granularity in ("tensor", "row", "column"):
        for format in FORMATS:
            for shape, why in (((6, 64), "vectors"), ((3, 2, 37), "odd size"), ((0, 8), "empty")):
                codes, scale = quantize_operator.reference(make(*shape), format, granularity)
                yield Sample((codes, scale, granularity, make.dtype), why)
        codes, scale = quantize_operator.reference(_special(make(5, 40)), "e4m3", granularity)
        yield Sample((codes, scale, granularity, make.dtype), "groups whose scale is NaN")


@operator(
    "dequantize(Tensor codes, Tensor scale, str granularity, ScalarType? dtype=None) -> Tensor",
    samples=_dequantize_samples,
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    tolerance="exact",
)
def dequantize_operator(
    codes: Tensor, scale: Tensor, granularity: str, dtype: torch.dtype | None = None
) -> Tensor:
    """``codes * scale`` in float32, rounded once to `dtype` (float32 by default)."""
    return (codes.contiguous().float() * spread(scale, granularity, codes.shape)).to(dtype or torch.float32)


def _rng_tensor(rng: Rng | None, device: torch.device) -> Tensor:
    """``[seed, offset]`` on the device: given, from an integer seed, or drawn from a generator."""
    if isinstance(rng, Tensor):
        if rng.dtype != torch.int64 or rng.shape != (2,):
            raise ValueError(
                "quantize: rng must be an int64 tensor [seed, offset], "
                f"got {rng.dtype} of shape {tuple(rng.shape)}"
            )
        if rng.device != device:
            raise ValueError(
                f"quantize: rng is on {rng.device} but x is on {device}; move it with rng.to(x.device)"
            )
        return rng
    if isinstance(rng, int) and not isinstance(rng, bool):
        return torch.tensor([(rng + 2**63) % 2**64 - 2**63, 0], device=device)
    if rng is not None and not isinstance(rng, torch.Generator):
        raise TypeError(
            "quantize: rng must be an int64 tensor [seed, offset], an integer seed, a torch.Generator or "
            f"None; got {type(rng).__name__}"
        )
    drawn = torch.randint(2**62, (2,), generator=rng, device=device if rng is None else rng.device)
    return drawn.to(device)


def _check_noise(noise: Tensor, x: Tensor) -> None:
    if not isinstance(noise, Tensor) or noise.dtype != torch.float32 or noise.shape != x.shape:
        given = (
            f"{noise.dtype} of shape {tuple(noise.shape)}"
            if isinstance(noise, Tensor)
            else type(noise).__name__
        )
        raise ValueError(
            "quantize: noise must be a float32 tensor in [0, 1) of the shape of x "
            f"{tuple(x.shape)}, got {given}"
        )
    check_same_device("quantize", "x", x, noise=noise)


def quantize(
    x: Tensor,
    scheme: Scheme,
    *,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    rng: Rng | None = None,
    noise: Tensor | None = None,
) -> Quantized:
    """Quantizes a tensor. Gradients do not flow through it.

    Args:
        x: Any shape and strides; float64 is rounded to float32 first.
        scheme: Format, granularity and scale rule.
        rounding: ``"nearest"`` (half to even) or ``"stochastic"``, whose mean is x.
        rng: Random source of stochastic rounding: an int64 tensor ``[seed, offset]`` on the device of x, an
            integer seed (offset 0), or a ``torch.Generator`` to draw both from; None draws from PyTorch's
            default generator. Element i of the flattened x uses word i of Philox-4x32-10 under that seed and
            offset.
        noise: float32 in [0, 1) of the shape of x: the draws themselves, instead of `rng`. An integer code
            goes up when ``noise >= 1 - fraction``; the magnitude of a float code, d of whose mantissa bits
            are dropped, goes up when ``floor(noise * 2**d)`` is less than these bits.

    Example:
        >>> q = quantize(x, Scheme("int8", "row"))
        >>> dequantize(q, x.dtype)
    """
    check_floating("quantize", x=x)
    if not isinstance(scheme, Scheme):
        raise TypeError(
            f'quantize: scheme must be a Scheme, for example Scheme("int8", "row"); got {scheme!r}'
        )
    check_choice("quantize", "rounding", rounding, ("nearest", "stochastic"))
    if rounding == "nearest" and not (rng is None and noise is None):
        raise ValueError('quantize: rng and noise belong to rounding="stochastic", but rounding is "nearest"')
    if rng is not None and noise is not None:
        raise ValueError("quantize: give rng or noise, not both")
    words = None
    if noise is not None:
        _check_noise(noise, x)
        noise = noise.detach().contiguous()
    elif rounding == "stochastic":
        words = _rng_tensor(rng, x.device)
    values = x.detach()
    if values.dtype == torch.float64:
        values = values.float()
    codes, scale = quantize_operator(values.contiguous(), scheme.format, scheme.granularity, words, noise)
    return Quantized(codes, scale, None, scheme, x.shape)


class _StraightThrough(torch.autograd.Function):
    """Values without a gradient of their own; what arrives at them goes to `target` instead."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, target: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0]


def dequantize(q: Quantized, dtype: torch.dtype | None = None) -> Tensor:
    """The values a quantized tensor stands for, in `dtype` (float32 by default).

    A group that held a NaN or an infinity gives NaN. Gradients flow through it where `q` says where to.
    """
    if not isinstance(q, Quantized):
        raise TypeError(f"dequantize: q must be a Quantized (what quantize returns), got {type(q).__name__}")
    check_choice(
        "dequantize", "dtype", dtype, (None, torch.float32, torch.bfloat16, torch.float16, torch.float64)
    )
    native = torch.float32 if dtype == torch.float64 else dtype
    x = dequantize_operator(q.codes.contiguous(), q.scale.detach().contiguous(), q.scheme.granularity, native)
    if q.straight_through is not None and torch.is_grad_enabled():
        x = _StraightThrough.apply(x, q.straight_through)
    return x.double() if dtype == torch.float64 else x


system(
    "quantize",
    title="Quantize and dequantize",
    source="stochastic rounding by Philox (Salmon et al., SC 2011)",
    page="quantization.md",
    functions=("quant.quantize", "quant.dequantize"),
    operators=("quantize", "dequantize"),
    bench=("quantize", "dequantize"),
    reasons={"module": "functions only", "golden": "PyTorch's own casts are the truth, bit for bit"},
)
