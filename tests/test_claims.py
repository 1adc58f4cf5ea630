"""docs/claims.md says what the committed results say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("claims_tool", ROOT / "tools" / "claims.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_results_give(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main("--check") == 0, capsys.readouterr().err


def test_a_ratio_is_that_of_two_contestants(tool: ModuleType) -> None:
    case = {"speedups": {"a": {"median": 3.0}, "b": {"median": 2.0}}}
    assert tool.ratio(case, "a", "b") == 1.5
    assert tool.ratio(case, "a", tool.OURS) == 3.0
    assert tool.ratio(case, tool.OURS, "b") == 0.5
