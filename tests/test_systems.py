"""The table of systems says what is there: tools/systems.py looks every cell up."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from tests.emulator.loading import load_emulator

from narrowgauge.ops import System, library, system, systems

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    load_emulator()
    if not library.state.cpu.loaded:
        pytest.skip(f"CPU library {library.state.cpu.reason}")
    spec = importlib.util.spec_from_file_location("systems_tool", ROOT / "tools" / "systems.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_records_give(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main("--check") == 0, capsys.readouterr().err


def test_what_does_not_exist_is_named(tool: ModuleType) -> None:
    record = System("x", "X", "", "no.md", ("no_f",), ("NoM",), ("no_op",), ("no_golden",), ("no_bench",))
    assert tool.missing(record, {"rms_norm"}) == [
        "operator no_op",
        "function no_f",
        "module NoM",
        "tests/golden/no_golden",
        "benchmark of no_bench",
        "docs/no.md",
    ]


def test_an_empty_cell_needs_a_reason(tool: ModuleType) -> None:
    cells, unexplained = tool.row(System("x", "X", "", "a.md", reasons={"golden": "no code exists"}))
    assert cells["golden"] == "*no code exists*"
    assert unexplained == ["reference", "cpu", "cuda", "module", "bench"]


def test_kernels_are_counted_where_they_are(tool: ModuleType) -> None:
    cells, _ = tool.row(System("x", "X", "", "a.md", operators=("rms_norm", "no_op")))
    assert (cells["cpu"], cells["cuda"]) == ("1 of 2", "1 of 2")


def test_a_reason_for_a_cell_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="reasons has gpu; expected names of reference"):
        system("x", title="X", source="", page="x.md", reasons={"gpu": "none"})
    assert "x" not in systems
