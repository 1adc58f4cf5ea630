"""What every optimizer does alike: training, checkpoints, clipping, hooks, scaler, odd gradients and parameters."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from tests.optim.every import (
    EVERY,
    Every,
    assert_near,
    assert_same_state,
    assert_same_steps,
    copies_of,
    every,
    flat_state,
    through_a_file,
)
from tests.optim.test_adamw import assert_equal, parameters, set_gradients, train
from torch import Tensor, nn

import narrowgauge as ng

SHAPES = [(33, 9), (5,), (12, 6), (8, 3, 2, 2)]
RAISES = {"Shampoo"}  # LAPACK decomposes no matrix that is not finite
STOCHASTIC = {"state_dtype": "int8", "min_quantized_size": 0, "param_update": "stochastic", "seed": 3}


def test_the_list_holds_every_class() -> None:
    assert {"AdamW", "Adam", "AdamW cautious"} <= set(EVERY)


# --- training and backends ----------------------------------------------------------------------------------


@every()
def test_trains(optimizer: Every) -> None:
    """A small network learns a function of eight numbers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    x = torch.randn(64, 8)
    y = (x @ torch.randn(8, 4)).tanh()
    ours = optimizer(list(model.parameters()))
    losses = []
    for _ in range(60):
        ours.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        ours.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses


@every()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_and_kernel_agree(optimizer: Every, dtype: torch.dtype) -> None:
    native, reference = parameters(*SHAPES, dtype=dtype), parameters(*SHAPES, dtype=dtype)
    ours, theirs = optimizer(native), optimizer(reference)
    train(native, ours, 3)
    with ng.backend("reference"):
        train(reference, theirs, 3)
    if optimizer.is_exact():
        assert_equal(native, reference)
        assert_same_state(ours, flat_state(theirs))
    else:
        assert_near(native, reference, 1e-5 if dtype is torch.float32 else 2**-7)


# --- checkpoints --------------------------------------------------------------------------------------------


def resumes(optimizer: Every, dtype: torch.dtype, **options: Any) -> None:
    whole = parameters(*SHAPES, dtype=dtype)
    train(whole, optimizer(whole, **options), 6)

    first = parameters(*SHAPES, dtype=dtype)
    ours = optimizer(first, **options)
    train(first, ours, 3)
    resumed = copies_of(first)
    fresh = optimizer(resumed, **{"lr": 77.0, **options})  # the rate travels with the state
    fresh.load_state_dict(through_a_file(ours.state_dict()))
    assert_same_state(fresh, flat_state(ours))
    train(first, ours, 1, first=3)  # the loaded states are copies
    train(resumed, fresh, 3, first=3)
    assert_equal(resumed, whole)


@every()
def test_resumes_with_the_same_bits(optimizer: Every) -> None:
    resumes(optimizer, torch.float32)


@every(takes="param_update")
def test_resumes_with_8_bit_states_and_random_rounding(optimizer: Every) -> None:
    state_dtype = "int8" if optimizer.stores("int8") else "fp32"
    resumes(optimizer, torch.bfloat16, **{**STOCHASTIC, "state_dtype": state_dtype})


def of_another_optimizer(state: dict[str, Any]) -> None:
    params = parameters(*SHAPES)
    theirs = torch.optim.Rprop(params)
    train(params, theirs, 1)
    saved = theirs.state_dict()
    groups = [group["params"] for group in state["param_groups"]]
    state["state"] = saved["state"]
    state["param_groups"] = [{**saved["param_groups"][0], "params": params} for params in groups]


def with_a_wrong_shape(state: dict[str, Any]) -> None:
    for values in state["state"].values():
        for name, value in values.items():
            if value.dim():
                values[name] = torch.cat([value, value])
                return


def without_a_state(state: dict[str, Any]) -> None:
    values = next(values for values in state["state"].values() if len(values) > 1)
    del values[next(name for name in values if name != "step")]


def without_a_group(state: dict[str, Any]) -> None:
    state["param_groups"].pop()


@every()
@pytest.mark.parametrize(
    "spoil", [of_another_optimizer, with_a_wrong_shape, without_a_state, without_a_group]
)
def test_refuses_a_state_that_does_not_fit_as_a_whole(optimizer: Every, spoil: Any) -> None:
    params = parameters(*SHAPES)
    ours = optimizer(params)
    train(params, ours, 2)
    before = flat_state(ours)
    state = copy.deepcopy(ours.state_dict())
    for group in state["param_groups"]:
        group["lr"] = 77.0
    spoil(state)
    with pytest.raises(ValueError, match=r"load_state_dict.*nothing was loaded"):
        ours.load_state_dict(state)
    assert_same_state(ours, before)


