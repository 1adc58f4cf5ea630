"""Steps during the backward pass: the bits of ordinary steps, few gradients at a time, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.optim.every import Every, every
from tests.optim.test_adamw import INT8, assert_equal
from torch import Tensor, nn

import narrowgauge as ng
from narrowgauge.optim.base import ElementwiseOptimizer


class Network(nn.Module):
    """Layers of 1,680, 1,640 and 328 bytes; `unused` takes part when asked."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 4)
        self.unused = nn.Linear(20, 4)

    def forward(self, x: Tensor, both: bool = False) -> Tensor:
        x = self.second(self.first(x).tanh()).tanh()
        return self.last(x) + self.unused(x) if both else self.last(x)


def loss_of(model: nn.Module, step: int, both: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return model(torch.randn(8, 20, generator=generator), both).square().mean()


def groups(model: Network) -> list[dict[str, Any]]:
    return [
        {"params": [*model.first.parameters(), *model.unused.parameters()]},
        {"params": [*model.second.parameters(), *model.last.parameters()], "lr": 0.003},
    ]


@pytest.mark.parametrize("bucket_bytes", [0, 1700, 2**26])
@pytest.mark.parametrize("options", [{}, INT8, {"cautious": True, "ema_decay": 0.9}])
def test_gives_the_bits_of_ordinary_steps(bucket_bytes: int, options: dict[str, Any]) -> None:
    ours, plain = Network(), Network()
    optimizer, ordinary = ng.optim.AdamW(groups(ours), **options), ng.optim.AdamW(groups(plain), **options)
    handle = ng.optim.step_in_backward(optimizer, bucket_bytes)
    for step in range(5):
        both = step in (1, 2)  # in other passes `unused` has no gradient
        loss_of(ours, step, both).backward()
        assert all(p.grad is None for p in ours.parameters())
        loss_of(plain, step, both).backward()
        ordinary.step()
        ordinary.zero_grad()
        assert_equal(list(ours.parameters()), list(plain.parameters()))
    assert optimizer.state[ours.unused.weight]["step"].item() == 2
    assert optimizer._only is None

    handle.remove()
    loss_of(ours, 5).backward()
    assert ours.first.weight.grad is not None
    before = ours.first.weight.detach().clone()
    optimizer.step(max_grad_norm=1.0)
    assert not torch.equal(ours.first.weight, before)


@pytest.mark.parametrize(("bucket_bytes", "together"), [(0, 1), (7200, 2), (7199, 1), (11_000, 3)])
def test_few_gradients_exist_at_a_time(bucket_bytes: int, together: int) -> None:
    model = nn.Sequential(*[nn.Linear(30, 30, bias=False) for _ in range(6)])  # 3600 bytes each
    optimizer = ng.optim.AdamW(model.parameters())
    ng.optim.step_in_backward(optimizer, bucket_bytes)
    counts = []
    optimizer.register_step_pre_hook(
        lambda *args: counts.append(sum(p.grad is not None for p in model.parameters()))
    )
    model(torch.randn(2, 30)).sum().backward()
    assert counts == [together] * (6 // together)
    optimizer.step()  # nothing is left to do
    assert optimizer.state[model[0].weight]["step"].item() == 1


def test_what_needs_all_gradients_is_refused() -> None:
    model = Network()
    optimizer = ng.optim.AdamW(model.parameters())
    ng.optim.step_in_backward(optimizer)
    with pytest.raises(RuntimeError, match="max_grad_norm needs all gradients at once"):
        optimizer.step(max_grad_norm=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(loss_of(model, 0))
    model.first.weight.grad = torch.zeros_like(model.first.weight)
    with pytest.raises(RuntimeError, match="a gradient scaler must see all gradients"):
        scaler.step(optimizer)


def test_bad_input() -> None:
    p = nn.Parameter(torch.zeros(3))
    with pytest.raises(TypeError, match=r"must be an elementwise optimizer of narrowgauge\.optim, got SGD"):
        ng.optim.step_in_backward(torch.optim.SGD([p]))
    for value in (-1, 1.5, True, None):
        with pytest.raises(ValueError, match="bucket_bytes must be an integer >= 0"):
            ng.optim.step_in_backward(ng.optim.AdamW([p]), value)


def before_the_base(cls: type) -> tuple[type, ...]:
    return cls.__mro__[: cls.__mro__.index(ElementwiseOptimizer)]


@every()
def test_every_optimizer_steps_so_or_says_why_not(optimizer: Every) -> None:
    ours, plain = nn.Linear(6, 4), nn.Linear(6, 4)
    plain.load_state_dict(ours.state_dict())
    inside, ordinary = optimizer(list(ours.parameters())), optimizer(list(plain.parameters()))
    if not issubclass(optimizer.cls, ElementwiseOptimizer):
        with pytest.raises(TypeError, match="must be an elementwise optimizer"):
            ng.optim.step_in_backward(inside)
        return
    if any(
        method in vars(cls)
        for cls in before_the_base(optimizer.cls)
        for method in ("_begin_step", "_end_step")
    ):
        with pytest.raises(ValueError, match="depends on all parameters at once"):
            ng.optim.step_in_backward(inside, 0)
        return
    ng.optim.step_in_backward(inside, 0)
    for step in range(3):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
        ours(x).square().mean().backward()
        plain(x).square().mean().backward()
        ordinary.step()
        ordinary.zero_grad()
    assert_equal(list(ours.parameters()), list(plain.parameters()))
