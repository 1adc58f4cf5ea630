"""SAM and ASAM: recorded runs, what must be bitwise, skipping, wrapping."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from tests import golden_files
from torch import Tensor, nn

import narrowgauge as ng

SHAPES = [(7, 5), (3,), (), (0, 2), (2, 3, 4)]


def parameters(
    dtype: torch.dtype = torch.float64, shapes: list[tuple[int, ...]] = SHAPES
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape in shapes
    ]


def gradients(params: list[nn.Parameter], step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(50 + step)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in params]


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    for p, g in zip(params, gradients(params, step), strict=True):
        p.grad = g


def assert_equal(actual: Any, expected: Any) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a, e), f"tensor {i}"


def values(params: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


# --- recorded runs ---


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_replays_the_authors_runs(backend: str) -> None:
    for path in golden_files.files("sam"):
        recorded, meta = golden_files.read(path)
        options = meta["hyperparameters"]
        count, dtype = len(meta["shapes"]), getattr(torch, meta["dtype"])
        tolerance = 1e-13 if dtype is torch.float64 else 2e-6
        params = [nn.Parameter(recorded[f"param{i}_0"].to(dtype, copy=True)) for i in range(count)]
        inner = {name: value for name, value in options.items() if name not in ("rho", "adaptive")}
        with ng.backend(backend):
            optimizer = ng.optim.SAM(
                torch.optim.SGD(params, **inner), rho=options["rho"], adaptive=options["adaptive"]
            )
            for step in range(1, meta["steps"] + 1):
                for kind in ("ascent", "descent"):
                    for i, p in enumerate(params):
                        p.grad = recorded[f"grad{i}_{kind}_step{step}"].to(dtype, copy=True)
                    optimizer.first_step() if kind == "ascent" else optimizer.second_step()
                    after = "perturbed_step" if kind == "ascent" else "step"
                    for i, p in enumerate(params):
                        torch.testing.assert_close(
                            p.detach(),
                            recorded[f"param{i}_{after}{step}"].to(dtype),
                            rtol=tolerance,
                            atol=tolerance,
                        )


# --- the climb ---


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_climbs_rho_along_the_joint_gradient(adaptive: bool, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    grads, before = gradients(params, 0), values(params)
    old = ng.optim.sam_perturb_(params, grads, 0.3, adaptive)
    assert_equal(old, before)
    for_norm = [torch.view_as_real(x) if x.is_complex() else x for x in before]
    real_grads = [torch.view_as_real(g) if g.is_complex() else g for g in grads]
    weight = [x.double().abs() if adaptive else torch.ones_like(x).double() for x in for_norm]
    weighted = [s * g.double() for s, g in zip(weight, real_grads, strict=True)]
    norm = torch.stack([x.square().sum() for x in weighted]).sum().sqrt()
    for p, x, s, g in zip(params, for_norm, weight, real_grads, strict=True):
        expected = x.double() + 0.3 * s**2 * g.double() / norm
        actual = torch.view_as_real(p.detach()) if p.is_complex() else p.detach()
        torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)
    ng.optim.sam_restore_(params, old)
    assert_equal(params, before)


def test_the_scale_of_the_gradient_does_not_matter() -> None:
    small, large = parameters(), parameters()
    grads = gradients(small, 0)
    ng.optim.sam_perturb_(small, grads, 0.1)
    ng.optim.sam_perturb_(large, [g * 1024 for g in grads], 0.1)
    for p, q in zip(small, large, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_layouts_and_mixed_dtypes() -> None:
    generator = torch.Generator().manual_seed(3)
    x, g = torch.randn(4, 3, 5, 2, generator=generator), torch.randn(4, 3, 5, 2, generator=generator)
    gaps = torch.stack([x, x], -1)[..., 0].clone(memory_format=torch.preserve_format)
    spread = torch.empty(4, 3, 5, 4)[..., ::2].copy_(x)
    params = [x.clone(), x.to(memory_format=torch.channels_last), gaps, spread, x.double(), x.half()]
    grads = [g, g, g.to(memory_format=torch.channels_last), g, g.double(), g.half()]
    before = [p.clone() for p in params]
    old = ng.optim.sam_perturb_(params, grads, 0.5)
    norm = torch.stack([g.double().square().sum() for g in grads]).sum().sqrt()
    for p in params:
        tolerance = 2.0**-10 if p.dtype is torch.float16 else 1e-6
        torch.testing.assert_close(
            p.double(), x.double() + 0.5 * g.double() / norm, rtol=tolerance, atol=tolerance
        )
    ng.optim.sam_restore_(params, old)
    assert_equal(params, before)


def test_bfloat16_moves_on_average_where_rounding_to_nearest_would_not() -> None:
    p = nn.Parameter(torch.ones(100_000, dtype=torch.bfloat16))
    rho = (
        2.0**-11 * 100_000**0.5
    )  # each element moves by 2^-11, a sixteenth of the distance to the next above 1
    old = ng.optim.sam_perturb_([p], [torch.ones_like(p)], rho)
    moved = p.detach().double() - 1
    assert set(moved.unique().tolist()) == {0.0, 2.0**-7}
    deviation = 2.0**-7 * (1 / 16 * 15 / 16 / 100_000) ** 0.5
    assert abs(moved.mean().item() - 2.0**-11) < 4 * deviation
    assert old[0].dtype is torch.bfloat16
    ng.optim.sam_restore_([p], old)
    assert (p == 1).all()


def test_draws_differ_from_step_to_step_and_repeat_after_resuming() -> None:
    seen = []
    for _ in range(2):
        p = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = ng.optim.SAM(ng.optim.AdamW([p], lr=0.0), rho=2.0**-11 * 64)
        for _ in range(2):
            p.grad = torch.ones_like(p)
            optimizer.first_step()
            seen.append(p.detach().clone())
            optimizer.second_step()
    assert not torch.equal(seen[0], seen[1])
    assert_equal(seen[:2], seen[2:])


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    for value in (torch.inf, torch.nan):
        params = parameters(torch.float32)
        before, grads = values(params), gradients(params, 0)
        grads[1][0] = value
        old = ng.optim.sam_perturb_(params, grads, 0.1)
        assert_equal(params, before)
        assert_equal(old, before)


# --- the optimizer ---


def inner(params: list[nn.Parameter], kind: str) -> torch.optim.Optimizer:
    return ng.optim.AdamW(params, lr=0.1) if kind == "ours" else torch.optim.SGD(params, lr=0.1, momentum=0.9)


@pytest.mark.parametrize("kind", ["ours", "torch"])
def test_rho_zero_gives_the_bits_of_the_inner_optimizer(kind: str) -> None:
    wrapped, plain = parameters(torch.float32), parameters(torch.float32)
    optimizers = ng.optim.SAM(inner(wrapped, kind), rho=0.0), inner(plain, kind)
    for step in range(3):
        set_gradients(wrapped, 100 + step)
        optimizers[0].first_step()
        for params, optimizer in zip((wrapped, plain), optimizers, strict=True):
            set_gradients(params, step)
            optimizer.step()
    assert_equal(wrapped, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("update", ["nearest", "kahan", "split"])
def test_rate_zero_leaves_every_bit(dtype: torch.dtype, update: str) -> None:
    params = parameters(dtype)
    before = values(params)
    optimizer = ng.optim.SAM(ng.optim.AdamW(params, lr=0.0, param_update=update), rho=0.5)
    set_gradients(params, 0)
    optimizer.first_step()
    assert not torch.equal(params[0], before[0])
    set_gradients(params, 1)
    optimizer.second_step()
    assert_equal(params, before)


@pytest.mark.parametrize("kind", ["ours", "torch"])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_the_whole_step_is_skipped_when_the_first_gradient_overflows(kind: str, value: float) -> None:
    params = parameters(torch.float32)
    optimizer = ng.optim.SAM(inner(params, kind))
    before = values(params)
    set_gradients(params, 0)
    params[2].grad.fill_(value)
    optimizer.first_step()
    set_gradients(params, 1)
    optimizer.second_step()
    assert_equal(params, before)
    assert not hasattr(optimizer.base_optimizer, "found_inf")
    set_gradients(params, 2)
    optimizer.first_step()
    set_gradients(params, 3)
    optimizer.second_step()
    assert not torch.equal(params[0], before[0])
    if kind == "ours":
        assert optimizer.state[params[0]]["step"] == 1


def test_groups_have_rho_of_their_own_and_one_norm() -> None:
    params = parameters()
    base = ng.optim.AdamW(
        [{"params": params[:2], "sam_rho": 0.4}, {"params": params[2:], "sam_adaptive": True}]
    )
    optimizer = ng.optim.SAM(base, rho=0.1)
    before, grads = values(params), gradients(params, 0)
    set_gradients(params, 0)
    optimizer.first_step()
    weights = [torch.ones_like(x) for x in before[:2]] + [x.abs() for x in before[2:]]
    norm = torch.stack([(s * g).square().sum() for s, g in zip(weights, grads, strict=True)]).sum().sqrt()
    for i, p in enumerate(params):
        rho = 0.4 if i < 2 else 0.1
        expected = before[i] + rho * weights[i] ** 2 * grads[i] / norm
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12)


class Bowl:
    """A closure that counts its calls; the loss is not quadratic, so the place matters."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        self.params, self.calls = params, 0

    def __call__(self) -> Tensor:
        self.calls += 1
        loss = sum((p**4).sum() for p in self.params)
        loss.backward()
        return loss


