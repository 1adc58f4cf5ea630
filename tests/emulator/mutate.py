"""Mutation test of the barriers: with any one of them switched off, some emulated test must fail.

    python tests/emulator/mutate.py [pattern]

`pattern` keeps the barriers whose "file:line" contains it. A barrier that no test misses is needless, or is
listed in mutations.toml with the reason why it stays.
"""

from __future__ import annotations

import json
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
PYTEST = "-m pytest -x -q -p no:cacheprovider -m emulator --ignore=tests/emulator"
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


def operators_at_barriers() -> dict[str, list[str]]:
    """For each barrier the operators that run it, found by running one sample after another of each."""
    program = """
import json, os, sys
import torch
import narrowgauge
from narrowgauge.ops import registry
from tests.backends import run_emulated
from tests.emulator.loading import load_emulator
emulator = load_emulator()
for name, record in registry.items():
    if os.fork() == 0:  # each in a process of its own, as the emulator remembers what ran
        for dtype in record.dtypes[:2]:
            for sample in record.sample_calls(dtype):
                run_emulated(record, *sample.args)
        print(json.dumps([name, emulator.barrier_sites()]), flush=True)
        os._exit(0)
    os.wait()
"""
    output = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    found: dict[str, list[str]] = {}
    for name, sites in map(json.loads, output.splitlines()):
        for site in sites:
            found.setdefault(site, []).append(name)
    return found


def is_noticed(disabled: str, operators: list[str] | None = None) -> bool:
    """Whether an emulated test fails with this barrier switched off: one of these operators', or any."""
    environment = os.environ | {"NARROWGAUGE_EMULATOR_DISABLE": disabled, "NARROWGAUGE_REQUIRE_EMULATOR": "1"}
    command = [sys.executable, *PYTEST.split()]
    if operators:
        command += ["tests/test_operators.py", "-k", " or ".join(operators)]
    else:
        command += ["tests"]
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
    if is_noticed(""):
        sys.exit("the emulated tests fail with every barrier in place")
    operators = operators_at_barriers()
    for site in (site for site in found if pattern in site):
        start = time.monotonic()
        nearest = operators.get(site, [])[:3]
        killed = (bool(nearest) and is_noticed(site, nearest)) or is_noticed(site)
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
