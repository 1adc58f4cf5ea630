"""L1BatchNorm2d against formulas written here in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.tolerances import assert_near, assert_same_bits
from torch import Tensor

import narrowgauge as ng

KAPPA = math.sqrt(math.pi / 2)
each_scale = pytest.mark.parametrize("gaussian_scale", [True, False])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def formula(x: Tensor, factor: float, eps: float = 1e-5) -> Tensor:
    p = x - x.mean(-1, keepdim=True)
    return p / (factor * p.abs().mean(-1, keepdim=True) + eps)


def channel_rows(x: Tensor) -> Tensor:
    return x.transpose(0, 1).flatten(1)


@each_scale
def test_batch_norm_is_the_norm_of_channels(gaussian_scale: bool) -> None:
    module = ng.nn.L1BatchNorm2d(3, gaussian_scale=gaussian_scale, dtype=torch.float64)
    with torch.no_grad():
        module.weight.copy_(random(3, seed=1))
        module.bias.copy_(random(3, seed=2))
    x, outer = random(4, 3, 5, 7).requires_grad_(), random(4, 3, 5, 7, seed=3)
    inputs = [x, module.weight, module.bias]
    rows = formula(channel_rows(x), KAPPA if gaussian_scale else 1.0)
    expected = rows.view(3, 4, 5, 7).transpose(0, 1) * module.weight.view(3, 1, 1) + module.bias.view(3, 1, 1)
    y = module(x)
    assert_near(y.detach(), expected.detach())
    for a, e in zip(
        torch.autograd.grad(y, inputs, outer), torch.autograd.grad(expected, inputs, outer), strict=True
    ):
        assert_near(a, e)


def test_running_values_of_batch_norm() -> None:
    batches = [random(4, 3, 5, 7, seed=i) * (i + 1) + i for i in range(3)]
    means = [channel_rows(x).mean(-1) for x in batches]
    deviations = [
        KAPPA * (channel_rows(x) - m.unsqueeze(-1)).abs().mean(-1)
        for x, m in zip(batches, means, strict=True)
    ]
    decaying = ng.nn.L1BatchNorm2d(3, momentum=0.3, dtype=torch.float64)
    average = ng.nn.L1BatchNorm2d(3, momentum=None, dtype=torch.float64)
    mean, deviation = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for x, m, d in zip(batches, means, deviations, strict=True):
        decaying(x)
        average(x)
        mean, deviation = 0.7 * mean + 0.3 * m, 0.7 * deviation + 0.3 * d
    assert_near(decaying.running_mean, mean)
    assert_near(decaying.running_deviation, deviation)
    assert_near(average.running_mean, torch.stack(means).mean(0))
    assert_near(average.running_deviation, torch.stack(deviations).mean(0))
    assert int(decaying.num_batches_tracked) == 3

    state = {name: value.clone() for name, value in decaying.state_dict().items()}
    y = decaying.eval()(batches[0])
    assert_near(y.detach(), (batches[0] - mean.view(3, 1, 1)) / (deviation.view(3, 1, 1) + 1e-5))
    for name, value in decaying.state_dict().items():
        assert_same_bits(value, state[name], name)
    other = ng.nn.L1BatchNorm2d(3, dtype=torch.float64).eval()
    other.load_state_dict(state)
    assert_same_bits(other(batches[0]).detach(), y.detach())


def test_batch_norm_without_running_values() -> None:
    module, x = ng.nn.L1BatchNorm2d(3, track_running_stats=False, affine=False), random(2, 3, 4, 4).float()
    assert module.state_dict() == {}
    assert_same_bits(module.eval()(x), module.train()(x))
    assert_near(module(x), formula(channel_rows(x.double()), KAPPA).view(3, 2, 4, 4).transpose(0, 1))


def test_masked_positions_do_not_count() -> None:
    x, mask = random(2, 3, 4, 5), random(2, 4, 5, seed=1) > 0
    module = ng.nn.L1BatchNorm2d(3, affine=False, dtype=torch.float64)
    y = module(x, mask)
    inside = torch.stack([x[:, c][mask] for c in range(3)])
    assert_near(torch.stack([y[:, c][mask] for c in range(3)]), formula(inside, KAPPA))
    assert_near(module.running_mean, 0.1 * inside.mean(-1))
    changed = torch.where(mask.unsqueeze(1), x, 1e3)
    assert_same_bits(module(changed, mask)[:, 0][mask], y[:, 0][mask])
    full = torch.ones(2, 4, 5, dtype=torch.bool)
    assert_near(module(x, full), module(x))


def test_batch_norm_in_processes_is_that_of_one(tmp_path: Any) -> None:
    """Of one process, in a group of its own: the sums and their gradients pass through the group."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        x, outer = random(4, 3, 5, 7).requires_grad_(), random(4, 3, 5, 7, seed=3)
        together = ng.nn.L1BatchNorm2d(3, process_group=torch.distributed.group.WORLD, dtype=torch.float64)
        alone = ng.nn.L1BatchNorm2d(3, dtype=torch.float64)
        y, expected = together(x), alone(x)
        assert_near(y.detach(), expected.detach())
        assert_near(torch.autograd.grad(y, x, outer)[0], torch.autograd.grad(expected, x, outer)[0])
    finally:
        torch.distributed.destroy_process_group()


def test_bad_batches() -> None:
    module = ng.nn.L1BatchNorm2d(3)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for args, message in (
        ((torch.ones(1, 3, 1, 1),), "expected more than 1 value per channel when training"),
        ((torch.ones(2, 4, 5, 5),), r"x has shape \(2, 4, 5, 5\); expected \(N, 3, H, W\)"),
        ((torch.ones(2, 3, 5),), r"x has shape \(2, 3, 5\)"),
        ((torch.ones(2, 3, 5, 5), torch.ones(2, 3, 5, 5) > 0), r"mask is torch.bool of shape \(2, 3, 5, 5\)"),
    ):
        with pytest.raises(ValueError, match=f"L1BatchNorm2d: {message}"):
            module(*args)
    for name, value in module.state_dict().items():
        assert_same_bits(value, before[name], name)
    assert module.eval()(torch.ones(1, 3, 1, 1)).shape == (1, 3, 1, 1)
    with pytest.raises(ValueError, match="momentum must be between 0 and 1 or None, got 2"):
        ng.nn.L1BatchNorm2d(3, momentum=2)
