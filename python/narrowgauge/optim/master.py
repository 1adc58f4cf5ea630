"""Parameters in two bytes that still follow small updates: stochastic rounding, a split master weight, Kahan sums.

csrc/optim/master.h gives the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from narrowgauge.ops import checks

_LARGEST = {torch.int8: 127, torch.int16: 32767}


def round_stochastic(x: Tensor, random16: Tensor) -> Tensor:
    """float32 to bfloat16: up in magnitude where the 16-bit number is below the dropped half; NaN and Inf pass."""
    bits = x.view(torch.int32)
    up = random16 < (bits & 0xFFFF)
    rounded = ((bits >> 16) + up).to(torch.int16).view(torch.bfloat16)
    return torch.where(x.isfinite(), rounded, x.to(torch.bfloat16))


@torch.no_grad()
def bf16_stochastic_round(
    x: Tensor, generator: torch.Generator | None = None, random16: Tensor | None = None
) -> Tensor:
    """Rounds to bfloat16 up or down by chance, so that the mean over many draws is `x`.

    Args:
        x: Floating point, any shape; taken as float32.
        generator: Source of the random bits; by default PyTorch's.
        random16: Integers in [0, 65536), shaped like `x`, that are used instead of random ones.

    Returns:
        A bfloat16 tensor. NaN and infinities pass unchanged; a number beyond the largest bfloat16 may become infinite.

    Raises:
        TypeError: `x` is not floating point, or `random16` not an integer tensor.
        ValueError: Both `generator` and `random16` are given, or `random16` has another shape.
    """
    checks.check_floating("bf16_stochastic_round", x=x)
    x = x.detach().float()
    if random16 is None:
        random16 = torch.randint(0, 1 << 16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    elif generator is not None:
        raise ValueError("bf16_stochastic_round: give generator or random16, not both")
    elif random16.is_floating_point() or random16.is_complex() or random16.dtype is torch.bool:
        raise TypeError(f"bf16_stochastic_round: random16 must hold integers, got {random16.dtype}")
    elif random16.shape != x.shape:
        raise ValueError(
            f"bf16_stochastic_round: random16 has shape {tuple(random16.shape)}, expected {tuple(x.shape)}"
        )
    return round_stochastic(x, random16.to(torch.int32))


def _half_gap(narrow: Tensor) -> Tensor:
    """Half the distance between a bfloat16 number and the next larger magnitude, in float32."""
    power = (narrow.float().view(torch.int32) & 0x7F800000).clamp_min(0x00800000).view(torch.float32)
    return power * 2.0**-8


@torch.no_grad()
def split_master(p: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Cuts float32 numbers into bfloat16 and one or two more bytes of what it lacks (FlashOptim, arXiv 2602.23349).

    With h half the gap between `narrow` and the next bfloat16, and L = 127 or 32767:

        narrow = bfloat16(p)        rest = round(clamp((p - narrow) / h, -1, 1) L)

    Args:
        p: float32, any shape.
        bits: 8 or 16.

    Returns:
        `narrow` (bfloat16) and `rest` (int8 or int16), shaped and laid out like `p`. The rest of a number that
        bfloat16 stores as infinite or NaN is 0.

    Raises:
        TypeError: `p` is not float32.
        ValueError: `bits` is neither 8 nor 16.
    """
    checks.check_choice("split_master", "bits", bits, (8, 16))
    if p.dtype is not torch.float32:
        raise TypeError(
            f"split_master: p must be float32, got {p.dtype}; convert it first, for example p.float()"
        )
    dtype = torch.int8 if bits == 8 else torch.int16
    narrow = p.detach().to(torch.bfloat16)
    share = ((p - narrow.float()) / _half_gap(narrow)).clamp(-1, 1)
    rest = torch.where(narrow.isfinite(), (share * _LARGEST[dtype]).round(), 0).to(dtype)
    return narrow, rest


@torch.no_grad()
def join_master(narrow: Tensor, rest: Tensor) -> Tensor:
    """The float32 numbers that `split_master` cut: narrow + rest / L h, each operation rounded.

    The error is at most h / 254 with 8 bits, and one unit in the last place of float32 with 16.

    Raises:
        TypeError: `narrow` is not bfloat16, or `rest` neither int8 nor int16.
        ValueError: Their shapes differ.
    """
    if narrow.dtype is not torch.bfloat16 or rest.dtype not in _LARGEST:
        raise TypeError(
            f"join_master: expected bfloat16 and int8 or int16, got {narrow.dtype} and {rest.dtype}"
        )
    if narrow.shape != rest.shape:
        raise ValueError(
            f"join_master: narrow has shape {tuple(narrow.shape)} but rest has shape {tuple(rest.shape)}"
        )
    correction = (rest.float() / _LARGEST[rest.dtype]) * _half_gap(narrow)
    return narrow.detach().float() + torch.where(rest == 0, 0, correction)


@torch.no_grad()
def kahan_add(p: Tensor, comp: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
    """Adds to numbers of 16 bits and keeps what rounding dropped for the next time (Kahan, CACM 8, 1965).

    In this order, each sum in float32 and then rounded to the dtype of `p`:

        c = comp + update        new = p + c        comp = c + (p - new)

    where p - new is rounded before the last sum.

    Args:
        p: bfloat16 or float16.
        comp: What earlier additions dropped; zeros at first. Of the dtype of `p`.
        update: Floating point.

    Returns:
        The new `p` and `comp`.

    Raises:
        TypeError: `p` is not bfloat16 or float16, or `comp` has another dtype.
    """
    if p.dtype not in (torch.bfloat16, torch.float16) or comp.dtype is not p.dtype:
        raise TypeError(
            f"kahan_add: p and comp must both be bfloat16 or both float16, got {p.dtype} and {comp.dtype}"
        )
    wide = p.float()
    c = (comp.float() + update.float()).to(p.dtype).float()
    new = (wide + c).to(p.dtype)
    return new, (c + (wide - new.float()).to(p.dtype).float()).to(p.dtype)
