"""Choosing the implementation: ng.backend, ng.info and the environment variables."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import narrowgauge as ng
from narrowgauge.nn.functional import rms_norm
from narrowgauge.ops import library, registry

needs_native = pytest.mark.skipif(
    not library.state.cpu.loaded, reason=f"CPU library {library.state.cpu.reason}"
)


@pytest.fixture
def references_called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the operators whose Python reference was called directly."""
    called: list[str] = []
    for name, record in registry.items():
        reference = record.reference

        def spy(*args: object, name: str = name, reference: object = reference) -> object:
            called.append(name)
            return reference(*args)

        monkeypatch.setattr(record, "reference", spy)
    return called


@needs_native
def test_backend_chooses_the_implementation(references_called: list[str]) -> None:
    x = torch.randn(3, 8)
    before = library.state.backend
    for name, expected in (("native", []), ("auto", []), ("reference", ["rms_norm"])):
        references_called.clear()
        with ng.backend(name):
            assert ng.info().backend == name
            rms_norm(x, 8)
        assert references_called == expected, name
    x.requires_grad_()
    references_called.clear()
    with ng.backend("reference"):
        rms_norm(x, 8).sum().backward()
    assert references_called == ["rms_norm_forward", "rms_norm_backward"]
    assert library.state.backend == before


def test_backends_nest_and_come_back_after_an_error() -> None:
    before = library.state.backend
    with ng.backend("reference"):
        with ng.backend("auto"):
            assert ng.info().backend == "auto"
        assert ng.info().backend == "reference"
        with pytest.raises(KeyError), ng.backend("auto"):
            raise KeyError
        assert ng.info().backend == "reference"
    assert library.state.backend == before


def test_unknown_backend() -> None:
    before = library.state.backend
    with (
        pytest.raises(
            ValueError,
            match=r'backend \(NARROWGAUGE_BACKEND\) must be "auto", "reference" or "native", got \'fast\'',
        ),
        ng.backend("fast"),
    ):
        pass
    assert library.state.backend == before


def test_native_without_libraries_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    before = library.state.backend
    monkeypatch.setattr(library.state, "cpu", library.NativeLibrary("cpu", reason="not built"))
    monkeypatch.setattr(library.state, "cuda", library.NativeLibrary("cuda", reason="no CUDA"))
    with pytest.raises(RuntimeError, match="not available: not built"), ng.backend("native"):
        pass
    with pytest.raises(RuntimeError, match="the CPU library is not loaded: not built"):
        library.set_cpu_isa("v3")
    assert library.cpu_isa() is None
    assert library.available_cpu_isas() == []
    info = ng.info()
    assert (info.cpu_library, info.cpu_isa, info.cuda_library) == ("not built", "-", "no CUDA")
    assert library.state.backend == before


def test_info_is_a_table_of_what_is_installed() -> None:
    info = ng.info()
    assert info.version == ng.__version__
    assert info.torch == torch.__version__
    assert info.cpu_threads == torch.get_num_threads()
    rows = dict(line.split("  ", 1) for line in str(info).splitlines())
    assert {name.replace(" ", "_"): value.strip() for name, value in rows.items()} == {
        name: str(value) for name, value in vars(info).items()
    }


@needs_native
def test_instruction_set() -> None:
    available, before = library.available_cpu_isas(), library.cpu_isa()
    assert available[-1] == "baseline"
    assert before in available
    try:
        for name in available:
            library.set_cpu_isa(name)
            assert library.cpu_isa() == ng.info().cpu_isa == name
        with pytest.raises(ValueError, match='must be "v4", "v3" or "baseline", got \'v5\''):
            library.set_cpu_isa("v5")
        for name in {"v4", "v3"} - set(available):
            with pytest.raises(
                ValueError, match=f"this processor does not have the instruction set '{name}'"
            ):
                library.set_cpu_isa(name)
        assert library.cpu_isa() == available[-1]
    finally:
        library.set_cpu_isa(before)


def imported(**environment: str) -> subprocess.CompletedProcess[str]:
    program = "import narrowgauge as ng; i = ng.info(); print(i.backend, i.cpu_isa)"
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@needs_native
def test_environment_variables() -> None:
    done = imported(NARROWGAUGE_BACKEND="reference", NARROWGAUGE_CPU_ISA="baseline")
    assert done.stdout.split() == ["reference", "baseline"], done.stderr
    done = imported(NARROWGAUGE_BACKEND="", NARROWGAUGE_CPU_ISA="")
    assert done.stdout.split() == ["auto", library.available_cpu_isas()[0]], done.stderr


@needs_native
@pytest.mark.parametrize("variable", ["NARROWGAUGE_BACKEND", "NARROWGAUGE_CPU_ISA"])
def test_environment_variable_with_an_unknown_value(variable: str) -> None:
    done = imported(**{variable: "fastest"})
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError")
    assert variable in last
    assert "'fastest'" in last
