"""Softmax, log-softmax and log-sum-exp, in the two-pass, online and three-pass forms.

    softmax     y = exp(z) / sum(exp(z))        dx = y (dy - sum(y dy))
    log-softmax y = (z - max) - ln(sum)         dx = dy - exp(y) sum(dy)

with z = x, x + mask, or -inf where a boolean mask is False. The two-pass form (Dukhan and Ablavatski, arXiv 2001.04438)
holds every exponential as a pair (v, n), meaning v * 2^n, so that the sum needs no maximum first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from narrowgauge.norm._reference import compute_dtype
from narrowgauge.ops import Sample, SampleMaker, checks, differentiable, library, operator
from narrowgauge.ops.system import system

Algorithm = Literal["auto", "two_pass", "online", "three_pass"]
ALGORITHMS = ("auto", "two_pass", "online", "three_pass")


def _samples(make: SampleMaker) -> Iterator[Sample]:
    wide = compute_dtype(make.dtype)
    for algorithm in ALGORITHMS[1:]:
        yield Sample((make(3, 150), None, False, False, algorithm, None), f"several blocks, {algorithm}")
    yield Sample((make(2, 3, 17, scale=30.0), None, False, False, "auto", None), "an odd row, spread values")
    yield Sample((make(5, 1), None, False, False, "auto", None), "rows of one element")
    yield Sample(
        (make(2, 3, 4, 8), make(3, 1, 8) > 0, False, True, "auto", None), "a boolean mask, dead rows 0"
    )
    yield Sample((make(2, 3, 24), make(3, 24), True, False, "online", None), "an additive mask")
    yield Sample((make(129), None, False, False, "two_pass", wide), "one row, wide output")
    yield Sample((make(0, 8), None, False, False, "auto", None), "no rows")
    yield Sample((make(4, 0), None, False, False, "auto", None), "rows without elements")
    yield Sample((make(6, 40), None, True, False, "auto", None), "logarithm")
    yield Sample((make(6, 40), None, True, False, "two_pass", wide), "logarithm, wide output")
    yield Sample((make(2, 2056), None, False, False, "online", None), "more than one warp's registers")


def _backward_samples(make: SampleMaker) -> Iterator[Sample]:
    wide = compute_dtype(make.dtype)

    def call(*shape: int, log: bool = False, dtype: torch.dtype = make.dtype) -> tuple[Any, ...]:
        y = _normalized(make(*shape, dtype=torch.float64), None, log, False).to(dtype)
        return make(*shape, dtype=dtype), y, None, log, make.dtype

    yield Sample(call(3, 64), "a multiple of every vector width")
    yield Sample(call(3, 1, 17, log=True), "an odd row, logarithm")
    yield Sample(call(6, 40, dtype=wide), "wide output")
    yield Sample(call(0, 8), "no rows")
    yield Sample(call(3, 0), "rows without elements")
    yield Sample(call(2, 2056, log=True), "more than one warp's registers")
    dy, y, _, _, dtype = call(2, 3, 24, log=True)
    yield Sample((dy, y, make(3, 24) > 0, True, dtype), "a boolean mask")


def _row_samples(make: SampleMaker) -> Iterator[Sample]:
    yield Sample((make(3, 150),), "several blocks")
    yield Sample((make(2, 3, 17, scale=30.0),), "an odd row, spread values")
    yield Sample((make(5, 1),), "rows of one element")
    yield Sample((make(0, 8),), "no rows")
    yield Sample((make(3, 0),), "rows without elements")
    yield Sample((make(2, 2056),), "more than one warp's registers")
    yield Sample((make(6, 40),), "a few rows")


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    z = x.to(compute_dtype(x.dtype))
    if mask is None:
        return z
    return z.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else z + mask.to(z.dtype)


def _normalized(x: Tensor, mask: Tensor | None, log: bool, zero_masked: bool) -> Tensor:
    z = _masked(x, mask)
    y = z.log_softmax(-1) if log else z.softmax(-1)
    if zero_masked:
        dead = (z == -math.inf).all(-1, keepdim=True)
        y = y.masked_fill(dead, -math.inf if log else 0.0)
    return y


@operator(
    "softmax(Tensor x, Tensor? mask, bool log, bool zero_masked, str algorithm, ScalarType? out_dtype) -> Tensor",
    samples=_samples,
)
def softmax_op(
    x: Tensor,
    mask: Tensor | None,
    log: bool,
    zero_masked: bool,
    algorithm: str,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """Softmax, or its logarithm, over the last dimension."""
    return _normalized(x, mask, log, zero_masked).to(out_dtype or x.dtype).contiguous()


@operator(
    "softmax_backward(Tensor dy, Tensor y, Tensor? mask, bool log, ScalarType? x_dtype) -> Tensor",
    samples=_backward_samples,
)
def softmax_backward_op(
    dy: Tensor, y: Tensor, mask: Tensor | None, log: bool, x_dtype: torch.dtype | None
) -> Tensor:
    """Gradient of softmax, or of its logarithm, from its result."""
    g, p = dy.to(compute_dtype(y.dtype)), y.to(compute_dtype(y.dtype))
    dx = g - p.exp() * g.sum(-1, keepdim=True) if log else p * (g - (p * g).sum(-1, keepdim=True))
    if mask is not None:
        dx = dx.masked_fill(~mask, 0.0)
    return dx.to(x_dtype or y.dtype).contiguous()


@operator("logsumexp(Tensor x) -> Tensor", samples=_row_samples)
def logsumexp_op(x: Tensor) -> Tensor:
    """ln(sum(exp(x))) over the last dimension."""
    return x.to(compute_dtype(x.dtype)).logsumexp(-1).to(x.dtype).contiguous()


@operator("sum_exp_extended(Tensor x) -> (Tensor mantissa, Tensor exponent)", samples=_row_samples)
def sum_exp_extended_op(x: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of exponentials over the last dimension as mantissa * 2^exponent, mantissa in [1, 2)."""
    z = x.to(compute_dtype(x.dtype))
    most = z.amax(-1) if z.shape[-1] else z.new_full(z.shape[:-1], -math.inf)
    finite = most.isfinite()
    shift = torch.where(finite, most, 0.0).double()
    total = (z.double() - shift.unsqueeze(-1)).exp().sum(-1)
    whole = (shift / math.log(2)).round()
    mantissa, steps = torch.frexp(total * (shift - whole * math.log(2)).exp())
    regular = finite & ~mantissa.isnan()
    mantissa = torch.where(regular, 2 * mantissa, total)
    exponent = torch.where(regular, whole + steps - 1, torch.where(total == 0, -math.inf, 0.0))
    return mantissa.to(z.dtype).contiguous(), exponent.to(z.dtype).contiguous()


