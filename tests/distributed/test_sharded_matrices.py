"""Muon, Shampoo and SOAP in two gloo processes with sharded parameters, against whole ones.

The test process starts this file twice as a program.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import narrowgauge as ng
from narrowgauge.optim import matrix

PROCESSES = 2
TIMEOUT = 60
PARAMETER_LIKE = ("momentum_buffer", "exp_avg", "exp_avg_sq")
EXACT = {"ns_dtype": torch.float64}
# No size is even, so that shards differ; of the fourth the second process holds nothing.
SHAPES = [(5, 7), (7, 5), (5, 7), (1, 5), (3, 5, 7), (5, 3, 3, 1)]

Make = Callable[[list[Any]], torch.optim.Optimizer]


def tensors(seed: int, shapes: list[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def assert_shards_step_like_the_whole(
    make: Make, dim: int, shapes: list[tuple[int, ...]], tolerance: float
) -> None:
    mesh = init_device_mesh("cpu", (PROCESSES,))
    plain = [nn.Parameter(x) for x in tensors(0, shapes)]
    sharded = [nn.Parameter(distribute_tensor(x, mesh, [Shard(dim)])) for x in tensors(0, shapes)]
    optimizers = make(plain), make(sharded)
    for step in range(1, 5):
        for p, q, g in zip(plain, sharded, tensors(step, shapes), strict=True):
            p.grad, q.grad = g, distribute_tensor(g, mesh, [Shard(dim)])
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(plain, sharded, strict=True):
        message = f"shape {tuple(p.shape)}, dimension {dim}: {{}}".format
        torch.testing.assert_close(q.full_tensor(), p.detach(), rtol=tolerance, atol=tolerance, msg=message)
        for name in optimizers[0].state[p]:
            other = optimizers[1].state[q][name]
            assert isinstance(other, DTensor) == (name in PARAMETER_LIKE), name


def shards_step_like_the_whole() -> None:
    for dim in (0, 1):
        assert_shards_step_like_the_whole(
            lambda params: ng.optim.Muon(params, lr=0.1, **EXACT), dim, SHAPES, 1e-12
        )
        assert_shards_step_like_the_whole(
            lambda params: ng.optim.Shampoo(params, lr=0.1, momentum=0.5, weight_decay=0.1), dim, SHAPES, 1e-7
        )
        square = [(5, 5), (3, 3, 5), (7,)][: 3 - dim]  # whose Gram matrices have full rank
        assert_shards_step_like_the_whole(
            lambda params: ng.optim.SOAP(params, lr=0.1, precondition_frequency=2), dim, square, 1e-8
        )


def whole_experts_are_not_gathered() -> None:
    gathered = []
    whole = matrix.whole
    ng.optim.muon.whole = lambda stacked, p: gathered.append(tuple(p.shape)) or whole(stacked, p)
    try:
        assert_shards_step_like_the_whole(
            lambda params: ng.optim.Muon(params, **EXACT), 0, [(3, 5, 7), (5, 7)], 1e-12
        )
    finally:
        ng.optim.muon.whole = whole
    assert set(gathered) == {(5, 7)}, gathered


def replicas_stay_equal() -> None:
    mesh = init_device_mesh("cpu", (PROCESSES,))
    (x,) = tensors(0, [(5, 7)])
    p, q = nn.Parameter(x.clone()), nn.Parameter(distribute_tensor(x, mesh, [Replicate()]))
    for parameter in (p, q):
        parameter.grad = parameter.detach().clone()
        ng.optim.Muon([parameter], **EXACT).step()
    assert torch.equal(p, q.to_local())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 7)
        self.up, self.norm, self.down = nn.Linear(7, 11), nn.LayerNorm(11), nn.Linear(11, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(self.norm(self.up(self.embedding(x)))).tanh())


def sharded_net() -> nn.Module:
    torch.manual_seed(0)
    return fully_shard(Net().double(), mesh=init_device_mesh("cpu", (PROCESSES,)))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return ng.optim.Muon(ng.optim.muon_groups(model, adamw={"lr": 0.01, "eps": 1e-4}), lr=0.05, **EXACT)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Tensor]) -> None:
    for x in batches:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def batches(first: int) -> list[Tensor]:
    return [torch.arange(8) * (first + k) % 9 for k in range(2)]


def fsdp_trains_like_one_process_and_resumes() -> None:
    model = sharded_net()
    optimizer = optimizer_of(model)
    train(model, optimizer, [x.chunk(PROCESSES)[dist.get_rank()] for x in batches(1)])
    torch.manual_seed(0)
    alone = Net().double()
    train(alone, optimizer_of(alone), batches(1))
    for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(
            p.full_tensor(), q.detach(), rtol=1e-9, atol=1e-9, msg=f"{name}: {{}}".format
        )

    weights, states = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=f"{sys.argv[2]}/checkpoint")
    train(model, optimizer, batches(3))
    fresh = sharded_net()
    fresh_optimizer = optimizer_of(fresh)
    weights, states = get_state_dict(fresh, fresh_optimizer)
    dcp.load({"model": weights, "optimizer": states}, checkpoint_id=f"{sys.argv[2]}/checkpoint")
    set_state_dict(fresh, fresh_optimizer, model_state_dict=weights, optim_state_dict=states)
    train(fresh, fresh_optimizer, batches(3))
    for (name, p), q in zip(fresh.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(p.to_local(), q.to_local()), name


def main(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(seconds=20),
    )
    shards_step_like_the_whole()
    whole_experts_are_not_gathered()
    replicas_stay_equal()
    fsdp_trains_like_one_process_and_resumes()
    dist.destroy_process_group()


def test_placements_move_with_their_dimension() -> None:
    """FSDP2 over tensor parallelism places parameters as strided shards."""
    from torch.distributed.tensor.placement_types import _StridedShard

    placements = [_StridedShard(0, split_factor=2), Shard(0), Replicate(), Shard(1)]
    moved = matrix._stacked_placements(SimpleNamespace(placements=placements))
    assert moved == [_StridedShard(1, split_factor=2), Shard(1), Replicate(), Shard(2)]


@pytest.mark.distributed
@pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")
def test_two_processes_with_shards(tmp_path: Path) -> None:
    running = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        )
        for rank in range(PROCESSES)
    ]
    try:
        errors = [process.communicate(timeout=TIMEOUT)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    for rank, (process, error) in enumerate(zip(running, errors, strict=True)):
        assert process.returncode == 0, f"process {rank}:\n{error}"


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
