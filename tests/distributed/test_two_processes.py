"""Swapped models and the optimizer in two gloo processes, against the same training in one."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tests.distributed.processes import PROCESSES, Processes, processes_of, serve
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import narrowgauge as ng

OPTIONS = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-4}  # eps: gradients near zero must not decide signs
INT8 = {"state_dtype": "int8", "min_quantized_size": 0}

CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


class Block(nn.Module):
    """No size is even, so that shards differ; some also in their number of blocks of 8-bit states."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(17)
        self.up = nn.Linear(17, 31)
        self.inner = nn.RMSNorm(31)
        self.down = nn.Linear(31, 17)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.inner(self.up(self.norm(x)).tanh()))


def swapped_model(linear: str | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), nn.LayerNorm(17), nn.Linear(17, 1))
    assert len(ng.swap(model, linear=linear).replaced) == (5 if linear is None else 10)
    return model


def batches(steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        yield torch.randn(8, 17, generator=generator), torch.randn(8, 1, generator=generator)


def my_half(tensor: Tensor) -> Tensor:
    return tensor.chunk(PROCESSES)[dist.get_rank()]


def train_in_parallel(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    for x, y in batches(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(my_half(x)), my_half(y)).backward()
        optimizer.step()


def train_alone(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    """Both halves of each batch, one after the other: quantized gradients depend on how a batch is cut."""
    for x, y in batches(steps):
        optimizer.zero_grad()
        for half_x, half_y in zip(x.chunk(PROCESSES), y.chunk(PROCESSES), strict=True):
            (nn.functional.mse_loss(model(half_x), half_y) / PROCESSES).backward()
        optimizer.step()


def adamw(model: nn.Module, **options: object) -> torch.optim.Optimizer:
    return ng.optim.AdamW(model.parameters(), **{**OPTIONS, **options})


def shard(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for module in model:
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def assert_same_parameters(got: nn.Module, expected: nn.Module, tolerance: float) -> None:
    for (name, ours), theirs in zip(got.named_parameters(), expected.parameters(), strict=True):
        message = f"{name}: {{}}".format
        torch.testing.assert_close(whole(ours), whole(theirs), rtol=tolerance, atol=tolerance, msg=message)


def trained(parallel: bool, wrap: Callable[[nn.Module], nn.Module], linear: str | None, **options: object):
    model = swapped_model(linear)
    if parallel:
        wrapped = wrap(model)
        train_in_parallel(wrapped, adamw(model, **options))
    else:
        train_alone(model, adamw(model, **options))
    return model


@check
def ddp_trains_like_one_process() -> None:
    for options in ({}, INT8):
        got = trained(True, DistributedDataParallel, None, **options)
        assert_same_parameters(got, trained(False, DistributedDataParallel, None, **options), 1e-5)


@check
def ddp_trains_quantized_linears_like_one_process() -> None:
    for linear in ("int8-row", "fp8-row"):
        got = trained(True, DistributedDataParallel, linear)
        assert_same_parameters(got, trained(False, DistributedDataParallel, linear), 1e-4)


@check
def fsdp_trains_like_one_process() -> None:
    assert_same_parameters(trained(True, shard, None), trained(False, shard, None), 1e-5)


@check
def fsdp_trains_quantized_linears_like_one_process() -> None:
    for linear in ("int8-row", "fp8-row"):
        assert_same_parameters(trained(True, shard, linear), trained(False, shard, linear), 1e-4)


@check
def fsdp_trains_with_8_bit_states() -> None:
    """Blocks of the states do not cross shards, so they are not those of one process: near, not equal."""
    got, exact = trained(True, shard, None, **INT8), trained(False, shard, None)
    assert_same_parameters(got, exact, 1e-2)


@check
def fsdp_trains_with_8_bit_states_and_stochastic_rounding() -> None:
    model = shard(swapped_model().bfloat16())
    optimizer = adamw(model, param_update="stochastic", **INT8)
    losses = []
    for x, y in list(batches(1)) * 30:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(my_half(x).bfloat16()).float(), my_half(y))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses


SHAPES = [(31, 17), (3, 300), (1, 5), (7,), (2, 3, 5)]  # of (1, 5) the second process holds nothing


def parameters_and_gradients(dtype: torch.dtype, steps: int) -> tuple[list[Tensor], list[list[Tensor]]]:
    generator = torch.Generator().manual_seed(1)

    def draw() -> list[Tensor]:
        return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]

    return draw(), [draw() for _ in range(steps)]


def step_all(parameters: list[Tensor], gradients: list[list[Tensor]], **options: object) -> None:
    optimizer = ng.optim.AdamW(parameters, **{**OPTIONS, **options})
    for gradient in gradients:
        for p, g in zip(parameters, gradient, strict=True):
            p.grad = g
        optimizer.step()


def step_shards(placement: Shard, dtype: torch.dtype, **options: object) -> list[nn.Parameter]:
    mesh = init_device_mesh("cpu", (PROCESSES,))
    values, gradients = parameters_and_gradients(dtype, 3)
    sharded = [nn.Parameter(distribute_tensor(value, mesh, [placement])) for value in values]
    sharded_gradients = [
        [distribute_tensor(g, mesh, [placement]) for g in gradient] for gradient in gradients
    ]
    step_all(sharded, sharded_gradients, **options)
    return sharded


def assert_shards_step_like_the_whole(dtype: torch.dtype, **options: object) -> None:
    sharded = step_shards(Shard(0), dtype, **options)
    values, gradients = parameters_and_gradients(dtype, 3)
    plain = [nn.Parameter(value) for value in values]
    step_all(plain, gradients, **options)
    for ours, theirs in zip(sharded, plain, strict=True):
        assert torch.equal(whole(ours), theirs.detach()), f"shape {tuple(theirs.shape)}"


@check
def optimizer_gives_shards_the_bits_of_the_whole() -> None:
    assert_shards_step_like_the_whole(torch.float32)
    assert_shards_step_like_the_whole(torch.bfloat16)


@check
def optimizer_rounds_shards_with_the_random_bits_of_the_whole() -> None:
    assert_shards_step_like_the_whole(torch.bfloat16, param_update="stochastic", seed=5)


@check
def optimizer_keeps_8_bit_states_shard_by_shard() -> None:
    """What one process computes that has the local shards as ordinary parameters."""
    for dim in (0, -1):
        sharded = step_shards(Shard(dim), torch.float32, **INT8)
        values, gradients = parameters_and_gradients(torch.float32, 3)

        def local(whole: Tensor, shard: DTensor) -> Tensor:
            return distribute_tensor(whole, shard.device_mesh, shard.placements).to_local().clone()

        plain = [nn.Parameter(local(*pair)) for pair in zip(values, sharded, strict=True)]
        mine = [[local(*pair) for pair in zip(gradient, sharded, strict=True)] for gradient in gradients]
        step_all(plain, mine, **INT8)
        for ours, theirs in zip(sharded, plain, strict=True):
            assert torch.equal(ours.to_local(), theirs), f"shape {tuple(ours.shape)}, dimension {dim}"


REDUCING: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "norms": lambda params: ng.optim.AdamW(params, project_norm=True, **OPTIONS),
    "norms of rows": lambda params: ng.optim.AdamW(params, project_norm="row", **OPTIONS),
    "Prodigy": lambda params: ng.optim.Prodigy(params, d0=1e-2, eps=1e-4),
    "schedule-free": lambda params: ng.optim.ScheduleFreeAdamW(params, lr=1e-2, eps=1e-4),
    "SAM": lambda params: ng.optim.SAM(ng.optim.AdamW(params, **OPTIONS), rho=0.5, adaptive=True),
}


@check
def optimizers_add_sums_over_shards() -> None:
    """As one process does with whole tensors; also when the optimizer is saved and loaded between steps."""
    mesh = init_device_mesh("cpu", (PROCESSES,))
    values, gradients = parameters_and_gradients(torch.float32, 4)

    def run(
        make: Callable[[list[Tensor]], torch.optim.Optimizer], place: Callable[[Tensor], Tensor]
    ) -> list[Tensor]:
        params = [nn.Parameter(place(value)) for value in values]
        optimizer = make(params)
        for number, gradient in enumerate(gradients):
            for p, g in zip(params, gradient, strict=True):
                p.grad = place(g)
            if isinstance(optimizer, ng.optim.SAM) and number % 2 == 0:
                optimizer.first_step()
                continue
            optimizer.step()
            if number == 1:
                state = optimizer.state_dict()
                optimizer = make(params)
                optimizer.load_state_dict(state)
        if isinstance(optimizer, ng.optim.ScheduleFreeAdamW):
            optimizer.eval()
        return [p.detach() for p in params]

    for name, make in REDUCING.items():
        plain = run(make, Tensor.clone)
        sharded = run(make, lambda x: distribute_tensor(x.clone(), mesh, [Shard(0)]))
        for ours, theirs in zip(sharded, plain, strict=True):
            assert torch.allclose(whole(ours), theirs, rtol=1e-5, atol=1e-6), (name, tuple(theirs.shape))


def assert_checkpoint_resumes(dtype: torch.dtype, **options: object) -> None:
    """Two steps, save, two steps; against load into a fresh model, the same two steps: the same bits."""

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for x, y in batches(2):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(my_half(x).to(dtype)), my_half(y).to(dtype)).backward()
            optimizer.step()

    folder = f"{sys.argv[2]}/{dtype}"
    model = shard(swapped_model().to(dtype))
    optimizer = adamw(model, **options)
    steps(model, optimizer)
    weights, states = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=folder)
    steps(model, optimizer)

    fresh = swapped_model().to(dtype)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    fresh = shard(fresh)
    fresh_optimizer = adamw(fresh, **options)
    weights, states = get_state_dict(fresh, fresh_optimizer)
    dcp.load({"model": weights, "optimizer": states}, checkpoint_id=folder)
    set_state_dict(fresh, fresh_optimizer, model_state_dict=weights, optim_state_dict=states)
    steps(fresh, fresh_optimizer)

    for (name, ours), theirs in zip(fresh.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours.to_local(), theirs.to_local()), name


