"""Layers that take the place of those in `torch.nn`."""

from narrowgauge.nn import functional
from narrowgauge.norm import (
    Derf,
    DyT,
    LayerNorm,
    LayerNormLinear,
    PolyNorm,
    PowerNorm,
    ResidualNorm,
    RMSNorm,
    RMSNormLinear,
    SeeDNorm,
    UnifiedNorm,
    mix_ln_schemes,
)

__all__ = [
    "Derf",
    "DyT",
    "LayerNorm",
    "LayerNormLinear",
    "PolyNorm",
    "PowerNorm",
    "RMSNorm",
    "RMSNormLinear",
    "ResidualNorm",
    "SeeDNorm",
    "UnifiedNorm",
    "functional",
    "mix_ln_schemes",
]
