"""L1 LayerNorm: the mean absolute deviation in place of the standard deviation.

    p = x - mean(x),    sigma = factor * mean(|p|),    y = p / (sigma + eps) * weight + bias

over the last dimension (or the last few, flattened). The factor is sqrt(pi / 2), with which sigma is the standard
deviation of Gaussian rows, or 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from narrowgauge.norm import _arguments, _reference
from narrowgauge.norm._arguments import Shape, packed
from narrowgauge.norm._replacement import ReplacedNorm, norm_replacement
from narrowgauge.ops import Sample, SampleMaker, checks, differentiable, library, operator, system

GAUSSIAN = math.sqrt(math.pi / 2)  # standard deviation of a normal variable over its mean absolute deviation


def factor_of(gaussian_scale: bool) -> float:
    """What the mean absolute deviation is multiplied with."""
    return GAUSSIAN if gaussian_scale else 1.0


def _reciprocal(denominator: Tensor) -> Tensor:
    """1 / denominator, and 0 for 0: a constant row without eps is 0 after the norm, not NaN."""
    positive = denominator > 0
    return torch.where(positive, 1 / torch.where(positive, denominator, 1), 0)


def _statistics(s: Tensor, eps: float, factor: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / (sigma + eps) of each row, the last dimension kept."""
    mean = s.mean(-1, keepdim=True)
    mean = mean + (s - mean).mean(-1, keepdim=True)  # a constant row has exactly its own mean
    return mean, _reciprocal((s - mean).abs().mean(-1, keepdim=True) * factor + eps)


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    compute = _reference.compute_dtype(x.dtype)
    s = x.to(compute)
    mean, inverse = _statistics(s, eps, factor)
    y = (s - mean) * inverse
    if weight is not None:
        y = y * weight.to(compute)
    if bias is not None:
        y = y + bias.to(compute)
    return y.to(x.dtype).contiguous(), mean.squeeze(-1), inverse.squeeze(-1)


LONG = ((1, 8208), "vectors beyond the registers"), ((2, 2053), "an odd row beyond the registers")


def _samples(make: SampleMaker) -> Iterator[Sample]:
    wide = torch.float64 if make.dtype == torch.float64 else torch.float32
    for shape, why in _reference.SHAPES + LONG:
        d = shape[-1]
        yield Sample((make(*shape), make(d), make(d), 1e-5, GAUSSIAN), why)
    yield Sample((make(6, 40), None, None, 1e-5, 1.0), "no weight, plain scale")
    yield Sample((make(6, 40), None, make(40), 1e-5, GAUSSIAN), "bias only")
    yield Sample(
        (make(6, 40), make(40, dtype=wide), make(40, dtype=wide), 1e-3, GAUSSIAN), "wide weight and bias"
    )
    yield Sample((make(3, 48, scale=1e4), make(48), None, 1e-5, GAUSSIAN), "large values")


def _backward_samples(make: SampleMaker) -> Iterator[Sample]:
    wide = torch.float64 if make.dtype == torch.float64 else torch.float32

    def call(shape: tuple[int, ...], weight: torch.dtype | None, bias: bool = True, affine_gradients: bool = True,
             factor: float = GAUSSIAN) -> tuple[object, ...]:  # fmt: skip
        x, d = make(*shape), shape[-1]
        _, mean, inverse = _forward(x, None, None, 1e-5, factor)
        parameters = make(d, dtype=weight) if weight else None, make(d) if bias else None
        return (make(*shape), x, mean, inverse, *parameters, factor, affine_gradients)

    for shape, why in _reference.SHAPES + LONG:
        yield Sample(call(shape, make.dtype), why)
    yield Sample(call((6, 40), None, bias=False, factor=1.0), "no weight, plain scale")
    yield Sample(call((70, 40), None), "bias only, several partial sums")
    yield Sample(call((70, 40), wide, bias=False), "wide weight")
    yield Sample(call((6, 40), make.dtype, affine_gradients=False), "frozen weight")


@operator(
    "l1_layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, float factor) -> Tensor",
    samples=_samples,
)
def l1_layer_norm_op(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, factor: float
) -> Tensor:
    """y, for calls that need no gradient."""
    return _forward(x, weight, bias, eps, factor)[0]


