"""Unified Normalization (Yang et al., arXiv 2208.01313), in the form of the authors' one-dimensional layer.

    q = mean(x^2)                       of each channel, over the tokens that are not padding
    v = q                               during the warm-up, and in steps that the outlier test skips
    v = geometric mean of q             over the last steps otherwise
    y = weight * x / sqrt(v + eps) + bias       in training
    y = weight * x / sqrt(V + eps) + bias       in evaluation, V being the running mean of v

There are no statistics of single tokens, so in evaluation the layer is an affine map of each channel, which
`fold_unified_norm` puts into the linear layer behind it. The gradient is the method's own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from narrowgauge.norm._channels import (
    TokenBatchNorm,
    channel_affine,
    channel_affine_op,
    channel_backward_op,
    channel_products_op,
    channel_squares_op,
    check_count,
    check_fraction,
    mean_over_tokens,
    over_processes,
    update_state,
)
from narrowgauge.norm._reference import compute_dtype
from narrowgauge.norm._replacement import ReplacedNorm, norm_replacement
from narrowgauge.ops import Sample, SampleMaker, operator, system
from narrowgauge.ops.autograd import fused_function

# The authors' code does not compare the gradient's scale with the running one before this iteration.
FIRST_RATIO = 1000


def _update_samples(make: SampleMaker) -> Iterator[Sample]:
    def call(channels: int, window: int, step: int, *, tokens: float = 3.0, outlying: bool = False,
             filtration: bool = False, backward_window: int = 2) -> tuple[Any, ...]:  # fmt: skip
        variance, squares = (make(channels).square() + 0.1 for _ in range(2))
        rows = make(window, channels).square() * 0.01 + 1.0
        squares = squares * 0.01 + tokens * (1e4 if outlying else 1.0)
        counters = [torch.tensor(value, device=make.device) for value in (0, step)]
        count = torch.tensor([tokens], dtype=make.dtype, device=make.device)
        return (
            variance, rows, counters[0], squares, count, counters[1], backward_window, 5, 8, filtration, 0.9, 1e-5
        )  # fmt: skip

    yield Sample(call(17, 4, 1), "during the warm-up")
    yield Sample(call(600, 3, 9), "smoothed, and more channels than threads")
    yield Sample(call(17, 4, 9, outlying=True), "an outlier that is not looked for; the ratio is clamped")
    yield Sample(call(17, 4, 9, outlying=True, filtration=True), "an outlier that is skipped")
    yield Sample(call(600, 4, 9, filtration=True), "a regular step that is looked at")
    yield Sample(call(17, 1, 9), "a window of one step")
    yield Sample(call(17, 4, 9, tokens=0.0), "nothing but padding")
    yield Sample(call(0, 2, 9, filtration=True), "no channels")


@operator(
    "unified_norm_update_(Tensor(a!) running_var, Tensor(b!) buffer_x2, Tensor(c!) skip_counter, Tensor squares,"
    " Tensor count, Tensor step, int backward_window, int warmup_iters, int first_ratio, bool outlier_filtration,"
    " float momentum, float eps) -> (Tensor factors, Tensor decisions)",
    samples=_update_samples,
    dtypes=(torch.float32, torch.float64),
)
def unified_norm_update_op(
    running_var: Tensor,
    buffer_x2: Tensor,
    skip_counter: Tensor,
    squares: Tensor,
    count: Tensor,
    step: Tensor,
    backward_window: int,
    warmup_iters: int,
    first_ratio: int,
    outlier_filtration: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """One step of the forward state from sums of x^2 over `count` tokens; without tokens it stays as it is.

    Returns the factors 1 / sqrt(v + eps) and r, the scale of the gradient; and as integers whether the step is skipped,
    whether the gradient statistic is taken as it is, and the slot of the backward window. `step` is the number of steps
    before this one.
    """
    old, window, t, size = running_var, buffer_x2, step + 1, buffer_x2.shape[0]
    some_token = count > 0
    q = torch.where(some_token, squares / count, old)
    slot = (torch.arange(size, device=window.device) == t % size).unsqueeze(-1)
    filled = torch.where(slot, q, window)
    geometric = filled.log().mean(0).exp()
    outlier = torch.zeros_like(some_token)
    if outlier_filtration:
        roots = window.sqrt()
        variance = (roots - roots.mean()).square().sum() / (roots.numel() - 1)
        deviating = (filled.mean(0) - geometric > size * variance).any()
        outlier = deviating & (t >= warmup_iters) & some_token
    skip = (outlier | (size <= 1)) & some_token
    warm = (t < warmup_iters) & some_token
    v = torch.where(warm | skip | (t <= size), q, geometric)
    v = torch.where(some_token, v, old)
    ratio = ((v + eps).sqrt() / (old + eps).sqrt()).clamp(0.2, 5.0)
    ratio = torch.where(skip | (t <= max(first_ratio, warmup_iters)), 1.0, ratio)
    direct = warm | skip | ((t <= backward_window) & some_token)
    factors = torch.stack([(v + eps).rsqrt(), ratio])
    decisions = torch.cat([skip.long(), direct.long(), (t % backward_window).view(1)])

    skip_counter.add_(outlier[0])
    buffer_x2.copy_(torch.where(some_token, torch.where(slot & outlier, old, filled), window))
    running_var.copy_(torch.where(some_token, momentum * old + (1 - momentum) * v, old))
    return factors, decisions


def _forward(x: Tensor, weight: Tensor, bias: Tensor, factors: Tensor, *_: Any) -> Tensor:
    return channel_affine_op(x, weight.to(factors.dtype) * factors[0], bias.to(factors.dtype), 0, 0.0)


def _setup(ctx: Any, args: tuple[Any, ...], y: Tensor) -> Tensor:
    x, weight, _, factors, decisions, some_token, ctx.ema_gz, ctx.buffer_gz, ctx.options = args
    ctx.save_for_backward(x, weight, factors, decisions, some_token)
    return y


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, factors, decisions, some_token = ctx.saved_tensors
    ema_gz, buffer_gz, momentum = ctx.ema_gz, ctx.buffer_gz, ctx.options.momentum
    dy = dy.contiguous()
    w = weight.to(factors.dtype)
    inverse, ratio = factors.unbind()
    skip, direct = decisions[0] != 0, decisions[1] != 0
    slot = (torch.arange(buffer_gz.shape[0], device=dy.device) == decisions[2]).unsqueeze(-1)

    products, dbias = channel_products_op(dy, x).unbind()
    dweight = ratio * inverse * products
    c = mean_over_tokens(w * dweight, x.numel() // x.shape[-1], None, ctx.options.process_group)  # of g * z
    window = torch.where(slot, torch.where(skip, ema_gz, c), buffer_gz)
    m = torch.where(direct, c, window.mean(0))
    ema = momentum * ema_gz + (1 - momentum) * m
    s = torch.where(skip, m, ema)
    if some_token is not None:
        window = torch.where(some_token, window, buffer_gz)
        ema = torch.where(some_token, ema, ema_gz)
        s = torch.where(some_token, s, 0.0)
    buffer_gz.copy_(window)
    ema_gz.copy_(ema)
    dx, _ = channel_backward_op(dy, x, None, w * ratio * inverse, s * inverse.square(), 0, 0.0, False)
    _, for_weight, for_bias, *_ = ctx.needs_input_grad
    return (
        dx,
        dweight.to(weight.dtype) if for_weight else None,
        dbias.to(weight.dtype) if for_bias else None,
        *[None] * 6,
    )


_train = fused_function("UnifiedNorm", _forward, _setup, _backward)


class UnifiedNorm(TokenBatchNorm):
    """Unified normalization: window-smoothed batch statistics in training, an affine map of channels in evaluation.

    Args:
        num_features: Channels C, the size of the last dimension.
        window_size: Steps over which statistics are smoothed; one number, or a pair for the forward and the backward
            pass. Default 4.
        warmup_iters: Steps without smoothing. Default 4000.
        outlier_filtration: Do not smooth in steps whose statistics deviate much from those of the window, and keep
            them out of it. Default False; the authors use it for vision, not for language.
        eps: Added inside the roots. Default 1e-5.
        momentum: Weight of the *old* value in the running means. Default 0.9.
        process_group: Processes over whose batches statistics are taken together, one all-reduce in the forward and one
            in the backward pass. Default None: each process its own.
        device, dtype: Of the parameters. State is float32, or float64 for float64.

    Buffers: ``running_var`` and ``ema_gz`` of shape (C,), ``buffer_x2`` and ``buffer_gz`` of shapes (window, C),
    ``num_batches_tracked`` and ``skip_counter``, all on the device: no step waits for it.

    Source: arXiv 2208.01313. The gradient is the method's own; with a window of one step and without padding it is that
    of the batch's root mean square.
    """

    running_var: Tensor
    ema_gz: Tensor
    buffer_x2: Tensor
    buffer_gz: Tensor
    skip_counter: Tensor

    def __init__(
        self,
        num_features: int,
        window_size: int | tuple[int, int] = 4,
        warmup_iters: int = 4000,
        outlier_filtration: bool = False,
        eps: float = 1e-5,
        momentum: float = 0.9,
        *,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, warmup_iters, process_group, device, dtype)
        check_fraction("UnifiedNorm", "momentum", momentum)
        windows = window_size if isinstance(window_size, (tuple, list)) else (window_size, window_size)
        if len(windows) != 2:
            raise ValueError(
                f"UnifiedNorm: window_size must be an integer or a pair of them, got {window_size!r}"
            )
        for window in windows:
            check_count("UnifiedNorm", "window_size", window, 1)
        self.window_size: tuple[int, int] = (windows[0], windows[1])
        self.outlier_filtration, self.momentum = outlier_filtration, float(momentum)
        state = compute_dtype(self.weight.dtype)
        for name, shape in (
            ("running_var", (num_features,)),
            ("ema_gz", (num_features,)),
            ("buffer_x2", (windows[0], num_features)),
            ("buffer_gz", (windows[1], num_features)),
        ):
            self.register_buffer(name, torch.empty(shape, device=device, dtype=state))
        self.register_buffer("skip_counter", torch.tensor(0, dtype=torch.int64, device=device))
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        self.running_var.fill_(1.0)
        for buffer in (
            self.ema_gz, self.buffer_x2, self.buffer_gz, self.num_batches_tracked, self.skip_counter
        ):  # fmt: skip
            buffer.zero_()

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        """Normalizes x.

        Args:
            x: Shape (B, N, C) or (B, C); any layout; float32, bfloat16, float16 or float64.
            pad_mask: Boolean, shape (B, N), True for padding, which is normalized like the rest but enters no
                statistic of the forward pass. A batch of nothing but padding leaves all buffers as they are and is
                normalized by the running statistics. Default: no padding.

        Raises:
            TypeError, ValueError: An argument does not fit; nothing has changed then.
            RuntimeError: Called a second time during the backward pass, by activation checkpointing.
        """
        padding = self._tokens(x, pad_mask, batch_first=True)
        x = x.contiguous()
        if not self.training or (x.shape[:-1].numel() == 0 and self.process_group is None):
            scale = (self.running_var + self.eps).rsqrt() * self.weight
            return channel_affine(x, scale, self.bias.to(scale.dtype), 0, 0.0)
        self._refuse_recomputation()
        with torch.no_grad():
            factors, decisions, some_token = self._update(x.detach(), padding)
        return _train.apply(
            x, self.weight, self.bias, factors, decisions, some_token, self.ema_gz, self.buffer_gz, self
        )

    def _update(self, x: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """One step of the forward state; also whether there was any token (None: there was)."""
        squares, count = over_processes(
            channel_squares_op(x, padding), x.numel() // self.num_features, padding, self.process_group
        )
        factors, decisions = update_state(
            unified_norm_update_op,
            self.running_var,
            self.buffer_x2,
            self.skip_counter,
            squares,
            count,
            self.num_batches_tracked,
            self.window_size[1],
            self.warmup_iters,
            FIRST_RATIO,
            self.outlier_filtration,
            self.momentum,
            self.eps,
        )
        if padding is None and self.process_group is None:
            self.num_batches_tracked.add_(1)
            return factors, decisions, None
        some_token = count > 0
        self.num_batches_tracked.add_(some_token[0])
        return factors, decisions, some_token

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, window_size={self.window_size}, warmup_iters={self.warmup_iters}, "
            f"outlier_filtration={self.outlier_filtration}, eps={self.eps}, momentum={self.momentum}"
        )


def fold_unified_norm(norm: UnifiedNorm, linear: nn.Linear) -> nn.Linear:
    """A linear layer that does in one what `norm` in evaluation and `linear` do one after the other.

    Args:
        norm: Its running statistics, weight and bias are used; it stays as it is.
        linear: The layer that reads its output; it stays as it is. Where a residual stream reads the norm's output
            too, or several linear layers do, fold a copy into each of the linear layers.

    Returns:
        A copy of `linear` with another weight, and a bias in any case.

    Raises:
        TypeError, ValueError: The layers do not fit.
    """
    if not isinstance(norm, UnifiedNorm):
        raise TypeError(f"fold_unified_norm: norm must be a UnifiedNorm, got {type(norm).__name__}")
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"fold_unified_norm: linear must be a torch.nn.Linear, got {type(linear).__name__}")
    if linear.in_features != norm.num_features:
        raise ValueError(
            f"fold_unified_norm: linear reads {linear.in_features} features but norm has {norm.num_features}"
        )
    if linear.weight.device != norm.weight.device:
        raise ValueError(
            f"fold_unified_norm: linear is on {linear.weight.device} but norm is on {norm.weight.device}; move one"
        )
    folded = copy.deepcopy(linear)
    with torch.no_grad():
        weight = linear.weight.double()
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        bias = weight @ norm.bias.double()
        if linear.bias is not None:
            bias = bias + linear.bias.double()
        folded.weight.copy_(weight * scale)
        folded.bias = nn.Parameter(bias.to(linear.weight.dtype), requires_grad=linear.weight.requires_grad)
    return folded


@norm_replacement("unified")
def _in_place_of(norm: ReplacedNorm) -> UnifiedNorm:
    norm.need_weight()
    return UnifiedNorm(norm.width, eps=norm.eps, device=norm.device, dtype=norm.dtype)


system(
    "unified_norm",
    title="Unified Normalization",
    source="arXiv 2208.01313",
    page="norm/unified.md",
    functions=("fold_unified_norm",),
    modules=("UnifiedNorm",),
    operators=(
        "channel_affine",
        "channel_backward",
        "channel_products",
        "channel_squares",
        "unified_norm_update_",
    ),
    golden=("unified_normalization",),
    bench=("unified_norm",),
)