@check
def distributed_checkpoint_resumes_with_the_same_bits() -> None:
    assert_checkpoint_resumes(torch.float32)


@check
def distributed_checkpoint_of_8_bit_states_resumes_with_the_same_bits() -> None:
    assert_checkpoint_resumes(torch.bfloat16, param_update="stochastic", **INT8)


@check
def swap_and_unswap_leave_sharded_modules() -> None:
    model = shard(nn.Sequential(nn.LayerNorm(17), nn.Linear(17, 3)))
    report = ng.swap(model)
    assert not report.replaced
    assert "before fully_shard" in report.left[0].note, report
    model = shard(swapped_model())
    assert not ng.unswap(model).replaced


@check
def swapping_inside_ddp_takes_effect() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), nn.Linear(17, 1))
    ddp = DistributedDataParallel(copy.deepcopy(model))
    assert len(ng.swap(ddp).replaced) == 2
    train_in_parallel(ddp, adamw(ddp))
    ng.swap(model)
    train_alone(model, adamw(model))
    assert_same_parameters(ddp.module, model, 1e-5)


processes = processes_of(__file__)


@pytest.mark.distributed
@pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")
@pytest.mark.parametrize("name", CHECKS)
def test_in_two_processes(name: str, processes: Processes) -> None:
    processes.run(name)


if __name__ == "__main__":
    serve(CHECKS)
