"""What PowerNorm and UnifiedNorm have in common: their state, wrong arguments, padding, dtypes, compilation."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.norm.batch_steps import assert_close, each_backend, random
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import narrowgauge as ng
from narrowgauge.nn import PowerNorm, UnifiedNorm

Norm = PowerNorm | UnifiedNorm


def power_norm(**options: Any) -> PowerNorm:
    return PowerNorm(8, num_groups=2, warmup_iters=2, batch_first=True, **options)


def unified_norm(**options: Any) -> UnifiedNorm:
    return UnifiedNorm(8, 2, 2, outlier_filtration=True, **options)


MAKERS: list[Callable[..., Norm]] = [power_norm, unified_norm]
each_norm = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)


def state(norm: Norm) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in norm.state_dict().items()}


def assert_same_state(norm: Norm, expected: dict[str, Tensor]) -> None:
    for name, value in norm.state_dict().items():
        assert torch.equal(value, expected[name]), name


def train(norm: Norm, steps: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Outputs and input gradients of steps with padding."""
    results = []
    for step in range(steps):
        x = random(5, 3, 8, seed=seed + step).to(dtype).requires_grad_()
        y = norm(x, random(5, 3, seed=50 + seed + step) > 0.8)
        y.backward(random(5, 3, 8, seed=100 + seed + step).to(dtype))
        assert x.grad is not None
        results += [y.detach(), x.grad]
    return results


GOOD = (5, 3, 8)
WRONG: list[tuple[str, Any, Any, type[Exception], str]] = [
    ("x is a list", [1.0], None, TypeError, "x must be a tensor, got list"),
    ("integer x", torch.ones(GOOD, dtype=torch.int64), None, TypeError, "x has dtype torch.int64"),
    ("feature count", torch.ones(5, 3, 7), None, ValueError, r"x has shape \(5, 3, 7\).*C = 8"),
    ("one dimension", torch.ones(8), None, ValueError, r"x has shape \(8,\)"),
    ("four dimensions", torch.ones(2, 2, 2, 8), None, ValueError, r"x has shape \(2, 2, 2, 8\)"),
    ("double x", torch.ones(GOOD, dtype=torch.float64), None, TypeError, "x has dtype torch.float64 but"),
    ("float mask", torch.ones(GOOD), torch.ones(5, 3), TypeError, "pad_mask must be a boolean tensor"),
    ("list as mask", torch.ones(GOOD), [True], TypeError, "pad_mask must be"),
    ("turned mask", torch.ones(GOOD), torch.zeros(3, 5, dtype=torch.bool), ValueError, r"pad_mask has shape \(3, 5\)"),
    ("flat mask", torch.ones(GOOD), torch.zeros(15, dtype=torch.bool), ValueError, r"pad_mask has shape \(15,\)"),
    ("mask of a matrix", torch.ones(5, 8), torch.zeros(5, 8, dtype=torch.bool), ValueError, "pad_mask has shape"),
    ("x elsewhere", torch.ones(GOOD, device="meta"), None, ValueError, "is on cpu but x is on meta"),
]  # fmt: skip


