"""Layers that can take the place of a LayerNorm or RMSNorm though they compute something else: for `ng.swap`.

A layer says so in its own file, under the name that `swap(model, norm=name)` takes:

    @norm_replacement("dyt")
    def _in_place_of(norm: ReplacedNorm) -> DyT:
        return DyT(norm.normalized_shape, bias=norm.bias, device=norm.device, dtype=norm.dtype)

`swap` then gives it the parameters that the replaced layer has under the same names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn


class Unsuitable(Exception):
    """Why a module is left as it is."""


@dataclass(frozen=True)
class ReplacedNorm:
    """What there is to know of a norm that is replaced."""

    normalized_shape: tuple[int, ...]
    eps: float
    weight: bool  # whether it has one
    bias: bool
    device: torch.device
    dtype: torch.dtype

    @property
    def width(self) -> int:
        """The one normalized size, for layers that take no other."""
        if len(self.normalized_shape) != 1:
            raise Unsuitable(f"normalizes over {len(self.normalized_shape)} dimensions")
        return self.normalized_shape[0]

    def need_weight(self) -> None:
        """For layers that always have one, which a norm without would suddenly learn."""
        if not self.weight:
            raise Unsuitable("has no weight")


norm_replacements: dict[str, Callable[[ReplacedNorm], nn.Module]] = {}


def norm_replacement(
    name: str,
) -> Callable[[Callable[[ReplacedNorm], nn.Module]], Callable[[ReplacedNorm], nn.Module]]:
    """Registers the decorated function, which makes the layer `name` in place of a norm."""

    def register(make: Callable[[ReplacedNorm], nn.Module]) -> Callable[[ReplacedNorm], nn.Module]:
        norm_replacements[name] = make
        return make

    return register
