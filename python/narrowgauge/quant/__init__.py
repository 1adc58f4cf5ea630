"""Quantization: formats, schemes, quantize / dequantize, and linear layers that compute in low precision."""

from narrowgauge.quant.quantize import dequantize, quantize
from narrowgauge.quant.scheme import Quantized, Scheme

__all__ = ["Quantized", "Scheme", "dequantize", "quantize"]
