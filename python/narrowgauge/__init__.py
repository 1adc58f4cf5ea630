"""Hand-written CUDA and C++ kernels for the part of PyTorch training that is not the matmul."""

from narrowgauge._version import __version__
from narrowgauge.ops import library as _library
from narrowgauge.ops.library import backend, info

_library.load()

from narrowgauge import convert, nn, optim, quant  # noqa: E402
from narrowgauge.swap import SwapReport, swap, unswap  # noqa: E402

__all__ = [
    "SwapReport",
    "__version__",
    "backend",
    "convert",
    "info",
    "nn",
    "optim",
    "quant",
    "swap",
    "unswap",
]
