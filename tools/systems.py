"""Writes docs/systems.md from the records of the systems: `python tools/systems.py`, or `--check` to compare only.

Every cell is looked up, not claimed: operators in the registry, CPU kernels in PyTorch's dispatcher, CUDA kernels in
the emulator, which is built from the same sources, recorded numbers in tests/golden, benchmarks among their cases. So
the CPU library and the emulator must be built (`make test` builds both). An empty cell without a reason is an error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.emulator.loading import load_emulator  # noqa: E402

import narrowgauge  # noqa: E402
from narrowgauge.cli.bench import load_bench  # noqa: E402
from narrowgauge.ops import System, registry, systems  # noqa: E402
from narrowgauge.optim.base import ElementwiseOptimizer  # noqa: E402
from narrowgauge.optim.codec import STATE_DTYPES  # noqa: E402
from narrowgauge.optim.rule_samples import PARAM_UPDATES  # noqa: E402

PAGE = ROOT / "docs" / "systems.md"
INTRODUCTION = """\
# Systems

<!-- Written by tools/systems.py; do not edit. -->

What there is, and where each part of it stands. *Reference*: operators with a PyTorch definition. *CPU*, *CUDA*: how
many of these have a hand-written kernel; every CUDA kernel runs in the emulator in the tests. *Golden*: the folders of
`tests/golden` with numbers of the authors' code, which the tests replay. *Bench*: the cases of `narrowgauge bench`.

| system | reference | CPU | CUDA | module | golden | bench |
|---|---|---|---|---|---|---|
"""
OPTIMIZERS = """
## Optimizers

*Rule*: the file in `csrc/optim/rules` with the arithmetic that CPU and CUDA kernels share. *Storage*: which options of
[`state_dtype` and `param_update`](optim/state_formats.md) the classes take.

| optimizer | rule | storage | reference | CPU | CUDA | module | golden | bench |
|---|---|---|---|---|---|---|---|---|
"""


def public(dotted: str, *places: Any) -> bool:
    """Whether a name exists in one of the places, or below the package."""
    for place in (*places, narrowgauge):
        value: Any = place
        for part in dotted.split("."):
            value = getattr(value, part, None)
        if value is not None:
            return True
    return False


def missing(record: System, bench_operators: set[str]) -> list[str]:
    """What a record names and does not exist."""
    nn = narrowgauge.nn
    return [
        *(f"operator {name}" for name in record.operators if name not in registry),
        *(f"function {name}" for name in record.functions if not public(name, nn.functional)),
        *(f"module {name}" for name in record.modules if not public(name, nn)),
        *(f"tests/golden/{name}" for name in record.golden if not (ROOT / "tests/golden" / name).is_dir()),
        *(f"benchmark of {name}" for name in record.bench if name not in bench_operators),
        *([] if (ROOT / "docs" / record.page).is_file() else [f"docs/{record.page}"]),
    ]


def kernels(names: tuple[str, ...], has: Callable[[str], bool]) -> str:
    """How many of the operators have a kernel: "all 3", "2 of 3", or nothing."""
    count = sum(map(has, names))
    return "" if count == 0 else f"all {count}" if count == len(names) else f"{count} of {len(names)}"


def row(record: System) -> tuple[dict[str, str], list[str]]:
    """The cells of a record, and the empty ones without a reason."""
    emulated = load_emulator().ops

    def has_cpu(name: str) -> bool:
        return name in registry and torch._C._dispatch_has_kernel_for_dispatch_key(
            f"narrowgauge::{name}", "CPU"
        )

    cells = {
        "reference": kernels(record.operators, lambda name: name in registry),
        "cpu": kernels(record.operators, has_cpu),
        "cuda": kernels(record.operators, lambda name: hasattr(emulated, name)),
        "module": ", ".join(f"`{name}`" for name in record.modules),
        "golden": ", ".join(f"`{name}`" for name in record.golden),
        "bench": ", ".join(f"`{name}`" for name in record.bench),
    }
    unexplained = [cell for cell, text in cells.items() if not text and cell not in record.reasons]
    shown = {cell: text or f"*{record.reasons.get(cell, '')}*" for cell, text in cells.items()}
    for cell in record.reasons:  # a partial cell may have a remark
        if cells[cell]:
            shown[cell] += f" *({record.reasons[cell]})*"
    return shown, unexplained


def is_optimizer(record: System) -> bool:
    return bool(record.modules) and all(name.startswith("optim.") for name in record.modules)


def optimizer_cells(record: System) -> tuple[str, str]:
    """The rules of an optimizer's operators, and how its classes may store states and parameters."""
    names = {name.removesuffix("_sums").removesuffix("_") for name in record.operators}
    rules = sorted(name for name in names if (ROOT / f"csrc/optim/rules/{name}.h").is_file())
    kernels = ", ".join(f"`{rule}.h`" for rule in rules)
    classes = [getattr(narrowgauge.optim, name.removeprefix("optim.")) for name in record.modules]
    if not all(issubclass(kind, ElementwiseOptimizer) for kind in classes):
        wraps = bool(rules)
        return (
            kernels or "*matrix products of PyTorch*",
            "*that of the optimizer around it*" if wraps else "*float32 (float64 for float64 parameters)*",
        )
    offered = [storage(kind) for kind in classes]
    return kernels or "*kernels of its own*", offered[0] if len(set(offered)) == 1 else ", ".join(offered)


