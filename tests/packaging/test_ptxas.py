"""No CUDA kernel may spill registers: read from what ptxas said in the build, not from the source."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ptxas_report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ptxas_report", ROOT / "tools" / "ptxas_report.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_kernel_spills() -> None:
    reports = list(ROOT.glob("build/*/ptxas.json"))
    rows = [row for report in reports for row in json.loads(report.read_text())]
    if not rows:
        assert os.environ.get("NARROWGAUGE_REQUIRE_CUDA_BUILD") != "1", "no ptxas.json in build/"
        pytest.skip("no CUDA build here (no nvcc), so ptxas reported nothing")
    spilling = [row for row in rows if row["spill_stores"] or row["spill_loads"]]
    assert not spilling, "\n".join(f"{row['kernel']} ({row['arch']})" for row in spilling)


def test_parse_counts_each_kernel_and_architecture(ptxas_report: ModuleType) -> None:
    report = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z3addPf' for 'sm_80'
ptxas info    : Function properties for _Z3addPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers, 384 bytes cmem[0]
ptxas info    : Compiling entry function '_Z3addPf' for 'sm_90a'
ptxas info    : Function properties for _Z3addPf
    48 bytes stack frame, 44 bytes spill stores, 36 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 48 bytes cumulative stack size
"""
    assert ptxas_report.parse(report) == [
        dict(zip(ptxas_report.COLUMNS, ("_Z3addPf", "sm_80", 12, 0, 0, 0), strict=True)),
        dict(zip(ptxas_report.COLUMNS, ("_Z3addPf", "sm_90a", 255, 44, 36, 48), strict=True)),
    ]


@pytest.mark.parametrize(
    ("demangled", "shown"),
    [
        ("void narrowgauge::norm<float, 4>(narrowgauge::Args)", "norm<float, 4>"),
        ("narrowgauge::(anonymous namespace)::plain(narrowgauge::Args)", "plain"),
    ],
)
def test_names_are_shortened(ptxas_report: ModuleType, demangled: str, shown: str) -> None:
    assert ptxas_report.short(demangled) == shown