def _setup(ctx: Any, args: tuple[Any, ...], y: Tensor) -> Tensor:
    x, mask, ctx.log, _, _, _ = args
    ctx.x_dtype = x.dtype
    ctx.mask_shape = None if mask is None or mask.dtype == torch.bool else (mask.shape, mask.dtype)
    hidden = mask is not None and mask.dtype == torch.bool and ctx.log
    ctx.save_for_backward(y, mask if hidden else None)
    return y


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    y, mask = ctx.saved_tensors
    dx = softmax_backward_op(dy.contiguous(), y, mask, ctx.log, ctx.x_dtype)
    dmask = None
    if ctx.mask_shape is not None and ctx.needs_input_grad[1]:
        shape, dtype = ctx.mask_shape
        wide = softmax_backward_op(dy.contiguous(), y, None, ctx.log, y.dtype) if y.dtype != dx.dtype else dx
        dmask = wide.to(compute_dtype(wide.dtype)).sum_to_size(shape).to(dtype)
    return dx, dmask, None, None, None, None


_softmax = differentiable(softmax_op, forward=softmax_op, setup=_setup, backward=_backward)


def _logsumexp_setup(ctx: Any, args: tuple[Any, ...], lse: Tensor) -> Tensor:
    ctx.save_for_backward(*args)
    return lse


def _logsumexp_backward(ctx: Any, g: Tensor) -> tuple[Tensor]:
    (x,) = ctx.saved_tensors
    y = softmax_op(x, None, False, False, "auto", None)
    return (y.mul_(g.unsqueeze(-1)),)


_logsumexp = differentiable(
    logsumexp_op, forward=logsumexp_op, setup=_logsumexp_setup, backward=_logsumexp_backward
)


