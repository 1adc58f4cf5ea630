"""What the built libraries ask of the process they are loaded into, and what they give it."""

from __future__ import annotations

import re
import shutil
import subprocess
from itertools import combinations
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARIES = sorted((ROOT / "python" / "narrowgauge" / "lib").glob("libnarrowgauge_*.so"))
KERNEL_OBJECTS = {
    folder.name.removeprefix("cpu_kernels_").removesuffix(".dir"): sorted(folder.rglob("*.o"))
    for folder in (ROOT / "build" / "cmake" / "CMakeFiles").glob("cpu_kernels_*.dir")
}

pytestmark = pytest.mark.skipif(
    not (LIBRARIES and shutil.which("nm") and shutil.which("readelf")),
    reason="needs the libraries built in place, and binutils",
)

# The stable ABI's C functions, the C library, and the C++ run time with its exceptions.
ALLOWED_UNDEFINED = re.compile(
    r"(aoti_)?torch_\w+$"
    r"|\w+@GLIBC_[\d.]+$"
    r"|\w+@(GLIBCXX|CXXABI|GCC)_[\d.]+$"
    r"|(_ITM_\w+|__gmon_start__|__cxa_finalize|__tls_get_addr)$"
)
ALLOWED_NEEDED = re.compile(
    r"lib(torch_cpu|torch_cuda|stdc\+\+|m|gcc_s|c|dl|rt|pthread)\.so(\.\d+)?$"
    r"|ld-linux-.*\.so\.\d$"
)


def output(*command: object) -> str:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout


def defined_symbols(objects: list[Path]) -> set[str]:
    """Symbols the linker could share between objects: global, weak and unique ones."""
    lines = output("nm", "--defined-only", "--extern-only", "--format=posix", *objects).splitlines()
    return {line.split()[0] for line in lines if len(line.split()) > 1}


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_needs_only_torch_and_the_system(library: Path) -> None:
    dynamic = output("readelf", "--dynamic", library)
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    assert "libtorch_cpu.so" in needed
    assert [name for name in needed if not ALLOWED_NEEDED.match(name)] == []
    assert ("libtorch_cuda.so" in needed) == ("cuda" in library.name)
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_uses_only_the_stable_abi(library: Path) -> None:
    lines = output("nm", "--dynamic", "--undefined-only", "--format=posix", library).splitlines()
    undefined = [line.split()[0] for line in lines]
    assert "torch_library_impl" in undefined or "aoti_torch_library_init_impl" in undefined
    assert [name for name in undefined if not ALLOWED_UNDEFINED.match(name)] == []


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_exports_only_its_own_names(library: Path) -> None:
    lines = output("nm", "--dynamic", "--defined-only", "--format=posix", library).splitlines()
    exported = [line.split()[0] for line in lines]
    assert "narrowgauge_build_info" in exported
    assert [name for name in exported if not name.startswith("narrowgauge_")] == []


def test_holds_no_path_of_the_machine_that_built_it() -> None:
    """Of the CPU library: the CUDA one names its sources, for the profiler and the sanitizer."""
    assert str(ROOT).encode() not in (LIBRARIES[0].parent / "libnarrowgauge_cpu.so").read_bytes()


@pytest.mark.skipif(len(KERNEL_OBJECTS) < 2, reason="one instruction set only, or built elsewhere")
@pytest.mark.parametrize(("first", "second"), list(combinations(sorted(KERNEL_OBJECTS), 2)))
def test_instruction_sets_share_no_symbol(first: str, second: str) -> None:
    """Of two definitions of one symbol the linker keeps either: an older processor could run AVX-512 code."""
    ours = defined_symbols(KERNEL_OBJECTS[first])
    assert ours
    assert ours & defined_symbols(KERNEL_OBJECTS[second]) == set()


@pytest.mark.skipif(not KERNEL_OBJECTS, reason="built elsewhere")
@pytest.mark.parametrize("isa", sorted(KERNEL_OBJECTS))
def test_kernels_share_no_symbol_with_the_bindings(isa: str) -> None:
    bindings = sorted((ROOT / "build/cmake/CMakeFiles/narrowgauge_cpu.dir").rglob("*.o"))
    assert bindings
    assert defined_symbols(KERNEL_OBJECTS[isa]) & defined_symbols(bindings) == set()
