"""diffGrad: recorded runs of the authors' code, and what the factor on the step does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import golden_files
from tests.optim.golden import replay
from torch import Tensor, nn

import narrowgauge as ng

TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-6}
WIDE = torch.float64


FIRST_RELEASE = "paper_era_aliased_grad"


class FirstRelease(ng.optim.DiffGrad):
    """The authors' first release: the previous gradient is the buffer that holds the new one."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if "previous_grad" in self.state[p]:
                    self.state[p]["previous_grad"].copy_(p.grad + group["weight_decay"] * p.detach())
        return super().step(*args, **kwargs)


def test_replays_the_authors_code() -> None:
    assert replay(
        "diffgrad",
        "",
        lambda params, meta: ng.optim.DiffGrad(params, **meta["hyperparameters"]),
        tolerances=TOLERANCES,
        skip=(FIRST_RELEASE,),
    )
    if (golden_files.GOLDEN / "diffgrad" / f"{FIRST_RELEASE}.npz").exists():
        replay(
            "diffgrad",
            FIRST_RELEASE,
            lambda params, meta: FirstRelease(params, **meta["hyperparameters"]),
            tolerances=TOLERANCES,
        )


def test_the_first_release_was_adam_at_half_the_rate() -> None:
    """From the second step on, whatever the gradients: the change that it saw was always 0."""
    generator = torch.Generator().manual_seed(4)
    grads = [3 * torch.randn(50, generator=generator, dtype=WIDE) for _ in range(4)]
    ours = [trained(FirstRelease, grads[:n], eps=0.0) for n in (1, 2, 3, 4)]
    adam = [trained(torch.optim.Adam, grads[:n], eps=0.0) for n in (1, 2, 3, 4)]
    for n in (1, 2, 3):
        torch.testing.assert_close(ours[n] - ours[n - 1], (adam[n] - adam[n - 1]) / 2, rtol=1e-9, atol=1e-13)


def trained(kind: Any, grads: list[Tensor], **options: Any) -> Tensor:
    p = nn.Parameter(torch.zeros_like(grads[0]))
    optimizer = kind([p], **options)
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
        assert torch.equal(p.grad, g)  # the weight decay is not added to it
    return p.detach()


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("decoupled", [False, True])
def test_follows_the_formula(backend: str, amsgrad: bool, decoupled: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(33, 3, generator=generator, dtype=WIDE)
    p, q = nn.Parameter(start.clone()), start.clone()
    m, v, largest, previous = (torch.zeros_like(start) for _ in range(4))
    options = {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": decoupled, "amsgrad": amsgrad}
    optimizer = ng.optim.DiffGrad([p], **options)
    for t in range(1, 5):
        p.grad = torch.randn(33, 3, generator=generator, dtype=WIDE) * 10 ** (2 - t)
        g = p.grad if decoupled else p.grad + 0.1 * q
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        largest = torch.maximum(largest, v)
        friction = torch.sigmoid((previous - g).abs())
        assert (friction >= 0.5).all()
        assert (friction <= 1).all()
        q = q * (1 - 0.01 * 0.1) if decoupled else q
        root = (largest if amsgrad else v).sqrt()
        q = q - 0.01 * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t) * m * friction / (root + 1e-8)
        previous = g
        with ng.backend(backend):
            optimizer.step()
    torch.testing.assert_close(p.detach(), q, rtol=1e-12, atol=1e-13)


def test_steady_gradients_give_half_of_adams_step() -> None:
    """From the second step on; eps is 0 because it enters the two methods in other places."""
    grads = [torch.full((5,), 0.3, dtype=WIDE)] * 4
    ours = [trained(ng.optim.DiffGrad, grads[:n], eps=0.0) for n in (1, 2, 3, 4)]
    adam = [trained(torch.optim.Adam, grads[:n], eps=0.0) for n in (1, 2, 3, 4)]
    for n in (1, 2, 3):
        torch.testing.assert_close(ours[n] - ours[n - 1], (adam[n] - adam[n - 1]) / 2, rtol=1e-10, atol=0)


@pytest.mark.parametrize("size", [20.0, 200.0, 1e30])
def test_large_changes_approach_adams_step_from_below(size: float) -> None:
    grads = [torch.full((300,), size, dtype=torch.float32)]
    ours, adam = trained(ng.optim.DiffGrad, grads, eps=0.0), trained(torch.optim.Adam, grads, eps=0.0)
    assert ours.isfinite().all()
    assert (ours.abs() <= adam.abs() * (1 + 1e-6)).all()
    torch.testing.assert_close(ours, adam, rtol=1e-6, atol=0)


def test_small_gradients_make_it_adam_at_half_the_rate() -> None:
    generator = torch.Generator().manual_seed(2)
    grads = [1e-4 * torch.randn(300, generator=generator, dtype=WIDE) for _ in range(5)]
    ours, adam = trained(ng.optim.DiffGrad, grads, eps=0.0), trained(torch.optim.Adam, grads, eps=0.0)
    torch.testing.assert_close(ours, adam / 2, rtol=1e-3, atol=1e-6)


def test_the_factor_of_float32_is_accurate() -> None:
    """One step from zero states with beta = 0 is the factor itself: compared with float64 over its range."""
    g = torch.linspace(-100, 100, 4001)
    step = -trained(ng.optim.DiffGrad, [g], lr=1.0, betas=(0.0, 0.0), eps=0.0)
    expected = torch.sigmoid(g.double().abs()) * g.sign()
    near = g != 0
    torch.testing.assert_close(step[near].double(), expected[near], rtol=3e-7, atol=0)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="DiffGrad: eps must be a finite number >= 0, got -1"):
        ng.optim.DiffGrad([nn.Parameter(torch.zeros(3))], eps=-1)
