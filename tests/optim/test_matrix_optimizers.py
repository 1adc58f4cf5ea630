"""What Shampoo and SOAP have in common with every optimizer: gradients, storage, scaling, checkpoints, bad input."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.optim.test_adamw import assert_equal, parameters, set_gradients, train
from tests.optim.test_checkpoint import through_a_file
from tests.tolerances import assert_same_bits
from torch import Tensor, nn

import narrowgauge as ng

SHAPES = [(6, 6), (6, 6), (3, 2, 4), (5,), (), (0, 3)]
MAKERS = {
    "shampoo": lambda params, **options: ng.optim.Shampoo(
        params, **{"lr": 0.05, "momentum": 0.5, "preconditioning_compute_steps": 2, **options}
    ),
    "soap": lambda params, **options: ng.optim.SOAP(
        params, **{"lr": 0.05, "precondition_frequency": 2, **options}
    ),
}
EACH = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@EACH
def test_batches_give_what_single_parameters_give(make: Any) -> None:
    together, alone = parameters(*SHAPES, dtype=torch.float64), parameters(*SHAPES, dtype=torch.float64)
    train(together, make(together), 5)
    optimizers = [make([p]) for p in alone]
    for step in range(5):
        set_gradients(alone, step)
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(together, alone, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


@EACH
def test_gradients_and_absent_ones_are_left_alone(make: Any) -> None:
    params = parameters((6, 6), (6, 6))
    absent = params[1].detach().clone()
    optimizer = make(params, maximize=True, weight_decay=0.1)
    optimizer.grad_scale = torch.tensor(4.0)
    for step in range(3):
        set_gradients(params, step)
        params[1].grad = None
        before, version, moved = params[0].grad.clone(), params[0].grad._version, params[0]._version
        optimizer.step()
        assert torch.equal(params[0].grad, before)
        assert params[0].grad._version == version
    assert params[0]._version > moved
    assert torch.equal(params[1], absent)
    assert params[1] not in optimizer.state
    set_gradients(params, 3)  # the second parameter's first call, the first one's fourth
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in params] == [4.0, 1.0]


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_parameters_have_wide_states(make: Any, dtype: torch.dtype) -> None:
    narrow = parameters((6, 6), (5,), dtype=dtype)
    wide = [nn.Parameter(p.detach().float()) for p in narrow]
    optimizers = make(narrow), make(wide)
    for step in range(2):
        set_gradients(narrow, step)
        for p, q in zip(narrow, wide, strict=True):
            q.grad = p.grad.float()
            q.data = p.data.float()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(narrow, wide, strict=True):
        assert_same_bits(p.detach(), q.detach().to(dtype))
        assert all(value.dtype is torch.float32 for value in optimizers[0].state[p].values())


@EACH
def test_layouts(make: Any) -> None:
    (plain,) = parameters((4, 3, 2, 3), dtype=torch.float64)
    strided = nn.Parameter(plain.detach().to(memory_format=torch.channels_last))
    gaps = nn.Parameter(torch.stack([plain.detach(), plain.detach()], -1)[..., 0])
    for p in (plain, strided, gaps):
        train([p], make([p]), 4)
    torch.testing.assert_close(strided, plain, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(gaps, plain, rtol=1e-8, atol=1e-8)


@EACH
def test_grad_scaler(make: Any) -> None:
    scaled, plain = parameters(*SHAPES), parameters(*SHAPES)
    optimizer, expected = make(scaled), make(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        set_gradients(plain, step)
        expected.step()
        for p, q in zip(scaled, plain, strict=True):
            p.grad = q.grad * 1024
        scaler.scale(torch.zeros(()))
        scaler.step(optimizer)
        scaler.update()
    assert_equal(scaled, plain)
    state = copy.deepcopy(optimizer.state_dict())
    scaled[1].grad[2, 3] = torch.inf
    scaler.scale(torch.zeros(()))
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert_equal(scaled, plain)
    torch.testing.assert_close(optimizer.state_dict()["state"], state["state"], rtol=0, atol=0)


@EACH
def test_tensor_lr_closures_and_schedulers(make: Any) -> None:
    numbers, tensors = parameters(*SHAPES), parameters(*SHAPES)
    optimizers = make(numbers, lr=0.125), make(tensors, lr=torch.tensor(0.125))
    for params, optimizer in zip((numbers, tensors), optimizers, strict=True):
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

        def closure(params: list[nn.Parameter] = params) -> Tensor:
            set_gradients(params, 0)
            return torch.tensor(3.0)

        for _ in range(3):
            assert optimizer.step(closure).item() == 3.0
            scheduler.step()
    for p, q in zip(tensors, numbers, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_gradients_that_are_not_finite_raise_or_show() -> None:
    """Matrices that are not finite have no roots and no eigenvectors."""
    params = parameters((6, 6))
    optimizer = MAKERS["shampoo"](params)
    for step in range(3):
        before = copy.deepcopy(optimizer.state_dict()), params[0].detach().clone()
        set_gradients(params, step)
        if step != 1:
            params[0].grad[1, 2] = torch.nan
            with pytest.raises(RuntimeError, match=r"finite|converge"):
                optimizer.step()
            assert torch.equal(params[0], before[1])
            if step:
                torch.testing.assert_close(
                    optimizer.state_dict()["state"], before[0]["state"], rtol=0, atol=0
                )
        else:
            optimizer.step()
            assert params[0].isfinite().all()
    params = parameters((6, 6))
    optimizer = MAKERS["soap"](params)
    set_gradients(params, 0)
    params[0].grad[1, 2] = torch.nan
    with pytest.raises(RuntimeError, match=r"finite|converge"):
        optimizer.step()
    assert params[0].isfinite().all()
    train(params, optimizer, 2)
    assert params[0].isfinite().all()
    params[0].grad[1, 2] = torch.nan
    optimizer.step()
    assert params[0].isnan().all()


@EACH
def test_parameters_it_cannot_take(make: Any) -> None:
    with pytest.raises(ValueError, match=r"dtype torch.complex64; accepted are torch.float32"):
        make([nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64))])
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = make(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()


BAD_ARGUMENTS = [
    ("shampoo", {"lr": -1.0}, "Shampoo: lr must be a finite number >= 0, got -1.0"),
    ("shampoo", {"momentum": 1.0}, r"momentum must be a finite number in \[0, 1\), got 1.0"),
    ("shampoo", {"weight_decay": -1}, "weight_decay must be"),
    ("shampoo", {"weight_decouple": 1}, "weight_decouple must be True or False"),
    ("shampoo", {"fixed_decay": 1}, "fixed_decay must be True or False"),
    ("shampoo", {"preconditioning_compute_steps": 0}, "preconditioning_compute_steps must be"),
    ("shampoo", {"matrix_eps": float("nan")}, "matrix_eps must be"),
    ("shampoo", {"max_precondition_dim": 1.5}, "max_precondition_dim must be a whole number, got 1.5"),
    ("shampoo", {"root_method": "qr"}, "root_method must be one of 'svd', 'eigh'; got 'qr'"),
    ("soap", {"lr": torch.zeros(2)}, "SOAP: a tensor lr must be one floating-point number"),
    ("soap", {"betas": 0.9}, "betas must be two numbers"),
    ("soap", {"betas": (0.9, 1.0)}, r"betas\[1\] must be"),
    ("soap", {"shampoo_beta": -1.0}, "shampoo_beta must be"),
    ("soap", {"precondition_frequency": 0}, "precondition_frequency must be"),
    ("soap", {"max_precondition_dim": 0}, "max_precondition_dim must be"),
    ("soap", {"merge_dims": None}, "merge_dims must be True or False"),
    ("soap", {"eps": -1}, "eps must be"),
    ("soap", {"maximize": "yes"}, "maximize must be True or False"),
]


@pytest.mark.parametrize(("name", "arguments", "message"), BAD_ARGUMENTS)
def test_bad_arguments(name: str, arguments: dict[str, Any], message: str) -> None:
    p = nn.Parameter(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=message):
        MAKERS[name]([p], **arguments)
    optimizer = MAKERS[name]([nn.Parameter(torch.zeros(2, 2))])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [p], **arguments})
    assert len(optimizer.param_groups) == 1


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumes_with_the_same_bits(make: Any, dtype: torch.dtype) -> None:
    whole, first = parameters(*SHAPES, dtype=dtype), parameters(*SHAPES, dtype=dtype)
    train(whole, make(whole), 6)
    optimizer = make(first)
    train(first, optimizer, 3)
    resumed = [nn.Parameter(p.detach().clone()) for p in first]
    fresh = make(resumed, lr=1.0)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    train(first, optimizer, 1, first=3)  # the loaded states are copies
    train(resumed, fresh, 3, first=3)
    assert_equal(resumed, whole)


@EACH
def test_state_dicts_that_do_not_fit_change_nothing(make: Any) -> None:
    params = parameters((6, 6), (4, 4))
    optimizer = make(params)
    train(params, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict())
    for path, value, message in [
        (("param_groups", 0, "weight_decay"), None, "group 0 has no weight_decay"),
        (("state", 1), {"step": torch.tensor(1.0)}, "the state of parameter 1 has the keys"),
        (("state", 1, "step"), torch.tensor(1.5), "step must be a whole number, got 1.5"),
        (("state", 1, "step"), torch.tensor(-1.0), "step must be a whole number"),
        (("param_groups", 0, "max_precondition_dim"), 5, "has the keys"),
    ]:
        inner = bad = copy.deepcopy(before)
        for key in path[:-1]:
            inner = inner[key]
        if value is None:
            del inner[path[-1]]
        else:
            inner[path[-1]] = value
        with pytest.raises(ValueError, match=message + ".*; nothing was loaded"):
            optimizer.load_state_dict(bad)
        after = optimizer.state_dict()
        assert after["param_groups"] == before["param_groups"]
        torch.testing.assert_close(after["state"], before["state"], rtol=0, atol=0)
