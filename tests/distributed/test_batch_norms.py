"""PowerNorm and UnifiedNorm with a process group: two gloo processes with a part of the batch each, against one.

The test process starts this file twice as a program; each of the two compares its part with the whole batch.
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

from narrowgauge.nn import PowerNorm, UnifiedNorm

PROCESSES = 2
TIMEOUT = 60
MAKERS: list[Callable[..., PowerNorm | UnifiedNorm]] = [
    lambda **options: PowerNorm(6, num_groups=2, warmup_iters=2, batch_first=True, **options),
    lambda **options: PowerNorm(
        6, num_groups=3, warmup_iters=0, batch_first=True, exclude_pad_grad=True, **options
    ),
    lambda **options: UnifiedNorm(6, (3, 2), 2, outlier_filtration=True, **options),
]
CUTS = (4, 1, 7, 0)  # where the batch of each step is cut; at 0 the first process has none of it


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def compare(make: Callable[..., PowerNorm | UnifiedNorm], masked: bool) -> None:
    """Every step's results and state: those of one process with the whole batch."""
    alone = make(dtype=torch.float64)
    shared = make(dtype=torch.float64, process_group=dist.group.WORLD)
    calls = 0
    all_reduce = dist.all_reduce

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return all_reduce(*args, **options)

    for step, cut in enumerate(CUTS):
        mine = slice(0, cut) if dist.get_rank() == 0 else slice(cut, None)
        x, dy = random(7, 5, 6, seed=step), random(7, 5, 6, seed=10 + step)
        pad = random(7, 5, seed=20 + step) > 0.3 if masked else None
        whole, part = x.clone().requires_grad_(), x[mine].clone().requires_grad_()
        alone.zero_grad()
        shared.zero_grad()
        y = alone(whole, pad)
        y.backward(dy)
        dist.all_reduce = counted
        try:
            own = shared(part, None if pad is None else pad[mine])
            assert calls == 2 * step + 1, "one all-reduce in the forward"
            own.backward(dy[mine])
            assert calls == 2 * step + 2, "one all-reduce in the backward"
        finally:
            dist.all_reduce = all_reduce
        gradients = torch.cat([shared.weight.grad, shared.bias.grad])
        dist.all_reduce(gradients)  # as DistributedDataParallel does, but for the mean
        for name, ours, theirs in (
            ("y", own, y[mine]),
            ("dx", part.grad, whole.grad[mine]),
            ("gradients", gradients, torch.cat([alone.weight.grad, alone.bias.grad])),
            *((name, buffer, alone.get_buffer(name)) for name, buffer in shared.named_buffers()),
        ):
            message = f"step {step}, {name}: {{}}".format
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, msg=message)


def nothing_but_padding_anywhere(make: Callable[..., PowerNorm | UnifiedNorm]) -> None:
    norm = make(dtype=torch.float64, process_group=dist.group.WORLD)
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    norm(random(2, 5, 6, seed=0), torch.ones(2, 5, dtype=torch.bool)).sum().backward()
    for name, buffer in norm.named_buffers():
        assert torch.equal(buffer, before[name]), name


def main(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(seconds=20),
    )
    for make in MAKERS:
        compare(make, masked=False)
        compare(make, masked=True)
        nothing_but_padding_anywhere(make)
    dist.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")
def test_two_processes_share_their_statistics(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    running = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path)],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
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