@every()
def test_copies_and_pickles_continue(optimizer: Every) -> None:
    params = parameters(*SHAPES)
    ours = optimizer(params)
    train(params, ours, 2)
    others = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))]
    ordered = [p for group in ours.param_groups for p in group["params"]]
    train(ordered, ours, 2, first=2)
    for other in others:
        mine = [p for group in other.param_groups for p in group["params"]]
        train(mine, other, 2, first=2)
        assert_equal(mine, ordered)


# --- arguments of the step ----------------------------------------------------------------------------------


@every(steps_with="max_grad_norm")
@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_clips_like_torch(optimizer: Every, limit: float) -> None:
    """The factor is a float32 number, so float64 results agree to its rounding."""
    ours, theirs = parameters(*SHAPES, dtype=torch.float64), parameters(*SHAPES, dtype=torch.float64)
    clipped, plain = optimizer(ours), optimizer(theirs)
    for step in range(4):
        set_gradients(ours, step)
        before = [p.grad.clone() for p in ours]
        clipped.step(max_grad_norm=limit)
        assert_equal([p.grad for p in ours], before)
        set_gradients(theirs, step)
        norm = nn.utils.clip_grad_norm_(theirs, limit)
        plain.step()
        torch.testing.assert_close(clipped.last_grad_norm.double(), norm, rtol=1e-6, atol=0)
    assert_near(ours, theirs, 1e-6)


@every(steps_with="max_grad_norm")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_norm_that_is_not_finite_skips_everything(optimizer: Every, value: float) -> None:
    params = parameters(*SHAPES)
    ours = optimizer(params)
    train(params, ours, 2)
    before, state = copies_of(params), flat_state(ours)
    set_gradients(params, 2)
    params[2].grad[3, 3] = value
    ours.step(max_grad_norm=1.0)
    assert not ours.last_grad_norm.isfinite()
    assert_equal(params, before)
    assert_same_state(ours, state)


def test_gradients_of_another_layout_are_zeroed_and_otherwise_left_alone() -> None:
    for zero_grad in (False, True):
        p = nn.Parameter(torch.randn(6, 4))
        p.grad = torch.randn(4, 6).t()
        before, version = p.grad.clone(), p.grad._version
        ng.optim.AdamW([p]).step(zero_grad=zero_grad)
        assert torch.equal(p.grad, torch.zeros(6, 4) if zero_grad else before)
        assert zero_grad or p.grad._version == version


@every(steps_with="zero_grad")
def test_zeroes_gradients_in_the_step(optimizer: Every) -> None:
    params, expected = parameters(*SHAPES), parameters(*SHAPES)
    ours, theirs = optimizer(params), optimizer(expected)
    for step in range(2):
        set_gradients(params, step)
        grads = [p.grad for p in params]
        ours.step(zero_grad=True)
        for p, g in zip(params, grads, strict=True):
            assert p.grad is g
            assert not g.any()
        train(expected, theirs, 1, first=step)
    assert_equal(params, expected)


@every()
def test_gradients_are_not_modified(optimizer: Every) -> None:
    params = parameters(*SHAPES)
    ours = optimizer(params)
    for step in range(2):
        set_gradients(params, step)
        before = [(p.grad.clone(), p.grad._version) for p in params]
        ours.step()
        for p, (grad, version) in zip(params, before, strict=True):
            assert torch.equal(p.grad, grad)
            assert p.grad._version == version


@every()
def test_closure_hooks_and_the_loss(optimizer: Every) -> None:
    params, expected = parameters((6, 4)), parameters((6, 4))
    ours, theirs = optimizer(params), optimizer(expected)
    calls = []
    ours.register_step_pre_hook(lambda *args: calls.append("pre"))
    ours.register_step_post_hook(lambda *args: calls.append("post"))

    def closure() -> Tensor:
        calls.append("closure")
        assert torch.is_grad_enabled()
        ours.zero_grad()
        loss = params[0].square().sum()
        loss.backward()
        return loss

    before = params[0].detach().square().sum().item()
    assert ours.step(closure).item() == pytest.approx(before)
    assert calls == ["pre", "closure", "post"]
    expected[0].grad = 2 * expected[0].detach()
    theirs.step()
    assert_equal(params, expected)


# --- learning rates -----------------------------------------------------------------------------------------


@every()
def test_tensor_lr_gives_the_bits_of_a_number(optimizer: Every) -> None:
    numbers, tensors = parameters(*SHAPES), parameters(*SHAPES)
    train(numbers, optimizer(numbers, lr=0.125), 3)
    rate = torch.tensor(0.125)
    train(tensors, optimizer(tensors, lr=rate), 3)
    assert rate.item() == 0.125
    assert_same_steps(optimizer, tensors, numbers)


