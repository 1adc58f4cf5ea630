"""The general row norm: every option of this family in one pair of operators, for LayerNorm and RMSNorm alike.

    s = dropout(x * rowscale) (+ dropout(x1)) (+ residual)
    y = (x_hat * (weight + weight_offset) + bias) * output_scale        x_hat: s normalized
    y1, from weight1 and bias1, likewise

The order of the steps is flash-attention's. `layer_norm.py` and `rms_norm.py` keep lean operators of their own for the
plain norm and the plain residual add; what needs more than those comes here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from narrowgauge.norm import _arguments
from narrowgauge.norm._arguments import Masks, packed
from narrowgauge.norm._reference import compute_dtype
from narrowgauge.ops import Differentiable, Sample, SampleMaker, differentiable, operator
from narrowgauge.ops.random import philox_words, uniform

_ARGUMENTS = (
    "(Tensor x, Tensor? residual, Tensor? x1, Tensor? rowscale, Tensor? weight, Tensor? bias, Tensor? weight1,"
    " Tensor? bias1, Tensor? dropout_mask, Tensor? dropout_mask1, Tensor? rng, float dropout_p, float eps,"
    " float weight_offset, float output_scale, bool centred, str casting, ScalarType? out_dtype,"
    " ScalarType? residual_dtype, bool keep_sum)"
)


def keep_mask(
    mask: Tensor | None, rng: Tensor | None, draw: int, x: Tensor, dropout_p: float
) -> Tensor | None:
    """What dropout keeps of x (draw 0) or x1 (draw 1), or None where there is no dropout.

    The bits of draw k are those of Philox at ``[seed, offset + k]``; an element is kept when its number is at least
    `dropout_p` (as float32).
    """
    if mask is not None or rng is None:
        return mask
    words = philox_words(torch.stack((rng[0], rng[1] + draw)), x.numel())
    return (uniform(words) >= dropout_p).view(x.shape)


def dropout_scale(dropout_p: float) -> float:
    """What kept elements are multiplied by."""
    return 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0


def dropped(branch: Tensor, keep: Tensor | None, dropout_p: float) -> Tensor:
    """`branch` after dropout."""
    if keep is None:
        return branch
    return torch.where(keep, branch * dropout_scale(dropout_p), torch.zeros_like(branch))


def _forward(
    x: Tensor,
    residual: Tensor | None,
    x1: Tensor | None,
    rowscale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    weight1: Tensor | None,
    bias1: Tensor | None,
    dropout_mask: Tensor | None,
    dropout_mask1: Tensor | None,
    rng: Tensor | None,
    dropout_p: float,
    eps: float,
    weight_offset: float,
    output_scale: float,
    centred: bool,
    casting: str,
    out_dtype: torch.dtype | None,
    residual_dtype: torch.dtype | None,
    keep_sum: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    compute = compute_dtype(x.dtype)
    s = x.to(compute)
    if rowscale is not None:
        s = s * rowscale.to(compute).unsqueeze(-1)
    s = dropped(s, keep_mask(dropout_mask, rng, 0, x, dropout_p), dropout_p)
    if x1 is not None:
        s = s + dropped(x1.to(compute), keep_mask(dropout_mask1, rng, 1, x, dropout_p), dropout_p)
    if residual is not None:
        s = s + residual.to(compute)

    def early(value: Tensor) -> Tensor:
        """Rounded to the dtype of x, unless the result alone is rounded."""
        return value if casting == "gemma" else value.to(x.dtype).to(compute)

    mean = s.mean(-1, keepdim=True) if centred else s.new_empty(0)
    deviation = s - mean if centred else s
    squares = deviation.square()
    rstd = (squares.mean(-1, keepdim=True) + eps).rsqrt()
    factor = rstd
    if casting == "none":
        factor = early(early(early(early(squares).mean(-1, keepdim=True)) + eps).rsqrt())
    x_hat = early(deviation * factor)

    def affine(weight: Tensor | None, bias: Tensor | None) -> Tensor:
        y = x_hat
        if weight is not None:
            y = early(y * early(weight.to(compute) + weight_offset))
        if bias is not None:
            y = early(y + early(bias.to(compute)))
        return (y * output_scale).to(out_dtype or x.dtype, copy=True).contiguous()

    y = affine(weight, bias)
    y1 = y.flatten()[:0].clone() if weight1 is None and bias1 is None else affine(weight1, bias1)
    stored = residual_dtype or (x.dtype if residual is None else residual.dtype)
    kept = s if keep_sum else s.flatten()[:0]
    residual_out = kept.to(stored, copy=True, memory_format=torch.contiguous_format)
    return y, residual_out, y1, mean.squeeze(-1) if centred else mean, rstd.squeeze(-1)


def _call(make: SampleMaker, shape: tuple[int, ...], **options: Any) -> tuple[Any, ...]:
    """A call of the forward; a name with True stands for a random tensor that fits."""
    d, rows = shape[-1], shape[:-1]
    wide = torch.float64 if make.dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(len(options))

    def mask() -> Tensor:
        return (torch.rand(shape, generator=generator) > 0.3).to(make.device)

    made: dict[str, Callable[[], Any]] = {
        "residual": lambda: make(*shape),
        "wide_residual": lambda: make(*shape, dtype=wide),
        "x1": lambda: make(*shape),
        "rowscale": lambda: make(*rows, dtype=wide),
        "weight": lambda: make(d),
        "bias": lambda: make(d),
        "weight1": lambda: make(d, dtype=wide),
        "bias1": lambda: make(d, dtype=wide),
        "dropout_mask": mask,
        "dropout_mask1": mask,
        "rng": lambda: torch.tensor([-0x123456789ABCDEF, 2**40 + 5], device=make.device),
        "out_dtype": lambda: wide,
        "residual_dtype": lambda: wide,
    }
    values: dict[str, Any] = {
        name: made[name]() if value is True and name in made else value for name, value in options.items()
    }
    return (
        make(*shape),
        values.get("residual", values.get("wide_residual")),
        *(values.get(name) for name in ("x1", "rowscale", "weight", "bias", "weight1", "bias1")),
        *(values.get(name) for name in ("dropout_mask", "dropout_mask1", "rng")),
        values.get("dropout_p", 0.3 if {"rng", "dropout_mask"} & set(options) else 0.0),
        1e-5,
        values.get("weight_offset", 0.0),
        values.get("output_scale", 1.0),
        values.get("centred", False),
        values.get("casting", "gemma"),
        values.get("out_dtype"),
        values.get("residual_dtype"),
        values.get("keep_sum", True),
    )


def _samples(make: SampleMaker) -> Iterator[Sample]:
    def call(*shape: int, **options: Any) -> tuple[Any, ...]:
        return _call(make, shape, **options)

    pair = {"weight": True, "weight1": True, "bias1": True}
    yield Sample(call(6, 40, residual=True, rng=True, weight=True), "dropout drawn in the kernel")
    yield Sample(
        call(2, 3, 17, residual=True, x1=True, rng=True, **pair, bias=True, centred=True, weight_offset=1.0),
        "two branches, two outputs, odd rows",
    )
    yield Sample(
        call(6, 40, x1=True, rowscale=True, dropout_mask=True, dropout_mask1=True, weight=True, centred=True,
             residual_dtype=True, out_dtype=True),
        "given masks, factors of rows, no residual, wide results",
    )  # fmt: skip
    yield Sample(
        call(6, 40, casting="llama", output_scale=0.5, weight=True, bias=True, weight_offset=1.0, keep_sum=False),
        "rounded before the weight, scaled",
    )  # fmt: skip
    yield Sample(call(6, 40, casting="none", weight=True, keep_sum=False), "everything in the dtype of x")
    yield Sample(
        call(6, 40, wide_residual=True, x1=True, weight1=True, keep_sum=False, centred=True),
        "a wide residual that is not kept, a second output alone with a weight",
    )
    yield Sample(call(0, 8, residual=True, rng=True, **pair), "no rows")
    yield Sample(call(4, 0, residual=True, rng=True, **pair), "rows without elements")
    yield Sample(
        call(2, 1028, residual=True, x1=True, rowscale=True, rng=True, **pair, bias=True),
        "longer than one warp's registers",
    )


@operator("general_norm" + _ARGUMENTS + " -> (Tensor y, Tensor residual_out, Tensor y1)", samples=_samples)
def general_norm_op(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """y, the sum s unless ``keep_sum`` is false, and y1 where there is weight1 or bias1; else they are empty."""
    return _forward(*args)[:3]


@operator(
    "general_norm_forward"
    + _ARGUMENTS
    + " -> (Tensor y, Tensor residual_out, Tensor y1, Tensor mean, Tensor rstd)",
    samples=_samples,
)
def general_norm_forward_op(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As general_norm, with mean (empty unless centred) and rstd of each row for the backward.

    Without `keep_sum` the sum is empty only where it would be x.
    """
    return _forward(*(*args[:-1], args[-1] or anything_added(args)))


