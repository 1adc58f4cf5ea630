"""L1 batch normalization of images: the mean absolute deviation of each channel in place of its standard deviation.

Written in PyTorch operations, without kernels of its own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from narrowgauge.norm.l1_norm import factor_of
from narrowgauge.ops import checks

CHANNELS = (0, 2, 3)  # what a channel is averaged over


class _AllReduce(torch.autograd.Function):
    """A sum over the processes whose gradient is again a sum over the processes."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        ctx.group = group
        value = value.clone()
        dist.all_reduce(value, group=group)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class L1BatchNorm2d(nn.Module):
    """Batch normalization by the mean absolute deviation; has the place and the arguments of `torch.nn.BatchNorm2d`.

    In training, each channel is centred on its mean, divided by ``factor * mean(|x - mean|) + eps``, and the running
    values move by `momentum` towards those of the batch. Evaluation uses the running values.

    Args:
        num_features: Number of channels, the second dimension of the input.
        eps: Added to the scaled deviation (there is no root). Default 1e-5.
        momentum: Weight of the new batch in the running values, as in ``torch.nn``: the older L1 layers write
            ``1 - momentum``. None: the average of all batches. Default 0.1.
        affine: Learn a weight and a bias. Default True.
        track_running_stats: Keep running values; without them, evaluation normalizes like training. Default True.
        gaussian_scale: Multiply the deviation by sqrt(pi / 2). Default True.
        process_group: Processes whose batches are normalized as one, in two rounds of communication: the deviation
            needs the common mean first. Default None: each on its own.

    Attributes:
        running_mean: Buffer, starts at 0.
        running_deviation: Buffer, the scaled deviation without eps, starts at 1.
        num_batches_tracked: Buffer.

    In the style of arXiv 1802.09769 and 2411.10948 (whose text was not available).
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_deviation: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        gaussian_scale: bool = True,
        *,
        process_group: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.check_eps("L1BatchNorm2d", eps)
        if momentum is not None and not (isinstance(momentum, (int, float)) and 0 <= momentum <= 1):
            raise ValueError(f"L1BatchNorm2d: momentum must be between 0 and 1 or None, got {momentum!r}")
        self.num_features, self.eps, self.momentum, self.affine = num_features, eps, momentum, affine
        self.track_running_stats, self.gaussian_scale = track_running_stats, gaussian_scale
        self.process_group = process_group
        for name in ("weight", "bias"):
            values = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)) if affine else None
            self.register_parameter(name, values)
        for name in ("running_mean", "running_deviation"):
            running = torch.empty(num_features, device=device, dtype=dtype) if track_running_stats else None
            self.register_buffer(name, running)
        self.register_buffer(
            "num_batches_tracked", torch.tensor(0, device=device) if track_running_stats else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets weight and running deviation to one, and everything else to zero."""
        for ones in (self.weight, self.running_deviation):
            if ones is not None:
                nn.init.ones_(ones)
        for zeros in (self.bias, self.running_mean, self.num_batches_tracked):
            if zeros is not None:
                nn.init.zeros_(zeros)

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        checks.check_floating("L1BatchNorm2d", x=x)
        if x.dim() != 4 or x.shape[1] != self.num_features:
            raise ValueError(
                f"L1BatchNorm2d: x has shape {tuple(x.shape)}; expected (N, {self.num_features}, H, W)"
            )
        if mask is not None and (mask.dtype != torch.bool or mask.shape != (x.shape[0], *x.shape[2:])):
            raise ValueError(
                f"L1BatchNorm2d: mask is {mask.dtype} of shape {tuple(mask.shape)}; "
                f"expected torch.bool of shape {(x.shape[0], *x.shape[2:])}"
            )
        alone = self.process_group is None
        if self._uses_batch and mask is None and alone and x.numel() <= self.num_features:
            raise ValueError(
                "L1BatchNorm2d: expected more than 1 value per channel when training, "
                f"got x of shape {tuple(x.shape)}"
            )

    @property
    def _uses_batch(self) -> bool:
        return self.training or self.running_mean is None

    def _summed(self, *values: Tensor) -> list[Tensor]:
        """Over the processes, in one round."""
        if self.process_group is None:
            return list(values)
        packed = torch.cat([value.flatten() for value in values])
        return list(_AllReduce.apply(packed, self.process_group).split([value.numel() for value in values]))

    def _batch_values(self, s: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and scaled deviation of each channel, in shapes that broadcast against s."""
        inside = s.new_ones(()) if mask is None else mask.unsqueeze(1).to(s.dtype)
        size = s.new_tensor(s.numel() / self.num_features if s.numel() else 0)
        total, size = self._summed(
            (s * inside).sum(CHANNELS), (size if mask is None else inside.sum()).reshape(1)
        )
        size = size.clamp(min=1)
        mean = (total / size).view(1, -1, 1, 1)
        (distance,) = self._summed(((s - mean).abs() * inside).sum(CHANNELS))
        return mean, (distance / size * factor_of(self.gaussian_scale)).view(1, -1, 1, 1)

    @torch.no_grad()
    def _track(self, mean: Tensor, deviation: Tensor) -> None:
        if self.running_mean is None or self.running_deviation is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        weight = 1 / self.num_batches_tracked.double() if self.momentum is None else self.momentum
        for running, value in ((self.running_mean, mean), (self.running_deviation, deviation)):
            running.copy_(running * (1 - weight) + value.flatten() * weight)  # rounded to its dtype

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The normalized input.

        Args:
            x: Shape ``(N, num_features, H, W)``.
            mask: Boolean of shape ``(N, H, W)``: where False, a position does not count in the batch's mean and
                deviation; it is normalized all the same.
        """
        self._check(x, mask)
        s = x.to(torch.promote_types(x.dtype, torch.float32))
        if self._uses_batch:
            mean, deviation = self._batch_values(s, mask)
            if self.training:
                self._track(mean, deviation)
        else:
            assert self.running_mean is not None
            assert self.running_deviation is not None
            mean, deviation = (
                v.to(s.dtype).view(1, -1, 1, 1) for v in (self.running_mean, self.running_deviation)
            )
        y = (s - mean) / (deviation + self.eps)
        if self.weight is not None and self.bias is not None:
            y = y * self.weight.to(s.dtype).view(1, -1, 1, 1) + self.bias.to(s.dtype).view(1, -1, 1, 1)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}, gaussian_scale={self.gaussian_scale}"
        )
