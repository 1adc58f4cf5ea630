"""Normalization layers."""

from narrowgauge.norm.ada_norm import (
    AdaLayerNorm,
    AdaRMSNorm,
    ada_layer_norm,
    ada_rms_norm,
    add_ada_layer_norm,
    add_ada_rms_norm,
    gated_residual,
)
from narrowgauge.norm.cross_entropy import CrossEntropyLoss, cross_entropy
from narrowgauge.norm.dyt import Derf, DyT, derf, dyt
from narrowgauge.norm.gated_rms_norm import GatedRMSNorm, gated_rms_norm
from narrowgauge.norm.l1_batch_norm import L1BatchNorm2d
from narrowgauge.norm.l1_norm import L1LayerNorm, l1_layer_norm
from narrowgauge.norm.layer_norm import LayerNorm, add_layer_norm, layer_norm
from narrowgauge.norm.linear_cross_entropy import LinearCrossEntropyLoss, linear_cross_entropy
from narrowgauge.norm.ln_removal import FixedStdLayerNorm, LNRemovalSchedule, residual_std_loss
from narrowgauge.norm.norm_linear import LayerNormLinear, RMSNormLinear, layer_norm_linear, rms_norm_linear
from narrowgauge.norm.norm_quant import layer_norm_quant, rms_norm_quant
from narrowgauge.norm.peri_add_norm import peri_add_norm
from narrowgauge.norm.placement import ResidualNorm, mix_ln_schemes
from narrowgauge.norm.polynorm import PolyNorm, poly_norm
from narrowgauge.norm.power_norm import PowerNorm
from narrowgauge.norm.pre_rms_norm import CRMSNorm, ZeroMeanLinear, crms_norm
from narrowgauge.norm.qk_norm import QKNorm, head_rms_norm, qk_norm
from narrowgauge.norm.quant_l1_norm import QuantL1LayerNorm, quant_l1_layer_norm
from narrowgauge.norm.rms_norm import RMSNorm, add_rms_norm, rms_norm
from narrowgauge.norm.scale_norm import ScaleNorm, l2_normalize, scale_norm
from narrowgauge.norm.seednorm import SeeDNorm, seed_norm
from narrowgauge.norm.softmax import LogSoftmax, Softmax, log_softmax, logsumexp, softmax, sum_exp_extended
from narrowgauge.norm.tokenformer import TokenParameterAttention, gelu_l2_norm, l2_norm_gelu
from narrowgauge.norm.unified_norm import UnifiedNorm, fold_unified_norm

__all__ = [
    "AdaLayerNorm",
    "AdaRMSNorm",
    "CRMSNorm",
    "CrossEntropyLoss",
    "Derf",
    "DyT",
    "FixedStdLayerNorm",
    "GatedRMSNorm",
    "L1BatchNorm2d",
    "L1LayerNorm",
    "LNRemovalSchedule",
    "LayerNorm",
    "LayerNormLinear",
    "LinearCrossEntropyLoss",
    "LogSoftmax",
    "PolyNorm",
    "PowerNorm",
    "QKNorm",
    "QuantL1LayerNorm",
    "RMSNorm",
    "RMSNormLinear",
    "ResidualNorm",
    "ScaleNorm",
    "SeeDNorm",
    "Softmax",
    "TokenParameterAttention",
    "UnifiedNorm",
    "ZeroMeanLinear",
    "ada_layer_norm",
    "ada_rms_norm",
    "add_ada_layer_norm",
    "add_ada_rms_norm",
    "add_layer_norm",
    "add_rms_norm",
    "crms_norm",
    "cross_entropy",
    "derf",
    "dyt",
    "fold_unified_norm",
    "gated_residual",
    "gated_rms_norm",
    "gelu_l2_norm",
    "head_rms_norm",
    "l1_layer_norm",
    "l2_norm_gelu",
    "l2_normalize",
    "layer_norm",
    "layer_norm_linear",
    "layer_norm_quant",
    "linear_cross_entropy",
    "log_softmax",
    "logsumexp",
    "mix_ln_schemes",
    "peri_add_norm",
    "poly_norm",
    "qk_norm",
    "quant_l1_layer_norm",
    "residual_std_loss",
    "rms_norm",
    "rms_norm_linear",
    "rms_norm_quant",
    "scale_norm",
    "seed_norm",
    "softmax",
    "sum_exp_extended",
]
