"""Optimizers: one fused kernel over all parameters, with narrow states and parameters."""

from narrowgauge.optim.adamw import Adam, AdamW
from narrowgauge.optim.codec import decode_state, encode_state
from narrowgauge.optim.master import bf16_stochastic_round, join_master, split_master

__all__ = [
    "Adam",
    "AdamW",
    "bf16_stochastic_round",
    "decode_state",
    "encode_state",
    "join_master",
    "split_master",
]
