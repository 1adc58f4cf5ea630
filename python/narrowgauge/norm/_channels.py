"""Norms whose statistics belong to channels and come from all tokens of a batch: what PowerNorm and UnifiedNorm share.

    u = x                                       groups = 0
    u = x / sqrt(mean(x^2) + eps)               the mean over each of `groups` equal pieces of the last dimension

The operators are passes over the tokens: a channelwise scaling of u, or sums over all tokens, or both at once. What
happens between passes to vectors of one element per channel is plain PyTorch, without a look at any value, so that
nothing waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from narrowgauge.norm import _arguments
from narrowgauge.norm._reference import compute_dtype
from narrowgauge.ops import Operator, Sample, SampleMaker, checks, differentiable, operator


def _pieces(values: Tensor, groups: int) -> Tensor:
    return values.reshape(*values.shape[:-1], groups, values.shape[-1] // groups)


def _scaled_by_groups(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor | None]:
    """u in the compute dtype, and 1 / sqrt(...) of each group."""
    values = x.to(compute_dtype(x.dtype))
    if groups == 0:
        return values, None
    pieces = _pieces(values, groups)
    rstd = (pieces.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (pieces * rstd).reshape(values.shape), rstd


def _sum_over_tokens(values: Tensor, pad_mask: Tensor | None) -> Tensor:
    rows = values.reshape(-1, values.shape[-1]) if values.numel() else values.new_empty(0, values.shape[-1])
    if pad_mask is not None and values.numel():
        rows = rows.masked_fill(pad_mask.unsqueeze(-1), 0.0)
    return rows.sum(0)


# --- operators ---

SHAPES = (
    ((3, 64), 2, "a multiple of every vector width"),
    ((2, 3, 17), 1, "three dimensions and an odd row"),
    ((5, 3), 3, "groups of one element"),
    ((0, 8), 2, "no tokens"),
    ((70, 129), 3, "enough rows for several partial sums, odd groups"),
)
LONG = ((2, 2052), 1, "longer than one warp's registers, and than a block's where it is not aligned")


def _wide(make: SampleMaker) -> torch.dtype:
    return compute_dtype(make.dtype)


def _mask(make: SampleMaker, shape: tuple[int, ...]) -> Tensor:
    return make(math.prod(shape[:-1])) > 0.5


def _affine_samples(make: SampleMaker) -> Iterator[Sample]:
    def call(shape: tuple[int, ...], groups: int) -> tuple[Any, ...]:
        d = shape[-1]
        return make(*shape), make(d, dtype=_wide(make)), make(d, dtype=_wide(make)), groups, 1e-5

    for shape, groups, why in (*SHAPES, LONG):
        yield Sample(call(shape, groups), why)
    yield Sample(call((70, 129), 0), "no groups, an odd row")
    yield Sample(call((6, 40), 0), "no groups")


@operator(
    "channel_affine(Tensor x, Tensor scale, Tensor bias, int groups, float eps) -> Tensor",
    samples=_affine_samples,
)
def channel_affine_op(x: Tensor, scale: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """u * scale + bias, with scale and bias of one element per channel in the compute dtype."""
    u, _ = _scaled_by_groups(x, groups, eps)
    return (u * scale + bias).to(x.dtype).contiguous()


def _squares_samples(make: SampleMaker) -> Iterator[Sample]:
    for shape, _, why in SHAPES:
        yield Sample((make(*shape), None), why)
        yield Sample((make(*shape), _mask(make, shape)), f"{why}; some are padding")
    yield Sample((make(3, 1028), None), "several tiles of columns")


@operator("channel_squares(Tensor x, Tensor? pad_mask) -> Tensor", samples=_squares_samples)
def channel_squares_op(x: Tensor, pad_mask: Tensor | None) -> Tensor:
    """The sum of x^2 over all tokens that are not padding; pad_mask has one element per token, True for padding."""
    return _sum_over_tokens(x.to(compute_dtype(x.dtype)).square(), pad_mask)


def _products_samples(make: SampleMaker) -> Iterator[Sample]:
    for shape, _, why in SHAPES:
        yield Sample((make(*shape), make(*shape)), why)


@operator("channel_products(Tensor dy, Tensor x) -> Tensor", samples=_products_samples)
def channel_products_op(dy: Tensor, x: Tensor) -> Tensor:
    """The sums of dy * x and of dy over all tokens, as two rows."""
    g, values = dy.to(compute_dtype(x.dtype)), x.to(compute_dtype(x.dtype))
    return torch.stack([_sum_over_tokens(g * values, None), _sum_over_tokens(g, None)])


def _backward_samples(make: SampleMaker) -> Iterator[Sample]:
    def call(shape: tuple[int, ...], groups: int, *, mask: bool = False, projection: bool = True,
             sums: bool = True) -> tuple[Any, ...]:  # fmt: skip
        vectors = [make(shape[-1], dtype=_wide(make)) for _ in range(2)]
        return (
            make(*shape),
            make(*shape),
            _mask(make, shape) if mask else None,
            vectors[0],
            vectors[1] if projection else None,
            groups,
            1e-5,
            sums,
        )

    for shape, groups, why in (*SHAPES, LONG):
        yield Sample(call(shape, groups), why)
    yield Sample(call((70, 129), 3, mask=True), "some tokens are left out")
    yield Sample(call((70, 129), 0, projection=False), "no groups, no projection")
    yield Sample(call((6, 40), 0, sums=False), "no groups, no sums")


@operator(
    "channel_backward(Tensor dy, Tensor x, Tensor? pad_mask, Tensor scale, Tensor? projection, int groups, float eps,"
    " bool sums) -> (Tensor dx, Tensor sums)",
    samples=_backward_samples,
)
def channel_backward_op(
    dy: Tensor,
    x: Tensor,
    pad_mask: Tensor | None,
    scale: Tensor,
    projection: Tensor | None,
    groups: int,
    eps: float,
    sums: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient of x from du = dy * scale - u * projection; sums over tokens of dy * u, dy and, with groups, u^2.

    Tokens that pad_mask marks get no gradient and enter no sum.
    """
    u, rstd = _scaled_by_groups(x, groups, eps)
    g = dy.to(u.dtype)
    du = g * scale
    if projection is not None:
        du = du - u * projection
    dx = du
    if rstd is not None:
        pieces, du_pieces = _pieces(u, groups), _pieces(du, groups)
        dx = rstd * (du_pieces - pieces * (du_pieces * pieces).mean(-1, keepdim=True))
        dx = dx.reshape(u.shape)
    if pad_mask is not None:
        dx = dx.masked_fill(pad_mask.view(*x.shape[:-1], 1), 0.0)
    terms = [g * u, g, u.square()] if groups else [g * u, g]
    results = [_sum_over_tokens(term, pad_mask) for term in terms]
    return dx.to(x.dtype, copy=True).contiguous(), torch.stack(results)[: len(terms) if sums else 0].clone()


