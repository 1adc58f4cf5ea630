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
    mean_over_tokens,
    over_processes,
    update_state,
)
from narrowgauge.norm._reference import compute_dtype
from narrowgauge.norm._replacement import ReplacedNorm, norm_replacement
from narrowgauge.ops import Sample, SampleMaker, checks, operator, system
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
    "power_norm_forward_(Tensor(a!) y, Tensor x, Tensor? pad_mask, Tensor scale, Tensor bias, Tensor steady,"
    " int groups, float eps) -> Tensor squares",
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
    "power_norm_warm_up_(Tensor(a!) y, Tensor x, Tensor scale, Tensor bias, Tensor steady, int groups, float eps)"
    " -> ()",
    samples=_warm_up_samples,
)
def power_norm_warm_up_op(
    y: Tensor, x: Tensor, scale: Tensor, bias: Tensor, steady: Tensor, groups: int, eps: float
) -> None:
    """Where `steady` is false, y becomes u * scale + bias."""
    u, _ = _scaled_by_groups(x, groups, eps)
    y.copy_(torch.where(steady, y, (u * scale + bias).to(y.dtype)))


def _update_samples(make: SampleMaker) -> Iterator[Sample]:
    def call(channels: int, tokens: float, step: int) -> tuple[Any, ...]:
        phi, squares = (make(channels).square() + 0.1 for _ in range(2))
        count = torch.tensor([tokens], dtype=make.dtype, device=make.device)
        return phi, squares, count, torch.tensor(step, device=make.device), 5, 0.9, 1e-5

    yield Sample(call(17, 3.0, 0), "the first step")
    yield Sample(call(300, 3.0, 4), "the last step of the warm-up, which leaves the cumulative mean out")
    yield Sample(call(17, 3.0, 5), "the first step after the warm-up")
    yield Sample(call(17, 0.0, 7), "nothing but padding")
    yield Sample(call(0, 3.0, 1), "no channels")


@operator(
    "power_norm_update_(Tensor(a!) running_phi, Tensor squares, Tensor count, Tensor step, int warmup_iters,"
    " float alpha, float eps) -> Tensor",
    samples=_update_samples,
    dtypes=(torch.float32, torch.float64),
)
def power_norm_update_op(
    running_phi: Tensor,
    squares: Tensor,
    count: Tensor,
    step: Tensor,
    warmup_iters: int,
    alpha: float,
    eps: float,
) -> Tensor:
    """One step of running_phi from sums of u^2 over `count` tokens; without tokens it stays as it is.

    Returns the factor of u in z, and 1 / sqrt(q + eps). `step` is the number of steps before this one.
    """
    phi, t = running_phi, (step + 1).to(running_phi.dtype)
    q = torch.where(count > 0, squares / count, phi)
    current = (q + eps).rsqrt()
    factors = torch.stack([torch.where(t <= warmup_iters, current, (phi + eps).rsqrt()), current])
    mean = torch.where(t < warmup_iters, phi * (t - 1) / t + q / t, phi)
    running_phi.copy_(torch.where(count > 0, alpha * mean + (1 - alpha) * q, phi))
    return factors


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    pad_mask: Tensor | None,
    running_phi: Tensor,
    num_batches_tracked: Tensor,
    ema_gz: Tensor,
    options: PowerNorm,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, the factors that the backward needs, and whether there was any token (None: there was)."""
    groups, eps, warmup, group = options.num_groups, options.eps, options.warmup_iters, options.process_group
    w, b = weight.to(running_phi.dtype), bias.to(running_phi.dtype)
    steady = num_batches_tracked >= warmup
    y = torch.empty_like(x)
    scale = (running_phi + eps).rsqrt() * w
    squares = power_norm_forward_op(y, x, pad_mask, scale, b, steady, groups, eps)
    squares, count = over_processes(squares, x.numel() // x.shape[-1], pad_mask, group)
    factors = update_state(
        power_norm_update_op, running_phi, squares, count, num_batches_tracked, warmup, options.alpha_fwd, eps
    )
    power_norm_warm_up_op(y, x, factors[0] * w, b, steady, groups, eps)
    if pad_mask is None and group is None:
        num_batches_tracked.add_(1)
        return y, factors, None
    some_token = count > 0
    num_batches_tracked.add_(some_token[0])
    return y, factors, some_token


def _setup(ctx: Any, args: tuple[Any, ...], results: tuple[Any, ...]) -> Tensor:
    x, weight, _, pad_mask, _, _, ctx.ema_gz, ctx.options = args
    y, factors, some_token = results
    ctx.save_for_backward(x, weight, pad_mask if ctx.options.exclude_pad_grad else None, factors, some_token)
    return y


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, pad_mask, factors, some_token = ctx.saved_tensors
    ema_gz, options, w = ctx.ema_gz, ctx.options, weight.to(factors.dtype)
    z_factor, q_factor = factors.unbind()
    du_factor = z_factor if options.backward_scale == "running" else q_factor
    projection = (1 - options.alpha_bkw) * ema_gz * z_factor  # its product with u is (1 - alpha) E z
    dx, sums = channel_backward_op(
        dy.contiguous(),
        x,
        pad_mask,
        w * du_factor,
        projection * du_factor,
        options.num_groups,
        options.eps,
        True,
    )
    dweight = z_factor * sums[0]
    az = w * dweight - projection * z_factor * sums[2]
    ema = ema_gz + mean_over_tokens(az, x.numel() // x.shape[-1], pad_mask, options.process_group)
    ema_gz.copy_(ema if some_token is None else torch.where(some_token, ema, ema_gz))
    _, for_weight, for_bias, *_ = ctx.needs_input_grad
    return (
        dx,
        dweight.to(weight.dtype) if for_weight else None,
        sums[1].to(weight.dtype) if for_bias else None,
        *[None] * 5,
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
        exclude_pad_grad: Keep padding out of the gradient and its statistics too. Default False, as the authors' code.
        process_group: Processes over whose batches statistics are taken together, one all-reduce in the forward and one
            in the backward pass. Default None: each process its own.
        device, dtype: Of the parameters. State is float32, or float64 for float64.

    Buffers: ``running_phi`` and ``ema_gz`` of shape (C,), and ``num_batches_tracked``. Each training forward updates
    the first and the last, each backward pass the second.

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
        return _train.apply(
            x,
            self.weight,
            self.bias,
            padding,
            self.running_phi,
            self.num_batches_tracked,
            self.ema_gz,
            self,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, alpha_fwd={self.alpha_fwd}, alpha_bkw={self.alpha_bkw}, "
            f"warmup_iters={self.warmup_iters}, num_groups={self.num_groups}, batch_first={self.batch_first}, "
            f"backward_scale={self.backward_scale!r}, exclude_pad_grad={self.exclude_pad_grad}"
        )


@norm_replacement("power")
def _in_place_of(norm: ReplacedNorm) -> PowerNorm:
    norm.need_weight()
    return PowerNorm(norm.width, norm.eps, batch_first=True, device=norm.device, dtype=norm.dtype)


system(
    "power_norm",
    title="PowerNorm",
    source="arXiv 2003.07845",
    page="norm/powernorm.md",
    modules=("PowerNorm",),
    operators=(
        "channel_affine",
        "channel_backward",
        "power_norm_forward_",
        "power_norm_update_",
        "power_norm_warm_up_",
    ),
    golden=("powernorm",),
    bench=("power_norm",),
)
