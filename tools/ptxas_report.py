"""Registers, spills and stack of every CUDA kernel, as ptxas reported them.

Two uses, both by CMake:
    ptxas_report.py --run nvcc ...             compile, keeping what ptxas says in <object>.ptxas
    ptxas_report.py --json FILE OBJECT...      gather those, write FILE, print a table
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

COLUMNS = ("kernel", "arch", "registers", "spill_stores", "spill_loads", "stack")


def run_compiler(command: list[str]) -> int:
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    report, rest = [], []
    for line in done.stderr.splitlines():
        (report if line.startswith("ptxas info") or "bytes stack frame" in line else rest).append(line)
    if rest:
        print(*rest, sep="\n", file=sys.stderr)
    if "-o" in command and done.returncode == 0:
        Path(command[command.index("-o") + 1] + ".ptxas").write_text("\n".join(report))
    return done.returncode


def parse(report: str) -> list[dict[str, str | int]]:
    """One row per kernel and architecture; a function that was not inlined counts to the kernel above it."""
    rows: list[dict[str, str | int]] = []
    for line in report.splitlines():
        if found := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            rows.append(dict(zip(COLUMNS, (found[1], found[2], 0, 0, 0, 0), strict=True)))
        elif "bytes stack frame" in line:
            figures = map(int, re.findall(r"\d+", line))
            for name, value in zip(("stack", "spill_stores", "spill_loads"), figures, strict=True):
                rows[-1][name] = int(rows[-1][name]) + value
        elif found := re.search(r"Used (\d+) registers", line):
            rows[-1]["registers"] = int(found[1])
    return rows


def demangle(names: list[str]) -> list[str]:
    if not names or not shutil.which("c++filt"):
        return names
    return subprocess.check_output(["c++filt", *names], text=True).splitlines()


def short(kernel: str) -> str:
    """`void narrowgauge::f<float, 4>(Args)` without what every kernel has in common."""
    name = re.sub(r"^void |narrowgauge::|\(anonymous namespace\)::", "", kernel)
    return re.sub(r"\([^()]*\)$", "", name)


def print_table(rows: list[dict[str, str | int]]) -> None:
    names = [short(str(row["kernel"])) for row in rows]
    width = max(map(len, ["kernel", *names]))
    print(f"{'kernel':<{width}}  {'arch':<7} registers  spill st/ld  stack")
    for name, row in zip(names, rows, strict=True):
        spills = f"{row['spill_stores']}/{row['spill_loads']}"
        print(f"{name:<{width}}  {row['arch']:<7} {row['registers']:>9}  {spills:>11}  {row['stack']:>5}")


def main(arguments: list[str]) -> int:
    if arguments[0] == "--run":
        return run_compiler(arguments[1:])
    _, output, *objects = arguments
    rows = [row for obj in objects for row in parse(Path(obj + ".ptxas").read_text())]
    for row, name in zip(rows, demangle([str(row["kernel"]) for row in rows]), strict=True):
        row["kernel"] = name
    rows.sort(key=lambda row: (row["kernel"], row["arch"]))
    Path(output).write_text(json.dumps(rows, indent=1))
    print_table(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
