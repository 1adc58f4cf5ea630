"""Numbers per row of many parameters in one tensor, row after row: added up by parameter, and spread over the rows."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from narrowgauge.optim import tensors
from narrowgauge.optim.rule_samples import row_count

if TYPE_CHECKING:
    from narrowgauge.optim.base import Call


@lru_cache(maxsize=256)
def _made_once(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def on_device(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A constant, kept for the next step: making it waits for the device. A compiled graph has its own."""
    if torch.compiler.is_compiling():
        return torch.tensor(values, dtype=dtype, device=device)
    return _made_once(values, dtype, device)


class Rows:
    """The rows of the parameters of a call."""

    def __init__(self, call: Call) -> None:
        self.counts = [row_count(p, length) for p, length in zip(call.params, call.row_lengths, strict=True)]
        self.total = sum(self.counts)
        self._counts = on_device(tuple(self.counts), torch.int64, call.device)
        self._whole = call.whole[0]

    def add(self, values: Tensor) -> Tensor:
        """One number (or n) per row to as many per parameter, over all shards. In a fixed order, unlike `index_add`."""
        added = torch.segment_reduce(values, "sum", lengths=self._counts, axis=0, unsafe=True)
        return tensors.sum_over_shards(added, self._whole, inside_rows=False)

    def spread(self, values: Tensor) -> Tensor:
        """One number per parameter to one per row."""
        return values.repeat_interleave(self._counts, output_size=self.total)