@each_norm
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("x", "mask", "error", "message"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_wrong_arguments_leave_everything_as_it_is(
    make: Callable[..., Norm], x: Any, mask: Any, error: type[Exception], message: str, training: bool
) -> None:
    norm = make().train(training)
    before = state(norm)
    with pytest.raises(error, match=message):
        norm(x, mask)
    assert_same_state(norm, before)


@each_backend
@each_norm
def test_nothing_but_padding_changes_no_state(
    make: Callable[..., Norm], backend: ng.ops.library.Backend
) -> None:
    norm = make(dtype=torch.float64)
    with ng.backend(backend):
        for steps in (0, 1, 3):  # before the first step, in the warm-up and after it
            train(norm, steps)
            before = state(norm)
            x = random(5, 3, 8).requires_grad_()
            y = norm(x, torch.ones(5, 3, dtype=torch.bool))
            y.sum().backward()
            assert x.grad is not None
            assert x.grad.isfinite().all()
            assert_same_state(norm, before)
            assert_close(y, copy.deepcopy(norm).eval()(x))
            empty = norm(torch.ones(0, 3, 8, dtype=torch.float64))
            assert empty.shape == (0, 3, 8)
            assert_same_state(norm, before)


@each_backend
@each_norm
def test_padding_is_normalized_but_not_counted(
    make: Callable[..., Norm], backend: ng.ops.library.Backend
) -> None:
    x, pad = random(5, 3, 8), random(5, 3, seed=1) > 0
    with ng.backend(backend):
        results = []
        for values in (x, torch.where(pad.unsqueeze(-1), 100 * random(5, 3, 8, seed=2), x)):
            norm = make(dtype=torch.float64)
            results.append((norm(values, pad)[~pad], *norm.buffers()))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
        whole, alone = make(dtype=torch.float64), make(dtype=torch.float64)
        assert_close(whole(x, pad)[~pad], alone(x[~pad]))


@each_backend
@each_norm
def test_a_batch_of_one_token(make: Callable[..., Norm], backend: ng.ops.library.Backend) -> None:
    norm = make(dtype=torch.float64)
    x = torch.tensor([[2.0, -2.0] * 4], dtype=torch.float64, requires_grad=True)
    with ng.backend(backend):
        y = norm(x)
    y.sum().backward()
    assert (y.detach() - x.detach().sign()).abs().max() < 1e-4  # each channel is divided by its own size
    assert all(buffer.isfinite().all() for buffer in norm.buffers())


@each_norm
def test_state_comes_back_from_a_state_dict(make: Callable[..., Norm]) -> None:
    norm = make(dtype=torch.float64)
    train(norm, 4)
    other = make(dtype=torch.float64)
    other.load_state_dict(pickle.loads(pickle.dumps(norm.state_dict())))
    third = copy.deepcopy(norm)
    for results in zip(*(train(each, 3, seed=9) for each in (norm, other, third)), strict=True):
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])
    assert_same_state(other, state(norm))
    norm.reset_parameters()
    assert_same_state(norm, state(make(dtype=torch.float64)))


@each_backend
@each_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("narrow_parameters", [False, True])
def test_narrow_inputs_have_wide_state(
    make: Callable[..., Norm], dtype: torch.dtype, narrow_parameters: bool, backend: ng.ops.library.Backend
) -> None:
    norm, exact = make(), make(dtype=torch.float64)
    if narrow_parameters:
        norm = norm.to(dtype)
    with ng.backend(backend):
        for step in range(4):
            x = random(5, 3, 8, seed=step).to(dtype)
            ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
            dy = random(5, 3, 8, seed=30 + step).to(dtype)
            y, expected = norm(ours), exact(theirs)
            y.backward(dy)
            expected.backward(dy.double())
            assert (y.dtype, ours.grad.dtype) == (dtype, dtype)
            tolerance = 4 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 2e-6
            for actual, truth in ((y, expected), (ours.grad, theirs.grad)):
                limit = tolerance * truth.abs().max().item()
                torch.testing.assert_close(
                    actual.detach().double(), truth.detach(), rtol=tolerance, atol=limit
                )
    for name, buffer in norm.named_buffers():
        if buffer.is_floating_point():
            assert buffer.dtype == torch.float32, name
            torch.testing.assert_close(buffer.double(), exact.get_buffer(name), rtol=1e-5, atol=1e-5)
    assert norm.weight.grad is not None
    assert norm.weight.grad.dtype == norm.weight.dtype


@each_norm
def test_converting_to_a_narrow_dtype_and_back_keeps_the_state(make: Callable[..., Norm]) -> None:
    norm = make()
    train(norm, 3, dtype=torch.float32)
    before = state(norm)
    norm.half().float()
    for name, buffer in norm.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert all(b.dtype in (torch.float64, torch.int64) for b in norm.double().buffers())


@each_backend
@each_norm
def test_any_layout(make: Callable[..., Norm], backend: ng.ops.library.Backend) -> None:
    x, dy = random(5, 3, 8), random(5, 3, 8, seed=1)
    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda t: t,
        lambda t: t.transpose(0, 2).contiguous().transpose(0, 2),
        lambda t: torch.stack([t, t], -1)[..., 1],
    ]
    results = []
    with ng.backend(backend):
        for layout in layouts:
            norm = make(dtype=torch.float64)
            ours = layout(x).detach().requires_grad_()
            norm(ours).backward(layout(dy))
            results.append((ours.grad, *state(norm).values()))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert torch.equal(a, b)


