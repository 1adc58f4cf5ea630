"""Facts about the machine and the software, for the record beside every measurement."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any

import torch

import narrowgauge as ng
from narrowgauge.ops import library


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def facts() -> dict[str, Any]:
    info = ng.info()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "gpu": info.cuda_device,
        "cuda_driver": info.cuda_driver,
        "cuda": torch.version.cuda,
        "python": info.python,
        "torch": info.torch,
        "narrowgauge": info.version,
        "backend": info.backend,
        "cpu_isa": info.cpu_isa,
        "cpu_library": library.state.cpu.loaded,
        "cuda_library": library.state.cuda.loaded,
        "cuda_architectures": info.cuda_architectures,
    }
