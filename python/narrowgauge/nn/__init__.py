"""Layers that take the place of those in `torch.nn`."""

from narrowgauge.nn import functional
from narrowgauge.norm import LayerNorm, RMSNorm

__all__ = ["LayerNorm", "RMSNorm", "functional"]
