"""Compiled steps of every optimizer, and the trainer of transformers where it is installed."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from tests.optim.every import EVERY, Every, assert_near
from tests.optim.test_adamw import assert_equal, parameters, set_gradients
from torch import nn

import narrowgauge as ng

# One per kind of step: elementwise, given by Python, with sums, by rows, of PyTorch's operators.
REPRESENTATIVE = [
    name
    for name in (
        "Adam l2",
        "AdamW cautious",
        "SGD",
        "Lion",
        "NAdam",
        "AdEMAMix",
        "LAMB",
        "AdamP",
        "AdamMini",
        "Adafactor",
    )
    if name in EVERY
]


def assert_compiles(optimizer: Every, **options: Any) -> None:
    """One graph, no graph for another rate, and the bits of eager steps."""
    shapes = [(33, 9), (12, 6), (40,)]
    eager, compiled = parameters(*shapes), parameters(*shapes)
    rates = torch.tensor(0.01), torch.tensor(0.01)
    ours, theirs = optimizer(compiled, lr=rates[0], **options), optimizer(eager, lr=rates[1], **options)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(ours.step, fullgraph=True, backend=counter)
    frames = []
    for number in range(4):
        for params in (eager, compiled):
            set_gradients(params, number)
        theirs.step()
        step()
        frames.append(counter.frame_count)
        for rate in rates:
            rate.mul_(0.5)
    if optimizer.has_sums():
        assert_near(compiled, eager, 1e-5)
    else:
        assert_equal(compiled, eager)
    assert frames[-1] == frames[1] <= 2  # the first step makes the states


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_compiled_steps(name: str) -> None:
    assert_compiles(EVERY[name])


def test_compiled_step_with_clipping_averages_and_codes() -> None:
    params, expected = parameters((33, 9), (5,)), parameters((33, 9), (5,))
    options = {"state_dtype": "int8", "min_quantized_size": 0, "ema_decay": 0.9}
    ours, theirs = ng.optim.AdamW(params, **options), ng.optim.AdamW(expected, **options)
    torch._dynamo.reset()
    step = torch.compile(ours.step, fullgraph=True, backend="aot_eager")
    for number in range(3):
        for one in (params, expected):
            set_gradients(one, number)
        step(max_grad_norm=0.5, zero_grad=True)
        theirs.step(max_grad_norm=0.5, zero_grad=True)
    assert_equal(params, expected)
    assert torch.equal(ours.last_grad_norm, theirs.last_grad_norm)
    assert_equal([ours.state[p]["ema"] for p in params], [theirs.state[p]["ema"] for p in expected])
    assert not any(p.grad.any() for p in params)


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_the_trainer_of_transformers_takes_it(tmp_path: Any) -> None:
    from transformers import Trainer, TrainingArguments

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            y = self.layer(x)[:, 0]
            return {"loss": nn.functional.mse_loss(y, labels), "logits": y}

    torch.manual_seed(0)
    model = Model()
    data = [{"x": torch.randn(4), "labels": torch.randn(())} for _ in range(16)]
    optimizer = ng.optim.AdamW(model.parameters(), lr=0.1)
    before = model.layer.weight.detach().clone()
    arguments = TrainingArguments(str(tmp_path), max_steps=6, report_to=[], use_cpu=True, save_strategy="no")
    Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None)).train()
    assert optimizer.state[model.layer.weight]["step"].item() == 6
    assert not torch.equal(model.layer.weight, before)