def _check_input(function: str, x: Tensor, dim: int) -> int:
    checks.check_floating(function, x=x)
    if not isinstance(dim, int) or not -x.dim() <= dim < x.dim():
        raise ValueError(
            f"{function}: dim must be between {-x.dim()} and {x.dim() - 1} for x of {x.dim()} dimensions, got {dim!r}"
        )
    return dim % x.dim()


def _row_mask(function: str, x: Tensor, dim: int, mask: Tensor) -> Tensor:
    """The mask as the kernels take it: broadcast in the last dimension, `dim` moved there."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{function}: mask must be a tensor, got {type(mask).__name__}")
    companions = (torch.bool, x.dtype) if x.dtype == torch.float64 else (torch.bool, x.dtype, torch.float32)
    if mask.dtype not in companions:
        raise TypeError(
            f"{function}: mask has dtype {mask.dtype} beside x of {x.dtype}; expected "
            f"{', '.join(map(str, dict.fromkeys(companions)))}: boolean (True keeps an element) or added to x"
        )
    checks.check_same_device(function, "x", x, mask=mask)
    sizes = (1,) * (x.dim() - mask.dim()) + tuple(mask.shape)
    if len(sizes) > x.dim() or any(m not in (1, n) for m, n in zip(sizes, x.shape, strict=True)):
        raise ValueError(
            f"{function}: mask has shape {tuple(mask.shape)}, which does not broadcast to that of x, {tuple(x.shape)}"
        )
    mask = mask.reshape(sizes)
    if dim != x.dim() - 1:
        mask = mask.movedim(dim, -1)
    return mask.expand(*mask.shape[:-1], x.shape[dim]).contiguous()


def _apply(
    function: str,
    x: Tensor,
    dim: int,
    algorithm: Algorithm,
    dtype: torch.dtype | None,
    mask: Tensor | None,
    zero_masked: bool,
) -> Tensor:
    log = function == "log_softmax"
    if mask is None and dtype is None and (dim == -1) and library.kernel_checks(x) and x.dim():
        try:
            return _softmax.call_kernel(x, None, log, zero_masked, algorithm, None)
        except (RuntimeError, TypeError):
            pass  # a guard refused: the checks below say which argument
    dim = _check_input(function, x, dim)
    checks.check_choice(function, "algorithm", algorithm, ALGORITHMS)
    if dtype is not None and dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise TypeError(f"{function}: dtype is {dtype}; expected {checks.FLOATING_NAMES}")
    if dtype is not None and dtype != torch.float32:
        x = x.to(dtype)
    elif dtype == torch.float32 and x.dtype == torch.float64:
        x = x.float()
    mask = None if mask is None else _row_mask(function, x, dim, mask)
    rows = x if dim == x.dim() - 1 else x.movedim(dim, -1)
    y = _softmax(rows.contiguous(), mask, log, zero_masked, algorithm, dtype)
    return y if dim == x.dim() - 1 else y.movedim(-1, dim)


def softmax(
    x: Tensor,
    dim: int = -1,
    *,
    algorithm: Algorithm = "auto",
    dtype: torch.dtype | None = None,
    mask: Tensor | None = None,
    zero_masked: bool = False,
) -> Tensor:
    """Softmax along a dimension, optionally of masked values.

    Args:
        x: Input of any shape; float32, bfloat16, float16 or float64; any layout. The last dimension of a contiguous
            tensor is the fast case.
        dim: The dimension that sums to one. Default: the last.
        algorithm: How the CPU kernel sums: ``"two_pass"`` (extended exponents), ``"online"`` (running maximum),
            ``"three_pass"`` (maximum, sum, result), or ``"auto"`` (the default), which chooses by the length. On CUDA a
            row stays in registers, and longer ones take the online form, whatever is asked for.
        dtype: Dtype of the result; x is taken in it, as in ``torch.softmax``. Default: that of x.
        mask: Boolean (False removes an element) or added to x (dtype of x or float32); broadcasts to x. Default: none.
        zero_masked: Give 0 instead of NaN in rows where nothing is left. Default False, as torch.

    Returns:
        A tensor of the shape of x. Sums are float32 (float64 for float64); a row with +inf or NaN is NaN.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: dim, algorithm, a device or the shape of the mask does not fit.

    Source: two-pass form, arXiv 2001.04438.
    """
    return _apply("softmax", x, dim, algorithm, dtype, mask, zero_masked)


def log_softmax(
    x: Tensor,
    dim: int = -1,
    *,
    algorithm: Algorithm = "auto",
    dtype: torch.dtype | None = None,
    mask: Tensor | None = None,
    zero_masked: bool = False,
) -> Tensor:
    """Logarithm of the softmax, as ``(x - max) - ln(sum)``.

    Args:
        x, dim, algorithm, dtype, mask: As in `softmax`.
        zero_masked: Give -inf, the logarithm of 0, instead of NaN in rows where nothing is left. Default False.

    Returns, Raises: As `softmax`.
    """
    return _apply("log_softmax", x, dim, algorithm, dtype, mask, zero_masked)


def logsumexp(x: Tensor, dim: int = -1, keepdim: bool = False) -> Tensor:
    """``ln(sum(exp(x)))`` along a dimension, in one pass over x.

    Args:
        x: Input; float32, bfloat16, float16 or float64; any layout.
        dim: The dimension that is summed. Default: the last.
        keepdim: Keep it, with size 1. Default False.

    Returns:
        A tensor of the dtype of x. -inf where all is -inf, +inf where one element is, NaN where one is NaN.

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: dim is out of range.
    """
    dim = _check_input("logsumexp", x, dim)
    lse = _logsumexp(x.movedim(dim, -1).contiguous())
    return lse.unsqueeze(dim) if keepdim else lse


def sum_exp_extended(x: Tensor) -> tuple[Tensor, Tensor]:
    """``sum(exp(x))`` over the last dimension as ``mantissa * 2**exponent``, which neither overflows nor underflows.

    Two such sums merge by ``E = max(e1, e2)``, ``m = m1 * 2**(e1 - E) + m2 * 2**(e2 - E)``: a vocabulary cut over
    devices needs one maximum and one sum. Has no gradient; `logsumexp` has.

    Args:
        x: Input of shape ``(..., n)``; float32, bfloat16, float16 or float64; any layout.

    Returns:
        mantissa in [1, 2) and the integral exponent, float32 (float64 for float64), of shape ``(...)``. 0 and -inf
        where all is -inf; inf and 0 where one element is +inf; a NaN mantissa where one is NaN.

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: x has no dimension.

    Source: the first pass of arXiv 2001.04438.
    """
    checks.check_floating("sum_exp_extended", x=x)
    if x.dim() == 0:
        raise ValueError("sum_exp_extended: x must have at least one dimension, got a scalar tensor")
    return sum_exp_extended_op(x.detach().contiguous())


class Softmax(nn.Module):
    """Softmax along a dimension; takes the place of `torch.nn.Softmax`.

    Args:
        dim: The dimension that sums to one. Default: the last.
        algorithm, dtype, zero_masked: As in `softmax`.

    ``forward(x, mask=None)``. Without parameters or buffers. Source: arXiv 2001.04438.
    """

    log = False

    def __init__(
        self,
        dim: int = -1,
        *,
        algorithm: Algorithm = "auto",
        dtype: torch.dtype | None = None,
        zero_masked: bool = False,
    ) -> None:
        super().__init__()
        checks.check_choice(type(self).__name__, "algorithm", algorithm, ALGORITHMS)
        self.dim, self.algorithm, self.dtype, self.zero_masked = dim, algorithm, dtype, zero_masked

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        function = "log_softmax" if self.log else "softmax"
        return _apply(function, x, self.dim, self.algorithm, self.dtype, mask, self.zero_masked)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, algorithm={self.algorithm!r}, dtype={self.dtype}, zero_masked={self.zero_masked}"


class LogSoftmax(Softmax):
    """Logarithm of the softmax along a dimension; takes the place of `torch.nn.LogSoftmax`.

    Args:
        dim: The dimension that sums to one. Default: the last.
        algorithm, dtype, zero_masked: As in `log_softmax`.
    """

    log = True


system(
    "softmax",
    title="Two-pass softmax, log-softmax, log-sum-exp",
    source="arXiv 2001.04438",
    page="norm/softmax.md",
    functions=("softmax", "log_softmax", "logsumexp", "sum_exp_extended"),
    modules=("Softmax", "LogSoftmax"),
    operators=("softmax", "softmax_backward", "logsumexp", "sum_exp_extended"),
    golden=("two_pass_softmax",),
    bench=("softmax", "log_softmax"),
)
