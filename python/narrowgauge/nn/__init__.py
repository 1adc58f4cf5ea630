"""Layers that take the place of those in `torch.nn`."""

from narrowgauge.nn import functional
from narrowgauge.norm import (
    AdaLayerNorm,
    AdaRMSNorm,
    Derf,
    DyT,
    GatedRMSNorm,
    LayerNorm,
    LayerNormLinear,
    PolyNorm,
    PowerNorm,
    QKNorm,
    ResidualNorm,
    RMSNorm,
    RMSNormLinear,
    ScaleNorm,
    SeeDNorm,
    UnifiedNorm,
    mix_ln_schemes,
)

__all__ = [
    "AdaLayerNorm",
    "AdaRMSNorm",
    "Derf",
    "DyT",
    "GatedRMSNorm",
    "LayerNorm",
    "LayerNormLinear",
    "PolyNorm",
    "PowerNorm",
    "QKNorm",
    "RMSNorm",
    "RMSNormLinear",
    "ResidualNorm",
    "ScaleNorm",
    "SeeDNorm",
    "UnifiedNorm",
    "functional",
    "mix_ln_schemes",
]