@each_norm
def test_nan_and_infinity_stay_in_their_channels(make: Callable[..., Norm]) -> None:
    norm = UnifiedNorm(8) if make is unified_norm else PowerNorm(8, num_groups=8)
    x = random(5, 3, 8).float()
    x[1, 1, 2], x[2, 0, 5] = float("nan"), float("inf")
    y = norm(x)
    bad = [2, 5]
    good = [c for c in range(8) if c not in bad]
    assert y[..., good].isfinite().all()
    assert y[1, 1, 2].isnan()
    assert y[..., 2].isnan().any()


@each_norm
def test_recomputation_is_refused(make: Callable[..., Norm]) -> None:
    for reentrant in (False, True):
        norm = make(dtype=torch.float64)
        x = random(5, 3, 8).requires_grad_()
        y = checkpoint(norm, x, use_reentrant=reentrant)
        before = state(norm)
        with pytest.raises(
            RuntimeError, match="called during a backward pass, as activation checkpointing does"
        ):
            y.sum().backward()
        assert_same_state(norm, before)
        norm.eval()
        checkpoint(norm, x, use_reentrant=reentrant).sum().backward()  # nothing to update


@each_norm
def test_each_backward_pass_updates_the_gradient_statistic(make: Callable[..., Norm]) -> None:
    """Two calls before their backward passes: the layer is used twice in one model."""
    norm = make(dtype=torch.float64)
    with torch.no_grad():
        norm(random(5, 3, 8))
    assert norm.num_batches_tracked == 1
    assert not norm.ema_gz.any()
    first, second = norm(random(5, 3, 8)), norm(random(5, 3, 8, seed=1))
    assert norm.num_batches_tracked == 3
    first.square().sum().backward()
    after_one = norm.ema_gz.clone()
    assert after_one.any()
    second.square().sum().backward()
    assert not torch.equal(norm.ema_gz, after_one)


@each_norm
def test_second_derivatives_are_refused(make: Callable[..., Norm]) -> None:
    norm = make(dtype=torch.float64)
    x = random(5, 3, 8).requires_grad_()
    (gradient,) = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        gradient.sum().backward()


@each_norm
def test_only_wanted_gradients(make: Callable[..., Norm]) -> None:
    whole, frozen = make(dtype=torch.float64), make(dtype=torch.float64)
    frozen.requires_grad_(False)
    for a, b in zip(train(whole, 3), train(frozen, 3), strict=True):
        assert torch.equal(a, b)
    assert frozen.weight.grad is None
    x = random(5, 3, 8)
    whole.zero_grad()
    whole(x).sum().backward()
    assert x.grad is None
    assert whole.weight.grad is not None


@each_norm
def test_no_step_looks_at_a_value(make: Callable[..., Norm]) -> None:
    """On meta tensors, which have none: reading one would raise."""
    norm = make(device="meta")
    x = torch.ones(5, 3, 8, device="meta", requires_grad=True)
    y = norm(x, torch.ones(5, 3, device="meta", dtype=torch.bool))
    y.sum().backward()
    assert x.grad is not None
    assert norm.eval()(x).shape == x.shape
    assert all(buffer.device.type == "meta" for buffer in norm.buffers())


@each_backend
@each_norm
@pytest.mark.parametrize("masked", [False, True])
def test_compiled_whole(make: Callable[..., Norm], masked: bool, backend: ng.ops.library.Backend) -> None:
    torch._dynamo.reset()
    eager, norm = make(), make()
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    with ng.backend(backend):
        for step in range(5):
            if step == 4:
                eager.eval(), norm.eval()
            x, dy = random(5, 3, 8, seed=step).float(), random(5, 3, 8, seed=20 + step).float()
            pad = random(5, 3, seed=40 + step) > 0.5 if masked else None
            results = []
            for call in (eager, compiled):
                ours = x.clone().requires_grad_()
                y = call(ours, pad)
                y.backward(dy)
                results.append((y, ours.grad))
            for a, b in zip(*results, strict=True):
                assert_close(a, b)
            for a, b in zip(eager.state_dict().values(), norm.state_dict().values(), strict=True):
                assert_close(a.double() if a.dtype == torch.int64 else a, b)


@each_norm
def test_autocast_changes_nothing(make: Callable[..., Norm]) -> None:
    plain, inside = make(), make()
    expected = train(plain, 3, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        actual = train(inside, 3, dtype=torch.bfloat16)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
    assert_same_state(inside, state(plain))


@each_norm
def test_prints_its_options(make: Callable[..., Norm]) -> None:
    text = repr(make())
    assert "8, " in text
    assert "warmup_iters=2" in text
