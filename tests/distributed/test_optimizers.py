"""Every optimizer with parameters sharded over two gloo processes, against one process."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tests.distributed.processes import PROCESSES, Processes, processes_of, serve
from tests.optim.every import EVERY, Every, assert_near
from tests.tolerances import assert_same_bits
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import narrowgauge as ng

SHAPES = [(31, 17), (3, 300), (7, 2), (1, 5), (2, 3, 5)]  # of (1, 5) the second process holds nothing
WITH_VECTORS = [*SHAPES, (5,), (1,)]
INT8 = {"state_dtype": "int8", "min_quantized_size": 0}
# Classes that say why they do not take sharded parameters.
WHOLE_ONLY = {"Adafactor", "GaLoreAdamW rank", "GradNormLoRP", "GradNormLoRP rank", "NormalizedSGD row"}

CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def check_every(function: Callable[[Every], None]) -> Callable[[Every], None]:
    for name, optimizer in EVERY.items():
        if name not in WHOLE_ONLY:
            CHECKS[f"{function.__name__}: {name}"] = partial(function, optimizer)
    return function


def draw(seed: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in WITH_VECTORS]


def sharded(value: Tensor, dim: int = 0) -> DTensor:
    return distribute_tensor(value, init_device_mesh("cpu", (PROCESSES,)), [Shard(dim)])


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def stepped(
    optimizer: Every,
    place: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    clip: bool = False,
    **options: Any,
) -> tuple[Any, list[nn.Parameter]]:
    """Three steps with gradients that are the same however parameters are placed."""
    params = [nn.Parameter(place(value)) for value in draw(0, dtype)]
    ours = optimizer(params, **options)
    for step in range(3):
        for p, g in zip(params, draw(1 + step, dtype), strict=True):
            p.grad = place(g)
        ours.step(**({"max_grad_norm": 0.5} if clip else {}))
    return ours, params


@check_every
def shards_step_like_the_whole(optimizer: Every) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        _, ours = stepped(optimizer, sharded, dtype)
        _, alone = stepped(optimizer, lambda value: value, dtype)
        if optimizer.has_sums():
            assert_near([whole(p) for p in ours], alone, 1e-5 if dtype is torch.float32 else 2**-7)
        else:
            for p, q in zip(ours, alone, strict=True):
                assert_same_bits(whole(p), q.detach(), f"shape {tuple(q.shape)}")


@check_every
def clips_by_the_norm_of_all_shards(optimizer: Every) -> None:
    if not optimizer.steps_with("max_grad_norm"):
        return
    one, ours = stepped(optimizer, sharded, torch.float32, clip=True)
    other, alone = stepped(optimizer, lambda value: value, torch.float32, clip=True)
    torch.testing.assert_close(one.last_grad_norm, other.last_grad_norm, rtol=1e-6, atol=0)
    assert_near([whole(p) for p in ours], alone, 1e-5)


@check
def what_needs_whole_parameters_says_so() -> None:
    for name in WHOLE_ONLY:
        if name in EVERY:
            with pytest.raises(ValueError, match=r"(is|not) sharded"):
                stepped(EVERY[name], sharded, torch.float32)


@check
def random_rounding_of_shards_draws_the_bits_of_the_whole() -> None:
    options = {"param_update": "stochastic", "seed": 5, "state_dtype": "bf16"}
    _, ours = stepped(EVERY["AdamW"], sharded, torch.bfloat16, **options)
    _, alone = stepped(EVERY["AdamW"], lambda value: value, torch.bfloat16, **options)
    for p, q in zip(ours, alone, strict=True):
        assert_same_bits(whole(p), q.detach())


@check
def the_average_is_sharded_like_the_parameter() -> None:
    options = {"ema_decay": 0.75, "param_update": "kahan"}
    one, ours = stepped(EVERY["AdamW"], sharded, torch.bfloat16, **options)
    other, alone = stepped(EVERY["AdamW"], lambda value: value, torch.bfloat16, **options)
    for p, q in zip(ours, alone, strict=True):
        for name in ("ema", "param_comp"):
            assert one.state[p][name].placements == p.placements
            assert_same_bits(whole(one.state[p][name]), other.state[q][name])
    before = [whole(p).clone() for p in ours]
    with one.swap_ema():
        for p in ours:
            assert_same_bits(whole(p), whole(one.state[p]["ema"]).bfloat16())
    for p, old in zip(ours, before, strict=True):
        assert_same_bits(whole(p), old)


@check
def the_whole_parameter_decides_about_8_bits() -> None:
    large, small = (nn.Parameter(sharded(torch.randn(rows, 16))) for rows in (256, 255))
    ours = ng.optim.AdamW([large, small], state_dtype="int8")
    for p in (large, small):
        p.grad = sharded(torch.randn(p.shape))
    ours.step()
    assert large.to_local().numel() < 4096
    assert "exp_avg.codes" in ours.state[large]
    assert "exp_avg" in ours.state[small]


class Model(nn.Module):
    """No size is even; of `last` the second process holds nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(17, 31), nn.Linear(31, 17)
        self.last = nn.Linear(17, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).tanh()).tanh())


