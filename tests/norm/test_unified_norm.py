"""Unified Normalization: the authors' recorded steps, its properties, and folding into a linear layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.golden_files import files, read
from tests.norm.batch_steps import assert_close, each_backend, random, replay
from torch import Tensor, nn

import narrowgauge as ng
from narrowgauge.nn import UnifiedNorm
from narrowgauge.nn.functional import fold_unified_norm

STATE = {name: name for name in ("running_var", "ema_gz", "buffer_x2", "buffer_gz", "skip_counter")} | {
    "iters": "num_batches_tracked"
}


@each_backend
@pytest.mark.parametrize("path", files("unified_normalization"), ids=lambda path: path.stem)
def test_recorded_steps(path: Path, backend: ng.ops.library.Backend) -> None:
    case, meta = read(path)
    norm = UnifiedNorm(
        meta["C"],
        meta["window_size"],
        meta["warmup_iters"],
        meta["outlier_filtration"],
        meta["eps"],
        meta["momentum"],
        dtype=case["param_weight"].dtype,
    )
    with ng.backend(backend):
        replay(norm, case, meta["steps"], STATE)


class Plain:
    """The method step by step, in float64 and as its description goes."""

    def __init__(self, norm: UnifiedNorm) -> None:
        self.norm = norm
        self.v, self.e = norm.running_var.double().clone(), norm.ema_gz.double().clone()
        self.x, self.z = norm.buffer_x2.double().clone(), norm.buffer_gz.double().clone()
        self.t, self.skips = int(norm.num_batches_tracked), 0

    def step(self, x: Tensor, pad: Tensor | None, dy: Tensor) -> tuple[Tensor, ...]:
        norm, eps, alpha, warmup = self.norm, self.norm.eps, self.norm.momentum, self.norm.warmup_iters
        forward_window, backward_window = norm.window_size
        self.t += 1
        t = self.t
        w, b = norm.weight.detach().double(), norm.bias.detach().double()
        tokens = x.reshape(-1, x.shape[-1]) if pad is None else x[~pad]
        q = tokens.square().mean(0)
        skip = forward_window <= 1
        threshold = forward_window * self.x.sqrt().var()
        self.x[t % forward_window] = q
        geometric = self.x.log().mean(0).exp()
        if norm.outlier_filtration and t >= warmup and (self.x.mean(0) - geometric > threshold).any():
            self.x[t % forward_window] = self.v
            skip = True
            self.skips += 1
        v = q if t <= forward_window or t < warmup or skip else geometric
        r = (v + eps).sqrt() / (self.v + eps).sqrt()
        r = torch.ones_like(v) if t <= max(1000, warmup) or skip else r.clamp(0.2, 5)
        z = x / (v + eps).sqrt()
        self.v = alpha * self.v + (1 - alpha) * v

        g = dy * w * r
        c = (g * z).mean((0, 1))
        self.z[t % backward_window] = self.e if skip else c
        m = c if t <= backward_window or t < warmup or skip else self.z.mean(0)
        self.e = alpha * self.e + (1 - alpha) * m
        dx = (g - (m if skip else self.e) * z) / (v + eps).sqrt()
        return w * z + b, dx, (dy * r * z).sum((0, 1)), dy.sum((0, 1))

    def assert_same_state(self) -> None:
        norm = self.norm
        for actual, expected in (
            (norm.running_var, self.v), (norm.ema_gz, self.e), (norm.buffer_x2, self.x), (norm.buffer_gz, self.z)
        ):  # fmt: skip
            assert_close(actual, expected)
        assert (norm.num_batches_tracked, norm.skip_counter) == (self.t, self.skips)


def late(norm: UnifiedNorm, iteration: int = 2000) -> UnifiedNorm:
    """Beyond the warm-up and the first thousand steps, where the gradient's scale is not one."""
    channels = norm.num_features
    norm.num_batches_tracked.fill_(iteration)
    norm.running_var.copy_(random(channels, seed=4).square() + 0.2)
    norm.ema_gz.copy_(random(channels, seed=5) * 0.1)
    norm.buffer_x2.copy_(random(*norm.buffer_x2.shape, seed=6).square() + 0.2)
    norm.buffer_gz.copy_(random(*norm.buffer_gz.shape, seed=7) * 0.1)
    with torch.no_grad():
        norm.weight.copy_(random(channels, seed=8))
        norm.bias.copy_(random(channels, seed=9))
    return norm


