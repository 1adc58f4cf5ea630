"""PolyNorm (PolyCom, arXiv 2411.03884): a normalized polynomial activation.

    y = weight[0] N(x^3) + weight[1] N(x^2) + weight[2] N(x) + bias,    N(u) = u / sqrt(mean(u^2) + eps)

over the last dimension, with three scalar weights and a scalar bias.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from narrowgauge.norm import _arguments
from narrowgauge.norm._reference import compute_dtype
from narrowgauge.ops import Sample, SampleMaker, checks, differentiable, library, operator
from narrowgauge.ops.system import system


def _samples(make: SampleMaker) -> Iterator[Sample]:
    wide = torch.float64 if make.dtype == torch.float64 else torch.float32
    for shape, why in (
        ((3, 64), "a multiple of every vector width"),
        ((2, 3, 17), "three dimensions and an odd row"),
        ((5, 1), "rows of one element"),
        ((129,), "a single row without a batch dimension"),
        ((0, 8), "no rows"),
        ((4, 0), "rows without elements"),
        ((70, 33), "enough rows for several partial sums"),
        ((2, 1028), "longer than one warp's registers"),
    ):
        yield Sample((make(*shape), make(3), make(1), 1e-6), why)
    yield Sample((make(6, 40), make(3), None, 1e-5), "no bias")
    yield Sample((make(6, 40, scale=30.0), make(3, dtype=wide), make(1, dtype=wide), 1e-6), "wide parameters")
    yield Sample((make(4, 24), make(3), make(1), 1e-6), "small rows")


def _powers(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    s = x.to(compute_dtype(x.dtype))
    square = s * s
    return square * s, square, s


def _rstd(u: Tensor, eps: float) -> Tensor:
    return (u.square().mean(-1, keepdim=True) + eps).rsqrt()


@operator(
    "poly_norm(Tensor x, Tensor weight, Tensor? bias, float eps) -> Tensor",
    samples=_samples,
)
def poly_norm_op(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """weight[0] N(x^3) + weight[1] N(x^2) + weight[2] N(x) + bias."""
    compute = compute_dtype(x.dtype)
    y = sum(w * (u * _rstd(u, eps)) for w, u in zip(weight.to(compute).unbind(), _powers(x), strict=True))
    assert isinstance(y, Tensor)
    if bias is not None:
        y = y + bias.to(compute)
    return y.to(x.dtype, memory_format=torch.contiguous_format)


def _backward_samples(make: SampleMaker) -> Iterator[Sample]:
    for sample in _samples(make):
        yield Sample((make(*sample.args[0].shape), *sample.args, True), sample.why)
    yield Sample((make(6, 40), make(6, 40), make(3), None, 1e-6, False), "frozen parameters")


@operator(
    "poly_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor? bias, float eps, bool parameter_gradients)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    samples=_backward_samples,
)
def poly_norm_backward_op(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, parameter_gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """All gradients in one pass over dy and x. Those of absent or frozen parameters are empty."""
    compute = compute_dtype(x.dtype)
    g = dy.to(compute)
    cube, square, s = _powers(x)
    dx, dots = torch.zeros_like(s), []
    for w, u, derivative in (
        (weight[0], cube, 3 * square),
        (weight[1], square, 2 * s),
        (weight[2], s, torch.ones_like(s)),
    ):
        scale = _rstd(u, eps)
        normed = u * scale
        dots.append((g * normed).sum())
        projected = g - normed * (g * normed).mean(-1, keepdim=True)
        dx = dx + w.to(compute) * scale * derivative * projected
    dweight, dbias = torch.stack(dots).to(weight.dtype), g.sum()
    if not parameter_gradients:
        dweight = weight.new_empty(0)
    if bias is None or not parameter_gradients:
        dbias = g.new_empty(0, dtype=compute if bias is None else bias.dtype)
    else:
        dbias = dbias.to(bias.dtype).view(bias.shape)
    return dx.to(x.dtype, memory_format=torch.contiguous_format), dweight, dbias


def _setup(ctx: Any, args: tuple[Any, ...], y: Tensor) -> Tensor:
    x, weight, bias, ctx.eps = args
    ctx.save_for_backward(x, weight, bias)
    return y


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:3]
    results = poly_norm_backward_op(dy.contiguous(), *ctx.saved_tensors, ctx.eps, any(wanted[1:]))
    return (*(d if want else None for d, want in zip(results, wanted, strict=True)), None)


_poly_norm = differentiable(poly_norm_op, forward=poly_norm_op, setup=_setup, backward=_gradients)


def poly_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """``weight[0] N(x^3) + weight[1] N(x^2) + weight[2] N(x) + bias`` with N(u) = u / sqrt(mean(u^2) + eps).

    Args:
        x: Input of shape ``(..., d)``; float32, bfloat16, float16 or float64; any layout. The means are over d.
        weight: Coefficients of the cube, the square and the first power, shape ``(3,)``; in the dtype of x or float32.
        bias: One number, shape ``(1,)``, in the dtype of x or float32. Default: none.
        eps: Added to the mean squares. Default 1e-6.

    Returns:
        A tensor of the shape and dtype of x. Arithmetic is float32 (float64 for float64), rounded once. Sixth powers
        must fit into it: values up to 1e6 do in float32.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, a device or eps does not fit.

    Source: arXiv 2411.03884.
    """
    if library.kernel_checks(x):
        try:
            return _poly_norm.call_kernel(x, weight, bias, eps)
        except (RuntimeError, TypeError):
            pass  # a guard refused: the checks below say which argument
    _arguments.last_size("poly_norm", x)
    if not isinstance(weight, Tensor):
        raise TypeError(f"poly_norm: weight must be a tensor, got {type(weight).__name__}")
    checks.check_floating("poly_norm", x=x, weight=weight, bias=bias)
    checks.check_eps("poly_norm", eps)
    checks.check_same_device("poly_norm", "x", x, weight=weight, bias=bias)
    for name, vector, count in (("weight", weight, 3), ("bias", bias, 1)):
        if vector is not None and tuple(vector.shape) != (count,):
            raise ValueError(f"poly_norm: {name} has shape {tuple(vector.shape)}; expected ({count},)")
    _arguments.check_companions("poly_norm", x, weight=weight, bias=bias)
    return _poly_norm(x.contiguous(), weight.contiguous(), bias, eps)


class PolyNorm(nn.Module):
    """PolyNorm, an activation that normalizes the powers of its input over the last dimension.

    Args:
        eps: Added to the mean squares. Default 1e-6.
        bias: Learn the scalar bias. Default True.

    Parameters are ``weight`` of shape (3,), one third each, for the cube, the square and the first power, and ``bias``
    of shape (1,), zero. Source: arXiv 2411.03884.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        eps: float = 1e-6,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.check_eps("PolyNorm", eps)
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(3, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(1, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the weights to one third and the bias to zero."""
        nn.init.constant_(self.weight, 1 / 3)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return poly_norm(x, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}, bias={self.bias is not None}"


system(
    "poly_norm",
    title="PolyNorm",
    source="arXiv 2411.03884",
    page="norm/polynorm.md",
    functions=("poly_norm",),
    modules=("PolyNorm",),
    operators=("poly_norm", "poly_norm_backward"),
    bench=("poly_norm",),
    reasons={"golden": "no numbers of the authors' code were recorded; the tests compare with its formula"},
)
