"""Narrow states and parameters over a long training of the demo's model, against float32.

The everyday test takes 150 steps; NARROWGAUGE_LONG_RUNS=1 adds one of 2,000, which takes about a minute.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import pytest
import torch

import narrowgauge as ng
from narrowgauge.examples.byte_llama import ByteLlama, Config
from narrowgauge.examples.standard_library_text import Batches, standard_library_text

ALTERNATIVES: dict[str, dict[str, Any]] = {
    "int8": {"state_dtype": "int8"},
    "bf16 stochastic": {"param_update": "stochastic"},
    "bf16 stochastic, int8": {"param_update": "stochastic", "state_dtype": "int8"},
}


@functools.cache
def text() -> torch.Tensor:
    return standard_library_text().train


@functools.cache
def final_loss(steps: int, alternative: str | None) -> float:
    """Mean training loss of the last fifth, in nats per byte."""
    options = ALTERNATIVES.get(alternative or "", {})
    torch.manual_seed(0)
    model = ByteLlama(Config(dim=64, layers=2))
    if "param_update" in options:
        model.bfloat16()
    ng.swap(model)
    optimizer = ng.optim.AdamW(model.parameters(), lr=2e-3, **options)
    batches = Batches(text(), steps, batch_size=4, length=64, seed=1)
    losses = []
    for step in range(steps):
        loss = model.loss(*batches[step])
        loss.backward()
        optimizer.step(max_grad_norm=1.0)
        optimizer.zero_grad()
        losses.append(loss.item())
    last = losses[-steps // 5 :]
    return sum(last) / len(last)


def assert_stays_near(steps: int, alternative: str, learnt: float, band: float) -> None:
    exact, narrow = final_loss(steps, None), final_loss(steps, alternative)
    assert exact < learnt, "it learns: a uniform guess has 5.55"
    assert abs(narrow - exact) < band, f"{narrow:.4f} nats per byte, float32 {exact:.4f}"


@pytest.mark.parametrize("alternative", ALTERNATIVES)
def test_150_steps(alternative: str) -> None:
    assert_stays_near(150, alternative, learnt=3.2, band=0.05)


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("NARROWGAUGE_LONG_RUNS") != "1", reason="NARROWGAUGE_LONG_RUNS=1 runs it")
@pytest.mark.parametrize("alternative", ALTERNATIVES)
def test_2000_steps(alternative: str) -> None:
    assert_stays_near(2000, alternative, learnt=2.0, band=0.05)
