"""Installs one wheel beside several Pythons and PyTorches, runs tools/smoke.py in each, and writes the table.

Each row gets a fresh virtual environment, removed afterwards. CUDA builds of torch are large downloads.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
CPU_INDEX = ("--extra-index-url", "https://download.pytorch.org/whl/cpu")
ROWS = (
    ("3.10", ("torch==2.10.*",)),
    ("3.12", ("torch==2.11.*",)),
    ("3.11", ("torch==2.13.0", *CPU_INDEX)),
    ("3.13", ("torch",)),  # the newest there is
)


def find_python(version: str) -> str | None:
    """An interpreter of that version: on PATH (if it runs: a shim may not), or one of pyenv's or uv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [f"python{version}", *map(str, pyenv.glob(f"{version}.*/bin/python"))]
    if shutil.which("uv"):
        found = subprocess.run(["uv", "python", "find", version], capture_output=True, text=True)
        candidates += found.stdout.split()
    probe = "import sys, venv; print('%d.%d' % sys.version_info[:2])"
    for candidate in filter(shutil.which, candidates):
        done = subprocess.run([candidate, "-c", probe], capture_output=True, text=True)
        if done.stdout.strip() == version:
            return candidate
    return None


def try_row(wheel: Path, version: str, torch: tuple[str, ...]) -> dict[str, str]:
    """What the smoke test says in a fresh environment; `result` is "passed" or the reason it is not."""
    python = find_python(version)
    if python is None:
        return {"python": version, "torch": torch[0], "result": "not run: no such Python on this machine"}
    with tempfile.TemporaryDirectory(prefix="narrowgauge-wheel-") as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        inside = Path(folder) / "bin" / "python"
        pip = [inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        steps = (
            [*pip, "numpy", *torch],
            [*pip, "--no-deps", wheel],
            [inside, ROOT / "tools" / "smoke.py"],
        )
        for step in steps:
            # Away from the sources, or they would be imported instead of the wheel.
            done = subprocess.run(list(map(str, step)), cwd=folder, capture_output=True, text=True)
            if done.returncode:
                print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
                reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
                return {"python": version, "torch": torch[0], "result": f"failed: {reason}"}
    return {"result": "passed", **json.loads(done.stdout.splitlines()[-1])}


def markdown(wheel: Path, rows: list[dict[str, str]]) -> str:
    columns = ("python", "torch", "cpu library", "cuda library", "result")
    size = wheel.stat().st_size / 1e6
    lines = [
        "# One wheel, every PyTorch",
        "",
        f"`{wheel.name}` ({size:.1f} MB) was installed as it is in each of these environments, and",
        "`tools/smoke.py` ran one operator of each room there. Written by `make wheel-matrix` on",
        f"{platform.system()} {platform.machine()} with {' '.join(platform.libc_ver())}.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(row.get(column, "-") for column in columns) + " |" for row in rows),
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} WHEEL (exactly one; `make wheel` builds it)")
    wheel = Path(sys.argv[1]).resolve()
    rows = []
    for version, torch in ROWS:
        print(f"Python {version}, {torch[0]} ...", flush=True)
        rows.append(try_row(wheel, version, torch))
        print(" ", rows[-1], flush=True)
    (ROOT / "docs" / "wheel_matrix.md").write_text(markdown(wheel, rows))
    return 0 if all(row["result"] == "passed" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
