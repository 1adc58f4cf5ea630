"""LayerNorm (Ba, Kiros and Hinton, arXiv 1607.06450), plain and with a fused residual add.

    y = (x - mean) * rstd * (weight + weight_offset) + bias,    rstd = 1 / sqrt(mean((x - mean)^2) + eps)

over the last dimension (or the last few, flattened).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from narrowgauge.norm import _arguments, _autograd, _general, _reference
from narrowgauge.norm._arguments import Masks, Shape, packed
from narrowgauge.ops import Sample, SampleMaker, checks, library, operator
from narrowgauge.ops.system import system


def _samples(make: SampleMaker) -> Iterator[Sample]:
    return _reference.forward_samples(make, residual=False)


def _residual_samples(make: SampleMaker) -> Iterator[Sample]:
    return _reference.forward_samples(make, residual=True)


def _backward_samples(make: SampleMaker) -> Iterator[Sample]:
    return _reference.backward_samples(make, centred=True)


@operator(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, float weight_offset, ScalarType? out_dtype)"
    " -> Tensor",
    samples=_samples,
)
def layer_norm_op(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """y, for calls that need no gradient."""
    return _reference.forward(x, None, weight, bias, eps, weight_offset, out_dtype, centred=True)[0]


@operator(
    "layer_norm_forward(Tensor x, Tensor? weight, Tensor? bias, float eps, float weight_offset, ScalarType? out_dtype)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
    samples=_samples,
)
def layer_norm_forward_op(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and mean and rstd of each row for the backward."""
    y, _, mean, rstd = _reference.forward(x, None, weight, bias, eps, weight_offset, out_dtype, centred=True)
    return y, mean, rstd


