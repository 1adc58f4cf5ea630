"""The mutation test finds the barriers in source text and judges what the tests said about them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.emulator import mutate
from tests.emulator.loading import load_emulator
from tests.emulator.test_emulator import barriers_of

SOURCE = """\
__device__ void cluster_barrier() { asm("barrier.cluster.arrive; __syncthreads()"); }
// __syncthreads();
/* __syncthreads();
   __syncwarp(); */ int x;
__syncthreads();  // a comment
if (__syncthreads_or(x)) __syncwarp(mask);
async_wait<kStages - 1>();
    cluster_barrier();
async_commit();
"""


def test_barriers_are_found_in_code_alone() -> None:
    assert mutate.find_barriers(SOURCE) == [5, 6, 7, 8]


@pytest.mark.parametrize(
    ("survivors", "reasons", "complaint"),
    [
        ([], "", None),
        (["a.cuh:1"], '"a.cuh:1" = "why"', None),
        (["a.cuh:1"], "", "no test notices the loss of a.cuh:1"),
        ([], '"a.cuh:1" = "why"', "a test notices its loss"),
        ([], '"a.cuh:3" = "why"', "a.cuh:3 is listed in mutations.toml and is no barrier"),
    ],
)
def test_survivors_need_a_reason_that_holds(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    survivors: list[str],
    reasons: str,
    complaint: str | None,
) -> None:
    (tmp_path / "mutations.toml").write_text(reasons)
    monkeypatch.setattr(mutate, "REASONS", tmp_path / "mutations.toml")
    monkeypatch.setattr(mutate, "barriers", lambda: ["a.cuh:1", "a.cuh:2"])
    monkeypatch.setattr(mutate, "operators_at_barriers", lambda: {"a.cuh:2": ["some_operator"]})
    monkeypatch.setattr(
        mutate, "is_noticed", lambda disabled, operators=None: disabled not in ["", *survivors]
    )
    assert mutate.main() == (complaint is not None)
    assert (complaint or "") in capsys.readouterr().out


@pytest.mark.emulator
def test_the_operators_at_a_barrier_are_found() -> None:
    load_emulator()
    operators = mutate.operators_at_barriers()
    assert set(operators) <= set(mutate.barriers())
    (in_group_sum,) = {tuple(names) for site, names in operators.items() if "reduce.cuh" in site}
    assert {"rms_norm", "layer_norm_backward"} <= set(in_group_sum)
    assert "dequantize" not in in_group_sum


@pytest.mark.emulator
def test_the_environment_switches_a_barrier_off() -> None:
    emulator = load_emulator()
    program = f"""
import sys; sys.path.insert(0, {str(Path(emulator.__file__).parent)!r})
import narrowgauge_emulator as emulator, numpy as np
emulator.self_test.run("block_rotate", emulator.Tensor(np.ones(64, np.float32), "float32"), 1, 64, 4096, 1)
"""
    environment = os.environ | {"NARROWGAUGE_EMULATOR_DISABLE": barriers_of("block_rotate")[0]}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert "EmulatorError: self_test::block_rotate" in result.stderr
