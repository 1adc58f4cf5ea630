"""Normalization layers."""

from narrowgauge.norm.layer_norm import LayerNorm, add_layer_norm, layer_norm
from narrowgauge.norm.rms_norm import RMSNorm, add_rms_norm, rms_norm
from narrowgauge.norm.rms_norm_quant import rms_norm_quant

__all__ = [
    "LayerNorm",
    "RMSNorm",
    "add_layer_norm",
    "add_rms_norm",
    "layer_norm",
    "rms_norm",
    "rms_norm_quant",
]
