"""RMSNorm (Zhang and Sennrich, arXiv 1910.07467), plain and with a fused residual add.

    y = x * rstd * (weight + weight_offset) + bias,    rstd = 1 / sqrt(mean(x^2) + eps)

over the last dimension (or the last few, flattened).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from narrowgauge.norm import _arguments, _autograd, _general, _reference
from narrowgauge.norm._arguments import Masks, Shape, packed
from narrowgauge.norm._replacement import ReplacedNorm, norm_replacement
from narrowgauge.ops import Sample, SampleMaker, checks, library, operator
from narrowgauge.ops.system import system


def _samples(make: SampleMaker) -> Iterator[Sample]:
    return _reference.forward_samples(make, residual=False)


def _residual_samples(make: SampleMaker) -> Iterator[Sample]:
    return _reference.forward_samples(make, residual=True)


def _backward_samples(make: SampleMaker) -> Iterator[Sample]:
    return _reference.backward_samples(make, centred=False)


@operator(
    "rms_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, float weight_offset, ScalarType? out_dtype)"
    " -> Tensor",
    samples=_samples,
)
def rms_norm_op(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """y, for calls that need no gradient."""
    return _reference.forward(x, None, weight, bias, eps, weight_offset, out_dtype, centred=False)[0]


@operator(
    "rms_norm_forward(Tensor x, Tensor? weight, Tensor? bias, float eps, float weight_offset, ScalarType? out_dtype)"
    " -> (Tensor y, Tensor rstd)",
    samples=_samples,
)
def rms_norm_forward_op(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """y, and rstd of each row for the backward."""
    y, _, _, rstd = _reference.forward(x, None, weight, bias, eps, weight_offset, out_dtype, centred=False)
    return y, rstd


@operator(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, float weight_offset,"
    " ScalarType? out_dtype) -> (Tensor y, Tensor residual_out)",
    samples=_residual_samples,
)
def add_rms_norm_op(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """The norm of x + residual, and the sum itself in the dtype of residual."""
    y, s, _, _ = _reference.forward(x, residual, weight, bias, eps, weight_offset, out_dtype, centred=False)
    return y, _reference.stored_sum(s, residual)


@operator(
    "add_rms_norm_forward(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, float weight_offset,"
    " ScalarType? out_dtype) -> (Tensor y, Tensor residual_out, Tensor rstd)",
    samples=_residual_samples,
)
def add_rms_norm_forward_op(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As add_rms_norm, with rstd of each row for the backward."""
    y, s, _, rstd = _reference.forward(
        x, residual, weight, bias, eps, weight_offset, out_dtype, centred=False
    )
    return y, _reference.stored_sum(s, residual), rstd


