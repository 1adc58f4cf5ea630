"""Saving and resuming AdamW: the same bits, both ways with torch, and all or nothing."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from tests.optim.test_adamw import INT8, assert_equal, parameters, train
from torch import nn

import narrowgauge as ng

SHAPES = [(33, 65), (5,), (), (0, 2)]


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"amsgrad": True, "maximize": True},
        {"param_update": "stochastic", "seed": 3},
        {"param_update": "stochastic", "amsgrad": True, **INT8},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumes_with_the_same_bits(options: dict[str, Any], dtype: torch.dtype) -> None:
    whole = parameters(*SHAPES, dtype=dtype)
    groups = [{"params": whole[:2]}, {"params": whole[2:], "lr": 0.01}]
    train(whole, ng.optim.AdamW(groups, **options), 6)

    first = parameters(*SHAPES, dtype=dtype)
    optimizer = ng.optim.AdamW([{"params": first[:2]}, {"params": first[2:], "lr": 0.01}], **options)
    train(first, optimizer, 3)
    resumed = [nn.Parameter(p.detach().clone()) for p in first]
    fresh = ng.optim.AdamW([{"params": resumed[:2]}, {"params": resumed[2:]}], **options)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    train(first, optimizer, 1, first=3)  # the loaded states are copies
    train(resumed, fresh, 3, first=3)
    assert_equal(resumed, whole)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_exchanges_state_dicts_with_torch(amsgrad: bool) -> None:
    ours, theirs = parameters(*SHAPES), parameters(*SHAPES)
    our_optimizer = ng.optim.AdamW(ours, lr=0.01, amsgrad=amsgrad)
    their_optimizer = torch.optim.AdamW(theirs, lr=0.02, amsgrad=amsgrad)
    train(ours, our_optimizer, 3)
    train(theirs, their_optimizer, 3)
    for source, source_optimizer, target_class in (
        (ours, our_optimizer, torch.optim.AdamW),
        (theirs, their_optimizer, ng.optim.AdamW),
    ):
        moved = [nn.Parameter(p.detach().clone()) for p in source]
        target = target_class(moved, amsgrad=amsgrad)
        target.load_state_dict(through_a_file(source_optimizer.state_dict()))
        train(source, source_optimizer, 2, first=3)
        train(moved, target, 2, first=3)
        for p, q in zip(source, moved, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


def test_bfloat16_states_of_torch_become_fp32_and_ours_stay() -> None:
    theirs = parameters((300,), dtype=torch.bfloat16)
    their_optimizer = torch.optim.AdamW(theirs)
    train(theirs, their_optimizer, 2)
    ours = parameters((300,), dtype=torch.bfloat16)
    optimizer = ng.optim.AdamW(ours)
    optimizer.load_state_dict(their_optimizer.state_dict())
    assert optimizer.state[ours[0]]["exp_avg"].dtype is torch.float32
    train(ours, optimizer, 1)
    again = ng.optim.AdamW(ours)
    again.load_state_dict(optimizer.state_dict())
    for name, value in optimizer.state[ours[0]].items():
        assert again.state[ours[0]][name].dtype is torch.float32
        assert torch.equal(again.state[ours[0]][name], value)


def test_copies_and_pickles_continue() -> None:
    params = parameters((300,))
    optimizer = ng.optim.AdamW(params, **INT8)
    train(params, optimizer, 2)
    copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    train(params, optimizer, 2, first=2)
    for other in copies:
        mine = other.param_groups[0]["params"]
        train(mine, other, 2, first=2)
        assert_equal(mine, params)


def saved(**options: Any) -> dict[str, Any]:
    params = parameters((5000,), (7,))
    optimizer = ng.optim.AdamW(params, **options)
    train(params, optimizer, 1)
    return copy.deepcopy(optimizer.state_dict())


def without(state: dict[str, Any], key: str) -> dict[str, Any]:
    del state["state"][0][key]
    return state


def with_value(state: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    state["state"][0][key] = value
    return state


def of_sgd() -> dict[str, Any]:
    params = parameters((5000,), (7,))
    optimizer = torch.optim.SGD(params, momentum=0.9)
    train(params, optimizer, 1)
    return optimizer.state_dict()


def foreign_group(name: str, value: Any) -> dict[str, Any]:
    state = saved()
    state["param_groups"][0][name] = value
    return state


REFUSED = {
    "no state": ({"param_groups": []}, {}, "has the keys 'state' and 'param_groups'"),
    "groups": ({**saved(), "param_groups": []}, {}, "groups have"),
    "another optimizer": (of_sgd(), {}, "has no betas: it is of another optimizer"),
    "a missing key": (without(saved(), "exp_avg_sq"), {}, "the state of parameter 0 has the keys"),
    "a foreign key": (with_value(saved(), "momentum_buffer", torch.zeros(5000)), {}, "momentum_buffer"),
    "no tensor": (with_value(saved(), "exp_avg", 3), {}, "exp_avg must be a tensor, got int"),
    "a wrong shape": (
        with_value(saved(), "exp_avg", torch.zeros(4999)),
        {},
        r"shape \(4999,\), expected \(5000,\)",
    ),
    "a wrong dtype": (with_value(saved(), "exp_avg", torch.zeros(5000).int()), {}, "has dtype torch.int32"),
    "a wrong step": (with_value(saved(), "step", torch.tensor(-1.0)), {}, "step must be a whole number"),
    "fractional step": (with_value(saved(), "step", 1.5), {}, "step must be a whole number"),
    "int8 into fp32": (
        saved(state_dtype="int8"),
        {},
        "saved with state_dtype='int8', this optimizer has 'fp32'",
    ),
    "fp32 into int8": (saved(), {"state_dtype": "int8"}, "saved with state_dtype='fp32'"),
    "float codes": (
        with_value(saved(state_dtype="int8"), "exp_avg.codes", torch.zeros(5000)),
        {"state_dtype": "int8"},
        "exp_avg.codes has dtype torch.float32, expected torch.uint8",
    ),
    "too few scales": (
        with_value(saved(state_dtype="int8"), "exp_avg.scale", torch.zeros(3)),
        {"state_dtype": "int8"},
        r"exp_avg.scale has shape \(3,\), expected \(20,\)",
    ),
    "bad hyperparameter": (foreign_group("betas", (0.9, 1.5)), {}, r"betas\[1\] must be"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_does_not_fit_and_changes_nothing(case: str) -> None:
    state, options, message = REFUSED[case]
    params = parameters((5000,), (7,), seed=1)
    optimizer = ng.optim.AdamW(params, lr=0.5, **options)
    train(params, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for number, values in before["state"].items():
        for name, value in values.items():
            assert torch.equal(after["state"][number][name], value)
