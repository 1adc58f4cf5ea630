"""Schedule-free optimizers: recorded runs, the three sequences of the paper, modes, checkpoints."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from tests import golden_files
from tests.optim.golden import replay
from torch import Tensor, nn

import narrowgauge as ng

SHAPES = [(7, 5), (3,), (), (0, 2), (2, 3, 4)]


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def train(
    params: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: int = 4, first: int = 0
) -> None:
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(100 + step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def of_meta(params: list[nn.Parameter], meta: dict[str, Any]) -> torch.optim.Optimizer:
    kind = ng.optim.ScheduleFreeSGD if "SGD" in meta["source"] else ng.optim.ScheduleFreeAdamW
    return kind(params, **meta["hyperparameters"])


def test_replays_the_authors_runs() -> None:
    names = replay(
        "extra_optim", "schedulefree_", of_meta, tolerances={torch.float64: 1e-10, torch.float32: 2e-6}
    )
    assert "schedulefree_adamw" in names


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_replays_the_authors_average(backend: str) -> None:
    for path in golden_files.files("extra_optim", "schedulefree_*.npz"):
        recorded, meta = golden_files.read(path)
        count, steps = len(meta["shapes"]), meta["steps"]
        dtype = getattr(torch, meta["dtype"])
        params = [nn.Parameter(recorded[f"param{i}_0"].to(dtype, copy=True)) for i in range(count)]
        tolerance = 1e-10 if dtype is torch.float64 else 2e-6
        with ng.backend(backend):
            optimizer = of_meta(params, meta)
            for step in range(1, steps + 1):
                for i, p in enumerate(params):
                    p.grad = recorded[f"grad{i}_step{step}"].to(dtype)
                optimizer.step()
            optimizer.eval()
            for i, p in enumerate(params):
                torch.testing.assert_close(
                    p.detach(),
                    recorded[f"param{i}_eval_step{steps}"].to(dtype),
                    rtol=tolerance,
                    atol=tolerance,
                )
            optimizer.train()
            for i, p in enumerate(params):
                torch.testing.assert_close(
                    p.detach(), recorded[f"param{i}_step{steps}"].to(dtype), rtol=tolerance, atol=tolerance
                )


class Sequences:
    """The paper's x, y and z of one tensor, each kept."""

    def __init__(self, p: Tensor, adam: bool, beta1: float, **options: float) -> None:
        self.x, self.z, self.v = p.clone(), p.clone(), torch.zeros_like(p)
        self.adam, self.beta1, self.options = adam, beta1, options
        self.step_number, self.weights, self.largest = 0, 0.0, 0.0

    def y(self) -> Tensor:
        return (1 - self.beta1) * self.z + self.beta1 * self.x

    def step(self, g: Tensor) -> None:
        options, self.step_number = self.options, self.step_number + 1
        rate = options["lr"] * min(1.0, self.step_number / options["warmup_steps"])
        self.largest = max(self.largest, rate)
        weight = self.step_number ** options["r"] * self.largest ** options["weight_lr_power"]
        self.weights += weight
        direction = g
        if self.adam:
            self.v = 0.99 * self.v + 0.01 * g * g
            direction = g / ((self.v / (1 - 0.99**self.step_number)).sqrt() + 1e-8)
        direction = direction + options["weight_decay"] * self.y()
        self.z = self.z - rate * direction
        self.x = self.x + weight / self.weights * (self.z - self.x)


