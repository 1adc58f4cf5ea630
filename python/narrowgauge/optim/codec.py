"""8-bit optimizer states: blockwise dynamic maps (Dettmers et al., arXiv 2110.02861).

Each block of 256 consecutive elements keeps its largest magnitude as a float32 scale, and every element the code of the
nearest entry of a fixed map, times that scale. Elements are consecutive in memory, whatever the strides. This module is
the definition; csrc/optim/dynamic_map.h gives the same bits.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from narrowgauge.ops import checks

BLOCK_SIZE = 256
STATE_DTYPES = ("int8",)


@functools.cache
def dynamic_map(signed: bool) -> Tensor:
    """The 256 sorted float32 values of a code: per decade twice as many as in the decade below, plus 0 and 1."""
    values = [torch.zeros(1), torch.ones(1)]
    for decade in range(7):
        bins = (1 if signed else 2) << decade
        # The edges of equal bins of [0.1, 1], rounded like those of a fused float32 linspace.
        tenth = torch.tensor(0.1)
        width = ((1 - tenth) / bins).double()
        bin_number = torch.arange(bins + 1, dtype=torch.float64)
        from_below, from_above = tenth.double() + width * bin_number, 1 - width * (bins - bin_number)
        edges = torch.where(bin_number < (bins + 1) // 2, from_below, from_above).float()
        centres = torch.tensor(10.0 ** (decade - 6)) * ((edges[:-1] + edges[1:]) / 2)
        values += [centres, -centres] if signed else [centres]
    return torch.cat(values).sort().values


@functools.cache
def _boundaries(signed: bool) -> Tensor:
    """Where the next code begins: the smallest floats that are not below the midpoints of neighbouring values."""
    exact = dynamic_map(signed).double()
    middle = (exact[1:] + exact[:-1]) / 2
    rounded = middle.float()
    above = torch.nextafter(rounded, torch.tensor(torch.inf))
    return torch.where(rounded.double() < middle, above, rounded)


def flat(x: Tensor) -> Tensor:
    """The elements of a dense tensor in the order of memory, as a view."""
    return x if x.dim() == 1 and x.stride(0) == 1 else x.as_strided((x.numel(),), (1,))


def block_count(numel: int, block_size: int = BLOCK_SIZE) -> int:
    """How many scales a state of `numel` elements has; the last block may be short."""
    return -(-numel // block_size)


def _blocks(x: Tensor, block_size: int) -> Tensor:
    x = flat(x)
    padding = block_count(x.numel(), block_size) * block_size - x.numel()
    return torch.nn.functional.pad(x, (0, padding)).view(-1, block_size)


def encode_state(
    x: Tensor, state_dtype: str = "int8", *, signed: bool, block_size: int = BLOCK_SIZE
) -> tuple[Tensor, Tensor]:
    """Codes (uint8, laid out like `x`) and the float32 scale of each block.

    A tie goes to the upper code. A block with a NaN or an infinity gets the scale NaN and codes 0.
    """
    checks.check_choice("encode_state", "state_dtype", state_dtype, STATE_DTYPES)
    blocks = _blocks(x.float(), block_size)
    largest = blocks.abs().amax(1)
    finite = largest.isfinite()
    boundaries = _boundaries(signed).to(x.device)
    codes = torch.bucketize(blocks / largest.clamp_min(1e-12)[:, None], boundaries, right=True)
    codes = torch.where(finite[:, None], codes, 0).to(torch.uint8).flatten()[: x.numel()]
    laid_out = torch.empty_like(x, dtype=torch.uint8)
    flat(laid_out).copy_(codes)
    return laid_out, torch.where(finite, largest, torch.nan)


def decode_state(
    codes: Tensor, scale: Tensor, state_dtype: str = "int8", *, signed: bool, block_size: int = BLOCK_SIZE
) -> Tensor:
    """The float32 state that codes and scales stand for, laid out like `codes`."""
    checks.check_choice("decode_state", "state_dtype", state_dtype, STATE_DTYPES)
    values = dynamic_map(signed).to(codes.device)[_blocks(codes, block_size).long()] * scale[:, None]
    laid_out = torch.empty_like(codes, dtype=torch.float32)
    flat(laid_out).copy_(values.flatten()[: codes.numel()])
    return laid_out
