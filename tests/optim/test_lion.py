"""Lion: recorded runs, the size of its steps, and its cautious form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.optim.golden import replay
from torch import nn

import narrowgauge as ng

TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-6}


def make(params: list[nn.Parameter], meta: dict[str, Any]) -> torch.optim.Optimizer:
    options = {k: v for k, v in meta["hyperparameters"].items() if k in ("lr", "betas", "weight_decay")}
    return ng.optim.Lion(params, **options)


def test_replays_recorded_runs() -> None:
    assert replay("extra_optim", "optimi_lion", make, tolerances=TOLERANCES)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_follows_the_formula(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(17, 5, generator=generator, dtype=torch.float64)
    p, expected, m = nn.Parameter(start.clone()), start.clone(), torch.zeros_like(start)
    optimizer = ng.optim.Lion([p], lr=0.01, betas=(0.8, 0.95), weight_decay=0.1)
    for _ in range(4):
        p.grad = torch.randn(17, 5, generator=generator, dtype=torch.float64)
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * (0.8 * m + 0.2 * p.grad).sign()
        m = 0.95 * m + 0.05 * p.grad
        with ng.backend(backend):
            optimizer.step()
    torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], m, rtol=1e-12, atol=1e-13)


def test_where_there_was_never_a_gradient_nothing_moves() -> None:
    p = nn.Parameter(torch.ones(300))
    p.grad = torch.zeros(300)
    ng.optim.Lion([p], lr=0.1).step()
    assert torch.equal(p.detach(), torch.ones(300))


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_cautious_leaves_elements_out_and_enlarges_the_others(backend: str) -> None:
    p = nn.Parameter(torch.zeros(8, dtype=torch.float64))
    optimizer = ng.optim.Lion([p], lr=0.1, cautious=True)
    with ng.backend(backend):
        p.grad = torch.ones(8, dtype=torch.float64)
        optimizer.step()
        torch.testing.assert_close(p.detach(), torch.full((8,), -0.1, dtype=torch.float64))
        before = p.detach().clone()
        # The momentum is 0.01: a small gradient against it leaves the direction as it was.
        p.grad = torch.tensor([-0.01, -0.01, 1, 1, 1, 1, 1, 1], dtype=torch.float64)
        optimizer.step()
    moved = before - p.detach()
    torch.testing.assert_close(moved[:2], torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(moved[2:], torch.full((6,), 0.1 * 8 / 6, dtype=torch.float64))


def test_loads_a_state_without_step_counters() -> None:
    """As other implementations of Lion keep it."""
    p, q = nn.Parameter(torch.ones(30)), nn.Parameter(torch.ones(30))
    ours, fresh = ng.optim.Lion([p]), ng.optim.Lion([q])
    p.grad = torch.linspace(-1, 1, 30)
    ours.step()
    saved = ours.state_dict()
    saved["state"][0].pop("step")
    fresh.load_state_dict(saved)
    assert torch.equal(ours.state[p]["exp_avg"], fresh.state[q]["exp_avg"])


def test_bad_arguments() -> None:
    p = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=r"Lion: betas\[1\] must be a finite number in \[0, 1\), got 1.5"):
        ng.optim.Lion([p], betas=(0.9, 1.5))
    with pytest.raises(ValueError, match="Lion: weight_decay must be a finite number >= 0, got -1"):
        ng.optim.Lion([p], weight_decay=-1)