@pytest.mark.parametrize("adam", [True, False])
def test_follows_the_papers_three_sequences(adam: bool) -> None:
    options = {"lr": 0.2, "warmup_steps": 3, "r": 0.5, "weight_lr_power": 1.5, "weight_decay": 0.1}
    params = parameters()
    truth = [Sequences(p.detach(), adam, 0.8, **options) for p in params]
    optimizer = (
        ng.optim.ScheduleFreeAdamW(params, betas=(0.8, 0.99), **options)
        if adam
        else ng.optim.ScheduleFreeSGD(params, momentum=0.8, **options)
    )
    for step in range(8):
        train(params, optimizer, 1, step)
        for p, sequences in zip(params, truth, strict=True):
            sequences.step(p.grad)
            torch.testing.assert_close(p.detach(), sequences.y(), rtol=1e-12, atol=1e-12)
    optimizer.eval()
    for p, sequences in zip(params, truth, strict=True):
        torch.testing.assert_close(p.detach(), sequences.x, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(optimizer.state[p]["z"], sequences.z, rtol=1e-12, atol=1e-12)


def test_modes() -> None:
    params = parameters()
    optimizer = ng.optim.ScheduleFreeAdamW(params, lr=0.1)
    train(params, optimizer)
    point = [p.detach().clone() for p in params]
    optimizer.train()  # already
    assert all(torch.equal(p, q) for p, q in zip(params, point, strict=True))
    optimizer.eval()
    average = [p.detach().clone() for p in params]
    assert not torch.equal(params[0], point[0])
    optimizer.eval()
    assert all(torch.equal(p, q) for p, q in zip(params, average, strict=True))
    states = {name: value.clone() for name, value in optimizer.state[params[0]].items()}
    with pytest.raises(RuntimeError, match=r"call train\(\) first"):
        train(params, optimizer)
    assert all(torch.equal(p, q) for p, q in zip(params, average, strict=True))
    assert all(torch.equal(optimizer.state[params[0]][name], value) for name, value in states.items())
    optimizer.train()
    for p, q in zip(params, point, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-14, atol=1e-14)


def test_a_mode_before_the_first_step_and_without_gradients() -> None:
    (p, other) = (nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3)))
    optimizer = ng.optim.ScheduleFreeSGD([p, other], lr=0.1)
    optimizer.eval()
    optimizer.train()
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer.eval()
    assert torch.equal(other, torch.ones(3))
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.9))  # the first average is the first iterate


@pytest.mark.parametrize("kind", ["ScheduleFreeAdamW", "ScheduleFreeSGD"])
def test_a_tensor_rate_is_a_number(kind: str) -> None:
    numbers, tensors = parameters(torch.float32), parameters(torch.float32)
    train(numbers, getattr(ng.optim, kind)(numbers, lr=0.125, warmup_steps=2))
    train(tensors, getattr(ng.optim, kind)(tensors, lr=torch.tensor(0.125), warmup_steps=2))
    assert all(torch.equal(p, q) for p, q in zip(numbers, tensors, strict=True))


def test_a_rate_of_zero_changes_nothing() -> None:
    params, before = parameters(), parameters()
    train(params, ng.optim.ScheduleFreeAdamW(params, lr=0.0))
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_a_skipped_step_leaves_the_averages_weights() -> None:
    params = parameters()
    optimizer = ng.optim.ScheduleFreeAdamW(params, warmup_steps=5)
    train(params, optimizer, 2)
    group = optimizer.param_groups[0]
    before = [group[name].clone() for name in ("k", "lr_max", "weight_sum")]
    kept = [p.detach().clone() for p in params]
    optimizer.found_inf = torch.ones(())
    train(params, optimizer, 1)
    assert [group[name] for name in ("k", "lr_max", "weight_sum")] == before
    assert all(torch.equal(p, q) for p, q in zip(params, kept, strict=True))
    optimizer.found_inf = torch.zeros(())
    train(params, optimizer, 1)
    assert group["k"] == 3


@pytest.mark.parametrize("kind", ["ScheduleFreeAdamW", "ScheduleFreeSGD"])
def test_resuming_continues_bit_for_bit(kind: str) -> None:
    params = parameters(torch.float32)
    optimizer = getattr(ng.optim, kind)(params, lr=0.1, warmup_steps=6)
    train(params, optimizer, 3)
    optimizer.eval()
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), [p.detach() for p in params]], file)
    file.seek(0)
    state, values = torch.load(file, weights_only=True)
    resumed = [nn.Parameter(value) for value in values]
    other = getattr(ng.optim, kind)(resumed)
    other.load_state_dict(state)
    with pytest.raises(RuntimeError, match="train"):
        other.step()
    for each in (optimizer, other):
        each.train()
    train(params, optimizer, 3, 3)
    train(resumed, other, 3, 3)
    assert all(torch.equal(p, q) for p, q in zip(params, resumed, strict=True))
    assert other.param_groups[0]["weight_sum"] == optimizer.param_groups[0]["weight_sum"]


