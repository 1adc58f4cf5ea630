"""Recorded numbers of the authors' implementations: tests/golden/<folder>/*.npz, each folder with its README."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


def files(folder: str, pattern: str = "*.npz") -> list[Path]:
    """The files of a folder, sorted; a folder without any is a mistake."""
    found = sorted((GOLDEN / folder).glob(pattern))
    assert found, f"tests/golden/{folder} has no {pattern}"
    return found


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and the options that the JSON in `meta` holds."""
    with np.load(path) as file:
        meta = json.loads(str(file["meta"])) if "meta" in file.files else {}
        return {name: torch.from_numpy(file[name]) for name in file.files if name != "meta"}, meta
