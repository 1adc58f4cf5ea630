"""Declaring operators: the record, autograd wiring, argument checks, and the native libraries."""

from narrowgauge.ops.autograd import Differentiable, differentiable
from narrowgauge.ops.library import Info, backend, info
from narrowgauge.ops.operator import Operator, Sample, SampleMaker, operator, registry
from narrowgauge.ops.system import System, system, systems

__all__ = [
    "Differentiable",
    "Info",
    "Operator",
    "Sample",
    "SampleMaker",
    "System",
    "backend",
    "differentiable",
    "info",
    "operator",
    "registry",
    "system",
    "systems",
]
