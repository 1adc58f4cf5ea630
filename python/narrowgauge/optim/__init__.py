"""Optimizers: one fused kernel over all parameters, with narrow states and parameters."""

from narrowgauge.optim.adamw import AdamW

__all__ = ["AdamW"]
