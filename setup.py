"""The native libraries, built by CMake; everything else about the package is in pyproject.toml.

Environment:
    NARROWGAUGE_NATIVE=AUTO|ON|OFF   AUTO: built where a compiler and torch are found
    NARROWGAUGE_CUDA=AUTO|ON|OFF     AUTO: the CUDA library too where nvcc is found
    NARROWGAUGE_CUDA_ARCHS           as CMAKE_CUDA_ARCHITECTURES
    CMAKE_ARGS                       anything else for CMake
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "cmake"))

from find_torch import find_torch  # noqa: E402


def tool(name: str) -> str | None:
    """A program beside this Python (a virtual environment need not be activated), or else on PATH."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def missing_for_native() -> str:
    """What keeps the native libraries from being built here; empty if nothing does."""
    if os.environ.get("NARROWGAUGE_NATIVE", "AUTO") == "OFF":
        return "NARROWGAUGE_NATIVE=OFF"
    if sys.platform != "linux":
        return f"the platform is {sys.platform}, not Linux"
    compilers = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(map(shutil.which, compilers)):
        return f"no C++ compiler ({', '.join(compilers)})"
    if not (tool("cmake") and tool("ninja")):
        return "no cmake or no ninja"
    if find_torch() is None:
        return "torch >= 2.10 is not installed in this environment (install it first)"
    return ""


def run(*command: object) -> None:
    if code := subprocess.call(list(map(str, command))):
        raise SystemExit(f"narrowgauge: {' '.join(map(str, command[:2]))} failed ({code}), see above")


class BuildNative(build_ext):
    """Configure, build, and install into narrowgauge/lib (of the sources, when in place)."""

    def run(self) -> None:
        build = ROOT / "build" / "cmake"
        command = [
            *(tool("cmake"), "-S", ROOT, "-B", build, "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DNARROWGAUGE_CUDA={os.environ.get('NARROWGAUGE_CUDA', 'AUTO')}",
            "-UNARROWGAUGE_CUDA_ARCHS",
        ]
        if archs := os.environ.get("NARROWGAUGE_CUDA_ARCHS"):
            command.append(f"-DNARROWGAUGE_CUDA_ARCHS={archs}")
        command += os.environ.get("CMAKE_ARGS", "").split()
        run(*command)
        run(tool("cmake"), "--build", build)
        run(tool("cmake"), "--install", build, "--prefix", self.library_dir)
        installed = [Path(line).name for line in (build / "install_manifest.txt").read_text().splitlines()]
        for library in self.library_dir.glob("*.so"):
            if library.name not in installed:
                library.unlink()  # of an earlier build with other options

    @property
    def library_dir(self) -> Path:
        base = ROOT / "python" if self.inplace else Path(self.build_lib).absolute()
        return base / "narrowgauge" / "lib"

    def get_outputs(self) -> list[str]:
        return [str(path) for path in self.library_dir.glob("*.so")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Wheel(bdist_wheel):
    """The stable ABI and no CPython API: one wheel for every Python and every torch of a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def extensions() -> list[Extension]:
    missing = missing_for_native()
    if not missing:
        return [Extension("narrowgauge.lib", sources=[])]
    message = f"narrowgauge: building without native kernels, it will run on PyTorch references: {missing}"
    if os.environ.get("NARROWGAUGE_NATIVE") == "ON":
        raise SystemExit(message)
    print(f"warning: {message}", file=sys.stderr)
    return []


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel})