@operator(
    "add_layer_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, float weight_offset,"
    " ScalarType? out_dtype) -> (Tensor y, Tensor residual_out)",
    samples=_residual_samples,
)
def add_layer_norm_op(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """The norm of x + residual, and the sum itself in the dtype of residual."""
    y, s, _, _ = _reference.forward(x, residual, weight, bias, eps, weight_offset, out_dtype, centred=True)
    return y, _reference.stored_sum(s, residual)


@operator(
    "add_layer_norm_forward(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, float weight_offset,"
    " ScalarType? out_dtype) -> (Tensor y, Tensor residual_out, Tensor mean, Tensor rstd)",
    samples=_residual_samples,
)
def add_layer_norm_forward_op(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As add_layer_norm, with mean and rstd of each row for the backward."""
    y, s, mean, rstd = _reference.forward(
        x, residual, weight, bias, eps, weight_offset, out_dtype, centred=True
    )
    return y, _reference.stored_sum(s, residual), mean, rstd


@operator(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias,"
    " Tensor? dresidual, float weight_offset, bool affine_gradients) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    samples=_backward_samples,
)
def layer_norm_backward_op(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dresidual: Tensor | None,
    weight_offset: float,
    affine_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """All gradients in one pass over dy and x; dresidual, the gradient of residual_out, is added to dx."""
    return _reference.backward(dy, x, mean, rstd, weight, bias, dresidual, weight_offset, affine_gradients)


_layer_norm = _autograd.plain(layer_norm_op, layer_norm_forward_op, layer_norm_backward_op)
_add_layer_norm = _autograd.with_residual(
    add_layer_norm_op, add_layer_norm_forward_op, layer_norm_backward_op
)


def layer_norm(
    x: Tensor,
    normalized_shape: Shape,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    weight_offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
    memory_efficient: bool = False,
) -> Tensor:
    """Layer normalization over the trailing dimensions; the order of arguments is torch's.

    Args:
        x: Input of shape ``(..., *normalized_shape)``; float32, bfloat16, float16 or float64; any layout.
        normalized_shape: Size, or sizes, of the trailing dimensions to normalize over.
        weight: Scale of shape `normalized_shape`, in the dtype of x or float32. Default: none.
        bias: Shift of shape `normalized_shape`, in the dtype of x or float32. Default: none.
        eps: Added to the (biased) variance. Default 1e-5.
        weight_offset: Added to the weight; 1 for a zero-centred weight. Default 0.
        out_dtype: Dtype of the result, that of x (the default) or float32.
        memory_efficient: Keep the result for the backward instead of x, which then can be freed. The normalized values
            come back as ``(y - bias) / weight``, with the weight held at least `eps` away from zero: a weight at zero
            gets no gradient. Default False.

    Returns:
        A tensor of the shape of x. Statistics and arithmetic are float32 (float64 for float64), rounded once.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, a device or eps does not fit.

    Source: arXiv 1607.06450.
    """
    sizes = normalized_shape if type(normalized_shape) is tuple else _arguments.as_sizes(normalized_shape)
    if not memory_efficient and library.kernel_checks(x) and x.shape[-1:] == sizes:
        try:
            return _layer_norm.call_kernel(x, weight, bias, eps, weight_offset, out_dtype)
        except (RuntimeError, TypeError):
            pass  # a guard refused: the checks below say which argument
    sizes = _arguments.normalized_sizes("layer_norm", x, normalized_shape)
    _arguments.check("layer_norm", x, sizes, weight, bias, eps, out_dtype)
    if memory_efficient:
        return _general.plain_norm(
            x, sizes, weight, bias, eps, weight_offset, out_dtype, centred=True, save_output=True
        )
    if len(sizes) == 1:
        return _layer_norm(x.contiguous(), packed(weight), packed(bias), eps, weight_offset, out_dtype)
    return _arguments.flattened(_layer_norm, x, sizes, weight, bias, eps, weight_offset, out_dtype)


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    weight_offset: float = 0.0,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_mask: Masks = None,
    rowscale: Tensor | None = None,
    residual_dtype: torch.dtype | None = None,
    prenorm: bool = True,
    out_dtype: torch.dtype | None = None,
) -> Any:
    """The layer_norm of ``dropout(x * rowscale) + dropout(x1) + residual`` over the last dimension, and that sum.

    One pass over memory; the order of the steps is flash-attention's. Absent parts cost nothing.

    Args:
        x: Output of the branch, shape ``(..., d)``.
        residual: Residual stream, shape of x, in the dtype of x or float32; None where there is none yet.
        weight, bias, weight_offset, out_dtype: As in `layer_norm`, with shapes ``(d,)``.
        eps: Added to the variance. Default 1e-5.
        x1: Output of a second, parallel branch, shape and dtype of x. Default: none.
        weight1, bias1: Weight and bias of a second result, from the same statistics. Default: none.
        dropout_p: Probability that an element of x, and independently one of x1, is dropped; the others are multiplied
            by ``1 / (1 - dropout_p)``. Drawn from torch's generator of the device, and again, not stored, in the
            backward. There is no train or eval here: pass 0 in evaluation. Default 0.
        dropout_mask: Bool tensor of the shape of x, True = keep, instead of drawing; with `x1` a pair, ``(mask of x,
            mask of x1)``. Kept elements are multiplied by ``1 / (1 - dropout_p)`` all the same.
        rowscale: Factor of each row of x (not of x1), shape ``(...)``, in the dtype of x or float32. Default: none.
        residual_dtype: Dtype of the returned sum, that of x or float32. Default: that of residual.
        prenorm: Return the sum as well. Default True.

    Returns:
        ``(y, sum)``; with `weight1` or `bias1` ``(y, y1, sum)``; without the sum, and without a tuple around a single
        tensor, where `prenorm` is False. The norm is taken of the un-rounded sum.

    Raises:
        TypeError, ValueError: As `layer_norm`.

    Source: arXiv 1607.06450; the fused form follows ``flash_attn/ops/triton/layer_norm.py``.
    """
    plain = x1 is weight1 is bias1 is dropout_mask is rowscale is residual_dtype is None
    if plain and dropout_p == 0 and prenorm and library.kernel_checks(x) and library.kernel_checks(residual):
        try:
            return _add_layer_norm.call_kernel(x, residual, weight, bias, eps, weight_offset, out_dtype)
        except (RuntimeError, TypeError):
            pass  # a guard refused: the checks below say which argument
    return _general.residual_norm(
        *(
            "add_layer_norm",
            _add_layer_norm,
            True,
            x,
            residual,
            weight,
            bias,
            eps,
            weight_offset,
            x1,
            weight1,
            bias1,
        ),
        *(dropout_p, dropout_mask, rowscale, residual_dtype, prenorm, out_dtype),
    )


class LayerNorm(nn.Module):
    """Layer normalization; takes the place of `torch.nn.LayerNorm`.

    Args:
        normalized_shape: Size, or sizes, of the trailing dimensions to normalize over.
        eps: Added to the (biased) variance. Default 1e-5.
        elementwise_affine: Learn a weight (and bias). Default True.
        bias: Learn a bias as well. Default True.
        weight_offset: Added to the weight; with 1 the weight starts at zeros, else at ones. Default 0.
        memory_efficient: Keep the result for the backward instead of the input, as in `layer_norm`. Default False.

    Source: arXiv 1607.06450. Parameters and state_dict are those of ``torch.nn.LayerNorm``.
    """

    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        normalized_shape: Shape,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        weight_offset: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__()
        checks.check_eps("LayerNorm", eps)
        self.normalized_shape = _arguments.as_sizes(normalized_shape)
        self.eps, self.elementwise_affine, self.weight_offset = eps, elementwise_affine, weight_offset
        self.memory_efficient = memory_efficient
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
        """Sets the effective weight to one and the bias to zero."""
        if self.weight is not None:
            nn.init.constant_(self.weight, 1.0 - self.weight_offset)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(
            x,
            self.normalized_shape,
            self.weight,
            self.bias,
            self.eps,
            weight_offset=self.weight_offset,
            memory_efficient=self.memory_efficient,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}, "
            f"bias={self.bias is not None}, weight_offset={self.weight_offset}"
            + (", memory_efficient=True" if self.memory_efficient else "")
        )


system(
    "layer_norm",
    title="LayerNorm, with residual, dropout and second-branch forms",
    source="arXiv 1607.06450",
    page="norms.md",
    functions=("layer_norm", "add_layer_norm"),
    modules=("LayerNorm",),
    operators=(
        *(
            "layer_norm",
            "layer_norm_forward",
            "layer_norm_backward",
            "add_layer_norm",
            "add_layer_norm_forward",
        ),
        *("general_norm", "general_norm_forward", "general_norm_backward"),
    ),
    golden=("layernorm",),
    bench=("layer_norm", "add_layer_norm", "general_norm"),
)
