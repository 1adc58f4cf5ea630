"""What a quantized tensor means: its scheme, and the plain tensors it consists of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from narrowgauge.ops.checks import check_choice
from narrowgauge.quant.formats import FORMATS, Format

GRANULARITIES = ("tensor", "row", "column", "block")
BLOCK = 128
"""How many consecutive elements of a row share a scale under the granularity ``"block"``."""
SCALE_RULES = ("absmax",)


@dataclass(frozen=True)
class Scheme:
    """How a tensor is quantized.

    Args:
        format: ``"int8"``, ``"e4m3"`` or ``"e5m2"``.
        granularity: Which elements share a scale: ``"tensor"`` (all of them), ``"row"`` (each row of x viewed
            as ``(-1, x.shape[-1])``), ``"column"`` (each column of that view) or ``"block"`` (each 128 consecutive
            elements of a row, fewer at its end).
        scale_rule: ``"absmax"``: the group's largest magnitude divided by the format's largest value.
    """

    format: str
    granularity: str = "tensor"
    scale_rule: str = "absmax"

    def __post_init__(self) -> None:
        check_choice("Scheme", "format", self.format, FORMATS)
        check_choice("Scheme", "granularity", self.granularity, GRANULARITIES)
        check_choice("Scheme", "scale_rule", self.scale_rule, SCALE_RULES)

    @property
    def number_format(self) -> Format:
        return FORMATS[self.format]

    def __str__(self) -> str:
        return f"{self.format} per {self.granularity} ({self.scale_rule})"


@dataclass
class Quantized:
    """A quantized tensor as plain tensors: ``x`` is about ``codes * scale``.

    Attributes:
        codes: In the layout and shape of x, in the format's dtype.
        scale: float32, one entry per group: shape ``()``, ``x.shape[:-1]``, ``x.shape[-1:]`` or, for blocks,
            ``(*x.shape[:-1], ceil(x.shape[-1] / 128))``.
        zero_point: None for symmetric formats.
        scheme: How it was quantized.
        shape: Shape of x.
        global_scale: None for one-level scale rules.
        straight_through: None, or a tensor of the shape of x (and without memory of its own) that the gradient of the
            dequantized values goes to.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    scheme: Scheme
    shape: torch.Size
    global_scale: Tensor | None = None
    straight_through: Tensor | None = None
