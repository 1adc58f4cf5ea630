"""Counter-based random bits in PyTorch: the definition that csrc/common/philox.h repeats.

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Element i of a draw
depends on (seed, offset, i) alone: never on the device, the thread or the shard.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def _multiply(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low half of a 32 x 32 bit product; int64 multiplication wraps, which keeps the bits."""
    product = x * constant
    return (product >> 32) & _LOW, product & _LOW


def philox_words(rng: Tensor, count: int, start: int = 0) -> Tensor:
    """The words of elements ``start`` to ``start + count - 1``: int64 values in [0, 2**32).

    Args:
        rng: int64 tensor ``[seed, offset]``, on the device of the result.
        count: Number of words.
        start: Index of the first element, for a shard of a larger tensor.
    """
    element = torch.arange(start, start + count, device=rng.device)
    first = start // 4
    group = torch.arange(first, (start + count + 3) // 4, device=rng.device)
    seed, offset = rng.unbind()
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    c0, c1 = group & _LOW, (group >> 32) & _LOW
    c2, c3 = (offset & _LOW).expand_as(group), ((offset >> 32) & _LOW).expand_as(group)
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return torch.stack((c0, c1, c2, c3), dim=1).flatten()[element - 4 * first]


def uniform(words: Tensor) -> Tensor:
    """Words as float32 numbers in [0, 1) with 24 bits."""
    return (words >> 8).float() * 2.0**-24
