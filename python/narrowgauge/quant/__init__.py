"""Quantization: formats, schemes, quantize / dequantize, and linear layers that compute in low precision."""

from narrowgauge.quant.linear import Linear, linear
from narrowgauge.quant.matmul import quantized_matmul
from narrowgauge.quant.quantize import dequantize, quantize
from narrowgauge.quant.recipes import RECIPES, Product, Recipe
from narrowgauge.quant.scheme import Quantized, Scheme

__all__ = [
    "RECIPES",
    "Linear",
    "Product",
    "Quantized",
    "Recipe",
    "Scheme",
    "dequantize",
    "linear",
    "quantize",
    "quantized_matmul",
]