@every()
@pytest.mark.parametrize("as_tensor", [False, True])
def test_schedulers_set_the_rate(optimizer: Every, as_tensor: bool) -> None:
    params, expected = parameters(*SHAPES), parameters(*SHAPES)
    ours = optimizer(params, lr=torch.tensor(0.25) if as_tensor else 0.25)
    theirs = optimizer(expected, lr=0.25)
    scheduler = torch.optim.lr_scheduler.StepLR(ours, 1, 0.5)
    for step in range(3):
        train(params, ours, 1, first=step)
        train(expected, theirs, 1, first=step)
        scheduler.step()
        for group in theirs.param_groups:
            group["lr"] *= 0.5
    assert_same_steps(optimizer, params, expected)


@every(takes="maximize")
def test_maximize_follows_negated_gradients(optimizer: Every) -> None:
    up, down = parameters(*SHAPES), parameters(*SHAPES)
    rising, falling = optimizer(up, maximize=True), optimizer(down)
    for step in range(3):
        set_gradients(up, step)
        rising.step()
        for p, q in zip(up, down, strict=True):
            q.grad = -p.grad
        falling.step()
    assert_equal(up, down)


# --- odd gradients ------------------------------------------------------------------------------------------


@every()
def test_sparse_gradients_are_refused_before_anything_changes(optimizer: Every) -> None:
    params = parameters((12, 6), (5,), (8, 4))
    ours = optimizer(params)
    before = copies_of(params)
    set_gradients(params, 0)
    params[2].grad = params[2].grad.to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        ours.step()
    assert_equal(params, before)


@every()
def test_a_nan_shows(optimizer: Every) -> None:
    """It must reach the parameter and stay, not freeze it with a value that looks sound; or be an error."""
    (p,) = parameters((12, 6))
    ours = optimizer([p])
    train([p], ours, 1)
    set_gradients([p], 1)
    p.grad[3, 3] = torch.nan
    if optimizer.name in RAISES:
        with pytest.raises(torch.linalg.LinAlgError):
            ours.step()
        return
    ours.step()
    train([p], ours, 1, first=2)
    assert not p[3, 3].isfinite()


@every(takes="state_dtype")
@pytest.mark.parametrize("state_dtype", ["int8", "int4", "fp8", "int8_companded"])
def test_a_nan_shows_through_coded_states(optimizer: Every, state_dtype: str) -> None:
    if not optimizer.stores(state_dtype):
        return
    (p,) = parameters((12, 64))
    ours = optimizer([p], state_dtype=state_dtype, min_quantized_size=0)
    for step in range(3):
        set_gradients([p], step)
        if step == 1:
            p.grad[3, 3] = torch.nan
        ours.step()
    assert not p[3, 3].isfinite()


@every()
def test_parameters_without_gradient_are_left_alone(optimizer: Every) -> None:
    params = parameters((12, 6), (9, 4))
    before = params[1].detach().clone()
    ours = optimizer(params)
    set_gradients(params, 0)
    params[1].grad = None
    ours.step()
    assert torch.equal(params[1], before)
    assert not any(name != "step" and value.any() for name, value in ours.state.get(params[1], {}).items())
    params[0].grad = None
    state = flat_state(ours)
    ours.step()  # nothing to do
    assert {k: v for k, v in flat_state(ours).items() if k.startswith("state")}.keys() == {
        k for k in state if k.startswith("state")
    }


@every()
def test_groups_may_be_added_between_steps(optimizer: Every) -> None:
    params = parameters((12, 6), (9, 4))
    ours = optimizer(params[:1])
    train(params[:1], ours, 2)
    added: Any = params[1:]
    if optimizer.takes("named_parameters"):
        added = [("layers.1.weight", params[1])]
    ours.add_param_group({"params": added})
    before = copies_of(params)
    train(params, ours, 3, first=2)
    for p, old in zip(params, before, strict=True):
        assert p.isfinite().all()
        assert not torch.equal(p, old)
    steps = [ours.state[p].get("step") for p in params]
    assert steps == [None, None] or [step.item() for step in steps] == [5, 3]


# --- gradient scaler ----------------------------------------------------------------------------------------


@every()
def test_grad_scaler(optimizer: Every) -> None:
    scaled, plain = parameters(*SHAPES), parameters(*SHAPES)
    ours, theirs = optimizer(scaled), optimizer(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        set_gradients(plain, step)
        theirs.step()
        for p, q in zip(scaled, plain, strict=True):
            p.grad = q.grad * 1024
        scaler.scale(torch.zeros(()))
        scaler.step(ours)
        scaler.update()
    assert_equal(scaled, plain)

    state = flat_state(ours)
    scaled[2].grad[3, 3] = torch.inf
    scaler.scale(torch.zeros(()))
    scaler.step(ours)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert_equal(scaled, plain)
    assert_same_state(ours, state)
