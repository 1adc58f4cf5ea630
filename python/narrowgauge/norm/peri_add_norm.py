"""The junction of a Peri-LN transformer (arXiv 2502.02732): normalize a branch, add it to the stream, normalize that.

    x_new = x + RMSNorm(f, weight_out),    y = RMSNorm(x_new, weight_in)

One kernel with two dependent row reductions: f and x are read once, x_new and y written once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from narrowgauge.norm import _arguments, _reference
from narrowgauge.norm._arguments import packed
from narrowgauge.norm._reference import compute_dtype
from narrowgauge.norm.rms_norm import rms_norm_backward_op
from narrowgauge.ops import Sample, SampleMaker, checks, differentiable, library, operator


def _samples(make: SampleMaker) -> Iterator[Sample]:
    wide = torch.float64 if make.dtype == torch.float64 else torch.float32

    def call(*shape: int, out: bool = True, into: bool = True, eps: float = 1e-6, offset: float = 0.0,
             stream: torch.dtype | None = None, weight: torch.dtype | None = None) -> tuple[object, ...]:  # fmt: skip
        weights = (make(shape[-1], dtype=weight) if wanted else None for wanted in (out, into))
        return make(*shape), make(*shape, dtype=stream), *weights, eps, offset

    yield Sample(call(3, 64), "a multiple of every vector width")
    yield Sample(call(2, 3, 17), "three dimensions and an odd row")
    yield Sample(call(5, 1), "rows of one element")
    yield Sample(call(129), "a single row without a batch dimension")
    yield Sample(call(0, 8), "no rows")
    yield Sample(call(4, 0), "rows without elements")
    yield Sample(
        call(70, 33, offset=1.0), "several partial sums of the weight gradients; zero-centred weights"
    )
    yield Sample(call(2, 1032), "longer than one warp's registers")
    yield Sample(call(7, 1029), "an odd row longer than a block's registers; more rows than groups")
    yield Sample(call(6, 40, out=False, into=False, eps=1e-5), "no weights")
    yield Sample(call(6, 40, out=False), "no weight of the branch")
    yield Sample(call(6, 40, stream=wide, weight=wide), "wide stream, wide weights")
    yield Sample(call(6, 40), "small rows")


def _forward(
    f: Tensor,
    x: Tensor,
    weight_out: Tensor | None,
    weight_in: Tensor | None,
    eps: float,
    weight_offset: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    compute = compute_dtype(f.dtype)
    branch, _, _, rstd_out = _reference.forward(
        f, None, weight_out, None, eps, weight_offset, compute, centred=False
    )
    y, s, _, rstd_in = _reference.forward(
        branch, x, weight_in, None, eps, weight_offset, f.dtype, centred=False
    )
    return y, _reference.stored_sum(s, x), rstd_out, rstd_in


@operator(
    "peri_add_norm(Tensor f, Tensor x, Tensor? weight_out, Tensor? weight_in, float eps, float weight_offset)"
    " -> (Tensor y, Tensor x_new)",
    samples=_samples,
)
def peri_add_norm_op(
    f: Tensor,
    x: Tensor,
    weight_out: Tensor | None,
    weight_in: Tensor | None,
    eps: float,
    weight_offset: float,
) -> tuple[Tensor, Tensor]:
    """x_new = x + norm(f), in the dtype of x, and y, the norm of the un-rounded x_new, in the dtype of f."""
    return _forward(f, x, weight_out, weight_in, eps, weight_offset)[:2]


@operator(
    "peri_add_norm_forward(Tensor f, Tensor x, Tensor? weight_out, Tensor? weight_in, float eps, float weight_offset)"
    " -> (Tensor y, Tensor x_new, Tensor rstd_out, Tensor rstd_in)",
    samples=_samples,
)
def peri_add_norm_forward_op(
    f: Tensor,
    x: Tensor,
    weight_out: Tensor | None,
    weight_in: Tensor | None,
    eps: float,
    weight_offset: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As peri_add_norm, with the rstd of each row of f and of x_new for the backward."""
    return _forward(f, x, weight_out, weight_in, eps, weight_offset)


def _backward_samples(make: SampleMaker) -> Iterator[Sample]:
    for i, sample in enumerate(_samples(make)):
        f, x, weight_out, weight_in, _, weight_offset = sample.args
        _, x_new, *statistics = _forward(*sample.args)
        dx_new = None if i == 1 else make(*x.shape, dtype=x.dtype)
        yield Sample(
            (make(*f.shape), dx_new, f, x_new, *statistics, weight_out, weight_in, weight_offset, i != 0),
            sample.why,
        )