@operator(
    "l1_layer_norm_forward(Tensor x, Tensor? weight, Tensor? bias, float eps, float factor)"
    " -> (Tensor y, Tensor mean, Tensor inverse)",
    samples=_samples,
)
def l1_layer_norm_forward_op(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and of each row the mean and 1 / (sigma + eps) for the backward."""
    return _forward(x, weight, bias, eps, factor)


@operator(
    "l1_layer_norm_backward(Tensor dy, Tensor x, Tensor mean, Tensor inverse, Tensor? weight, Tensor? bias,"
    " float factor, bool affine_gradients) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    samples=_backward_samples,
)
def l1_layer_norm_backward_op(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    factor: float,
    affine_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """All gradients in one pass over dy and x; the sign of x - mean is computed anew, and is 0 for 0."""
    compute = _reference.compute_dtype(x.dtype)
    g, p, scale = dy.to(compute), x.to(compute) - mean.unsqueeze(-1), inverse.unsqueeze(-1)
    x_hat, sign = p * scale, p.sign()
    h = g if weight is None else g * weight.to(compute)
    pull = factor * (sign - sign.mean(-1, keepdim=True)) * (h * x_hat).mean(-1, keepdim=True)
    dx = (h - h.mean(-1, keepdim=True) - pull) * scale

    def summed(parameter: Tensor | None, terms: Tensor) -> Tensor:
        if parameter is None or not affine_gradients:
            return terms.new_empty(0, dtype=compute if parameter is None else parameter.dtype)
        return terms.unsqueeze(0).flatten(0, -2).sum(0).to(parameter.dtype)

    return dx.to(x.dtype).contiguous(), summed(weight, g * x_hat), summed(bias, g)


def _setup(ctx: Any, args: tuple[Any, ...], results: tuple[Tensor, ...]) -> Tensor:
    x, weight, bias, _, ctx.factor = args
    y, mean, inverse = results
    ctx.save_for_backward(x, mean, inverse, weight, bias)
    return y


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    _, for_weight, for_bias, *_ = ctx.needs_input_grad
    dx, dweight, dbias = l1_layer_norm_backward_op(
        dy.contiguous(), *ctx.saved_tensors, ctx.factor, for_weight or for_bias
    )
    return dx, dweight if for_weight else None, dbias if for_bias else None, None, None


_l1_layer_norm = differentiable(
    l1_layer_norm_op, forward=l1_layer_norm_forward_op, setup=_setup, backward=_gradients
)


def l1_layer_norm(
    x: Tensor,
    normalized_shape: Shape,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    gaussian_scale: bool = True,
) -> Tensor:
    """Layer normalization by the mean absolute deviation over the trailing dimensions.

    Args:
        x: Input of shape ``(..., *normalized_shape)``; float32, bfloat16, float16 or float64; any layout.
        normalized_shape: Size, or sizes, of the trailing dimensions to normalize over.
        weight: Scale of shape `normalized_shape`, in the dtype of x or float32. Default: none.
        bias: Shift of shape `normalized_shape`, in the dtype of x or float32. Default: none.
        eps: Added to the scaled deviation (there is no root). Default 1e-5.
        gaussian_scale: Multiply the deviation by sqrt(pi / 2), so that it is the standard deviation for Gaussian
            rows. Default True, right for a model trained with LayerNorm.

    Returns:
        A tensor of the shape and dtype of x. Statistics and arithmetic are float32 (float64 for float64), rounded
        once. A constant row gives the bias.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, a device or eps does not fit.

    In the style of arXiv 2411.10948 (its text was not available) and of L1 batch normalization, arXiv 1802.09769.
    """
    sizes = normalized_shape if type(normalized_shape) is tuple else _arguments.as_sizes(normalized_shape)
    if library.kernel_checks(x) and x.shape[-1:] == sizes:
        try:
            return _l1_layer_norm.call_kernel(x, weight, bias, eps, factor_of(gaussian_scale))
        except (RuntimeError, TypeError):
            pass  # a guard refused: the checks below say which argument
    sizes = _arguments.normalized_sizes("l1_layer_norm", x, normalized_shape)
    _arguments.check("l1_layer_norm", x, sizes, weight, bias, eps, None)
    if len(sizes) == 1:
        return _l1_layer_norm(x.contiguous(), packed(weight), packed(bias), eps, factor_of(gaussian_scale))
    return _arguments.flattened(_l1_layer_norm, x, sizes, weight, bias, eps, factor_of(gaussian_scale))


class L1LayerNorm(nn.Module):
    """Layer normalization by the mean absolute deviation; its parameters are those of `torch.nn.LayerNorm`.

    Args:
        normalized_shape: Size, or sizes, of the trailing dimensions to normalize over.
        eps: Added to the scaled deviation. Default 1e-5.
        gaussian_scale: Multiply the deviation by sqrt(pi / 2). Default True.
        elementwise_affine: Learn a weight (and bias). Default True.
        bias: Learn a bias as well. Default True.

    In the style of arXiv 2411.10948, whose text was not available.
    """

    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        normalized_shape: Shape,
        eps: float = 1e-5,
        gaussian_scale: bool = True,
        elementwise_affine: bool = True,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.check_eps(type(self).__name__, eps)
        self.normalized_shape = _arguments.as_sizes(normalized_shape)
        self.eps, self.gaussian_scale, self.elementwise_affine = eps, gaussian_scale, elementwise_affine
        _arguments.register_affine(
            self,
            self.normalized_shape,
            weight=elementwise_affine,
            bias=elementwise_affine and bias,
            device=device,
            dtype=dtype,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the weight to one and the bias to zero."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return l1_layer_norm(
            x, self.normalized_shape, self.weight, self.bias, self.eps, gaussian_scale=self.gaussian_scale
        )

    def extra_repr(self) -> str:
        return (
            f"{self.normalized_shape}, eps={self.eps}, gaussian_scale={self.gaussian_scale}, "
            f"elementwise_affine={self.elementwise_affine}, bias={self.bias is not None}"
        )


@norm_replacement("l1")
def _in_place_of(norm: ReplacedNorm) -> L1LayerNorm:
    return L1LayerNorm(
        norm.normalized_shape,
        norm.eps,
        elementwise_affine=norm.weight,
        bias=norm.bias,
        device=norm.device,
        dtype=norm.dtype,
    )


system(
    "l1_norm",
    title="L1 normalization",
    source="in the style of arXiv 2411.10948 and 1802.09769",
    page="norm/l1.md",
    functions=("l1_layer_norm",),
    modules=("L1LayerNorm", "L1BatchNorm2d"),
    operators=("l1_layer_norm", "l1_layer_norm_forward", "l1_layer_norm_backward"),
    bench=("l1_layer_norm",),
    reasons={"golden": "no authors' code exists"},
)
