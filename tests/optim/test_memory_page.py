"""The table of memory in the documentation is what `ng.optim.memory` counts."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_what_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("memory_tool", ROOT / "tools" / "optimizer_memory.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.main("--check") == 0, capsys.readouterr().err