@operator(
    "peri_add_norm_backward(Tensor dy, Tensor? dx_new, Tensor f, Tensor x_new, Tensor rstd_out, Tensor rstd_in,"
    " Tensor? weight_out, Tensor? weight_in, float weight_offset, bool weight_gradients)"
    " -> (Tensor df, Tensor dx, Tensor dweight_out, Tensor dweight_in)",
    samples=_backward_samples,
)
def peri_add_norm_backward_op(
    dy: Tensor,
    dx_new: Tensor | None,
    f: Tensor,
    x_new: Tensor,
    rstd_out: Tensor,
    rstd_in: Tensor,
    weight_out: Tensor | None,
    weight_in: Tensor | None,
    weight_offset: float,
    weight_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All gradients in one pass over dy, dx_new, f and x_new; dx_new is the gradient that arrived at x_new."""
    compute = compute_dtype(f.dtype)

    def through_norm(
        g: Tensor, s: Tensor, rstd: Tensor, weight: Tensor | None, added: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        d, dweight, _ = _reference.backward(
            g.to(compute),
            s.to(compute),
            None,
            rstd,
            weight,
            None,
            added,
            weight_offset,
            weight_gradients,
        )
        return d, dweight

    dx, dweight_in = through_norm(dy, x_new, rstd_in, weight_in, dx_new)
    df, dweight_out = through_norm(dx, f, rstd_out, weight_out, None)
    return df.to(f.dtype), dx.to(x_new.dtype), dweight_out, dweight_in


def _setup(ctx: Any, args: tuple[Any, ...], results: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    f, _, weight_out, weight_in, _, ctx.weight_offset = args
    y, x_new, rstd_out, rstd_in = results
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(f, x_new, rstd_out, rstd_in, weight_out, weight_in)
    return y, x_new


def _gradients(ctx: Any, dy: Tensor | None, dx_new: Tensor | None) -> tuple[Tensor | None, ...]:
    if dx_new is not None:
        dx_new = dx_new.contiguous()
    for_out, for_in = ctx.needs_input_grad[2:4]
    dweight_in: Tensor | None
    if dy is not None:
        df, dx, dweight_out, dweight_in = peri_add_norm_backward_op(
            dy.contiguous(), dx_new, *ctx.saved_tensors, ctx.weight_offset, for_out or for_in
        )
    elif dx_new is not None:  # only the sum was used: the second norm has no part in it
        f, _, rstd_out, _, weight_out, _ = ctx.saved_tensors
        df, dweight_out, _ = rms_norm_backward_op(
            dx_new, f, rstd_out, weight_out, None, None, ctx.weight_offset, for_out
        )
        dx, dweight_in = dx_new, None
    else:
        return (None,) * 6
    return df, dx, dweight_out if for_out else None, dweight_in if for_in else None, None, None


_peri_add_norm = differentiable(
    peri_add_norm_op, forward=peri_add_norm_forward_op, setup=_setup, backward=_gradients
)


def peri_add_norm(
    f: Tensor,
    x: Tensor,
    w_out: Tensor | None = None,
    w_in: Tensor | None = None,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``x_new = x + rms_norm(f, w_out)`` and ``y = rms_norm(x_new, w_in)``, in one pass over memory.

    Args:
        f: Output of a sub-layer, shape ``(..., d)``; float32, bfloat16, float16 or float64; any layout.
        x: Residual stream, shape of f, in the dtype of f or float32.
        w_out: Weight of the norm of f, shape ``(d,)``, in the dtype of f or float32. Default: none.
        w_in: Weight of the norm that the next sub-layer reads through, likewise.
        eps: Added to both mean squares. Default 1e-6.
        weight_offset: Added to both weights; 1 for zero-centred weights, as in Gemma. Default 0.

    Returns:
        ``(y, x_new)``: the next sub-layer's input in the dtype of f, and the new stream in that of x. The norm is taken
        of the un-rounded sum.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, a device or eps does not fit.

    Source: arXiv 2502.02732.
    """
    if library.kernel_checks(f) and library.kernel_checks(x):
        try:
            return _peri_add_norm.call_kernel(f, x, w_out, w_in, eps, weight_offset)
        except (RuntimeError, TypeError):
            pass  # a guard refused: the checks below say which argument
    (d,) = _arguments.last_size("peri_add_norm", f, "f")
    if not isinstance(x, Tensor):
        raise TypeError(f"peri_add_norm: x must be a tensor, got {type(x).__name__}")
    checks.check_floating("peri_add_norm", f=f, x=x, w_out=w_out, w_in=w_in)
    checks.check_eps("peri_add_norm", eps)
    checks.check_same_device("peri_add_norm", "f", f, x=x, w_out=w_out, w_in=w_in)
    if x.shape != f.shape:
        raise ValueError(f"peri_add_norm: x has shape {tuple(x.shape)}; expected that of f, {tuple(f.shape)}")
    for name, weight in (("w_out", w_out), ("w_in", w_in)):
        if weight is not None and tuple(weight.shape) != (d,):
            raise ValueError(f"peri_add_norm: {name} has shape {tuple(weight.shape)}; expected ({d},)")
    _arguments.check_companions("peri_add_norm", f, "f", x=x, w_out=w_out, w_in=w_in)
    return _peri_add_norm(f.contiguous(), x.contiguous(), packed(w_out), packed(w_in), eps, weight_offset)