def storage(kind: type) -> str:
    """What of `state_dtype` and `param_update` a class takes, found out by asking for it."""
    p = torch.empty(64, 128, requires_grad=True)
    given: list[object] = [("weight", p)] if kind.__name__ == "AdamMini" else [p]
    table = narrowgauge.optim.memory(given, kind, lr=0.1)[1:]
    formats = [name for name in STATE_DTYPES if any(row.state_dtype == name for row in table)]
    updates = [name for name in PARAM_UPDATES if any(row.param_update == name for row in table)]
    states = "all states" if len(formats) == len(STATE_DTYPES) or kind.__name__ == "NormalizedSGD" else ""
    kept = "all updates" if len(updates) == len(PARAM_UPDATES) else ""
    if states and kept:
        return "all"
    return (states or "states " + ", ".join(formats)) + "; " + (kept or "updates " + ", ".join(updates))


def page() -> tuple[str, list[str]]:
    """The text of docs/systems.md, and what is wrong with the records."""
    _, modules = load_bench(ROOT)
    bench_operators = {case.operator for module in modules for case in module.CASES}
    text, optimizers, complaints = INTRODUCTION, OPTIMIZERS, []
    for name, record in sorted(systems.items(), key=lambda item: (item[1].page, item[0])):
        cells, unexplained = row(record)
        complaints += [f"{name}: {what} does not exist" for what in missing(record, bench_operators)]
        complaints += [f"{name}: the cell {cell} is empty without a reason" for cell in unexplained]
        functions = ", ".join(f"`{function}`" for function in record.functions)
        title = "<br>".join(filter(None, (f"[{record.title}]({record.page})", record.source, functions)))
        if is_optimizer(record):
            optimizers += f"| {' | '.join((title, *optimizer_cells(record), *cells.values()))} |\n"
        else:
            text += f"| {' | '.join((title, *cells.values()))} |\n"
    claimed = {operator for record in systems.values() for operator in record.operators}
    complaints += [f"operator {name} belongs to no system" for name in sorted(set(registry) - claimed)]
    return text + optimizers, complaints


def main(*arguments: str) -> int:
    text, complaints = page()
    if "--check" in arguments:
        if not PAGE.is_file() or PAGE.read_text() != text:
            complaints.append("docs/systems.md is out of date: run python tools/systems.py")
    else:
        PAGE.write_text(text)
    print(*complaints, sep="\n", file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