def test_loads_the_authors_state() -> None:
    """Numbers of groups are Python's there, and states have no step."""
    params, mine = parameters(), parameters()
    optimizer = ng.optim.ScheduleFreeAdamW(params)
    train(params, optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        group.update({name: float(group[name]) for name in ("lr_max", "weight_sum")}, k=int(group["k"]))
    for entries in state["state"].values():
        del entries["step"]
    with torch.no_grad():
        for p, q in zip(mine, params, strict=True):
            p.copy_(q)
    other = ng.optim.ScheduleFreeAdamW(mine)
    other.load_state_dict(state)
    train(params, optimizer, 2, 4)
    train(mine, other, 2, 4)
    assert all(torch.equal(p, q) for p, q in zip(params, mine, strict=True))


@pytest.mark.parametrize("options", [{"param_update": "split"}, {"param_update": "kahan"}])
def test_narrow_parameters_come_back_from_the_average(options: dict[str, Any]) -> None:
    """The mode is changed with all the bits that the parameter keeps beside it."""
    params, wide = parameters(torch.bfloat16), parameters(torch.bfloat16)
    wide = [nn.Parameter(p.detach().float()) for p in wide]
    optimizer = ng.optim.ScheduleFreeAdamW(params, lr=1e-3, **options)
    plain = ng.optim.ScheduleFreeAdamW(wide, lr=1e-3)
    for step in range(20):
        train(params, optimizer, 1, step)
        for p, q in zip(params, wide, strict=True):
            q.grad = p.grad.float()
        plain.step()
        for each in (optimizer, plain):
            each.eval()
            each.train()
    for p, q in zip(params, wide, strict=True):
        torch.testing.assert_close(p.detach().float(), q.detach(), rtol=2.0**-7, atol=1e-3)


def test_layouts_and_complex_numbers() -> None:
    generator = torch.Generator().manual_seed(3)
    plain = nn.Parameter(torch.randn(4, 3, 5, 2, generator=generator))
    last = nn.Parameter(plain.detach().to(memory_format=torch.channels_last))
    gaps = nn.Parameter(torch.stack([plain.detach()] * 2, -1)[..., 0])
    turned = nn.Parameter(torch.view_as_complex(plain.detach().clone()))
    optimizers = [ng.optim.ScheduleFreeSGD([p], lr=0.1) for p in (plain, last, gaps, turned)]
    for _ in range(3):
        g = torch.randn(4, 3, 5, 2, generator=generator)
        for p in (plain, last, gaps):
            p.grad = g.clone()
        turned.grad = torch.view_as_complex(g.clone())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.eval()
            optimizer.train()
    for p in (last, gaps, torch.view_as_real(turned)):
        assert torch.equal(p, plain)


@pytest.mark.parametrize("kind", ["ScheduleFreeAdamW", "ScheduleFreeSGD"])
def test_gradients_are_not_touched(kind: str) -> None:
    params = parameters(torch.float32)
    optimizer = getattr(ng.optim, kind)(params, weight_decay=0.1)
    train(params, optimizer, 1)
    generator = torch.Generator().manual_seed(100)
    for p in params:
        assert torch.equal(p.grad, torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_gradients_that_are_not_finite_stay_where_they_are(value: float) -> None:
    p = nn.Parameter(torch.ones(300))
    optimizer = ng.optim.ScheduleFreeAdamW([p])
    p.grad = torch.ones(300)
    p.grad[7] = value
    optimizer.step()
    optimizer.step()
    assert (~p.isfinite()).nonzero().flatten().tolist() == [7]


def test_a_compiled_step_gives_the_bits_of_an_eager_one() -> None:
    eager, compiled = parameters(torch.float32), parameters(torch.float32)
    optimizers = [
        ng.optim.ScheduleFreeAdamW(params, lr=torch.tensor(0.1), warmup_steps=3)
        for params in (eager, compiled)
    ]
    step = torch.compile(optimizers[1].step, fullgraph=True, backend="aot_eager")
    for number in range(4):
        for params in (eager, compiled):
            generator = torch.Generator().manual_seed(number)
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
        optimizers[0].step()
        step()
    assert all(torch.equal(p, q) for p, q in zip(eager, compiled, strict=True))
    assert optimizers[1].param_groups[0]["k"] == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be"),
        ({"betas": (0.0, 0.9)}, r"betas\[0\] must be in \(0, 1\), got 0.0"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] must be"),
        ({"eps": -1e-8}, "eps must be"),
        ({"weight_decay": -1}, "weight_decay must be"),
        ({"warmup_steps": -1}, "warmup_steps must be"),
        ({"r": -0.5}, "r must be"),
        ({"weight_lr_power": -1}, "weight_lr_power must be"),
        ({"state_dtype": "int8"}, "'fp32' or 'bf16', got 'int8'"),
    ],
)
def test_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ng.optim.ScheduleFreeAdamW(parameters(), **options)


def test_sgd_refuses_a_momentum_of_zero() -> None:
    with pytest.raises(ValueError, match=r"momentum must be in \(0, 1\), got 0.0"):
        ng.optim.ScheduleFreeSGD(parameters(), momentum=0.0)
