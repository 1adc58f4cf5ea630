"""Optimizers: one fused kernel over all parameters, with narrow states and parameters."""

from narrowgauge.optim.adabelief import AdaBelief
from narrowgauge.optim.adadelta import Adadelta
from narrowgauge.optim.adafactor import Adafactor
from narrowgauge.optim.adagrad import Adagrad
from narrowgauge.optim.adam_atan2 import AdamAtan2
from narrowgauge.optim.adam_mini import AdamMini
from narrowgauge.optim.adamax import Adamax
from narrowgauge.optim.adamp import AdamP
from narrowgauge.optim.adamw import Adam, AdamW
from narrowgauge.optim.adan import Adan
from narrowgauge.optim.ademamix import AdEMAMix
from narrowgauge.optim.adopt import ADOPT
from narrowgauge.optim.codec import bytes_per_element, decode_state, encode_state
from narrowgauge.optim.convert import import_bitsandbytes_state, import_torchao_state
from narrowgauge.optim.diffgrad import DiffGrad
from narrowgauge.optim.from_torch import from_torch
from narrowgauge.optim.galore import GaLoreAdamW
from narrowgauge.optim.gradnormlorp import GradNormLoRP
from narrowgauge.optim.in_backward import step_in_backward
from narrowgauge.optim.lamb import LAMB
from narrowgauge.optim.laprop import LaProp
from narrowgauge.optim.lars import LARS
from narrowgauge.optim.lion import Lion
from narrowgauge.optim.mars import MARS
from narrowgauge.optim.master import bf16_stochastic_round, join_master, kahan_add, split_master
from narrowgauge.optim.memory import memory
from narrowgauge.optim.muon import Muon, muon_groups, newton_schulz
from narrowgauge.optim.nadam import NAdam
from narrowgauge.optim.nap import NormProjector, nap_
from narrowgauge.optim.normalized import NormalizedSGD, normalized_logistic_step_
from narrowgauge.optim.prodigy import Prodigy
from narrowgauge.optim.radam import RAdam
from narrowgauge.optim.rmsprop import RMSprop
from narrowgauge.optim.sam import SAM, sam_perturb_, sam_restore_
from narrowgauge.optim.schedule_free import ScheduleFreeAdamW, ScheduleFreeSGD
from narrowgauge.optim.sgd import SGD
from narrowgauge.optim.sgdp import SGDP
from narrowgauge.optim.shampoo import Shampoo
from narrowgauge.optim.soap import SOAP
from narrowgauge.optim.stable_adamw import StableAdamW

__all__ = [
    "ADOPT",
    "LAMB",
    "LARS",
    "MARS",
    "SAM",
    "SGD",
    "SGDP",
    "SOAP",
    "AdEMAMix",
    "AdaBelief",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamAtan2",
    "AdamMini",
    "AdamP",
    "AdamW",
    "Adamax",
    "Adan",
    "DiffGrad",
    "GaLoreAdamW",
    "GradNormLoRP",
    "LaProp",
    "Lion",
    "Muon",
    "NAdam",
    "NormProjector",
    "NormalizedSGD",
    "Prodigy",
    "RAdam",
    "RMSprop",
    "ScheduleFreeAdamW",
    "ScheduleFreeSGD",
    "Shampoo",
    "StableAdamW",
    "bf16_stochastic_round",
    "bytes_per_element",
    "decode_state",
    "encode_state",
    "from_torch",
    "import_bitsandbytes_state",
    "import_torchao_state",
    "join_master",
    "kahan_add",
    "memory",
    "muon_groups",
    "nap_",
    "newton_schulz",
    "normalized_logistic_step_",
    "sam_perturb_",
    "sam_restore_",
    "split_master",
    "step_in_backward",
]