def anything_added(args: tuple[Any, ...]) -> bool:
    """Whether the sum is more than x."""
    _, residual, x1, rowscale, *_ = args
    mask, rng = args[8], args[10]
    return not (residual is x1 is rowscale is mask is rng is None)


def _backward_samples(make: SampleMaker) -> Iterator[Sample]:
    def call(*shape: int, from_output: bool = False, for_x1: bool = False, affine_gradients: bool = True,
             **options: Any) -> tuple[Any, ...]:  # fmt: skip
        args = _call(make, shape, x1=for_x1 or None, **options)
        y, s, y1, mean, rstd = _forward(*(*args[:-1], True))
        _, residual, _, rowscale, *affine, mask, mask1, rng, p, _, offset, scale, centred = args[:16]
        return (
            make(*shape, dtype=y.dtype),
            make(*shape, dtype=y.dtype) if y1.shape == y.shape else None,
            y if from_output else s,
            mean if centred and not from_output else None,
            rstd,
            *affine,
            make(*shape, dtype=s.dtype) if options.get("dresidual") else None,
            *(rowscale, mask, mask1, rng, p, offset, scale, centred, from_output, 0.125),
            make.dtype,
            make.dtype if residual is None else residual.dtype,
            *(residual is not None, for_x1, affine_gradients),
        )

    everything = {
        "weight": True,
        "bias": True,
        "weight1": True,
        "bias1": True,
        "dresidual": True,
        "rng": True,
    }
    yield Sample(
        call(6, 40, residual=True, weight=True, centred=True), "nothing to scale: one gradient for all"
    )
    yield Sample(
        call(70, 33, residual=True, for_x1=True, **everything, centred=True, weight_offset=1.0),
        "two branches, two outputs, odd rows, several partial sums",
    )
    yield Sample(
        call(6, 40, for_x1=True, rowscale=True, dropout_mask=True, dropout_mask1=True, weight=True, weight1=True,
             residual_dtype=True, out_dtype=True),
        "given masks, factors of rows, no residual, wide gradients",
    )  # fmt: skip
    yield Sample(
        call(
            6, 40, wide_residual=True, dresidual=True, dropout_mask=True, weight=True, affine_gradients=False
        ),
        "a wide residual, frozen weight",
    )
    yield Sample(
        call(6, 40, from_output=True, weight=True, bias=True, centred=True, output_scale=0.5),
        "x_hat recovered from the output",
    )
    yield Sample(call(3, 2, 17, from_output=True, bias=True), "the same, without a weight, odd rows")
    yield Sample(call(0, 8, residual=True, for_x1=True, **everything), "no rows")
    yield Sample(call(4, 0, residual=True, for_x1=True, **everything), "rows without elements")
    yield Sample(call(2, 1028, residual=True, for_x1=True, **everything), "longer than one warp's registers")


