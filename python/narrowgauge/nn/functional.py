"""The functional forms of the layers in `narrowgauge.nn`."""

from narrowgauge.norm import (
    add_layer_norm,
    add_rms_norm,
    derf,
    dyt,
    fold_unified_norm,
    layer_norm,
    layer_norm_linear,
    layer_norm_quant,
    peri_add_norm,
    poly_norm,
    rms_norm,
    rms_norm_linear,
    rms_norm_quant,
    seed_norm,
)

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "derf",
    "dyt",
    "fold_unified_norm",
    "layer_norm",
    "layer_norm_linear",
    "layer_norm_quant",
    "peri_add_norm",
    "poly_norm",
    "rms_norm",
    "rms_norm_linear",
    "rms_norm_quant",
    "seed_norm",
]
