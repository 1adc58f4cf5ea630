"""Layers that take the place of those in `torch.nn`."""

from narrowgauge.nn import functional
from narrowgauge.norm import (
    Derf,
    DyT,
    LayerNorm,
    PolyNorm,
    ResidualNorm,
    RMSNorm,
    SeeDNorm,
    mix_ln_schemes,
)

__all__ = [
    "Derf",
    "DyT",
    "LayerNorm",
    "PolyNorm",
    "RMSNorm",
    "ResidualNorm",
    "SeeDNorm",
    "functional",
    "mix_ln_schemes",
]
