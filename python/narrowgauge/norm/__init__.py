"""Normalization layers."""

from narrowgauge.norm.dyt import Derf, DyT, derf, dyt
from narrowgauge.norm.layer_norm import LayerNorm, add_layer_norm, layer_norm
from narrowgauge.norm.norm_linear import LayerNormLinear, RMSNormLinear, layer_norm_linear, rms_norm_linear
from narrowgauge.norm.norm_quant import layer_norm_quant, rms_norm_quant
from narrowgauge.norm.peri_add_norm import peri_add_norm
from narrowgauge.norm.placement import ResidualNorm, mix_ln_schemes
from narrowgauge.norm.polynorm import PolyNorm, poly_norm
from narrowgauge.norm.power_norm import PowerNorm
from narrowgauge.norm.rms_norm import RMSNorm, add_rms_norm, rms_norm
from narrowgauge.norm.seednorm import SeeDNorm, seed_norm
from narrowgauge.norm.unified_norm import UnifiedNorm, fold_unified_norm

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
    "add_layer_norm",
    "add_rms_norm",
    "derf",
    "dyt",
    "fold_unified_norm",
    "layer_norm",
    "layer_norm_linear",
    "layer_norm_quant",
    "mix_ln_schemes",
    "peri_add_norm",
    "poly_norm",
    "rms_norm",
    "rms_norm_linear",
    "rms_norm_quant",
    "seed_norm",
]
