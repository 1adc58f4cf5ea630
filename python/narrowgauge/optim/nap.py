"""NaP, normalize-and-project (Lyle et al., "Normalization and effective learning rates in reinforcement learning",
NeurIPS 2024, arXiv 2407.01800): weights keep the norm they began with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from narrowgauge.ops import checks, system
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


def _joined(rho: list[Tensor], counts: list[int], by_rows: bool, like: Tensor) -> Tensor:
    """The norms of all parameters, or of all their rows, in one tensor."""
    first = rho[0]
    if not by_rows and all(x.dim() == 0 and x.dtype is first.dtype and x.device == first.device for x in rho):
        return torch.stack(rho).to(like)
    shards = (tensors.local(x).reshape(-1)[:count] for x, count in zip(rho, counts, strict=True))
    return torch.cat([shard.to(like) for shard in shards])


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
    steps = list(torch.stack(call.steps).unbind())
    rests, narrow = call.rests, call.copies
    if not by_rows:  # any order of the elements will do
        params, rests, narrow = (
            [x if x.is_contiguous() else codec.flat(x) for x in items] for items in (params, rests, narrow)
        )
    lengths = [_row_length(p, by_rows) for p in params]
    counts = [row_count(p, length) for p, length in zip(params, lengths, strict=True)]
    squares = _squares(params, lengths, steps, number, rests)
    if not by_rows:
        squares = tensors.sum_over_shards(squares, whole[0])
    states = call.optimizer.state
    rho = _joined([states[p]["rho"] for p in whole], counts, by_rows, squares)
    factor, skip = _factors(squares, rho), call.found_inf
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
    shards = [tensors.local(p) for p in whole]
    params = [shard if shard.is_contiguous() else shard.contiguous() for shard in shards]
    steps = list(torch.zeros(len(params), device=params[0].device).unbind())
    lengths = [_row_length(p, by_rows) for p in params]
    squares = _squares(params, lengths, steps, 0, [])
    if not by_rows:
        squares = tensors.sum_over_shards(squares, whole[0])
    counts = [row_count(p, length) for p, length in zip(params, lengths, strict=True)]
    factor = _factors(squares, _joined(norms, counts, by_rows, squares)).to(_compute(params[0]))
    nap_rule.step(
        *(params, params, [], [], steps, [], [], [], None, factor, None, 0.0, [], 0, 0, 0, False, False, 0.0),
        *(lengths, 0, [], [], None, None, None),
    )
    for shard, p in zip(shards, params, strict=True):
        if p is not shard:
            shard.copy_(p)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(whole)


class NormProjector:
    """Keeps the norms of weights beside any optimizer: call `project_` after every step.

    The norms are those at construction. Of a module the weights of linear and convolution layers are taken; the last
    layer is left out, because nothing normalizes what it gives.

    Args:
        params_or_module: A module, or tensors, which are taken as they are.
        every: Project at every so many-th call only.
        exclude_output: Leave out a module's last such layer.
        affine: What happens to scales and offsets of the module's normalization layers. ``"none"`` and ``"free"``:
            nothing; ``"joint"``: the two of a layer keep their joint norm; ``"decay"``: they are drawn towards their
            first values.
        affine_decay: By what share of the way, at each projection.

    Raises:
        ValueError: An argument is out of range, or there is nothing to project.
    """

    def __init__(
        self,
        params_or_module: torch.nn.Module | Iterable[Tensor],
        every: int = 1,
        exclude_output: bool = True,
        affine: str = "none",
        *,
        affine_decay: float = 0.01,
    ) -> None:
        checks.check_choice("NormProjector", "affine", affine, ("none", "joint", "decay", "free"))
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"NormProjector: every must be a whole number >= 1, got {every!r}")
        if not 0 <= affine_decay <= 1:
            raise ValueError(f"NormProjector: affine_decay must be in [0, 1], got {affine_decay!r}")
        self.every, self.affine, self.affine_decay, self.calls = every, affine, affine_decay, 0
        self.params: list[Tensor] = []
        self.affine_params: list[list[Tensor]] = []
        if isinstance(params_or_module, torch.nn.Module):
            kinds = (torch.nn.Linear, torch.nn.modules.conv._ConvNd)
            layers = list(params_or_module.modules())
            weights = [layer.weight for layer in layers if isinstance(layer, kinds)]
            self.params = weights[:-1] if exclude_output else weights
            if affine in ("joint", "decay"):
                pairs = [_affine_of(layer) for layer in layers]
                self.affine_params = [pair for pair in pairs if pair]
        else:
            self.params = list(params_or_module)
        if not self.params:
            raise ValueError("NormProjector: params_or_module has no weights to project")
        self.rho = [torch.zeros((), dtype=torch.float32, device=p.device) for p in self.params]
        for p, rho in zip(self.params, self.rho, strict=True):
            write_norms("tensor", p, rho)
        self.affine_start = [[p.detach().clone() for p in pair] for pair in self.affine_params]

    @torch.no_grad()
    def project_(self) -> None:
        """Projects, at every so many-th call."""
        self.calls += 1
        if self.calls % self.every:
            return
        nap_(self.params, self.rho)
        for pair, start in zip(self.affine_params, self.affine_start, strict=True):
            if self.affine == "decay":
                torch._foreach_lerp_(pair, start, self.affine_decay)
                continue
            target, norm = (torch.stack(torch._foreach_norm(values)).norm() for values in (start, pair))
            torch._foreach_mul_(pair, torch.where(norm > 0, target / norm, 1.0))

    def state_dict(self) -> dict[str, Any]:
        """The norms and first values that are kept, and the number of calls."""
        return {"rho": self.rho, "affine_start": self.affine_start, "calls": self.calls}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` gave for the same parameters."""
        count, pairs = len(state_dict["rho"]), len(state_dict["affine_start"])
        if (count, pairs) != (len(self.rho), len(self.affine_start)):
            raise ValueError(
                f"NormProjector.load_state_dict: it has {count} weights and {pairs} normalization layers, "
                f"this projector has {len(self.rho)} and {len(self.affine_start)}; nothing was loaded"
            )
        self.calls = state_dict["calls"]
        mine = [*self.rho, *chain.from_iterable(self.affine_start)]
        saved = [*state_dict["rho"], *chain.from_iterable(state_dict["affine_start"])]
        for target, value in zip(mine, saved, strict=True):
            target.copy_(value)


def _affine_of(layer: torch.nn.Module) -> list[Tensor]:
    """Scale and offset of a normalization layer, as far as it has them."""
    if "norm" not in type(layer).__name__.lower():
        return []
    own = dict(layer.named_parameters(recurse=False))
    return [own[name] for name in ("weight", "bias") if name in own]


system(
    "nap",
    title="NaP (normalize-and-project)",
    source="arXiv 2407.01800",
    page="optim/nap.md",
    functions=("optim.nap_",),
    modules=("optim.NormProjector",),
    operators=("nap_", "nap_sums"),
    golden=("nap",),
    bench=("nap",),
)