@operator(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor rstd, Tensor? weight, Tensor? bias, Tensor? dresidual,"
    " float weight_offset, bool affine_gradients) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    samples=_backward_samples,
)
def rms_norm_backward_op(
    dy: Tensor,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dresidual: Tensor | None,
    weight_offset: float,
    affine_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """All gradients in one pass over dy and x; dresidual, the gradient of residual_out, is added to dx."""
    return _reference.backward(dy, x, None, rstd, weight, bias, dresidual, weight_offset, affine_gradients)


_rms_norm = _autograd.plain(rms_norm_op, rms_norm_forward_op, rms_norm_backward_op)
_add_rms_norm = _autograd.with_residual(add_rms_norm_op, add_rms_norm_forward_op, rms_norm_backward_op)


def rms_norm(
    x: Tensor,
    normalized_shape: Shape,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    bias: Tensor | None = None,
    weight_offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
    partial: float | None = None,
    memory_efficient: bool = False,
) -> Tensor:
    """Root mean square normalization over the trailing dimensions.

    Args:
        x: Input of shape ``(..., *normalized_shape)``; float32, bfloat16, float16 or float64; any layout.
        normalized_shape: Size, or sizes, of the trailing dimensions to normalize over.
        weight: Scale of shape `normalized_shape`, in the dtype of x or float32. Default: none.
        eps: Added to the mean square. Default: machine epsilon of the compute dtype (1.19e-7; 2.2e-16 for float64).
        bias: Shift of shape `normalized_shape`, in the dtype of x or float32. Default: none.
        weight_offset: Added to the weight; 1 for a zero-centred weight, as in Gemma. Default 0.
        out_dtype: Dtype of the result, that of x (the default) or float32.
        partial: Take the mean square from the first ``int(partial * d)`` of the d elements only (partial RMSNorm of the
            paper); all are divided by it. Runs in plain PyTorch. Default None: from all.
        memory_efficient: Keep the result for the backward instead of x, which then can be freed. The normalized values
            come back as ``(y - bias) / weight``, with the weight held at least `eps` away from zero: a weight at zero
            gets no gradient. Default False.

    Returns:
        A tensor of the shape of x. Statistics and arithmetic are float32 (float64 for float64), rounded once.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, a device or eps does not fit.

    Source: arXiv 1910.07467, with eps inside the root.
    """
    sizes = normalized_shape if type(normalized_shape) is tuple else _arguments.as_sizes(normalized_shape)
    if partial is None and not memory_efficient and library.kernel_checks(x) and x.shape[-1:] == sizes:
        try:
            return _rms_norm.call_kernel(
                x,
                weight,
                bias,
                _arguments.machine_eps(x.dtype) if eps is None else eps,
                weight_offset,
                out_dtype,
            )
        except (RuntimeError, TypeError):
            pass  # a guard refused: the checks below say which argument
    sizes = _arguments.normalized_sizes("rms_norm", x, normalized_shape)
    if eps is None:
        eps = _arguments.machine_eps(x.dtype)
    _arguments.check("rms_norm", x, sizes, weight, bias, eps, out_dtype)
    if partial is not None:
        if memory_efficient:
            raise ValueError("rms_norm: partial and memory_efficient exclude each other; choose one")
        return _partial_rms_norm(x, sizes, weight, bias, eps, weight_offset, out_dtype, partial)
    if memory_efficient:
        return _general.plain_norm(
            x, sizes, weight, bias, eps, weight_offset, out_dtype, centred=False, save_output=True
        )
    if len(sizes) == 1:
        return _rms_norm(x.contiguous(), packed(weight), packed(bias), eps, weight_offset, out_dtype)
    return _arguments.flattened(_rms_norm, x, sizes, weight, bias, eps, weight_offset, out_dtype)


def _partial_rms_norm(
    x: Tensor,
    sizes: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    out_dtype: torch.dtype | None,
    partial: float,
) -> Tensor:
    """RMSNorm with the mean square of the first channels; its gradient is PyTorch's own."""
    d = math.prod(sizes)
    count = _arguments.check_partial("rms_norm", partial, d)
    compute = _reference.compute_dtype(x.dtype)
    s = x.reshape(*x.shape[: -len(sizes)], d).to(compute)
    y = s * (s[..., :count].square().mean(-1, keepdim=True) + eps).rsqrt()
    if weight is not None:
        y = y * (weight.flatten().to(compute) + weight_offset)
    if bias is not None:
        y = y + bias.flatten().to(compute)
    return y.to(out_dtype or x.dtype).reshape(x.shape)


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    bias: Tensor | None = None,
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
    """The rms_norm of ``dropout(x * rowscale) + dropout(x1) + residual`` over the last dimension, and that sum.

    One pass over memory; the order of the steps is flash-attention's. Absent parts cost nothing.

    Args:
        x: Output of the branch, shape ``(..., d)``.
        residual: Residual stream, shape of x, in the dtype of x or float32; None where there is none yet.
        weight, bias, weight_offset, out_dtype: As in `rms_norm`, with shapes ``(d,)``.
        eps: Added to the mean square. Default 1e-6.
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
        TypeError, ValueError: As `rms_norm`.

    Source: arXiv 1910.07467; the fused form follows ``flash_attn/ops/triton/layer_norm.py``.
    """
    plain = x1 is weight1 is bias1 is dropout_mask is rowscale is residual_dtype is None
    if plain and dropout_p == 0 and prenorm and library.kernel_checks(x) and library.kernel_checks(residual):
        try:
            return _add_rms_norm.call_kernel(x, residual, weight, bias, eps, weight_offset, out_dtype)
        except (RuntimeError, TypeError):
            pass  # a guard refused: the checks below say which argument
    return _general.residual_norm(
        *(
            "add_rms_norm",
            _add_rms_norm,
            False,
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


class RMSNorm(nn.Module):
    """Root mean square normalization; takes the place of `torch.nn.RMSNorm`.

    Args:
        normalized_shape: Size, or sizes, of the trailing dimensions to normalize over.
        eps: Added to the mean square. Default None: machine epsilon of the compute dtype.
        elementwise_affine: Learn a weight (and bias, where asked for). Default True.
        weight_offset: Added to the weight; with 1 (Gemma) the weight starts at zeros, else at ones. Default 0.
        casting: Where a narrow input is rounded. ``"gemma"`` (default): float32 throughout, rounded once at the end;
            ``"llama"``: the normalized value is rounded to the input dtype before it is multiplied by the weight, as in
            the Llama of Transformers; ``"none"``: everything in the input dtype, save for the sum.
        bias: Learn a bias as well. Default False.
        output_scale: Constant factor of the result (LayerNorm Scaling, arXiv 2502.05795). Default 1.
        partial, memory_efficient: As in `rms_norm`; with ``casting="gemma"`` only. Default: off.

    Source: arXiv 1910.07467. Parameters and state_dict are those of ``torch.nn.RMSNorm``.
    """

    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        normalized_shape: Shape,
        eps: float | None = None,
        elementwise_affine: bool = True,
        weight_offset: float = 0.0,
        casting: Literal["gemma", "llama", "none"] = "gemma",
        *,
        bias: bool = False,
        output_scale: float = 1.0,
        partial: float | None = None,
        memory_efficient: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.check_choice("RMSNorm", "casting", casting, ("gemma", "llama", "none"))
        if eps is not None:
            checks.check_eps("RMSNorm", eps)
        self.normalized_shape = _arguments.as_sizes(normalized_shape)
        self.eps, self.elementwise_affine, self.weight_offset = eps, elementwise_affine, weight_offset
        self.casting, self.output_scale = casting, output_scale
        self.partial, self.memory_efficient = partial, memory_efficient
        if partial is not None:
            _arguments.check_partial("RMSNorm", partial, math.prod(self.normalized_shape))
        if casting != "gemma" and (partial is not None or memory_efficient):
            raise ValueError(
                f'RMSNorm: partial and memory_efficient go with casting="gemma" only, got {casting!r}'
            )
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
        if self.casting == "gemma" and (self.output_scale == 1.0 or self.partial is not None):
            y = rms_norm(
                x,
                self.normalized_shape,
                self.weight,
                self.eps,
                bias=self.bias,
                weight_offset=self.weight_offset,
                partial=self.partial,
                memory_efficient=self.memory_efficient,
            )
            return y if self.output_scale == 1.0 else y * self.output_scale
        sizes = _arguments.normalized_sizes("rms_norm", x, self.normalized_shape)
        eps = _arguments.machine_eps(x.dtype) if self.eps is None else self.eps
        _arguments.check("rms_norm", x, sizes, self.weight, self.bias, eps, None)
        return _general.plain_norm(
            *(x, sizes, self.weight, self.bias, eps, self.weight_offset, None),
            centred=False,
            casting=self.casting,
            output_scale=self.output_scale,
            save_output=self.memory_efficient,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}, "
            f"weight_offset={self.weight_offset}, casting={self.casting!r}, bias={self.bias is not None}, "
            f"output_scale={self.output_scale}"
            + (f", partial={self.partial}" if self.partial is not None else "")
            + (", memory_efficient=True" if self.memory_efficient else "")
        )


system(
    "rms_norm",
    title="RMSNorm, with residual, dropout and second-branch forms",
    source="arXiv 1910.07467",
    page="norms.md",
    functions=("rms_norm", "add_rms_norm"),
    modules=("RMSNorm",),
    operators=("rms_norm", "rms_norm_forward", "rms_norm_backward", "add_rms_norm", "add_rms_norm_forward"),
    golden=("rmsnorm",),
    bench=("rms_norm", "add_rms_norm"),
)


@norm_replacement("rms")
def _in_place_of(norm: ReplacedNorm) -> RMSNorm:
    return RMSNorm(
        norm.normalized_shape, norm.eps, norm.weight, bias=norm.bias, device=norm.device, dtype=norm.dtype
    )
