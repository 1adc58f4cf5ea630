"""Optimizers with reductions in two gloo processes with sharded parameters, against whole ones.

The test process starts this file twice as a program.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import narrowgauge as ng

PROCESSES = 2
TIMEOUT = 60
# No size is even, so that shards differ; of the last the second process holds nothing.
SHAPES = [(5, 7), (7, 40), (9,), (3, 3, 2, 2), (41, 50), (1, 5)]
KINDS = ["rows", "none", "none", "rows", "whole", "none"]  # by what AdamP projects each

Make = Callable[[list[Any]], torch.optim.Optimizer]


def parameters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    result = []
    for p, kind in zip(parameters(), KINDS, strict=True):
        g = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        view = p.reshape((p.shape[0], -1) if kind == "rows" else (1, -1))
        along = (g.reshape(view.shape) * view).sum(1, keepdim=True) / view.square().sum(1, keepdim=True)
        result.append(g + p if kind == "none" else g - (along * view).reshape(p.shape))
    return result


def assert_shards_step_like_the_whole(name: str, make: Make, dim: int) -> None:
    mesh = init_device_mesh("cpu", (PROCESSES,))
    usable = [i for i, shape in enumerate(SHAPES) if dim < len(shape)]
    plain = [nn.Parameter(parameters()[i]) for i in usable]
    sharded = [nn.Parameter(distribute_tensor(parameters()[i], mesh, [Shard(dim)])) for i in usable]
    optimizers = make(plain), make(sharded)
    for step in range(1, 5):
        for p, q, i in zip(plain, sharded, usable, strict=True):
            p.grad = gradients(step)[i]
            q.grad = distribute_tensor(p.grad, mesh, [Shard(dim)])
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(plain, sharded, strict=True):
        message = f"{name}, shape {tuple(p.shape)}, dimension {dim}: {{}}".format
        torch.testing.assert_close(q.full_tensor(), p.detach(), rtol=1e-11, atol=1e-12, msg=message)


def adam_mini(params: list[Any]) -> torch.optim.Optimizer:
    names = ["mlp.weight", "final.weight", "final.bias", "attn.proj.weight", "embed.weight", "mlp.last"]
    return ng.optim.AdamMini(list(zip(names, params, strict=True)), lr=0.01, weight_decay=0.1)


def main(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(seconds=20),
    )
    makers: dict[str, Make] = {
        "AdamP": lambda params: ng.optim.AdamP(params, lr=0.01, weight_decay=0.1),
        "SGDP": lambda params: ng.optim.SGDP(params, lr=0.01, momentum=0.9, weight_decay=0.1),
        "LAMB": lambda params: ng.optim.LAMB(params, lr=0.01),
        "LARS": lambda params: ng.optim.LARS(params, lr=0.5, weight_decay=0.1),
        "StableAdamW": lambda params: ng.optim.StableAdamW(params, lr=0.01),
    }
    for name, make in makers.items():
        for dim in (0, 1):
            assert_shards_step_like_the_whole(name, make, dim)
    assert_shards_step_like_the_whole("AdamMini", adam_mini, 0)

    mesh = init_device_mesh("cpu", (PROCESSES,))
    sharded = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(1)]))
    with pytest.raises(ValueError, match="AdamMini: parameters may only be sharded in dimension 0"):
        ng.optim.AdamMini([("mlp.weight", sharded)])
    with pytest.raises(ValueError, match="Adafactor: a parameter is sharded"):
        ng.optim.Adafactor([sharded])
    dist.destroy_process_group()


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
