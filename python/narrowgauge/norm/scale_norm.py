"""ScaleNorm (Nguyen and Salazar, arXiv 1910.05895) and the unit-sphere norm of nGPT (arXiv 2410.01131).

    y = g * x / max(|x|, eps)

over the last dimension, with the Euclidean norm |x| and one learned g, or g = 1 for the unit sphere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from narrowgauge.norm import _modulated
from narrowgauge.norm._arguments import packed
from narrowgauge.norm._reference import SHAPES, compute_dtype
from narrowgauge.ops import Sample, SampleMaker, checks, differentiable, library, operator, system


def _calls(make: SampleMaker) -> Iterator[tuple[tuple[Any, ...], str]]:
    """Arguments of the forward, and why."""
    wide = torch.float64 if make.dtype == torch.float64 else torch.float32
    for shape, why in SHAPES:
        yield (make(*shape), make(1), 1e-5), why
    yield (make(6, 40), make(1, dtype=wide), 1e-5), "wide g"
    yield (make(6, 40), None, 1e-5), "the unit sphere"
    yield (make(5, 24, scale=0.1), make(1), 10.0), "rows shorter than eps"


def _samples(make: SampleMaker) -> Iterator[Sample]:
    for args, why in _calls(make):
        yield Sample(args, why)


def _backward_samples(make: SampleMaker) -> Iterator[Sample]:
    for args, why in _calls(make):
        yield Sample((make(*args[0].shape), *args, True), why)
    yield Sample((make(6, 40), make(6, 40), make(1), 1e-5, False), "frozen g")


@operator("scale_norm(Tensor x, Tensor? g, float eps) -> Tensor", samples=_samples)
def scale_norm_op(x: Tensor, g: Tensor | None, eps: float) -> Tensor:
    """y; the backward recomputes what it needs."""
    s = x.to(compute_dtype(x.dtype))
    y = s / torch.linalg.vector_norm(s, dim=-1, keepdim=True).clamp_min(eps)
    return (y if g is None else y * g.to(s.dtype)).to(x.dtype).contiguous()


@operator(
    "scale_norm_backward(Tensor dy, Tensor x, Tensor? g, float eps, bool g_gradient) -> (Tensor dx, Tensor dg)",
    samples=_backward_samples,
)
def scale_norm_backward_op(
    dy: Tensor, x: Tensor, g: Tensor | None, eps: float, g_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of x and g in one pass over dy and x."""
    compute = compute_dtype(x.dtype)
    d, s = dy.to(compute), x.to(compute)
    length = torch.linalg.vector_norm(s, dim=-1, keepdim=True)
    x_hat = s / length.clamp_min(eps)
    h = d if g is None else d * g.to(compute)
    along = x_hat * (h * x_hat).sum(-1, keepdim=True)
    # A row shorter than eps is divided by a constant.
    dx = torch.where(length >= eps, h - along, h) / length.clamp_min(eps)
    return dx.to(x.dtype).contiguous(), _modulated.summed_like(d * x_hat, g, g_gradient)


def _setup(ctx: Any, args: tuple[Any, ...], y: Tensor) -> Tensor:
    x, g, ctx.eps = args
    ctx.save_for_backward(x, g)
    return y


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    for_g = ctx.needs_input_grad[1]
    dx, dg = scale_norm_backward_op(dy.contiguous(), *ctx.saved_tensors, ctx.eps, for_g)
    return dx, dg if for_g else None, None


_scale_norm = differentiable(scale_norm_op, forward=scale_norm_op, setup=_setup, backward=_gradients)


def scale_norm(x: Tensor, g: Tensor | None, eps: float = 1e-5) -> Tensor:
    """Rows of length g: ``g * x / max(|x|, eps)`` over the last dimension.

    Args:
        x: Input of shape ``(..., d)``; float32, bfloat16, float16 or float64; any layout.
        g: Scale with one element, in the dtype of x or float32; None for rows of length one.
        eps: Least divisor. Default 1e-5.

    Returns:
        A tensor of the shape and dtype of x. Arithmetic is float32 (float64 for float64), rounded once.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, a device or eps does not fit.

    Source: arXiv 1910.05895.
    """
    if library.kernel_checks(x):
        try:
            return _scale_norm.call_kernel(x, g, eps)
        except (RuntimeError, TypeError):
            pass  # a guard refused: the checks below say which argument
    return _checked("scale_norm", x, g, eps)


def _checked(function: str, x: Tensor, g: Tensor | None, eps: float) -> Tensor:
    _modulated.check_tensor(function, "x", x)
    checks.check_eps(function, eps)
    _modulated.check_beside(function, "x", x, g=g)
    if g is not None and g.numel() != 1:
        raise ValueError(f"{function}: g has shape {tuple(g.shape)}; expected one element")
    g = None if g is None else packed(g.reshape(1))
    return _scale_norm(x.contiguous(), g, eps)


def l2_normalize(x: Tensor, eps: float = 1e-12) -> Tensor:
    """Rows of length one, on the unit sphere: ``x / max(|x|, eps)`` over the last dimension.

    Args:
        x: Input of shape ``(..., d)``; float32, bfloat16, float16 or float64; any layout.
        eps: Least divisor. Default 1e-12, that of ``torch.nn.functional.normalize``.

    Returns:
        A tensor of the shape and dtype of x.

    Raises:
        TypeError, ValueError: As `scale_norm`.

    Source: arXiv 2410.01131.
    """
    return _checked("l2_normalize", x, None, eps)


class ScaleNorm(nn.Module):
    """ScaleNorm with one learned length `g`.

    Args:
        dim: Size of the last dimension; g starts at its square root, so that the layer starts as an RMSNorm.
        eps: Least divisor. Default 1e-5.

    Source: arXiv 1910.05895.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.check_eps("ScaleNorm", eps)
        self.dim, self.eps = dim, eps
        self.g = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets g to the square root of the row's size."""
        nn.init.constant_(self.g, self.dim**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return scale_norm(x, self.g, self.eps)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}"


system(
    "scale_norm",
    title="ScaleNorm and the unit-sphere norm",
    source="arXiv 1910.05895, arXiv 2410.01131",
    page="norm/scale_norm.md",
    functions=("l2_normalize", "scale_norm"),
    modules=("ScaleNorm",),
    operators=("scale_norm", "scale_norm_backward"),
    bench=("scale_norm",),
    reasons={
        "golden": "no recorded numbers of the authors' code; the tests compare with plain PyTorch in float64"
    },
)
