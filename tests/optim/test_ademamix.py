"""AdEMAMix: a recorded run, its formula in float64, and AdamW where the slow momentum counts nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests import golden_files
from torch import Tensor, nn

import narrowgauge as ng

WIDE = torch.float64


def gradients(*shape: int, steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator, dtype=WIDE) for _ in range(steps)]


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_replays_bitsandbytes(backend: str) -> None:
    """Its weight decay is decoupled; its first state packs the fast momentum and the slow one."""
    recorded, meta = golden_files.read(golden_files.files("bnb8bit", "ademamix32.npz")[0])
    options = {k: v for k, v in meta["hyperparameters"].items() if k != "min_8bit_size"}
    p = nn.Parameter(recorded["param0_0"].clone())
    optimizer = ng.optim.AdEMAMix([p], decoupled_weight_decay=True, **options)
    for step in range(1, meta["steps"] + 1):
        p.grad = recorded[f"grad0_step{step}"].clone()
        with ng.backend(backend):
            optimizer.step()
        torch.testing.assert_close(p.detach(), recorded[f"param0_step{step}"], rtol=2e-6, atol=2e-7)
        state = optimizer.state[p]
        fast, slow = recorded[f"state0_state1_step{step}"]
        torch.testing.assert_close(state["exp_avg"], fast, rtol=2e-6, atol=1e-8)
        torch.testing.assert_close(state["exp_avg_slow"], slow, rtol=2e-5, atol=1e-8)
        torch.testing.assert_close(
            state["exp_avg_sq"], recorded[f"state0_state2_step{step}"], rtol=2e-6, atol=1e-9
        )


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("warm_up", [None, 3])
def test_ademamix_follows_the_formula(backend: str, decoupled: bool, warm_up: int | None) -> None:
    q = gradients(17, 9, steps=1)[0]
    p = nn.Parameter(q.clone())
    m, v, slow = (torch.zeros_like(q) for _ in range(3))
    optimizer = ng.optim.AdEMAMix(
        [p], lr=0.01, weight_decay=0.1, t_alpha_beta3=warm_up, decoupled_weight_decay=decoupled
    )
    for t, g in enumerate(gradients(17, 9, steps=5), 1):
        p.grad = g.clone()
        alpha, beta3 = 5.0, 0.9999
        if warm_up is not None and t < warm_up:
            # The half-life of the slow momentum grows evenly, from that of the fast one.
            half = [math.log(0.5) / math.log(beta) - 1 for beta in (0.9, 0.9999)]
            alpha = 5.0 * t / warm_up
            beta3 = 0.5 ** (1 / ((1 - t / warm_up) * half[0] + t / warm_up * half[1] + 1))
        g = g if decoupled else g + 0.1 * q
        m, v, slow = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2, beta3 * slow + (1 - beta3) * g
        q = q * (1 - 0.001) if decoupled else q
        q = q - 0.01 * (m / (1 - 0.9**t) + alpha * slow) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        with ng.backend(backend):
            optimizer.step()
    torch.testing.assert_close(p.detach(), q, rtol=1e-10, atol=1e-12)


def test_without_the_slow_momentum_it_is_adamw() -> None:
    ours, theirs = (nn.Parameter(torch.ones(40, dtype=WIDE)) for _ in range(2))
    optimizers = (
        ng.optim.AdEMAMix([ours], alpha=0.0, weight_decay=0.1, decoupled_weight_decay=True),
        torch.optim.AdamW([theirs], weight_decay=0.1),
    )
    for g in gradients(40, steps=4):
        ours.grad, theirs.grad = g.clone(), g.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": (0.9, 0.999)}, "betas must be three numbers"),
        ({"alpha": -1.0}, "alpha must be"),
        ({"t_alpha_beta3": 0}, "t_alpha_beta3 must be a finite number >= 1, got 0"),
        ({"t_alpha_beta3": 5, "betas": (0.0, 0.9, 0.9)}, r"t_alpha_beta3 needs 0 < betas\[0\] <= betas\[2\]"),
        ({"t_alpha_beta3": 5, "betas": (0.9, 0.9, 0.8)}, r"t_alpha_beta3 needs 0 < betas\[0\] <= betas\[2\]"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ng.optim.AdEMAMix([nn.Parameter(torch.zeros(3))], **options)
