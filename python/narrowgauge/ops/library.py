"""The native libraries: where they are, whether they loaded, and which implementation runs."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

Backend = Literal["auto", "reference", "native"]

_library = torch.library.Library("narrowgauge", "DEF")


def define(schema: str, reference: Callable[..., Any]) -> None:
    """Declares an operator whose implementation, on every device without a kernel, is `reference`."""
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(schema[: schema.index("(")], reference, "CompositeExplicitAutograd")


@dataclass
class NativeLibrary:
    """One compiled library: its file, its build, or the reason it is not in use."""

    name: str
    path: Path | None = None
    reason: str = ""
    build: dict[str, Any] = field(default_factory=dict)
    handle: ctypes.CDLL | None = field(default=None, repr=False)

    @property
    def loaded(self) -> bool:
        return self.handle is not None


class _State:
    """Which implementation operators run: a plain attribute, because it is read at every call."""

    def __init__(self) -> None:
        self.backend: Backend = "auto"
        self.use_reference = False
        self.cpu_kernels = self.cuda_kernels = False  # loaded, and not set aside for the reference
        self.cpu = NativeLibrary("cpu")
        self.cuda = NativeLibrary("cuda")

    def select(self, backend: Backend) -> None:
        if backend not in ("auto", "reference", "native"):
            raise ValueError(
                f'backend (NARROWGAUGE_BACKEND) must be "auto", "reference" or "native", got {backend!r}'
            )
        if backend == "native" and not (self.cpu.loaded or self.cuda.loaded):
            raise RuntimeError(f'backend "native" is not available: {self.cpu.reason or self.cuda.reason}')
        self.backend = backend
        self.use_reference = backend == "reference"
        self.cpu_kernels = self.cpu.loaded and not self.use_reference
        self.cuda_kernels = self.cuda.loaded and not self.use_reference


state = _State()


def kernel_checks(x: Any) -> bool:
    """Whether a call on `x` goes to a kernel as it is: then the kernel's own guards are enough.

    Public functions try such calls at once and name the wrong argument only after a guard has refused, because at
    small sizes the checks in Python would cost more than the kernel.
    """
    return (
        isinstance(x, torch.Tensor)
        and not torch.compiler.is_compiling()
        and ((x.is_cpu and state.cpu_kernels) or (x.is_cuda and state.cuda_kernels))
        and x.is_contiguous()
    )


@contextlib.contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Chooses the implementation of every operator inside the ``with`` block; for tests and debugging.

    Args:
        name: ``"reference"`` runs the pure-PyTorch definitions, ``"native"`` requires the compiled libraries,
            ``"auto"`` (the default outside) uses a kernel where there is one.

    The environment variable ``NARROWGAUGE_BACKEND`` sets the same at import.
    """
    before = state.backend
    state.select(name)
    try:
        yield
    finally:
        state.select(before)


def _directory() -> Path:
    return Path(os.environ.get("NARROWGAUGE_LIBRARY_DIR") or Path(__file__).parent.parent / "lib")


def _load(library: NativeLibrary) -> None:
    path = _directory() / f"libnarrowgauge_{library.name}.so"
    if not path.exists():
        library.reason = f"not built ({path.name} is not in {path.parent})"
        return
    try:
        torch.ops.load_library(str(path))
        handle = ctypes.CDLL(str(path))
    except OSError as error:
        library.reason = f"could not be loaded: {error}"
        return
    library.path, library.handle = path, handle
    with contextlib.suppress(AttributeError):
        handle.narrowgauge_build_info.restype = ctypes.c_char_p
        library.build = json.loads(handle.narrowgauge_build_info())


def load() -> None:
    """Loads the libraries; called once at import. Where a library does not load, `info` says why."""
    _load(state.cpu)
    if torch.version.cuda is None:
        state.cuda.reason = "this PyTorch has no CUDA"
    else:
        _load(state.cuda)
    if not state.cpu.loaded:
        warnings.warn(
            f"narrowgauge runs on its slow pure-PyTorch references: the CPU library is {state.cpu.reason}. "
            "Reinstall where a C++17 compiler is available; ng.info() tells more.",
            RuntimeWarning,
            stacklevel=3,
        )
    elif isa := os.environ.get("NARROWGAUGE_CPU_ISA"):
        set_cpu_isa(isa)
    state.select(os.environ.get("NARROWGAUGE_BACKEND") or "auto")  # type: ignore[arg-type]


def cpu_isa() -> str | None:
    """The instruction set the CPU kernels use: "v4" (AVX-512), "v3" (AVX2) or "baseline"; None without the library."""
    if state.cpu.handle is None:
        return None
    function = state.cpu.handle.narrowgauge_cpu_isa
    function.restype = ctypes.c_char_p
    return function().decode()


def set_cpu_isa(name: str) -> None:
    """Forces the instruction set of the CPU kernels; for tests. ``NARROWGAUGE_CPU_ISA`` does the same at import."""
    if state.cpu.handle is None:
        raise RuntimeError(f"the CPU library is not loaded: {state.cpu.reason}")
    code = state.cpu.handle.narrowgauge_set_cpu_isa(name.encode())
    if code == 1:
        raise ValueError(f'NARROWGAUGE_CPU_ISA must be "v4", "v3" or "baseline", got {name!r}')
    if code == 2:
        raise ValueError(f"this processor does not have the instruction set {name!r}")


def available_cpu_isas() -> list[str]:
    """The instruction sets this processor can run, best first."""
    current, available = cpu_isa(), []
    if current is None:
        return []
    for name in ("v4", "v3", "baseline"):
        with contextlib.suppress(ValueError):
            set_cpu_isa(name)
            available.append(name)
    set_cpu_isa(current)
    return available


@dataclass(frozen=True)
class Info:
    """What is installed and in use; prints as a table."""

    version: str
    torch: str
    python: str
    backend: str
    cpu_library: str
    cpu_isa: str
    cpu_threads: int
    cuda_library: str
    cuda_architectures: str
    cuda_device: str
    cuda_driver: str

    def __str__(self) -> str:
        rows = [(name.replace("_", " "), str(value)) for name, value in vars(self).items()]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _cuda_driver() -> str:
    """The driver's CUDA version beside the one the CUDA library needs."""
    if torch.version.cuda is None:
        return "-"
    try:
        version = ctypes.c_int()
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return "none found"
    major, minor = version.value // 1000, version.value % 1000 // 10
    needed = str(state.cuda.build.get("cuda", "13.0")).split(".")[0]
    old = major < int(needed)
    return f"CUDA {major}.{minor}" + (
        f" (too old: this build needs CUDA {needed}, driver 580 or newer)" if old else ""
    )


def info() -> Info:
    """Which libraries loaded, for which architectures, and why not when not."""
    from narrowgauge import __version__

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    architectures = state.cuda.build.get("cuda_architectures", "-")
    return Info(
        version=__version__,
        torch=torch.__version__,
        python=platform.python_version(),
        backend=state.backend,
        cpu_library=str(state.cpu.path) if state.cpu.loaded else state.cpu.reason,
        cpu_isa=cpu_isa() or "-",
        cpu_threads=torch.get_num_threads(),
        cuda_library=str(state.cuda.path) if state.cuda.loaded else state.cuda.reason,
        cuda_architectures=str(architectures),
        cuda_device=device,
        cuda_driver=_cuda_driver(),
    )