def _setup_affine(ctx: Any, args: tuple[Any, ...], y: Tensor) -> Tensor:
    x, scale, _, ctx.groups, ctx.eps = args
    ctx.save_for_backward(x, scale)
    return y


def _affine_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, scale = ctx.saved_tensors
    _, for_scale, for_bias, *_ = ctx.needs_input_grad
    dx, sums = channel_backward_op(
        dy.contiguous(), x, None, scale, None, ctx.groups, ctx.eps, for_scale or for_bias
    )
    return dx, sums[0] if for_scale else None, sums[1] if for_bias else None, None, None


channel_affine = differentiable(
    channel_affine_op, forward=channel_affine_op, setup=_setup_affine, backward=_affine_gradients
)


# --- statistics ---


def update_state(step: Operator, *args: Any) -> Any:
    """Runs an operator that changes state, and for torch.compile always as the operator.

    Traced through its reference, the backward graph might compute the step's results again, from the changed state.
    """
    return step.overload(*args) if torch.compiler.is_compiling() else step(*args)


def over_processes(
    sums: Tensor, tokens: int, pad_mask: Tensor | None, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Sums over the tokens of all processes of the group, and the number of tokens that are not padding.

    One all-reduce; none without a group.
    """
    count = sums.new_full((1,), tokens)
    if pad_mask is not None:
        count = count - pad_mask.sum()
    if group is None:
        return sums, count
    both = torch.cat([sums, count])
    dist.all_reduce(both, group=group)
    return both[:-1], both[-1:]


def mean_over_tokens(
    sums: Tensor, tokens: int, pad_mask: Tensor | None, group: dist.ProcessGroup | None
) -> Tensor:
    """The sums divided by the number of tokens."""
    if pad_mask is None and group is None:
        return sums / tokens
    sums, count = over_processes(sums, tokens, pad_mask, group)
    return sums / count


class TokenBatchNorm(nn.Module):
    """Parameters, checks and the handling of state that PowerNorm and UnifiedNorm share.

    State is float32 (float64 in a float64 module), and stays so when the module is converted to a narrower dtype.
    """

    weight: Tensor
    bias: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float,
        warmup_iters: int,
        process_group: dist.ProcessGroup | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_count(name, "num_features", num_features, 1)
        check_count(name, "warmup_iters", warmup_iters, 0)
        checks.check_eps(name, eps)
        self.num_features, self.eps, self.warmup_iters = num_features, float(eps), warmup_iters
        self.process_group = process_group
        _arguments.register_affine(self, (num_features,), weight=True, bias=True, device=device, dtype=dtype)
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.int64, device=device))

    def reset_parameters(self) -> None:
        """Sets weight to one, bias to zero, and the state to that of a fresh module."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        self.reset_running_stats()

    def reset_running_stats(self) -> None:
        """Sets the state to that of a fresh module."""
        raise NotImplementedError

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> TokenBatchNorm:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.is_floating_point() and buffer.dtype.itemsize < 4:
                kept = before[name]
                assert kept is not None
                self._buffers[name] = kept.to(buffer.device)
        return self

    def _tokens(self, x: Tensor, pad_mask: Tensor | None, batch_first: bool) -> Tensor | None:
        """Checks the arguments of a call; the mask comes back as one element per token, in the order of the tokens."""
        name, parameters = type(self).__name__, self.weight
        checks.check_floating(name, x=x)
        if x.dim() not in (2, 3) or x.shape[-1] != self.num_features:
            layout = "(B, T, C)" if batch_first else "(T, B, C)"
            raise ValueError(
                f"{name}: x has shape {tuple(x.shape)}; expected {layout} or (B, C) with C = {self.num_features} "
                "(num_features)"
            )
        if pad_mask is not None and (not isinstance(pad_mask, Tensor) or pad_mask.dtype != torch.bool):
            given = pad_mask.dtype if isinstance(pad_mask, Tensor) else type(pad_mask).__name__
            raise TypeError(
                f"{name}: pad_mask must be a boolean tensor, True for padding, got {given}; "
                "convert it with pad_mask.bool()"
            )
        checks.check_same_device(name, "x", x, weight=self.weight, bias=self.bias, pad_mask=pad_mask)
        companions = (x.dtype,) if x.dtype == torch.float64 else (x.dtype, torch.float32)
        if parameters.dtype not in companions or self.bias.dtype not in companions:
            raise TypeError(
                f"{name}: x has dtype {x.dtype} but the module's parameters are {parameters.dtype}; convert one of "
                f"them, for example x.to({parameters.dtype})"
            )
        if pad_mask is None:
            return None
        tokens = tuple(x.shape[:-1])
        if len(tokens) == 1:
            if tuple(pad_mask.shape) not in (tokens, (*tokens, 1)):
                raise ValueError(
                    f"{name}: pad_mask has shape {tuple(pad_mask.shape)}; expected {tokens} or {(*tokens, 1)} beside "
                    f"x of shape {tuple(x.shape)}"
                )
            return pad_mask.reshape(-1)
        expected = tokens if batch_first else tokens[::-1]
        if tuple(pad_mask.shape) != expected:
            raise ValueError(
                f"{name}: pad_mask has shape {tuple(pad_mask.shape)}; expected (batch, tokens) = {expected} beside x "
                f"of shape {tuple(x.shape)}"
            )
        return (pad_mask if batch_first else pad_mask.t()).reshape(-1)

    def _refuse_recomputation(self) -> None:
        """A forward inside a backward is activation checkpointing, which would update the state a second time."""
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                f"{type(self).__name__}: the training forward was called during a backward pass, as activation "
                "checkpointing does to recompute it; that would update the running statistics twice. Keep this layer "
                "outside of the checkpointed function"
            )


def check_count(function: str, name: str, value: Any, least: int) -> None:
    """A number of things."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{function}: {name} must be an integer >= {least}, got {value!r}")


def check_fraction(function: str, name: str, value: Any) -> None:
    """A weight of an average."""
    if not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{function}: {name} must be a number from 0 to 1, got {value!r}")
