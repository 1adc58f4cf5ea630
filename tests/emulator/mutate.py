"""Mutation test of the barriers: with any one of them switched off, some emulated test must fail.

    python tests/emulator/mutate.py [pattern]

`pattern` keeps the barriers whose "file:line" contains it. A barrier that no test misses is needless, or is
listed in mutations.toml with the reason why it stays.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
REASONS = Path(__file__).with_name("mutations.toml")
PYTEST = "-m pytest -x -q -p no:cacheprovider -m emulator --ignore=tests/emulator tests"
TIME_LIMIT = 900  # seconds; a test that never ends has noticed, too

NOT_CODE = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)
# `void` before the name makes it a definition.
BARRIER = re.compile(
    r"(?<!void )\b(?:__syncthreads(?:_or|_and|_count)?|__syncwarp|cluster_barrier|async_wait\s*<[^<>]*>)\s*\("
)


def find_barriers(source: str) -> list[int]:
    """The lines with a barrier in CUDA source text."""
    code = NOT_CODE.sub(lambda match: "\n" * match[0].count("\n"), source)
    return sorted({code[: match.start()].count("\n") + 1 for match in BARRIER.finditer(code)})


def barriers() -> list[str]:
    """Every barrier of the product, as "norm/norm.cuh:41"."""
    files = [
        path
        for room in ("common", "norm", "quant", "optim")
        for path in sorted((CSRC / room).glob("*"))
        if path.suffix in {".h", ".cuh", ".cu", ".cpp"}
    ]
    return [f"{path.relative_to(CSRC)}:{line}" for path in files for line in find_barriers(path.read_text())]


def tests_fail(disabled: str) -> bool:
    """Whether an emulated operator test fails with this barrier switched off."""
    environment = os.environ | {"NARROWGAUGE_EMULATOR_DISABLE": disabled, "NARROWGAUGE_REQUIRE_EMULATOR": "1"}
    command = [sys.executable, *PYTEST.split()]
    try:
        result = subprocess.run(
            command, cwd=ROOT, env=environment, timeout=TIME_LIMIT, capture_output=True, text=True
        )
    except subprocess.TimeoutExpired:
        return True
    if result.returncode not in (0, 1):
        sys.exit(f"pytest itself failed with code {result.returncode}:\n{result.stdout}\n{result.stderr}")
    return result.returncode == 1


def main(pattern: str = "") -> int:
    """Prints what became of each barrier; returns 1 when no test misses one, or a reason is stale."""
    reasons = tomllib.loads(REASONS.read_text())
    found = barriers()
    gone = [site for site in reasons if site not in found]
    complaints = [f"{site} is listed in mutations.toml and is no barrier" for site in gone]
    if tests_fail(disabled=""):
        sys.exit("the emulated tests fail with every barrier in place")
    for site in (site for site in found if pattern in site):
        start = time.monotonic()
        killed = tests_fail(site)
        outcome = "killed" if killed else "survived"
        print(f"{site:32} {outcome:9} {time.monotonic() - start:6.1f} s  {reasons.get(site, '')}", flush=True)
        if killed and site in reasons:
            complaints.append(f"{site} is listed in mutations.toml and a test notices its loss")
        elif not killed and site not in reasons:
            complaints.append(
                f"no test notices the loss of {site}: remove it, or test it, or list the reason"
            )
    print(*complaints, sep="\n")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