def test_a_closure_takes_both_passes_or_the_second() -> None:
    both, second, by_hand = parameters(), parameters(), parameters()
    optimizers = [ng.optim.SAM(ng.optim.AdamW(p, lr=0.01), rho=0.2) for p in (both, second, by_hand)]
    closures = [Bowl(p) for p in (both, second, by_hand)]
    for _ in range(3):
        optimizers[0].step(closures[0])
        optimizers[0].zero_grad()
        closures[1]()
        loss = optimizers[1].step(closures[1])
        optimizers[1].zero_grad()
        closures[2]()
        optimizers[2].first_step(zero_grad=True)
        closures[2]()
        optimizers[2].second_step(zero_grad=True)
    assert loss.item() > 0
    assert closures[0].calls == closures[1].calls == closures[2].calls == 6
    assert_equal(both, by_hand)
    assert_equal(second, by_hand)


def test_every_leaves_steps_to_the_inner_optimizer() -> None:
    sparse, plain = parameters(), parameters()
    optimizer, closure = ng.optim.SAM(ng.optim.AdamW(sparse, lr=0.01), rho=0.5, every=3), Bowl(sparse)
    alone, plain_closure = ng.optim.AdamW(plain, lr=0.01), Bowl(plain)
    counts = []
    for step in range(6):
        before = closure.calls
        optimizer.step(closure)
        optimizer.zero_grad()
        counts.append(closure.calls - before)
        if step == 0:
            with torch.no_grad():
                for p, q in zip(plain, sparse, strict=True):
                    p.copy_(q)
            alone.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        elif step < 3:
            plain_closure()
            alone.step()
            alone.zero_grad()
            assert_equal(sparse, plain)
    assert counts == [2, 1, 1, 2, 1, 1]


