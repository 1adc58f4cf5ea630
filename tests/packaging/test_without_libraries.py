"""With no compiled library the package imports, says so once, and computes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import warnings

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import narrowgauge as ng

import torch

ours = [w for w in caught if "narrowgauge" in str(w.message)]
assert len(ours) == 1 and ours[0].category is RuntimeWarning, caught
assert "not built" in ng.info().cpu_library
x, weight = torch.randn(5, 33), torch.randn(33)
expected = torch.nn.functional.rms_norm(x, (33,), weight, 1e-6)
torch.testing.assert_close(ng.nn.functional.rms_norm(x, (33,), weight, 1e-6), expected)
try:
    with ng.backend("native"):
        raise SystemExit("native without a library")
except RuntimeError as error:
    assert "not available" in str(error)
print("fine")
"""


def test_import_without_libraries(tmp_path: Path) -> None:
    environment = {**os.environ, "NARROWGAUGE_LIBRARY_DIR": str(tmp_path)}
    environment.pop("NARROWGAUGE_CPU_ISA", None)
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "fine", done.stderr