@operator(
    "general_norm_backward(Tensor dy, Tensor? dy1, Tensor s, Tensor? mean, Tensor rstd, Tensor? weight, Tensor? bias,"
    " Tensor? weight1, Tensor? bias1, Tensor? dresidual, Tensor? rowscale, Tensor? dropout_mask,"
    " Tensor? dropout_mask1, Tensor? rng, float dropout_p, float weight_offset, float output_scale, bool centred,"
    " bool from_output, float min_weight, ScalarType? x_dtype, ScalarType? residual_dtype, bool for_residual,"
    " bool for_x1, bool affine_gradients)"
    " -> (Tensor dx, Tensor dresidual_in, Tensor dx1, Tensor dweight, Tensor dbias, Tensor dweight1, Tensor dbias1)",
    samples=_backward_samples,
)
def general_norm_backward_op(
    dy: Tensor,
    dy1: Tensor | None,
    s: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    weight1: Tensor | None,
    bias1: Tensor | None,
    dresidual: Tensor | None,
    rowscale: Tensor | None,
    dropout_mask: Tensor | None,
    dropout_mask1: Tensor | None,
    rng: Tensor | None,
    dropout_p: float,
    weight_offset: float,
    output_scale: float,
    centred: bool,
    from_output: bool,
    min_weight: float,
    x_dtype: torch.dtype | None,
    residual_dtype: torch.dtype | None,
    for_residual: bool,
    for_x1: bool,
    affine_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All gradients in one pass; dresidual_in and dx1 are empty where they would repeat dx.

    With `from_output`, s is y and x_hat is recovered from it, the weight held away from zero by `min_weight`.
    """
    x_dtype = x_dtype or s.dtype
    residual_dtype = residual_dtype or x_dtype
    compute = compute_dtype(x_dtype)

    def scale_of(weight: Tensor | None) -> Tensor:
        return dy.new_ones((), dtype=compute) if weight is None else weight.to(compute) + weight_offset

    wide, factor = s.to(compute), rstd.unsqueeze(-1)
    if from_output:
        divisor = scale_of(weight)
        held = torch.full_like(divisor, min_weight).copysign(divisor)
        divisor = torch.where(divisor.abs() < min_weight, held, divisor)
        x_hat = (wide / output_scale - (0 if bias is None else bias.to(compute))) / divisor
    else:
        x_hat = wide * factor if mean is None else (wide - mean.unsqueeze(-1)) * factor
    g = dy.to(compute) * output_scale
    g1 = None if dy1 is None else dy1.to(compute) * output_scale
    h = g * scale_of(weight)
    if g1 is not None:
        h = h + g1 * scale_of(weight1)
    ds = h - x_hat * (h * x_hat).mean(-1, keepdim=True)
    if centred:
        ds = ds - h.mean(-1, keepdim=True)
    ds = ds * factor
    if dresidual is not None:
        ds = ds + dresidual.to(compute)

    how = Rescaling.of(rowscale, dropout_mask, dropout_mask1, rng, x_dtype, residual_dtype)
    dx = dropped(ds, keep_mask(dropout_mask, rng, 0, s, dropout_p), dropout_p)
    if rowscale is not None:
        dx = dx * rowscale.to(compute).unsqueeze(-1)
    dx1 = dropped(ds, keep_mask(dropout_mask1, rng, 1, s, dropout_p), dropout_p)

    def result(gradient: Tensor, dtype: torch.dtype, wanted: bool = True) -> Tensor:
        if not wanted:
            return gradient.new_empty(0, dtype=dtype)
        return gradient.to(dtype, copy=True, memory_format=torch.contiguous_format)

    def summed(parameter: Tensor | None, terms: Tensor | None) -> Tensor:
        if parameter is None or terms is None or not affine_gradients:
            return dy.new_empty(0, dtype=compute if parameter is None else parameter.dtype)
        return (terms.flatten(0, -2).sum(0) if terms.dim() > 1 else terms).to(parameter.dtype)

    return (
        result(dx, x_dtype),
        result(ds, residual_dtype, for_residual and how.residual_apart),
        result(dx1, x_dtype, for_x1 and how.x1_apart),
        summed(weight, g * x_hat),
        summed(bias, g),
        summed(weight1, None if g1 is None else g1 * x_hat),
        summed(bias1, g1),
    )


@dataclass(frozen=True)
class Rescaling:
    """Whether the gradients of residual and x1 are tensors of their own, or that of x."""

    residual_apart: bool
    x1_apart: bool

    @staticmethod
    def of(
        rowscale: Tensor | None,
        dropout_mask: Tensor | None,
        dropout_mask1: Tensor | None,
        rng: Tensor | None,
        x_dtype: torch.dtype,
        residual_dtype: torch.dtype,
    ) -> Rescaling:
        x_scaled = not (rowscale is None and dropout_mask is None and rng is None)
        return Rescaling(
            x_scaled or x_dtype != residual_dtype, x_scaled or not (dropout_mask1 is None and rng is None)
        )


def _setup(ctx: Any, args: tuple[Any, ...], results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, residual, x1, rowscale, weight, bias, weight1, bias1, mask, mask1, rng, p = args[:12]
    y, residual_out, y1, mean, rstd = results
    _, ctx.weight_offset, ctx.output_scale, ctx.centred, _, _, _, keep_sum = args[12:]
    ctx.dropout_p, ctx.x_dtype, ctx.has_x1 = p, x.dtype, x1 is not None
    ctx.residual_dtype = x.dtype if residual is None else residual.dtype
    ctx.has_residual, ctx.second = residual is not None, not (weight1 is bias1 is None)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        residual_out if anything_added(args) else x,
        mean if ctx.centred else None,
        *(rstd, weight, bias, weight1, bias1, rowscale, mask, mask1, rng),
        x if rowscale is not None and rowscale.requires_grad else None,
    )
    return y, residual_out if keep_sum else residual_out.new_empty(0), y1


def _gradients(
    ctx: Any, dy: Tensor | None, dresidual: Tensor | None, dy1: Tensor | None
) -> tuple[Tensor | None, ...]:
    s, mean, rstd, weight, bias, weight1, bias1, rowscale, mask, mask1, rng, x = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    if dresidual is not None and dresidual.shape != s.shape:  # the sum was not returned
        dresidual = None
    dy1 = dy1.contiguous() if ctx.second and dy1 is not None else None
    if dy is None:
        dy = torch.zeros_like(s, dtype=ctx.x_dtype) if dy1 is None else torch.zeros_like(dy1)
    # The gradient of rowscale needs that of the sum, unrounded.
    residual_dtype = ctx.residual_dtype if x is None else compute_dtype(ctx.x_dtype)
    dx, dresidual_in, dx1, *affine = general_norm_backward_op(
        dy.contiguous(),
        dy1,
        s,
        *(mean, rstd, weight, bias, weight1, bias1),
        None if dresidual is None else dresidual.contiguous(),
        *(rowscale, mask, mask1, rng, ctx.dropout_p, ctx.weight_offset, ctx.output_scale, ctx.centred),
        *(False, 0.0, ctx.x_dtype, residual_dtype),
        (ctx.has_residual and wanted[1]) or x is not None,
        ctx.has_x1 and wanted[2],
        any(wanted[4:8]),
    )
    how = Rescaling.of(rowscale, mask, mask1, rng, ctx.x_dtype, residual_dtype)
    of_sum = dresidual_in if how.residual_apart else dx
    drowscale = None
    if x is not None:
        branch = dropped(x.to(of_sum.dtype), keep_mask(mask, rng, 0, x, ctx.dropout_p), ctx.dropout_p)
        drowscale = (of_sum * branch).sum(-1).to(rowscale.dtype)
    return (
        dx,
        of_sum.to(ctx.residual_dtype) if wanted[1] else None,
        (dx1 if how.x1_apart else dx) if wanted[2] else None,
        drowscale,
        *(
            gradient if want and gradient.shape == parameter.shape else None
            for gradient, parameter, want in zip(
                affine, (weight, bias, weight1, bias1), wanted[4:8], strict=True
            )
        ),
        *(None,) * 12,
    )


general_norm = differentiable(
    general_norm_op, forward=general_norm_forward_op, setup=_setup, backward=_gradients
)


def _setup_from_output(ctx: Any, args: tuple[Any, ...], results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    y, residual_out, y1, _, rstd = results
    x, weight, bias = args[0], args[4], args[5]
    ctx.eps, ctx.weight_offset, ctx.output_scale, ctx.centred = args[12:16]
    ctx.x_dtype = x.dtype
    ctx.save_for_backward(y, rstd, weight, bias)
    return y, residual_out, y1


def _gradients_from_output(ctx: Any, dy: Tensor, dresidual: Tensor, dy1: Tensor) -> tuple[Tensor | None, ...]:
    y, rstd, weight, bias = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    dx, _, _, dweight, dbias, _, _ = general_norm_backward_op(
        *(dy.contiguous(), None, y, None, rstd, weight, bias, None, None, None, None, None, None, None, 0.0),
        *(ctx.weight_offset, ctx.output_scale, ctx.centred, True, ctx.eps, ctx.x_dtype, ctx.x_dtype),
        *(False, False, wanted[4] or wanted[5]),
    )
    return (
        *(dx, None, None, None),
        *(dweight if wanted[4] else None, dbias if wanted[5] else None),
        *(None,) * 14,
    )


# Saves the output instead of the input (Apex's ``memory_efficient``). Not among the registered ones, because its
# gradient is that of the norm only where the weight is away from zero.
from_output_norm = Differentiable(
    general_norm_op, general_norm_forward_op, _setup_from_output, _gradients_from_output
)


def residual_norm(
    function: str,
    lean: Differentiable,
    centred: bool,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    x1: Tensor | None,
    weight1: Tensor | None,
    bias1: Tensor | None,
    dropout_p: float,
    dropout_mask: Masks,
    rowscale: Tensor | None,
    residual_dtype: torch.dtype | None,
    prenorm: bool,
    out_dtype: torch.dtype | None,
) -> Any:
    """Checks the arguments of `add_layer_norm` and `add_rms_norm`, and calls the lean operator or the general one."""
    sizes = _arguments.last_size(function, x)
    _arguments.check(function, x, sizes, weight, bias, eps, out_dtype, residual)
    _arguments.check_residual_dtype(function, x, residual_dtype)
    _arguments.check_branches(function, x, x1, rowscale, dropout_p)
    _arguments.check_second(function, x, weight1, bias1)
    mask, mask1 = _arguments.dropout_masks(function, x, x1, dropout_mask)
    second = not (weight1 is bias1 is None)
    draw = dropout_p > 0 and mask is None
    one_branch = x1 is rowscale is mask is None and not draw
    same = residual_dtype in (None, x.dtype if residual is None else residual.dtype)
    x = x.contiguous()
    if one_branch and not second and residual is not None and same and prenorm:
        return lean(x, residual.contiguous(), packed(weight), packed(bias), eps, weight_offset, out_dtype)
    nothing_added = one_branch and residual is None
    y, residual_out, y1 = general_norm(
        *(x, packed(residual), packed(x1), packed(rowscale)),
        *(packed(weight), packed(bias), packed(weight1), packed(bias1), mask, mask1),
        torch.randint(2**62, (2,), device=x.device) if draw else None,
        *(float(dropout_p), eps, weight_offset, 1.0, centred, "gemma", out_dtype, residual_dtype),
        prenorm and not nothing_added,
    )
    if nothing_added:  # the sum is x
        residual_out = x if residual_dtype is None else x.to(residual_dtype)
    results = (y, *((y1,) if second else ()), *((residual_out,) if prenorm else ()))
    return results if len(results) > 1 else y


def plain_norm(
    x: Tensor,
    sizes: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    out_dtype: torch.dtype | None,
    *,
    centred: bool,
    casting: str = "gemma",
    output_scale: float = 1.0,
    save_output: bool = False,
) -> Tensor:
    """A norm without a residual through the general operators; the arguments have been checked."""
    flat = x.reshape(*x.shape[: -len(sizes)], math.prod(sizes)).contiguous()
    weight, bias = (None if vector is None else vector.flatten().contiguous() for vector in (weight, bias))
    norm = from_output_norm if save_output else general_norm
    y, _, _ = norm(
        *(flat, None, None, None, weight, bias, None, None, None, None, None),
        *(0.0, eps, weight_offset, output_scale, centred, casting, out_dtype, None, False),
    )
    return y.view(x.shape)