def fsdp(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for module in model.children():
        fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def halves(steps: int, first: int = 0) -> Iterator[Tensor]:
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        yield torch.randn(8, 17, generator=generator).chunk(PROCESSES)


def train(model: nn.Module, optimizer: Any, steps: int, first: int = 0, **arguments: Any) -> None:
    """This process's half of each batch; of a model that is not sharded, both halves."""
    parallel = any(isinstance(p, DTensor) for p in model.parameters())
    for batch in halves(steps, first):
        for half in [batch[dist.get_rank()]] if parallel else batch:
            loss = (model(half.to(next(model.parameters()).dtype)) + 1).square().mean()
            (loss if parallel else loss / PROCESSES).backward()
        optimizer.step(**arguments)
        optimizer.zero_grad()


@check
def fully_sharded_models_train_with_sums_and_clipping() -> None:
    """eps, because gradients near zero must not decide signs."""
    for options in ({}, {"cautious": True}):
        models = [fsdp(Model()), Model()]
        norms = []
        for model in models:
            optimizer = ng.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4, **options)
            train(model, optimizer, 4, max_grad_norm=0.1)
            norms.append(optimizer.last_grad_norm)
        torch.testing.assert_close(norms[0], norms[1], rtol=1e-4, atol=0)
        assert norms[0] > 0.1
        assert_near([whole(p) for p in models[0].parameters()], list(models[1].parameters()), 1e-4)


@check
def fully_sharded_models_step_in_backward() -> None:
    models = [fsdp(Model()), fsdp(Model())]
    optimizers = [ng.optim.AdamW(model.parameters(), lr=1e-2, **INT8) for model in models]
    ng.optim.step_in_backward(optimizers[0], 1000)
    for half in halves(3):
        for model in models:
            model(half[dist.get_rank()]).square().mean().backward()
        assert all(p.grad is None for p in models[0].parameters())
        optimizers[1].step()
        optimizers[1].zero_grad()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert_same_bits(p.to_local().detach(), q.to_local().detach())
    assert optimizers[0].state[models[0].first.weight]["step"].item() == 3


@check
def data_parallel_gradients_arrive_too_early() -> None:
    model = DistributedDataParallel(Model())
    with pytest.raises(ValueError, match="not averaged yet when they arrive"):
        ng.optim.step_in_backward(ng.optim.AdamW(model.parameters()))


@check
def sharded_optimizers_of_torch_are_continued() -> None:
    model = fsdp(Model())
    source = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, source, 2)
    coded = ng.optim.from_torch(source, **INT8)
    decoded = coded.dequantized_state_dict()["state"][0]["exp_avg"]
    exact = source.state[model.first.weight]["exp_avg"].to_local()
    assert 0 < (decoded - exact).norm() < 0.02 * exact.norm()
    before = [whole(p).clone() for p in model.parameters()]
    ours = ng.optim.from_torch(source)
    train(model, ours, 2, first=2)
    got = [whole(p).clone() for p in model.parameters()]
    with torch.no_grad():
        for p, old in zip(model.parameters(), before, strict=True):
            p.copy_(sharded(old))
    train(model, source, 2, first=2)
    assert_near(got, [whole(p) for p in model.parameters()], 1e-5)


def assert_distributed_checkpoint_resumes(optimizer: Every, **options: Any) -> None:
    """Two steps, save, two steps; against load into a fresh model, the same two steps: the same bits."""
    folder = f"{sys.argv[2]}/{optimizer.name.replace(' ', '_')}{len(options)}"
    model = fsdp(Model())
    ours = optimizer(list(model.parameters()), **options)
    train(model, ours, 2)
    weights, states = get_state_dict(model, ours)
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=folder)
    train(model, ours, 2, first=2)

    fresh = Model()
    with torch.no_grad():
        for p in fresh.parameters():
            p.zero_()
    fresh = fsdp(fresh)
    resumed = optimizer(list(fresh.parameters()), **options)
    weights, states = get_state_dict(fresh, resumed)
    dcp.load({"model": weights, "optimizer": states}, checkpoint_id=folder)
    set_state_dict(fresh, resumed, model_state_dict=weights, optim_state_dict=states)
    train(fresh, resumed, 2, first=2)
    for (name, p), q in zip(fresh.named_parameters(), model.parameters(), strict=True):
        assert_same_bits(p.to_local().detach(), q.to_local().detach(), name)


@check_every
def distributed_checkpoints_resume(optimizer: Every) -> None:
    assert_distributed_checkpoint_resumes(optimizer)


@check
def codes_of_shards_are_decoded() -> None:
    for state_dtype, share in (("int8", 0.05), ("int4", 0.4), ("fp8", 0.1), ("int8_companded", 0.05)):
        options = {"state_dtype": state_dtype, "min_quantized_size": 0}
        ours, params = stepped(EVERY["AdamW"], sharded, torch.float32, **options)
        exact, _ = stepped(EVERY["AdamW"], sharded, torch.float32)
        for i, state in enumerate(ours.dequantized_state_dict()["state"].values()):
            expected = exact.state[exact.param_groups[0]["params"][i]]["exp_avg"].to_local()
            assert state["exp_avg"].shape == params[i].to_local().shape
            assert (state["exp_avg"] - expected).norm() <= share * expected.norm()


@check
def distributed_checkpoints_of_codes_resume() -> None:
    for state_dtype in ("int4", "fp8_expanded", "int8_companded"):
        options = {"state_dtype": state_dtype, "min_quantized_size": 0, "ema_decay": 0.9}
        assert_distributed_checkpoint_resumes(copy.copy(EVERY["AdamW"]), **options)


processes = processes_of(__file__)


@pytest.mark.distributed
@pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")
@pytest.mark.parametrize("name", CHECKS)
def test_in_two_processes(name: str, processes: Processes) -> None:
    processes.run(name)


if __name__ == "__main__":
    serve(CHECKS)
