"""The wheel: its tag, what is in it, and that it can be made without a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project without its operators: a real build of both kinds of wheel, in seconds."""
    copy = tmp_path_factory.mktemp("wheel") / "sources"
    ignore = shutil.ignore_patterns("__pycache__", "lib", "*.egg-info", "*.so")
    for name in ("cmake", "examples", "python", "csrc/common"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore, symlinks=True)
    for name in ("CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, copy)
    return copy


def build_wheel(sources: Path, **environment: str) -> tuple[str, set[str]]:
    """The wheel's file name and the names in it."""
    folder = sources / "dist"
    shutil.rmtree(folder, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
    subprocess.run([*pip, "-w", folder, "."], cwd=sources, env={**os.environ, **environment}, check=True)
    (wheel,) = folder.glob("*.whl")
    with ZipFile(wheel) as archive:
        return wheel.name, set(archive.namelist())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="native wheels are built on Linux")
@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
def test_native_wheel_serves_every_python(sources: Path) -> None:
    name, files = build_wheel(sources, NARROWGAUGE_NATIVE="ON", NARROWGAUGE_CUDA="OFF")
    _, version, python, abi, platform = name.removesuffix(".whl").split("-")
    assert (version, python, abi) == ("0.1.0", "py3", "none")
    assert platform.startswith("linux_")
    assert {file for file in files if file.endswith(".so")} == {"narrowgauge/lib/libnarrowgauge_cpu.so"}
    assert {"narrowgauge/py.typed", "narrowgauge/examples/byte_llama.py", "narrowgauge/cli/main.py"} <= files


@pytest.mark.slow
def test_without_a_compiler_the_wheel_is_pure(sources: Path) -> None:
    name, files = build_wheel(sources, NARROWGAUGE_NATIVE="AUTO", CXX="/nonexistent/c++")
    assert name == "narrowgauge-0.1.0-py3-none-any.whl"
    assert not [file for file in files if file.endswith(".so")]
    assert "narrowgauge/ops/library.py" in files


def test_native_on_without_a_compiler_is_an_error() -> None:
    environment = {**os.environ, "NARROWGAUGE_NATIVE": "ON", "CXX": "/nonexistent/c++"}
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "no C++ compiler (/nonexistent/c++)" in done.stderr
