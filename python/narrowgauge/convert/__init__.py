"""Rewrites of a model's weights that keep its function: one file per conversion."""

from narrowgauge.convert.dyt import convert_norm_to_dyt
from narrowgauge.convert.layernorm_scaling import apply_layernorm_scaling
from narrowgauge.convert.ln_removal import fold_fixed_layernorm
from narrowgauge.convert.pre_rms import convert_pre_ln_to_rms

__all__ = [
    "apply_layernorm_scaling",
    "convert_norm_to_dyt",
    "convert_pre_ln_to_rms",
    "fold_fixed_layernorm",
]
