"""NaP, normalize-and-project (Lyle et al., "Normalization and effective learning rates in reinforcement learning",
NeurIPS 2024, arXiv 2407.01800): weights keep the norm they began with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from narrowgauge.ops import system
from narrowgauge.optim import codec, tensors
from narrowgauge.optim.elementwise import Rule, stream_seed
from narrowgauge.optim.rule_samples import PARAM_UPDATES, row_count

if TYPE_CHECKING:
    from narrowgauge.optim.base import Call

CHOICES = (False, True, "tensor", "row")


def _update(
    variant: int, p: Tensor, g: Tensor, states: list[Tensor], scalars: Any, factor: Tensor
) -> tuple[Tensor, list[Tensor]]:
    return p * factor, states


# Sums of p^2 over parameters or their rows; its step multiplies each by a number.
nap_rule = Rule(
    name="nap",
    options=(),
    signed=((),),
    scalars=lambda variant, lr, step, given: (),
    update=_update,
    terms=lambda variant, p, g, states, scalars: [p * p],
    sums=(1,),
    rows=True,
)


def _is_by_rows(project_norm: Any, p: Tensor) -> bool:
    return project_norm == "row" and p.dim() > 1


def _row_length(shard: Tensor, by_rows: bool) -> int:
    """How many elements share a norm: all, or all behind the first dimension."""
    return shard.numel() // shard.shape[0] if by_rows and shard.shape[0] else shard.numel()


def norms_shape(project_norm: Any, p: Any) -> Callable[[int], tuple[int, ...]]:
    """The shape of the norms of a shard of `p` with so many elements."""
    if not _is_by_rows(project_norm, p):
        return lambda numel: ()
    if tensors.is_dtensor(p) and any(place.is_shard() and place.dim != 0 for place in p.placements):
        raise ValueError(
            f"project_norm='row' needs parameters that are replicated or sharded in dimension 0, got {p.placements}; "
            "use project_norm='tensor'"
        )
    length = _row_length(p, True)
    return lambda numel: (numel // length if length else 1,)


@torch.no_grad()
def write_norms(project_norm: Any, p: Any, rho: Any) -> None:
    """Writes the norms that `p` has now."""
    shard, by_rows = tensors.local(p.detach()), _is_by_rows(project_norm, p)
    length = _row_length(shard, by_rows)
    count = row_count(shard, length)
    squares = shard.double().square().reshape(count, length).sum(1)
    if not by_rows:
        squares = tensors.sum_over_shards(squares, p)
    tensors.local(rho).view(-1)[:count].copy_(squares.sqrt())


def _factors(squares: Tensor, rho: Tensor) -> Tensor:
    """By what to multiply; 1 where there is no norm to keep or none to scale."""
    norm = squares.sqrt()
    return torch.where((rho > 0) & (norm > 0) & norm.isfinite(), rho / norm, 1.0)


def _compute(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype is torch.float64 else torch.float32


def _squares(
    params: list[Tensor], lengths: list[int], steps: list[Tensor], how: int, rests: list[Tensor]
) -> Tensor:
    sums = nap_rule.reduce(
        *(params, params, [], [], steps, None, None, 0.0, [], 0, 0, how, rests, False, lengths, None, None)
    )
    return sums[:, 0].double()


def project(call: Call) -> None:
    """Gives the parameters of a call, whose step is done, the norms in their states, in two passes."""
    group, whole, params = call.group, call.whole, call.params
    by_rows, every, how = (
        _is_by_rows(group["project_norm"], whole[0]),
        group["project_every"],
        call.param_update,
    )
    if how == "stochastic" and params[0].dtype is not torch.bfloat16:
        how = "nearest"  # only states are rounded so
    number, stochastic = PARAM_UPDATES.index(how), how == "stochastic"
    # The rule counts steps of its own; these copies hold the number of this one.
    steps = list(torch.stack([step.reshape(()) for step in call.steps]).unbind())
    rests, narrow = call.rests, call.copies
    if not by_rows:  # any order of the elements will do
        params, rests, narrow = ([codec.flat(x) for x in items] for items in (params, rests, narrow))
    lengths = [_row_length(p, by_rows) for p in params]
    counts = [row_count(p, length) for p, length in zip(params, lengths, strict=True)]
    squares = _squares(params, lengths, steps, number, rests)
    if not by_rows:
        squares = tensors.sum_over_shards(squares, whole[0])
    states = call.optimizer.state
    kept = [tensors.local(states[p]["rho"]).view(-1)[:count] for p, count in zip(whole, counts, strict=True)]
    factor, skip = _factors(squares, torch.cat(kept).double()), call.found_inf
    if every > 1:
        due = torch.stack(steps) % every == 0
        of_rows = torch.cat([flag.expand(count) for flag, count in zip(due.unbind(), counts, strict=True)])
        factor = torch.where(of_rows, factor, 1.0)
        idle = (~due.any()).float()
        skip = idle if skip is None else torch.maximum(idle, skip.reshape(()))
    nap_rule.step(
        *(params, params, [], [], steps, rests, [], narrow, None, factor.to(_compute(params[0]))),
        *(None, 0.0, [], 0, 0, number, False, False, 0.0, lengths),
        stream_seed(group["seed"], -1),  # no parameter's step draws from this stream
        [call.optimizer._indices[p] for p in whole] if stochastic else [],
        [tensors.first_element(p) for p in whole] if stochastic else [],
        *(None, None, skip),
    )
    call.finish()


@torch.no_grad()
def nap_(params: Tensor | Sequence[Tensor], rho: Tensor | float | Sequence[Tensor | float]) -> None:
    """Scales every tensor to a norm, all in two launches for each dtype and device.

    A tensor whose norm is zero or not finite, or whose `rho` is zero, stays as it is. Nothing waits for the device.

    Args:
        params: Floating-point or complex tensors of any shape, changed in place.
        rho: For each tensor its Frobenius norm, a number or a tensor of one element; or a tensor with one norm per row
            (index of dimension 0), which scales every row by itself.

    Raises:
        ValueError: The numbers of tensors and norms differ, or a norm has another shape.
        TypeError: A tensor is neither floating point nor complex.
    """
    params = [params] if isinstance(params, Tensor) else list(params)
    norms: list[Tensor | float] = [rho] if isinstance(rho, (Tensor, int, float)) else list(rho)
    if len(norms) != len(params):
        raise ValueError(
            f"nap_: rho must hold one norm per tensor, got {len(norms)} for {len(params)} tensors"
        )
    batches: dict[Any, list[tuple[Tensor, Tensor]]] = {}
    for i, (p, norm) in enumerate(zip(params, norms, strict=True)):
        if not (p.is_floating_point() or p.is_complex()):
            raise TypeError(f"nap_: params must be floating point or complex, params[{i}] is {p.dtype}")
        if not isinstance(norm, Tensor):
            norm = torch.full((), norm, dtype=torch.float64, device=p.device)
        by_rows = norm.numel() != 1
        fits = not by_rows or tensors.is_dtensor(p) or (p.dim() > 0 and norm.shape == p.shape[:1])
        if not fits:
            raise ValueError(
                f"nap_: rho[{i}] must be one norm, or one per row of a tensor of shape {tuple(p.shape)}, "
                f"got shape {tuple(norm.shape)}"
            )
        if by_rows:
            norms_shape("row", p)  # its sharding must allow it
        if p.numel() > 0:
            batches.setdefault((p.dtype, p.device, tensors.sharding(p), by_rows), []).append((p, norm))
    for (*_, by_rows), batch in batches.items():
        _project_batch([p for p, _ in batch], [norm for _, norm in batch], by_rows)


def _project_batch(whole: list[Tensor], norms: list[Tensor], by_rows: bool) -> None:
    shards = [tensors.local(p.detach()) for p in whole]
    params = [shard.contiguous() for shard in shards]
    steps = list(torch.zeros(len(params), device=params[0].device).unbind())
    lengths = [_row_length(p, by_rows) for p in params]
    squares = _squares(params, lengths, steps, 0, [])
    if not by_rows:
        squares = tensors.sum_over_shards(squares, whole[0])
    counts = [row_count(p, length) for p, length in zip(params, lengths, strict=True)]
    kept = [
        tensors.local(norm).reshape(-1)[:count].to(squares) for norm, count in zip(norms, counts, strict=True)
    ]
    nap_rule.step(
        *(params, params, [], [], steps, [], [], [], None),
        *(
            _factors(squares, torch.cat(kept)).to(_compute(params[0])),
            None,
            0.0,
            [],
            0,
            0,
            0,
            False,
            False,
            0.0,
        ),
        *(lengths, 0, [], [], None, None, None),
    )
    for shard, p in zip(shards, params, strict=True):
        if p is not shard:
            shard.copy_(p)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(whole)


system(
    "nap",
    title="NaP (normalize-and-project)",
    source="arXiv 2407.01800",
    page="optim/nap.md",
    functions=("optim.nap_",),
    operators=("nap_", "nap_sums"),
    golden=("nap",),
)
