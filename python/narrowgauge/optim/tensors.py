"""What optimizers ask of tensors: whether they are sharded, how they lie in memory, where a shard begins."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor


def dtensor_class() -> Any:
    """The DTensor class, when this process has imported it."""
    module = sys.modules.get("torch.distributed.tensor")
    return getattr(module, "DTensor", None)


def is_dtensor(x: Any) -> bool:
    if type(x) is Tensor or type(x) is torch.nn.Parameter:
        return False
    dtensor = dtensor_class()
    return dtensor is not None and isinstance(x, dtensor)


def local(x: Any) -> Tensor:
    """This process's shard, as real numbers."""
    if is_dtensor(x):
        x = x.to_local()
    return torch.view_as_real(x) if x.is_complex() else x


def is_dense(x: Tensor) -> bool:
    covered = 1
    for size, stride in sorted(zip(x.shape, x.stride(), strict=True), key=lambda pair: pair[1]):
        if size > 1:
            if stride != covered:
                return False
            covered *= size
    return True


def like(x: Tensor, model: Tensor) -> Tensor:
    """`x` itself when it is stored element for element like `model`, else such a copy."""
    if x.stride() == model.stride():
        return x
    return torch.empty_like(model, dtype=x.dtype).copy_(x)


def first_element(p: Any) -> int:
    """Where this process's shard begins in the whole parameter."""
    if not is_dtensor(p):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if any(not (placement.is_replicate() or placement.is_shard(0)) for placement in p.placements):
        raise ValueError(
            "param_update='stochastic' needs parameters that are replicated or sharded in dimension 0, "
            f"got {p.placements}"
        )
    _, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    return offset[0] * math.prod(p.shape[1:]) if offset else 0


def new_sharded(p: Any, per_shard: Any, dtype: torch.dtype) -> Tensor:
    """Zeros beside a sharded parameter that are not shaped like it; ``per_shard(numel)`` says their shape.

    Every process holds as many as the largest shard needs, because shards of a DTensor that is made of local tensors
    must have one size: checkpoints are cut by it.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    sizes = list(p.shape)
    placements: list[Any] = []
    for placement, parts in zip(p.placements, p.device_mesh.shape, strict=True):
        dim = getattr(placement, "dim", None)
        placements.append(Replicate() if dim is None else Shard(0))
        if dim is not None:
            sizes[dim] = -(-sizes[dim] // parts)
    zeros = torch.zeros(per_shard(math.prod(sizes)), dtype=dtype, device=p.device)
    return DTensor.from_local(zeros, p.device_mesh, placements, run_check=False)


def sharding(p: Any) -> tuple[Any, ...] | None:
    """What two parameters have in common whose sums can be added over processes together."""
    return (p.device_mesh, p.placements) if is_dtensor(p) else None


def sum_over_shards(value: Tensor, p: Any, inside_rows: bool | None = None) -> Tensor:
    """Adds what every process computed of its shard of `p`; only over shards that cut rows (the first dimension), or
    only over those that keep them whole, when `inside_rows` is given."""
    if is_dtensor(p):
        import torch.distributed as dist

        for dim, placement in enumerate(p.placements):
            if placement.is_shard() and inside_rows in (None, placement.dim != 0):
                dist.all_reduce(value, group=p.device_mesh.get_group(dim))
    return value


def group_number(group: dict[str, Any], name: str, device: torch.device) -> Tensor:
    """A number that a group keeps between steps, as float64 on the device; replaced by a tensor where it is none.

    Of shape (1,): torch.compile loses what is written to a float64 tensor without dimensions on the CPU.
    """
    value = group[name]
    if not isinstance(value, Tensor):
        group[name] = value = torch.full((1,), value, dtype=torch.float64, device=device)
    elif value.dtype is not torch.float64 or value.device != device or value.dim() != 1:
        group[name] = value = value.to(device, torch.float64).reshape(1)
    return value
