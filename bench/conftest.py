"""Lets pytest-benchmark drive the harness: one of its rounds is one round of all contestants."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench import harness


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bench-device", default="cpu", help="device of the benchmarks")
    parser.addoption("--bench-no-compile", action="store_true", help="leave torch.compile out")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        device = metafunc.config.getoption("--bench-device")
        metafunc.parametrize("case", harness.cases_of([metafunc.module], device), ids=str)


@pytest.fixture(scope="session")
def setting(pytestconfig: pytest.Config) -> harness.Setting:
    harness.keep_freed_memory()
    return harness.Setting(
        device=pytestconfig.getoption("--bench-device"),
        compile=not pytestconfig.getoption("--bench-no-compile"),
    )


@pytest.fixture
def contest(benchmark, setting: harness.Setting) -> Callable[[harness.Case], None]:
    """Runs a case; its ratios are in the `extra_info` of pytest-benchmark's JSON."""

    def run(case: harness.Case) -> None:
        torch.compiler.reset()
        torch.manual_seed(0)
        built = case.build(setting)
        comparison = harness.Comparison(
            harness.with_copy(built.contestants, built.bytes_moved, setting.device),
            harness.Clock.of(setting.device, case.host_time),
        )
        benchmark.pedantic(comparison.round, rounds=10)
        ours = next(iter(built.contestants))
        benchmark.extra_info.update(harness.Measurement.of(comparison, ours, built.bytes_moved).to_json())

    return run
