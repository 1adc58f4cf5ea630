"""The record of a system: what users know by one name (PowerNorm, softmax, ...), and where its parts are.

`docs/systems.md` is generated from these records (`python tools/systems.py`), and the tests check every one of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

systems: dict[str, System] = {}

CELLS = ("reference", "cpu", "cuda", "module", "golden", "bench")


@dataclass(frozen=True)
class System:
    """One row of the table of systems.

    Attributes:
        name: Its key in the registry.
        title: Its name for readers.
        source: Paper, with arXiv id.
        page: Its page, below ``docs/``.
        functions: Public functions in ``narrowgauge.nn.functional``, or dotted below ``narrowgauge``.
        modules: Public classes in ``narrowgauge.nn``, or dotted below ``narrowgauge``.
        operators: Names in the operator registry.
        golden: Folders below ``tests/golden`` that its tests replay.
        bench: Names of the operators of its benchmark cases.
        reasons: Why a cell of the table is empty, by the names in `CELLS`.
    """

    name: str
    title: str
    source: str
    page: str
    functions: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    operators: tuple[str, ...] = ()
    golden: tuple[str, ...] = ()
    bench: tuple[str, ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)


def system(
    name: str,
    *,
    title: str,
    source: str,
    page: str,
    functions: tuple[str, ...] = (),
    modules: tuple[str, ...] = (),
    operators: tuple[str, ...] = (),
    golden: tuple[str, ...] = (),
    bench: tuple[str, ...] = (),
    reasons: Mapping[str, str] | None = None,
) -> System:
    """Registers a system; the arguments are the attributes of `System`."""
    unknown = set(reasons or {}) - set(CELLS)
    if unknown:
        raise ValueError(
            f"system {name}: reasons has {', '.join(sorted(unknown))}; expected names of {', '.join(CELLS)}"
        )
    record = System(
        name, title, source, page, functions, modules, operators, golden, bench, dict(reasons or {})
    )
    systems[name] = record
    return record
