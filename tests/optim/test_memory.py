"""The table of bytes says what training really allocates."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from tests.optim.every import OF_MATRICES, Every, every
from tests.optim.test_adamw import set_gradients
from torch import nn

import narrowgauge as ng
from narrowgauge.optim.codec import STATE_DTYPES
from narrowgauge.optim.memory import Memory, MemoryTable
from narrowgauge.optim.rule_samples import PARAM_UPDATES


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(70, 60), nn.LayerNorm(60), nn.Conv2d(3, 5, 3), nn.Linear(60, 7))


def held(optimizer: torch.optim.Optimizer) -> int:
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


def assert_row_is_true(row: Memory, cls: type, **options: Any) -> None:
    trained = model().to(getattr(torch, row.param_dtype))
    params = list(trained.parameters())
    storage = {"state_dtype": row.state_dtype, "param_update": row.param_update} if row.state_dtype else {}
    named = "named_parameters" in inspect.signature(cls).parameters
    optimizer: Any = cls(list(trained.named_parameters()) if named else params, **options, **storage)
    set_gradients(params, 0)
    optimizer.step()
    assert row.params == sum(p.nbytes for p in params)
    assert row.grads == sum(p.grad.nbytes for p in params)
    assert row.states == held(optimizer), row
    assert row.total == row.params + row.grads + row.states


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9, "split_bits": 16, "min_quantized_size": 100}])
def test_every_format_of_adamw(options: dict[str, Any]) -> None:
    table = ng.optim.memory(model(), **options)
    assert len(table) == 28 + bool(options)
    for row in table[bool(options) :]:
        assert_row_is_true(row, ng.optim.AdamW, **options)


@every()
def test_every_optimizer(optimizer: Every) -> None:
    if optimizer.name in OF_MATRICES:
        pytest.skip("takes groups; its states are counted by a function that makes them")
    options = {"lr": 0.01, **optimizer.arguments}
    table = ng.optim.memory(model(), optimizer.cls, **options)
    if optimizer.takes("state_dtype") and optimizer.takes("param_update"):
        offered = [(s, u) for u in PARAM_UPDATES for s in STATE_DTYPES if optimizer.stores(s, u)]
        assert [(row.state_dtype, row.param_update) for row in table[-len(offered) :]] == offered
    assert_row_is_true(table[-1], optimizer.cls, **options)


def test_one_format_frozen_and_tied_parameters() -> None:
    trained = model()
    trained[0].requires_grad_(False)
    trained.append(trained[3])
    table = ng.optim.memory(trained, state_dtype="int8", param_update="stochastic")
    assert [row.state_dtype for row in table] == ["fp32", "int8"]
    numel = sum(p.numel() for p in trained.parameters())
    learning = sum(p.numel() for p in trained.parameters() if p.requires_grad)
    assert (table[0].params, table[0].grads) == (4 * numel, 4 * learning)
    assert (table[1].params, table[1].grads) == (2 * numel, 2 * learning)
    assert ng.optim.memory(trained.named_parameters(), state_dtype="int8", param_update="stochastic") == table
    groups = [{"params": list(trained[0].parameters())}, {"params": list(trained[1:].parameters())}]
    assert ng.optim.memory(groups, state_dtype="int8", param_update="stochastic") == table
    assert {row.total for row in ng.optim.memory([])} == {0}


def test_a_large_model_is_counted_without_memory() -> None:
    with torch.device("meta"):
        large = nn.Linear(200_000, 100_000, bias=False)
    table = ng.optim.memory(large)
    assert table[0].total == 16 * 20_000_000_000 + 4


def test_it_prints_as_a_table() -> None:
    lines = str(ng.optim.memory(nn.Linear(1000, 1000, bias=False), state_dtype="int8")).splitlines()
    assert lines[0].split() == [
        "optimizer",
        "parameters",
        "states",
        "update",
        "param",
        "MB",
        "grad",
        "MB",
        "state",
        "MB",
        "total",
        "MB",
    ]
    assert lines[1].split() == [
        "AdamW",
        "float32",
        "fp32",
        "nearest",
        "4.00",
        "4.00",
        "8.00",
        "16.00",
        "100%",
    ]
    assert lines[3].split()[:4] == ["AdamW", "bfloat16", "int8", "stochastic"]
    assert lines[3].split()[-1] == "38%"
    assert len({len(line.rstrip()) for line in lines[1:]}) == 1
    assert str(MemoryTable())


def test_bad_input() -> None:
    with pytest.raises(TypeError, match="parameters must be tensors, got str"):
        ng.optim.memory(["weight"])
    with pytest.raises(ValueError, match="state_dtype must be one of"):
        ng.optim.memory(model(), state_dtype="int7")
