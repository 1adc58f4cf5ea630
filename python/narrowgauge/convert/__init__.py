"""Rewrites of a model's weights that keep its function: one file per conversion."""

from narrowgauge.convert.dyt import convert_norm_to_dyt
from narrowgauge.convert.layernorm_scaling import apply_layernorm_scaling

__all__: list[str] = ["apply_layernorm_scaling", "convert_norm_to_dyt"]