@each_backend
@pytest.mark.parametrize("window", [1, 4, (3, 2), (1, 3), (3, 1)], ids=str)
@pytest.mark.parametrize("filtration", [False, True])
@pytest.mark.parametrize("start", ["warm-up", "late"])
@pytest.mark.parametrize("channels", [2, 129])
def test_steps(
    window: Any, filtration: bool, start: str, channels: int, backend: ng.ops.library.Backend
) -> None:
    norm = UnifiedNorm(channels, window, 3, filtration, dtype=torch.float64)
    if start == "late":
        late(norm)
    plain = Plain(norm)
    for step in range(6):
        x, dy = random(5, 4, channels, seed=10 + step), random(5, 4, channels, seed=20 + step)
        x = x * (40.0 if step == 4 else 1.0)
        pad = random(5, 4, seed=30 + step) > 0.3
        ours = x.clone().requires_grad_()
        norm.zero_grad()
        with ng.backend(backend):
            y = norm(ours, pad)
            y.backward(dy)
        expected = plain.step(x, pad, dy)
        for actual, truth in zip((y, ours.grad, norm.weight.grad, norm.bias.grad), expected, strict=True):
            assert_close(actual, truth)
        plain.assert_same_state()


def test_a_window_of_one_step_has_the_gradient_of_autograd() -> None:
    norm = UnifiedNorm(8, window_size=1, dtype=torch.float64)
    x, dy = random(6, 5, 8).requires_grad_(), random(6, 5, 8, seed=1)
    y = norm(x)
    y.backward(dy)
    other = x.detach().clone().requires_grad_()
    expected = other / (other.square().mean((0, 1)) + norm.eps).sqrt() * norm.weight.detach()
    assert_close(y, expected)
    (gradient,) = torch.autograd.grad(expected, other, dy)
    assert_close(x.grad, gradient)


def skips(filtration: bool, scales: list[float]) -> int:
    norm = UnifiedNorm(16, 4, 4, filtration, dtype=torch.float64)
    channels = torch.linspace(
        0.5, 2.0, 16, dtype=torch.float64
    )  # their spread is what the threshold measures
    for step, scale in enumerate(scales):
        norm(random(8, 16, 16, seed=step) * channels * scale)
    return int(norm.skip_counter)


def test_outliers_are_skipped_where_wanted() -> None:
    scales = [1.0] * 12 + [40.0, 1.0]
    assert skips(True, scales[:12]) == 0
    assert skips(True, scales) >= 1
    assert skips(False, scales) == 0


def test_constant_statistics_are_no_outlier() -> None:
    norm = UnifiedNorm(16, 4, 4, True, dtype=torch.float64)
    x = random(8, 16, 16)
    for _ in range(12):
        norm(x)
    assert norm.skip_counter == 0
    window = norm.buffer_x2
    assert_close(window.mean(0), window.log().mean(0).exp())
    assert_close(window[0], x.square().mean((0, 1)))


@each_backend
def test_evaluation_is_affine_and_has_the_true_gradient(backend: ng.ops.library.Backend) -> None:
    norm = late(UnifiedNorm(6, dtype=torch.float64)).eval()
    x = random(4, 3, 6).requires_grad_()
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    with ng.backend(backend):
        assert_close(norm(x), x * scale + norm.bias)
        assert torch.autograd.gradcheck(norm, (x,))


@pytest.mark.parametrize("bias", [False, True])
def test_a_folded_linear_layer_gives_the_same(bias: bool) -> None:
    norm = late(UnifiedNorm(17, dtype=torch.float64)).eval()
    linear = nn.Linear(17, 5, bias=bias).double()
    before = [value.clone() for value in (*norm.state_dict().values(), *linear.state_dict().values())]
    folded = fold_unified_norm(norm, linear)
    x = random(3, 4, 17)
    torch.testing.assert_close(folded(x), linear(norm(x)), rtol=1e-10, atol=1e-10)
    after = [*norm.state_dict().values(), *linear.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert folded.bias is not None


def test_folding_refuses_what_does_not_fit() -> None:
    norm, linear = UnifiedNorm(8), nn.Linear(8, 2)
    with pytest.raises(TypeError, match="norm must be a UnifiedNorm, got LayerNorm"):
        fold_unified_norm(nn.LayerNorm(8), linear)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"linear must be a torch\.nn\.Linear, got UnifiedNorm"):
        fold_unified_norm(norm, norm)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="linear reads 9 features but norm has 8"):
        fold_unified_norm(norm, nn.Linear(9, 2))
    with pytest.raises(ValueError, match="linear is on meta but norm is on cpu"):
        fold_unified_norm(norm, nn.Linear(8, 2, device="meta"))


BAD = [
    ({"window_size": 0}, "window_size must be an integer >= 1, got 0"),
    ({"window_size": (4, 0)}, "window_size must be an integer >= 1, got 0"),
    ({"window_size": (4, 4, 4)}, "window_size must be an integer or a pair"),
    ({"window_size": 2.5}, "window_size must be an integer"),
    ({"momentum": 1.1}, "momentum must be a number from 0 to 1"),
    ({"eps": float("inf")}, "eps must be a finite number"),
    ({"warmup_iters": 1.5}, "warmup_iters must be an integer >= 0"),
    ({"num_features": -3}, "num_features must be an integer >= 1"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[str(options) for options, _ in BAD])
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"UnifiedNorm: {message}"):
        UnifiedNorm(**{"num_features": 8, **options})
