"""The layers of Pre-RMSNorm and Pre-CRMSNorm transformers (Jiang et al., arXiv 2305.14858).

CRMSNorm is RMSNorm of a zero-mean vector that is stored without its last entry, which is minus the sum of the others:

    y = x * rstd,    rstd = 1 / sqrt((sum(x^2) + sum(x)^2) / (k + 1) + eps)

over the k stored entries. `narrowgauge.convert.convert_pre_ln_to_rms` rewrites models into these forms.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from narrowgauge.norm import _arguments, _reference
from narrowgauge.ops import Sample, SampleMaker, checks, differentiable, library, operator, system

SHAPES = (
    ((3, 64), "a multiple of every vector width"),
    ((2, 3, 17), "three dimensions and an odd row"),
    ((5, 1), "rows of one stored entry"),
    ((129,), "a single row without a batch dimension"),
    ((0, 8), "no rows"),
    ((4, 0), "nothing stored: a zero-mean vector of one entry"),
    ((2, 1028), "longer than one warp's registers"),
)


def _samples(make: SampleMaker) -> Iterator[Sample]:
    for shape, why in SHAPES:
        yield Sample((make(*shape), 1e-5), why)
    yield Sample((make(6, 40, scale=1e-4), 1e-6), "eps dominates")


def _backward_samples(make: SampleMaker) -> Iterator[Sample]:
    for shape, why in SHAPES:
        x = make(*shape)
        yield Sample((make(*shape), x, _compressed_rms(x, 1e-5)[1]), why)


def _compressed_rms(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y in the compute dtype, and rstd."""
    s = x.to(_reference.compute_dtype(x.dtype))
    squares = s.square().sum(-1) + s.sum(-1).square()
    rstd = (squares / (x.shape[-1] + 1) + eps).rsqrt()
    return s * rstd.unsqueeze(-1), rstd


@operator("crms_norm(Tensor x, float eps) -> Tensor", samples=_samples)
def crms_norm_op(x: Tensor, eps: float) -> Tensor:
    """y, for calls that need no gradient."""
    return _compressed_rms(x, eps)[0].to(x.dtype).contiguous()


@operator("crms_norm_forward(Tensor x, float eps) -> (Tensor y, Tensor rstd)", samples=_samples)
def crms_norm_forward_op(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y, and rstd of each row for the backward."""
    y, rstd = _compressed_rms(x, eps)
    return y.to(x.dtype).contiguous(), rstd


@operator("crms_norm_backward(Tensor dy, Tensor x, Tensor rstd) -> Tensor dx", samples=_backward_samples)
def crms_norm_backward_op(dy: Tensor, x: Tensor, rstd: Tensor) -> Tensor:
    """dx = rstd * (dy - c * (y + sum(y))) with c = sum(dy * y) / (k + 1)."""
    compute = _reference.compute_dtype(x.dtype)
    g, scale = dy.to(compute), rstd.unsqueeze(-1)
    y = x.to(compute) * scale
    c = (g * y).sum(-1, keepdim=True) / (x.shape[-1] + 1)
    return ((g - c * (y + y.sum(-1, keepdim=True))) * scale).to(x.dtype).contiguous()


def _setup(ctx: Any, args: tuple[Tensor, float], results: tuple[Tensor, Tensor]) -> Tensor:
    y, rstd = results
    ctx.save_for_backward(args[0], rstd)
    return y


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    return crms_norm_backward_op(dy.contiguous(), *ctx.saved_tensors), None


_crms_norm = differentiable(crms_norm_op, forward=crms_norm_forward_op, setup=_setup, backward=_gradients)


def crms_norm(x: Tensor, eps: float = 1e-5) -> Tensor:
    """RMSNorm of zero-mean vectors that are stored without their last entry, over the last dimension.

    Args:
        x: The stored entries, shape ``(..., k)``; float32, bfloat16, float16 or float64; any layout.
        eps: Added to the mean square of the k + 1 entries. Default 1e-5.

    Returns:
        The first k entries of the normalized vectors: a tensor of the shape and dtype of x. Statistics and arithmetic
        are float32 (float64 for float64), rounded once.

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: x has no dimension, or eps does not fit.

    Source: arXiv 2305.14858.
    """
    if library.kernel_checks(x):
        try:
            return _crms_norm.call_kernel(x, eps)
        except (RuntimeError, TypeError):
            pass  # a guard refused: the checks below say which argument
    _arguments.last_size("crms_norm", x)
    checks.check_floating("crms_norm", x=x)
    checks.check_eps("crms_norm", eps)
    return _crms_norm(x.contiguous(), eps)


class CRMSNorm(nn.Module):
    """RMSNorm of zero-mean vectors that are stored without their last entry. It has no parameters.

    Args:
        dim: How many entries are stored: one less than the width of the vectors.
        eps: Added to the mean square. Default 1e-5.

    Weight and bias of the LayerNorm that it replaces are folded into the next linear layer, because the entry that is
    not stored would need its own. Source: arXiv 2305.14858.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        checks.check_eps("CRMSNorm", eps)
        (self.dim,) = _arguments.as_sizes(dim)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        _arguments.normalized_sizes("CRMSNorm", x, (self.dim,))
        return crms_norm(x, self.eps)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}"


class ZeroMeanLinear(nn.Linear):
    """A linear layer whose output has mean zero: it computes with its weight and bias re-centred over the outputs.

    In place of the layers that write into the residual stream of a Pre-LN transformer, it lets the LayerNorms that read
    the stream be RMSNorms, in training too: the gradients are those of the LayerNorm model. Parameters, initialization
    and state_dict are those of ``torch.nn.Linear``. Source: arXiv 2305.14858.
    """

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias - self.bias.mean()
        return F.linear(x, self.weight - self.weight.mean(0), bias)


system(
    "pre_rms_norm",
    title="Pre-RMSNorm and Pre-CRMSNorm",
    source="arXiv 2305.14858",
    page="norm/pre_rmsnorm.md",
    functions=("crms_norm", "convert.convert_pre_ln_to_rms"),
    modules=("CRMSNorm", "ZeroMeanLinear"),
    operators=("crms_norm", "crms_norm_forward", "crms_norm_backward"),
    golden=("pre_rmsnorm",),
    bench=("crms_norm", "convert_pre_ln_to_rms"),
)
