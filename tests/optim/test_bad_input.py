"""Bad arguments of AdamW: an error that names them, before anything changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import narrowgauge as ng
from narrowgauge.ops import library
from narrowgauge.optim.adamw import adamw_rule

BAD_ARGUMENTS = [
    ({"lr": -1.0}, "lr must be a finite number >= 0, got -1.0"),
    ({"lr": float("nan")}, "lr must be"),
    ({"lr": float("inf")}, "lr must be"),
    ({"lr": "fast"}, "lr must be a finite number >= 0, got 'fast'"),
    ({"lr": torch.zeros(2)}, "a tensor lr must be one floating-point number"),
    ({"betas": (0.9, 1.0)}, r"betas\[1\] must be a finite number in \[0, 1\), got 1.0"),
    ({"betas": (-0.1, 0.9)}, r"betas\[0\]"),
    ({"betas": 0.9}, "betas must be two numbers"),
    ({"eps": -1e-8}, "eps must be"),
    ({"weight_decay": -1}, "weight_decay must be"),
    ({"state_dtype": "int7"}, "state_dtype must be one of 'fp32', 'bf16', 'int8', .*; got 'int7'"),
    (
        {"param_update": "random"},
        "param_update must be one of 'nearest', 'stochastic', 'kahan', 'split'; got 'random'",
    ),
    ({"seed": 0.5}, "seed must be an integer"),
    ({"min_quantized_size": -1}, "min_quantized_size must be"),
    ({"differentiable": True}, "use an optimizer of torch.optim"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS)
def test_arguments(arguments: dict[str, Any], message: str) -> None:
    p = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=message):
        ng.optim.AdamW([p], **arguments)
    with pytest.raises(ValueError, match=message):
        ng.optim.AdamW([{"params": [p], **arguments}])
    optimizer = ng.optim.AdamW([nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [p], **arguments})
    assert len(optimizer.param_groups) == 1


def test_parameters_of_a_dtype_without_a_kernel() -> None:
    with pytest.raises(ValueError, match=r"dtype torch.float8_e4m3fn; accepted are torch.float32"):
        ng.optim.AdamW([torch.zeros(3).to(torch.float8_e4m3fn)])


def test_sparse_gradients() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = ng.optim.AdamW(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()


def call(**changes: Any) -> tuple[Any, ...]:
    lists: dict[str, Any] = {
        "params": [torch.zeros(4, 4)],
        "grads": [torch.zeros(4, 4)],
        "states": [torch.zeros(4, 4), torch.zeros(4, 4)],
        "scales": [],
        "steps": [torch.zeros(())],
        "rests": [],
        "emas": [],
        "copies": [],
        "given": None,
        "lr_tensor": None,
    }
    rest: dict[str, Any] = {
        "options": [0.9, 0.999, 1e-2, 1e-8],
        "variant": 0,
        "state_format": 0,
        "param_update": 0,
        "row_lengths": [],
        "grad_scale": None,
        "found_inf": None,
    }
    unknown = set(changes) - set(lists) - set(rest)
    assert not unknown, unknown
    lists.update({name: value for name, value in changes.items() if name in lists})
    rest.update({name: value for name, value in changes.items() if name in rest})
    params, grads, states, scales, steps, rests, emas, copies, given, lr_tensor = lists.values()
    return (
        *(params, grads, states, scales, steps, rests, emas, copies, given, None, lr_tensor, 1e-3),
        *(rest["options"], rest["variant"], rest["state_format"], rest["param_update"], False, False, 0.0),
        *(rest["row_lengths"], 0, [], [], rest["grad_scale"], None, rest["found_inf"]),
    )


BAD_CALLS = [
    ({"grads": []}, "equally long"),
    ({"states": [torch.zeros(4, 4)]}, "states must hold 2 tensors per parameter"),
    ({"scales": [torch.zeros(1)]}, "scales must be empty or as long as states"),
    ({"params": [torch.zeros(4, 4).long()]}, "floating point, got int64"),
    ({"grads": [torch.zeros(4, 4).double()]}, "grads must have the dtype of params, float32 or bfloat16"),
    ({"grads": [torch.zeros(4, 5)]}, r"grads\[0\] must be laid out like its parameter"),
    ({"grads": [torch.zeros(4, 4).t()]}, "laid out like its parameter"),
    ({"params": [torch.zeros(4, 8)[:, ::2]]}, "gaps or overlaps"),
    ({"params": [torch.zeros(1).expand(4, 4)]}, "gaps or overlaps"),
    ({"states": [torch.zeros(4, 4), torch.zeros(16)]}, r"states\[1\] must be laid out"),
    ({"states": [torch.zeros(4, 4).bfloat16()] * 2}, r"states\[0\] must be float32"),
    ({"steps": [torch.zeros(2)]}, r"steps\[0\] must be one float32 number"),
    ({"steps": [torch.zeros((), dtype=torch.float64)]}, "must be one float32 number"),
    ({"param_update": 1}, "this param_update is for bfloat16 params, got float32"),
    ({"param_update": 4}, "unknown param_update 4"),
    ({"state_format": 9}, "unknown state_format 9"),
    ({"variant": 6}, r"variant must be in \[0, 6\), got 6"),
    ({"variant": 4}, "given must be there"),
    ({"options": [0.9]}, "options must hold 4 numbers, got 1"),
    ({"row_lengths": [3]}, r"row_lengths\[0\] must divide the elements"),
    ({"rests": [torch.zeros(4, 4)]}, "rests are there for param_update kahan and split, and only then"),
    ({"emas": [torch.zeros(4, 4).double()]}, r"emas\[0\] must be float32"),
    ({"emas": [torch.zeros(4, 4)] * 2}, "emas must be empty or one per parameter"),
    ({"copies": [torch.zeros(4, 4).double()]}, "copies must be bfloat16, float16 or float32"),
    (
        {"given": torch.zeros(2, 1).double()},
        "given must be a contiguous float64 tensor with one row per parameter",
    ),
    ({"lr_tensor": torch.zeros(2)}, "lr_tensor must have one element"),
    ({"grad_scale": torch.zeros((), dtype=torch.int32)}, "grad_scale must be float32, got int32"),
    ({"found_inf": torch.zeros(3)}, "found_inf must have one element"),
    (
        {"states": [torch.zeros(4, 4).byte()] * 2, "scales": [torch.zeros(2)] * 2, "state_format": 2},
        "must hold 1 float32 per 256 elements",
    ),
]


@pytest.mark.skipif(not library.state.cpu.loaded, reason=f"CPU library {library.state.cpu.reason}")
@pytest.mark.parametrize(("changes", "message"), BAD_CALLS)
def test_calls_of_the_operator(changes: dict[str, Any], message: str) -> None:
    args = call(**changes)
    with pytest.raises(RuntimeError, match=message):
        adamw_rule.step.overload(*args)


def test_an_empty_list_is_no_error() -> None:
    adamw_rule.step(*call(params=[], grads=[], states=[], steps=[]))
    ng.optim.AdamW([nn.Parameter(torch.zeros(3))]).step()
