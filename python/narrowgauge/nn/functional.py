"""The functional forms of the layers in `narrowgauge.nn`."""

from narrowgauge.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm, rms_norm_quant

__all__ = ["add_layer_norm", "add_rms_norm", "layer_norm", "rms_norm", "rms_norm_quant"]