def test_arguments_of_the_inner_step_pass() -> None:
    params = parameters()
    optimizer = ng.optim.SAM(ng.optim.AdamW(params))
    optimizer.step(Bowl(params), max_grad_norm=1.0, zero_grad=True)
    assert optimizer.base_optimizer.last_grad_norm > 0
    assert all(p.grad is None for p in params)


def test_amp_with_a_scaler() -> None:
    """The climb does not depend on the scale, so that only the step needs it."""
    scaled, plain = parameters(torch.float32), parameters(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizers = ng.optim.SAM(ng.optim.AdamW(scaled)), ng.optim.SAM(ng.optim.AdamW(plain))
    for _ in range(3):
        scaler.scale(sum((p**4).sum() for p in scaled)).backward()
        optimizers[0].first_step(zero_grad=True)
        scaler.scale(sum((p**4).sum() for p in scaled)).backward()
        scaler.step(optimizers[0])
        scaler.update()
        optimizers[0].zero_grad()
        optimizers[1].step(Bowl(plain))
        optimizers[1].zero_grad()
    for p, q in zip(scaled, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_checkpoints_are_the_inner_optimizers_and_hold_no_copy() -> None:
    params = parameters(torch.float32)
    optimizer = ng.optim.SAM(ng.optim.AdamW(params, lr=0.1), rho=0.2, every=2)
    for _ in range(3):
        optimizer.step(Bowl(params))
        optimizer.zero_grad()
    assert set(optimizer.state_dict()["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = [nn.Parameter(p.detach().clone()) for p in params]
    other = ng.optim.SAM(ng.optim.AdamW(resumed), every=2)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.param_groups is other.base_optimizer.param_groups
    for _ in range(3):
        for each, its in ((optimizer, params), (other, resumed)):
            each.step(Bowl(its))
            each.zero_grad()
    assert_equal(params, resumed)


def test_schedulers_and_new_groups_reach_the_inner_optimizer() -> None:
    params = parameters(torch.float32)
    optimizer = ng.optim.SAM(ng.optim.AdamW(params[:2], lr=0.1))
    optimizer.add_param_group({"params": params[2:], "lr": 0.2})
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step(Bowl(params))
    scheduler.step()
    assert [group["lr"] for group in optimizer.base_optimizer.param_groups] == [0.05, 0.1]
    assert optimizer.base_optimizer.param_groups[1]["sam_rho"] == 0.05
    assert len(optimizer.state) == len(params)


def test_copies_are_whole() -> None:
    params = parameters(torch.float32)
    optimizer = ng.optim.SAM(ng.optim.AdamW(params, lr=0.1), rho=0.2)
    optimizer.step(Bowl(params))
    optimizer.zero_grad()
    copied, other = copy.deepcopy((params, optimizer))
    assert other.param_groups is other.base_optimizer.param_groups
    assert other.param_groups[0]["params"][0] is copied[0]
    for each, its in ((optimizer, params), (other, copied)):
        each.step(Bowl(its))
    assert_equal(params, copied)


# --- bad input ---


def test_refuses() -> None:
    params = parameters()
    with pytest.raises(TypeError, match=r"base_optimizer must be an optimizer, such as AdamW\(params\)"):
        ng.optim.SAM(params)
    base = ng.optim.AdamW(params)
    with pytest.raises(ValueError, match=r"rho must be a finite number >= 0, got -0\.1"):
        ng.optim.SAM(base, rho=-0.1)
    with pytest.raises(ValueError, match="every must be a whole number >= 1, got 0"):
        ng.optim.SAM(base, every=0)
    before = values(params)
    with pytest.raises(ValueError, match="5 params need as many grads, got 1"):
        ng.optim.sam_perturb_(params, [params[0]], 0.1)
    with pytest.raises(
        ValueError, match=r"grads\[1\] must have the shape \(3,\) of its parameter, got \(4,\)"
    ):
        ng.optim.sam_perturb_(params[:2], [params[0], torch.zeros(4)], 0.1)
    with pytest.raises(ValueError, match="rho must be"):
        ng.optim.sam_perturb_(params, before, -1.0)
    with pytest.raises(ValueError, match="5 params need as many old values, got 0"):
        ng.optim.sam_restore_(params, [])
    assert_equal(params, before)
    assert ng.optim.sam_perturb_([], [], 0.1) == []


def test_refuses_passes_out_of_order() -> None:
    params = parameters()
    optimizer = ng.optim.SAM(ng.optim.AdamW(params))
    with pytest.raises(RuntimeError, match="needs a closure, or first_step"):
        optimizer.step()
    set_gradients(params, 0)
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="call second_step first"):
        optimizer.first_step()


def test_refuses_sparse_gradients() -> None:
    layer = nn.Embedding(5, 3, sparse=True)
    layer(torch.tensor([1, 2])).sum().backward()
    optimizer = ng.optim.SAM(torch.optim.SGD(layer.parameters(), lr=0.1))
    with pytest.raises(
        RuntimeError, match="does not support sparse gradients; build the layer with sparse=False"
    ):
        optimizer.first_step()
