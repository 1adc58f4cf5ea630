"""Number formats of quantized tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Int:
    """Symmetric signed integers of `bits` bits: the codes are -qmax ... qmax."""

    name: str
    bits: int
    dtype: torch.dtype

    @property
    def qmax(self) -> int:
        return 2 ** (self.bits - 1) - 1

    @property
    def largest(self) -> float:
        """The largest code: what a group's largest magnitude is scaled to."""
        return float(self.qmax)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Float:
    """Small floating-point numbers with `exponent` and `mantissa` bits.

    Attributes:
        bias: Exponent bias; the smallest normal number is ``2 ** (1 - bias)``.
        fmax: Largest finite value; casts saturate there.
    """

    name: str
    exponent: int
    mantissa: int
    bias: int
    fmax: float
    dtype: torch.dtype

    @property
    def largest(self) -> float:
        """The largest code: what a group's largest magnitude is scaled to."""
        return self.fmax

    def __str__(self) -> str:
        return self.name


Format = Int | Float

INT8 = Int("int8", bits=8, dtype=torch.int8)
E4M3 = Float("e4m3", exponent=4, mantissa=3, bias=7, fmax=448.0, dtype=torch.float8_e4m3fn)
E5M2 = Float("e5m2", exponent=5, mantissa=2, bias=15, fmax=57344.0, dtype=torch.float8_e5m2)

FORMATS: dict[str, Format] = {each.name: each for each in (INT8, E4M3, E5M2)}


def scale_of(amax: Tensor, format: Format) -> Tensor:
    """float32 scales from the largest magnitudes of the groups: 1 for zeros, NaN for what is not finite."""
    amax = amax.float()
    scale = amax / torch.full_like(amax, format.largest)  # a scalar divisor would become a reciprocal on CUDA
    return torch.where(amax.isfinite(), torch.where(scale > 0, scale, 1.0), torch.nan)


def round_nearest(v: Tensor, format: Format) -> Tensor:
    """Scaled float32 values to codes, round half to even; NaN becomes 0."""
    v = v.nan_to_num(nan=0.0).clamp(-format.largest, format.largest)
    if isinstance(format, Int):
        v = v.round()
    return v.to(format.dtype)


def round_stochastic_uniform(v: Tensor, format: Int, u: Tensor) -> Tensor:
    """Scaled float32 values to integer codes: up with the fraction's probability, drawn by u in [0, 1).

    ``floor(v + u)`` would be shorter but moves exact integers, because v + u is itself rounded.
    """
    v = v.nan_to_num(nan=0.0)
    floor = v.floor()
    v = floor + (u >= 1.0 - (v - floor)).float()
    return v.clamp(-format.largest, format.largest).to(format.dtype)


def round_stochastic_words(v: Tensor, format: Float, words: Tensor) -> Tensor:
    """Scaled float32 values to float codes: the magnitude goes up when a word is below the dropped bits.

    The significand stands in 64 bits: those above 32 are kept by the format, those below are dropped.
    """
    v = v.nan_to_num(nan=0.0).clamp(-format.fmax, format.fmax)
    bits = v.view(torch.int32).long() & 0x7FFFFFFF
    exponent = (bits >> 23).clamp(min=1)
    significand = (bits & 0x7FFFFF) | ((bits >= 0x800000).long() << 23)
    grid = exponent.clamp(min=128 - format.bias)  # exponent of the binade whose spacing v is rounded to
    dropped = (grid - exponent + 23 - format.mantissa).clamp(max=56)
    fixed = (significand << 32) >> dropped
    steps = (fixed >> 32) + (words < (fixed & 0xFFFFFFFF)).long()
    spacing = ((grid - format.mantissa) << 23).int().view(torch.float32)
    return (steps.float() * spacing).copysign(v).to(format.dtype)
