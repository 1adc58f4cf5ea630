"""Steps during the backward pass, so that no more than a few gradients exist at a time."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from narrowgauge.optim import tensors
from narrowgauge.optim.base import ElementwiseOptimizer


class StepInBackward:
    """What `step_in_backward` returns; with `remove` the optimizer steps as usual again."""

    def __init__(self, optimizer: ElementwiseOptimizer, buckets: list[list[Tensor]]) -> None:
        self.optimizer = optimizer
        self._waiting = [set(bucket) for bucket in buckets]
        self._buckets = buckets
        self._will_finish = False
        self._handles: list[Any] = [optimizer.register_step_pre_hook(_refuse_what_needs_all_gradients)]
        for number, bucket in enumerate(buckets):
            hook = partial(self._arrived, number)
            self._handles += [p.register_post_accumulate_grad_hook(hook) for p in bucket]

    def remove(self) -> None:
        """Takes the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _arrived(self, number: int, p: Tensor) -> None:
        if not self._will_finish:
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
            self._will_finish = True
        self._waiting[number].discard(p)
        if not self._waiting[number]:
            self._step(number)

    def _step(self, number: int) -> None:
        bucket = self._buckets[number]
        self.optimizer._only = set(bucket)
        try:
            self.optimizer.step()
        finally:
            self.optimizer._only = None
        for p in bucket:
            p.grad = None
        self._waiting[number] = set(bucket)

    def _finish(self) -> None:
        """After the backward pass: buckets of which some parameters took no part."""
        self._will_finish = False
        for number, bucket in enumerate(self._buckets):
            if len(self._waiting[number]) < len(bucket):
                self._step(number)


def _refuse_what_needs_all_gradients(
    optimizer: ElementwiseOptimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    if kwargs.get("max_grad_norm") is not None:
        raise RuntimeError(
            "step_in_backward: max_grad_norm needs all gradients at once, and they are gone; call remove() on what "
            "step_in_backward returned"
        )
    if getattr(optimizer, "grad_scale", None) is not None:
        raise RuntimeError(
            "step_in_backward: a gradient scaler must see all gradients before the step, and the parameters have "
            "stepped already; train in bfloat16 without a scaler, or call remove() on what step_in_backward returned"
        )


def _overrides(optimizer: ElementwiseOptimizer, method: str) -> bool:
    own, base = getattr(type(optimizer), method), getattr(ElementwiseOptimizer, method)
    return inspect.unwrap(own) is not inspect.unwrap(base)  # torch.optim wraps `step` of every class


def _cut(params: list[Tensor], bucket_bytes: int) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for p in params:
        bytes_of_p = tensors.local(p.detach()).nbytes
        if bucket and size + bytes_of_p > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append(p)
        size += bytes_of_p
    if bucket:
        yield bucket


def step_in_backward(optimizer: ElementwiseOptimizer, bucket_bytes: int = 64 * 2**20) -> StepInBackward:
    """Lets every backward pass step the parameters as their gradients arrive, and frees the gradients.

    Parameters are cut into buckets from the last to the first; a bucket steps in one call when all its gradients are
    there, or at the end of the pass if some take no part. So about `bucket_bytes` of gradients exist at a time. The
    parameters end with the bits of an ordinary step. ``optimizer.step()`` in the loop then finds no gradients and
    changes nothing; hooks of `step` run once per bucket. Gradients cannot be accumulated over several passes.

    Args:
        optimizer: An optimizer of this library whose step treats parameters one by one. Groups added later are not
            taken part.
        bucket_bytes: Bytes of gradients per bucket, of this process's shards; 0 steps every parameter on its own.

    Returns:
        A handle whose ``remove()`` ends it.

    Raises:
        TypeError: `optimizer` is of another kind.
        ValueError: Its step depends on all gradients at once; a bad `bucket_bytes`; or several processes train
            parameters that are not sharded, whose gradients are not averaged yet when they arrive.
    """
    name = type(optimizer).__name__
    if not isinstance(optimizer, ElementwiseOptimizer):
        raise TypeError(
            f"step_in_backward: optimizer must be an elementwise optimizer of narrowgauge.optim, got {name}"
        )
    if any(_overrides(optimizer, method) for method in ("step", "_begin_step", "_end_step")):
        raise ValueError(
            f"step_in_backward: a step of {name} depends on all parameters at once; use it without, "
            "or an optimizer that treats them one by one, such as AdamW"
        )
    if isinstance(bucket_bytes, bool) or not isinstance(bucket_bytes, int) or bucket_bytes < 0:
        raise ValueError(f"step_in_backward: bucket_bytes must be an integer >= 0, got {bucket_bytes!r}")
    params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    several = distributed and torch.distributed.get_world_size() > 1
    if several and not all(tensors.is_dtensor(p) for p in params):
        raise ValueError(
            "step_in_backward: in a run of several processes the parameters must be sharded (fully_shard); the "
            "gradients of DistributedDataParallel are not averaged yet when they arrive"
        )
    return StepInBackward(optimizer, list(_cut(params[::-1], bucket_bytes)))
