"""Finding the emulator's module, for every test that runs CUDA kernels on the CPU."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load_emulator() -> ModuleType:
    """The module `narrowgauge_emulator`. Not built, it skips the test, or fails it where it is required."""
    folder = (ROOT / os.environ.get("NARROWGAUGE_EMULATOR_DIR", "build/emulator")).resolve()
    if not any(folder.glob("narrowgauge_emulator.*")):
        reason = f"no narrowgauge_emulator in {folder}; `make emulator` builds it"
        if os.environ.get("NARROWGAUGE_REQUIRE_EMULATOR") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return importlib.import_module("narrowgauge_emulator")
