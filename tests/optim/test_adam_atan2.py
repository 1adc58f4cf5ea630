"""Adam-atan2: its formula in float64, that scale does not matter, the arctangent at the edges."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.optim.test_adamw import parameters, set_gradients
from torch import Tensor, nn

import narrowgauge as ng

BACKENDS = ["reference", "auto"]
SHAPES = [(17, 9), (5,), (), (0, 3), (40, 30)]


def truth(p: Tensor, grads: list[Tensor], group: dict[str, Any]) -> Tensor:
    (beta1, beta2), lr = group["betas"], group["lr"]
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        p = p * (1 - lr * group["weight_decay"])
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        first, second = m / (1 - beta1**t), (v / (1 - beta2**t)).sqrt()
        p = p - lr * group["a"] * torch.atan2(first, group["b"] * second)
    return p


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.3, "a": 0.7, "b": 2.5, "betas": (0.8, 0.95)}])
def test_is_its_formula(backend: str, options: dict[str, Any]) -> None:
    params = parameters(*SHAPES, dtype=torch.float64)
    start = [p.detach().clone() for p in params]
    grads: list[list[Tensor]] = [[] for _ in params]
    with ng.backend(backend):
        optimizer = ng.optim.AdamAtan2(params, lr=0.01, **options)
        for step in range(5):
            set_gradients(params, step)
            for p, own in zip(params, grads, strict=True):
                own.append(p.grad.clone())
            optimizer.step()
    for p, first, own in zip(params, start, grads, strict=True):
        expected = truth(first, own, optimizer.param_groups[0])
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_arctangent_at_every_slope(backend: str, dtype: torch.dtype) -> None:
    """With beta1 = beta2 = 0 the first step is lr atan(1 / b) with the sign of the gradient."""
    tolerance = 1e-15 if dtype is torch.float64 else 3e-7
    for b in (0.0, 1e-6, 0.1, 0.41, 0.42, 0.9, 1.0, 1.1, 2.41, 2.42, 30.0, 1e6):
        p = nn.Parameter(torch.zeros(300, dtype=dtype))
        p.grad = torch.linspace(-1.5, 1.7, 300, dtype=dtype)
        with ng.backend(backend):
            ng.optim.AdamAtan2([p], lr=1.0, betas=(0.0, 0.0), a=1.0, b=b).step()
        angle = math.atan2(1, b)
        torch.testing.assert_close(
            p.detach(), -angle * p.grad.sign(), rtol=tolerance, atol=0, msg=f"b = {b}: {{}}".format
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_scale_of_gradients_does_not_matter(backend: str) -> None:
    """A power of two changes no bit, down to gradients whose squares are barely normal numbers."""
    small, large = parameters((40, 30)), parameters((40, 30))
    with ng.backend(backend):
        optimizers = ng.optim.AdamAtan2(small, lr=0.1), ng.optim.AdamAtan2(large, lr=0.1)
        for step in range(3):
            set_gradients(large, step)
            large[0].grad = large[0].grad.sign() * (large[0].grad.abs() + 0.5)
            small[0].grad = large[0].grad * 2.0**-50
            for optimizer in optimizers:
                optimizer.step()
    assert torch.equal(small[0], large[0])


def test_steps_are_bounded() -> None:
    p = nn.Parameter(torch.zeros(4))
    optimizer = ng.optim.AdamAtan2([p], lr=1.0)
    for scale in (1e-20, 1e10, 1e-5, 1e15):
        before = p.detach().clone()
        p.grad = torch.tensor([1.0, -1.0, 0.0, -0.0]) * scale
        optimizer.step()
        assert (p - before).abs().max() <= 1.27 * math.pi / 2 * (1 + 1e-6)
    assert p[2:].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_shows_and_infinity_is_bounded(backend: str) -> None:
    p = nn.Parameter(torch.zeros(3))
    p.grad = torch.tensor([torch.nan, torch.inf, 1.0])
    with ng.backend(backend):
        optimizer = ng.optim.AdamAtan2([p], lr=1.0, a=1.0)
        optimizer.step()
    assert p[0].isnan()
    torch.testing.assert_close(p[1:].detach(), torch.full((2,), -math.pi / 4))
    assert optimizer.state[p]["exp_avg"][1].isinf()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": (0.9, 1.0)}, r"AdamAtan2: betas\[1\] must be a finite number in \[0, 1\), got 1.0"),
        ({"a": -1.0}, r"AdamAtan2: a must be a finite number >= 0, got -1.0"),
        ({"b": math.inf}, r"AdamAtan2: b must be a finite number >= 0, got inf"),
        ({"weight_decay": -1.0}, r"AdamAtan2: weight_decay must be a finite number >= 0, got -1.0"),
    ],
)
def test_refuses_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ng.optim.AdamAtan2(parameters((3,)), **options)
