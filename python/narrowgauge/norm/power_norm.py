"""PowerNorm (Shen et al., arXiv 2003.07845), in the form of the authors' masked layer.

    u = x / sqrt(mean(x^2) + eps)       over each group of channels of a token
    q = mean(u^2)                       of each channel, over the tokens that are not padding
    y = weight * u / sqrt(q + eps) + bias       during the warm-up
    y = weight * u / sqrt(phi + eps) + bias     after it, with the running phi of before this step

The gradient is the method's own: statistics count as constants, and a running mean of g * z, kept across steps, is
projected out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from narrowgauge.norm._channels import (
    LONG,
    SHAPES,
    TokenBatchNorm,
    _mask,
    _scaled_by_groups,
    _sum_over_tokens,
    _wide,
    channel_affine,
    channel_backward_op,
    check_count,
    check_fraction,
    kept_where_no_token,
    mean_over_tokens,
)
from narrowgauge.norm._reference import compute_dtype
from narrowgauge.ops import Sample, SampleMaker, checks, operator
from narrowgauge.ops.autograd import fused_function


def _vectors(make: SampleMaker, columns: int) -> list[Tensor]:
    return [make(columns, dtype=_wide(make)) for _ in range(2)]


def _forward_samples(make: SampleMaker) -> Iterator[Sample]:
    steady, warm = torch.ones((), dtype=torch.bool), torch.zeros((), dtype=torch.bool)

    def call(shape: tuple[int, ...], groups: int, mask: bool, when: Tensor) -> tuple[Any, ...]:
        d = shape[-1]
        return (
            make(*shape),
            make(*shape),
            _mask(make, shape) if mask else None,
            *_vectors(make, d),
            when.to(make.device),
            groups,
            1e-5,
        )

    for shape, groups, why in SHAPES:
        yield Sample(call(shape, groups, False, steady), why)
    yield Sample(call((70, 129), 3, True, steady), "some tokens are padding")
    yield Sample(call((6, 40), 5, True, warm), "during the warm-up y stays as it is")
    yield Sample(call(LONG[0], 1, False, steady), LONG[2])


@operator(
    "power_norm_forward_(Tensor(a!) y, Tensor x, Tensor? pad_mask, Tensor scale, Tensor bias, Tensor steady, int groups,"
    " float eps) -> Tensor squares",
    samples=_forward_samples,
)
def power_norm_forward_op(
    y: Tensor,
    x: Tensor,
    pad_mask: Tensor | None,
    scale: Tensor,
    bias: Tensor,
    steady: Tensor,
    groups: int,
    eps: float,
) -> Tensor:
    """The sum of u^2 over tokens that are not padding; and where `steady` is true, y becomes u * scale + bias."""
    u, _ = _scaled_by_groups(x, groups, eps)
    y.copy_(torch.where(steady, (u * scale + bias).to(y.dtype), y))
    return _sum_over_tokens(u.square(), pad_mask)


def _warm_up_samples(make: SampleMaker) -> Iterator[Sample]:
    for when, (shape, groups, why) in zip((False, True, False), SHAPES[2:], strict=True):
        steady = torch.full((), when, dtype=torch.bool, device=make.device)
        yield Sample((make(*shape), make(*shape), *_vectors(make, shape[-1]), steady, groups, 1e-5), why)


@operator(
    "power_norm_warm_up_(Tensor(a!) y, Tensor x, Tensor scale, Tensor bias, Tensor steady, int groups, float eps) -> ()",
    samples=_warm_up_samples,
)
def power_norm_warm_up_op(
    y: Tensor, x: Tensor, scale: Tensor, bias: Tensor, steady: Tensor, groups: int, eps: float
) -> None:
    """Where `steady` is false, y becomes u * scale + bias."""
    u, _ = _scaled_by_groups(x, groups, eps)
    y.copy_(torch.where(steady, y, (u * scale + bias).to(y.dtype)))


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    pad_mask: Tensor | None,
    running_phi: Tensor,
    ema_gz: Tensor,
    steady: Tensor,
    groups: int,
    eps: float,
    group: dist.ProcessGroup | None,
    alpha_bkw: float,
    running_scale: bool,
    exclude_pad_grad: bool,
) -> tuple[Tensor, ...]:
    """y, q, whether there was any token; then what the backward needs: the factors of u in z, and of a in du."""
    compute = compute_dtype(x.dtype)
    w, b = weight.to(compute), bias.to(compute)
    running = (running_phi + eps).rsqrt()
    y = torch.empty_like(x)
    squares = power_norm_forward_op(y, x, pad_mask, running * w, b, steady, groups, eps)
    q, some_token = mean_over_tokens(squares, x.numel() // x.shape[-1], pad_mask, group)
    q = kept_where_no_token(some_token, q, running_phi)
    current = (q + eps).rsqrt()
    power_norm_warm_up_op(y, x, current * w, b, steady, groups, eps)
    z_scale = torch.where(steady, running, current)
    if some_token is None:
        some_token = steady.new_ones(1)
    return y, q, some_token, z_scale, z_scale if running_scale else current


def _setup(ctx: Any, args: tuple[Any, ...], results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, weight, _, pad_mask, _, ctx.ema_gz, _, ctx.groups, ctx.eps, ctx.group, ctx.alpha, _, exclude = args
    y, q, some_token, z_scale, du_scale = results
    ctx.save_for_backward(x, weight, pad_mask if exclude else None, some_token, z_scale, du_scale)
    ctx.mark_non_differentiable(q, some_token)
    return y, q, some_token


def _backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, weight, pad_mask, some_token, z_scale, du_scale = ctx.saved_tensors
    ema_gz, w = ctx.ema_gz, weight.to(z_scale.dtype)
    running = (1 - ctx.alpha) * ema_gz * z_scale  # times u: (1 - alpha) E z
    dx, sums = channel_backward_op(
        dy.contiguous(), x, pad_mask, w * du_scale, running * du_scale, ctx.groups, ctx.eps, True
    )
    dweight = z_scale * sums[0]
    az = w * dweight - running * z_scale * sums[2]
    mean, _ = mean_over_tokens(az, x.numel() // x.shape[-1], pad_mask, ctx.group)
    ema_gz.copy_(torch.where(some_token, ema_gz + mean, ema_gz))
    _, for_weight, for_bias, *_ = ctx.needs_input_grad
    return (
        dx,
        dweight.to(weight.dtype) if for_weight else None,
        sums[1].to(weight.dtype) if for_bias else None,
        *[None] * 10,
    )


_train = fused_function("PowerNorm", _forward, _setup, _backward)


class PowerNorm(TokenBatchNorm):
    """Power normalization: batch statistics without a mean, and running ones in the forward pass already.

    Args:
        num_features: Channels C, the size of the last dimension.
        eps: Added inside both roots. Default 1e-5.
        alpha_fwd: Weight of the old value in the running quadratic mean. Default 0.9.
        alpha_bkw: Weight of the old value in the running gradient statistic. Default 0.9.
        warmup_iters: Steps that are normalized by the batch's own statistics. Default 10000.
        num_groups: Groups of channels that each token is scaled by first; in a transformer the number of attention
            heads. Default 1.
        batch_first: Three-dimensional inputs are (B, T, C) rather than (T, B, C), which only matters for where padding
            is. Default False.
        backward_scale: Divisor of the gradient: ``"batch"`` (default) by the statistics of the batch also after the
            warm-up, as in the authors' code; ``"running"`` by those that the forward pass divided by.
        exclude_pad_grad: Keep padding out of the gradient and its statistics too. Default False, as in the authors' code.
        process_group: Processes over whose batches statistics are taken together, one all-reduce in the forward and one
            in the backward pass. Default None: each process its own.
        device, dtype: Of the parameters. State is float32, or float64 for float64.

    Buffers: ``running_phi`` and ``ema_gz`` of shape (C,), and ``num_batches_tracked``. Each training forward updates the
    first and the last, each backward pass the second.

    Source: arXiv 2003.07845. The gradient is the method's own approximation at every step.
    """

    running_phi: Tensor
    ema_gz: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        alpha_fwd: float = 0.9,
        alpha_bkw: float = 0.9,
        warmup_iters: int = 10000,
        num_groups: int = 1,
        batch_first: bool = False,
        *,
        backward_scale: Literal["batch", "running"] = "batch",
        exclude_pad_grad: bool = False,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, warmup_iters, process_group, device, dtype)
        check_fraction("PowerNorm", "alpha_fwd", alpha_fwd)
        check_fraction("PowerNorm", "alpha_bkw", alpha_bkw)
        check_count("PowerNorm", "num_groups", num_groups, 1)
        if num_features % num_groups != 0:
            raise ValueError(
                f"PowerNorm: num_groups must divide num_features, got {num_groups} groups of {num_features} channels"
            )
        checks.check_choice("PowerNorm", "backward_scale", backward_scale, ("batch", "running"))
        self.alpha_fwd, self.alpha_bkw, self.num_groups = float(alpha_fwd), float(alpha_bkw), num_groups
        self.batch_first, self.backward_scale = batch_first, backward_scale
        self.exclude_pad_grad = exclude_pad_grad
        state = compute_dtype(self.weight.dtype)
        self.register_buffer("running_phi", torch.empty(num_features, device=device, dtype=state))
        self.register_buffer("ema_gz", torch.empty(num_features, device=device, dtype=state))
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        self.running_phi.fill_(1.0)
        self.ema_gz.zero_()
        self.num_batches_tracked.zero_()

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        """Normalizes x.

        Args:
            x: Shape (T, B, C), or (B, T, C) with `batch_first`, or (B, C); any layout; float32, bfloat16, float16 or
                float64.
            pad_mask: Boolean, shape (B, T), True for padding, which is normalized like the rest but enters no
                statistic of the forward pass. A batch of nothing but padding leaves all buffers as they are and is
                normalized by the running statistics. Default: no padding.

        Raises:
            TypeError, ValueError: An argument does not fit; nothing has changed then.
            RuntimeError: Called a second time during the backward pass, by activation checkpointing.
        """
        padding = self._tokens(x, pad_mask, self.batch_first)
        x = x.contiguous()
        if not self.training or (x.shape[:-1].numel() == 0 and self.process_group is None):
            scale = (self.running_phi + self.eps).rsqrt() * self.weight
            return channel_affine(x, scale, self.bias.to(scale.dtype), self.num_groups, self.eps)
        self._refuse_recomputation()
        y, q, some_token = _train.apply(
            x,
            self.weight,
            self.bias,
            padding,
            self.running_phi,
            self.ema_gz,
            self.num_batches_tracked >= self.warmup_iters,
            self.num_groups,
            self.eps,
            self.process_group,
            self.alpha_bkw,
            self.backward_scale == "running",
            self.exclude_pad_grad,
        )
        with torch.no_grad():
            self._update(q, some_token)
        return y

    def _update(self, q: Tensor, some_token: Tensor) -> None:
        phi, step = self.running_phi, self.num_batches_tracked + 1
        t = step.to(phi.dtype)
        cumulative = phi * (t - 1) / t + q / t
        mean = torch.where(step < self.warmup_iters, cumulative, phi)
        mean = self.alpha_fwd * mean + (1 - self.alpha_fwd) * q
        phi.copy_(torch.where(some_token, mean, phi))
        self.num_batches_tracked.add_(some_token[0])

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, alpha_fwd={self.alpha_fwd}, alpha_bkw={self.alpha_bkw}, "
            f"warmup_iters={self.warmup_iters}, num_groups={self.num_groups}, batch_first={self.batch_first}, "
            f"backward_scale={self.backward_scale!r}, exclude_pad_grad={self.exclude_pad_grad}"
        )
