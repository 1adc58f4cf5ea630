"""PowerNorm: the authors' recorded steps, a plain implementation of the method, and its properties."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.golden_files import files, read
from tests.norm.batch_steps import assert_close, each_backend, random, replay
from torch import Tensor

import narrowgauge as ng
from narrowgauge.nn import PowerNorm

STATE = {"running_phi": "running_phi", "ema_gz": "ema_gz", "iters": "num_batches_tracked"}


@each_backend
@pytest.mark.parametrize("path", files("powernorm"), ids=lambda path: path.stem)
def test_recorded_steps(path: Path, backend: ng.ops.library.Backend) -> None:
    case, meta = read(path)
    norm = PowerNorm(
        meta["C"],
        meta["eps"],
        meta["alpha_fwd"],
        meta["alpha_bkw"],
        meta["warmup_iters"],
        meta["group_num"],
        dtype=case["param_weight"].dtype,
    )
    with ng.backend(backend):
        replay(norm, case, meta["steps"], STATE)


class Plain:
    """The method step by step, in float64 and as its description goes; autograd does the group scaling."""

    def __init__(self, norm: PowerNorm) -> None:
        self.norm, self.t = norm, 0
        self.phi, self.e = norm.running_phi.double().clone(), norm.ema_gz.double().clone()

    def scaled(self, x: Tensor) -> Tensor:
        pieces = x.unflatten(-1, (self.norm.num_groups, -1))
        return (pieces / (pieces.square().mean(-1, keepdim=True) + self.norm.eps).sqrt()).flatten(-2)

    def step(self, x: Tensor, pad: Tensor | None, dy: Tensor) -> tuple[Tensor, ...]:
        """x (T, B, C), pad (T, B); returns y, dx, dweight, dbias."""
        norm, eps = self.norm, self.norm.eps
        self.t += 1
        x = x.double().requires_grad_()
        u = self.scaled(x)
        w, b, g = norm.weight.detach().double(), norm.bias.detach().double(), dy.double()
        tokens = u.detach()[torch.ones(x.shape[:2], dtype=torch.bool) if pad is None else ~pad]
        q = tokens.square().mean(0)
        divisor = ((q if self.t <= norm.warmup_iters else self.phi) + eps).sqrt()
        z = u.detach() / divisor
        if self.t < norm.warmup_iters:
            self.phi = self.phi * (self.t - 1) / self.t + q / self.t
        self.phi = norm.alpha_fwd * self.phi + (1 - norm.alpha_fwd) * q

        a = g * w - (1 - norm.alpha_bkw) * self.e * z
        du = a / (divisor if norm.backward_scale == "running" else (q + eps).sqrt())
        counted = torch.ones(x.shape[:2], dtype=torch.bool)
        if norm.exclude_pad_grad and pad is not None:
            counted = ~pad
            du = du * counted.unsqueeze(-1)
        self.e = self.e + (a * z)[counted].mean(0)
        (dx,) = torch.autograd.grad(u, x, du)
        return w * z + b, dx, (g * z)[counted].sum(0), g[counted].sum(0)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"backward_scale": "running", "alpha_fwd": 0.7, "alpha_bkw": 0.5},
    {"exclude_pad_grad": True, "batch_first": True},
    {"warmup_iters": 0},
]


@each_backend
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("channels", "groups"), [(129, 3), (16, 4), (1, 1), (17, 17)])
@pytest.mark.parametrize("masked", [False, True])
def test_steps_across_the_end_of_the_warm_up(
    channels: int, groups: int, options: dict[str, Any], masked: bool, backend: ng.ops.library.Backend
) -> None:
    norm = PowerNorm(channels, num_groups=groups, **{"warmup_iters": 2, **options}, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.copy_(random(channels, seed=1))
        norm.bias.copy_(random(channels, seed=2))
    plain = Plain(norm)
    for step in range(4):
        x, dy = random(6, 5, channels, seed=10 + step), random(6, 5, channels, seed=20 + step)
        pad = random(6, 5, seed=30 + step) > 0.3 if masked else None
        ours = x.transpose(0, 1) if norm.batch_first else x
        ours = ours.detach().clone().requires_grad_()
        mask = None if pad is None else (pad.t() if not norm.batch_first else pad.t().contiguous())
        norm.zero_grad()
        with ng.backend(backend):
            y = norm(ours, mask)
            y.backward(dy.transpose(0, 1) if norm.batch_first else dy)
        dx = ours.grad
        assert dx is not None
        if norm.batch_first:
            y, dx = y.transpose(0, 1), dx.transpose(0, 1)
        expected = plain.step(x, pad, dy)
        for actual, truth in zip((y, dx, norm.weight.grad, norm.bias.grad), expected, strict=True):
            assert_close(actual, truth)
        assert_close(norm.running_phi, plain.phi)
        assert_close(norm.ema_gz, plain.e)
        assert norm.num_batches_tracked == step + 1


@each_backend
def test_evaluation_is_affine_in_u(backend: ng.ops.library.Backend) -> None:
    norm = PowerNorm(12, num_groups=3, dtype=torch.float64).eval()
    norm.running_phi.copy_(random(12).square() + 0.1)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    x = random(4, 3, 12, seed=1)
    with ng.backend(backend):
        y = norm(x, torch.ones(3, 4, dtype=torch.bool))
    u = Plain(norm).scaled(x)
    assert_close(y, u * (norm.weight / (norm.running_phi + norm.eps).sqrt()) + norm.bias)
    assert all(torch.equal(before[name], value) for name, value in norm.state_dict().items())


@each_backend
def test_evaluation_has_the_true_gradient(backend: ng.ops.library.Backend) -> None:
    norm = PowerNorm(6, num_groups=2, dtype=torch.float64).eval()
    norm.running_phi.copy_(random(6).square() + 0.1)

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x,))

    with ng.backend(backend):
        args = tuple(random(*shape, seed=3).requires_grad_() for shape in ((5, 6), (6,), (6,)))
        assert torch.autograd.gradcheck(call, args)


def test_without_a_gradient_statistic_the_backward_only_divides() -> None:
    norm = PowerNorm(8, alpha_bkw=1.0, num_groups=2, dtype=torch.float64)
    norm.ema_gz.copy_(random(8))
    x, dy = random(7, 2, 8, seed=1).requires_grad_(), random(7, 2, 8, seed=2)
    norm(x).backward(dy)
    u = Plain(norm).scaled(x)
    q = u.detach().square().mean((0, 1))
    (expected,) = torch.autograd.grad(u, x, dy * norm.weight.detach() / (q + norm.eps).sqrt())
    assert_close(x.grad, expected)


def test_the_scale_of_x_does_not_matter() -> None:
    x = random(7, 2, 8, seed=1)
    results = []
    for factor in (1.0, 1e-3, 1e4):
        norm = PowerNorm(8, eps=0.0, num_groups=2, warmup_iters=1, dtype=torch.float64)
        results.append([norm(x * factor), norm(x * factor), norm.eval()(x * factor)])
    for result in results[1:]:
        for actual, expected in zip(result, results[0], strict=True):
            assert_close(actual, expected)


def test_running_phi_of_constant_statistics() -> None:
    norm = PowerNorm(6, warmup_iters=5, dtype=torch.float64)
    x = random(9, 2, 6)
    for _ in range(5):
        norm(x)
    assert_close(norm.running_phi, Plain(norm).scaled(x).square().mean((0, 1)))


def test_two_dimensions_are_one_time_step() -> None:
    x, pad = random(9, 8), random(9, seed=1) > 0.5
    results = []
    for shape, mask in (((9, 8), pad), ((9, 8), pad.view(9, 1)), ((1, 9, 8), pad.view(9, 1))):
        norm = PowerNorm(8, num_groups=2, dtype=torch.float64)
        results.append((norm(x.view(shape), mask).view(9, 8), norm.running_phi))
    for y, phi in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(phi, results[0][1])


BAD = [
    ({"alpha_fwd": 1.5}, "alpha_fwd must be a number from 0 to 1, got 1.5"),
    ({"alpha_bkw": -0.1}, "alpha_bkw must be a number from 0 to 1"),
    ({"alpha_bkw": float("nan")}, "alpha_bkw must be"),
    ({"num_groups": 3}, "num_groups must divide num_features, got 3 groups of 8 channels"),
    ({"num_groups": 0}, "num_groups must be an integer >= 1"),
    ({"backward_scale": "mean"}, "backward_scale must be one of 'batch', 'running'"),
    ({"eps": -1.0}, "eps must be a finite number >= 0"),
    ({"warmup_iters": -1}, "warmup_iters must be an integer >= 0"),
    ({"num_features": 0}, "num_features must be an integer >= 1"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[str(options) for options, _ in BAD])
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"PowerNorm: {message}"):
        PowerNorm(**{"num_features": 8, **options})
