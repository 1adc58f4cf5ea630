"""Writes docs/optim/memory.md: `python tools/optimizer_memory.py`, or `--check` to compare only.

Bytes are counted, not claimed: `ng.optim.memory` makes the states of one parameter of 1024 x 1024 elements on the meta
device, for every optimizer and every way to store its states and parameters.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import narrowgauge as ng
from narrowgauge.optim.base import ElementwiseOptimizer
from narrowgauge.optim.memory import Memory

PAGE = Path(__file__).resolve().parents[1] / "docs" / "optim" / "memory.md"
ELEMENTS = 1024 * 1024
INTRODUCTION = """\
# Memory of optimizers

<!-- Written by tools/optimizer_memory.py; do not edit. -->

Bytes per parameter of a matrix of 1024 x 1024. *Held*: parameter, gradient and states together. *Moved*: the least
that a step reads and writes, gradients once, parameters and states twice; a method with a reduction reads some of it
again (its page says how much). [`ng.optim.memory`](mechanics.md) counts the same for a model of yours.

## AdamW, by storage

| parameters | states | update | parameter | gradient | states | held | moved |
|---|---|---|---:|---:|---:|---:|---:|
"""
CLASSES = """
## Every optimizer, float32 parameters

With the arguments' defaults; SGD, RMSprop and LARS with momentum, low-rank methods with rank 128.

| optimizer | float32 states | held | moved | int8 states | held | moved |
|---|---:|---:|---:|---:|---:|---:|
"""
ARGUMENTS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9},
    "SGDP": {"momentum": 0.9},
    "RMSprop": {"momentum": 0.9},
    "GaLoreAdamW": {"rank": 128},
    "GradNormLoRP": {"rank": 128},
}
NOT_ALONE = {"SAM"}


def optimizers() -> list[type]:
    """Every class that takes parameters like an optimizer, by name."""
    found = (getattr(ng.optim, name) for name in sorted(ng.optim.__all__, key=str.lower))
    return [
        kind
        for kind in found
        if inspect.isclass(kind)
        and issubclass(kind, torch.optim.Optimizer)
        and kind.__name__ not in NOT_ALONE
    ]


def rows(kind: type, **options: Any) -> list[Memory]:
    """What `ng.optim.memory` counts for a matrix, without AdamW for comparison."""
    named = [("layer.weight", torch.empty(1024, 1024, device="meta", requires_grad=True))]
    name = kind.__name__
    return list(ng.optim.memory(named if name == "AdamMini" else [named[0][1]], kind, **options))[1:]


def moved(row: Memory) -> float:
    return (row.grads + 2 * (row.params + row.states)) / ELEMENTS


def cells(values: Iterable[float]) -> str:
    return " | ".join(f"{value:.2f}" for value in values)


def page() -> str:
    text = INTRODUCTION
    first = ng.optim.memory([torch.empty(1024, 1024, device="meta", requires_grad=True)])[0]
    for row in [first, *rows(ng.optim.AdamW)]:
        numbers = (
            row.params / ELEMENTS,
            row.grads / ELEMENTS,
            row.states / ELEMENTS,
            row.total / ELEMENTS,
            moved(row),
        )
        line = f"| {row.param_dtype} | {row.state_dtype} | {row.param_update} | {cells(numbers)} |\n"
        text += "" if line in text else line
    text += CLASSES
    for kind in optimizers():
        options = {"lr": 1e-3, **ARGUMENTS.get(kind.__name__, {})}
        parts = []
        takes = issubclass(kind, ElementwiseOptimizer) or "state_dtype" in inspect.signature(kind).parameters
        for state_dtype in ("fp32", "int8"):
            chosen = {"state_dtype": state_dtype, "param_update": "nearest"} if takes else {}
            try:
                (row,) = rows(kind, **options, **chosen) or [first]
            except ValueError:
                parts.append("- | - | -")
                continue
            if state_dtype == "int8" and not takes:
                parts.append("- | - | -")
            else:
                parts.append(cells((row.states / ELEMENTS, row.total / ELEMENTS, moved(row))))
        text += f"| {kind.__name__} | {' | '.join(parts)} |\n"
    return text


def main(*arguments: str) -> int:
    text = page()
    if "--check" not in arguments:
        PAGE.write_text(text)
    elif not PAGE.is_file() or PAGE.read_text() != text:
        print("docs/optim/memory.md is out of date: run python tools/optimizer_memory.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
