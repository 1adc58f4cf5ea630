"""Layers that take the place of those in `torch.nn`."""

from narrowgauge.nn import functional
from narrowgauge.norm import (
    Derf,
    DyT,
    LayerNorm,
    LayerNormLinear,
    PolyNorm,
    ResidualNorm,
    RMSNorm,
    RMSNormLinear,
    SeeDNorm,
    mix_ln_schemes,
)

__all__ = [
    "Derf",
    "DyT",
    "LayerNorm",
    "LayerNormLinear",
    "PolyNorm",
    "RMSNorm",
    "RMSNormLinear",
    "ResidualNorm",
    "SeeDNorm",
    "functional",
    "mix_ln_schemes",
]
