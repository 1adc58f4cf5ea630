"""A norm and a low-precision linear layer as one: the normed activations exist only as codes.

    y = norm(x),    out = y @ weight.T + bias

The forward quantizes y row by row in the pass that normalizes it, and for the weight's gradient also keeps the
transposed copy of its codes, one scale per channel. The backward is that of `narrowgauge.quant.linear`, then that of
the norm: gradients pass the rounding unchanged. Kept for it are x, the transposed codes and the statistics of rows, but
no y in the dtype of x, which the two layers apart keep.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from narrowgauge.norm import _arguments
from narrowgauge.norm.layer_norm import LayerNorm
from narrowgauge.norm.norm_quant import NARROW, norm_backward, norm_quant_op
from narrowgauge.norm.rms_norm import RMSNorm
from narrowgauge.ops import checks
from narrowgauge.ops.autograd import fused_function
from narrowgauge.quant.linear import Linear
from narrowgauge.quant.matmul import Operand, operand, scaled_matmul
from narrowgauge.quant.recipes import RECIPES

if TYPE_CHECKING:
    from typing_extensions import Self

RECIPE_NAMES = tuple(
    name
    for name, recipe in RECIPES.items()
    if recipe.output.left == recipe.grad_weight.right and recipe.output.left.granularity == "row"
)
"""Recipes in which y is quantized row by row, in one format for both of its matmuls."""


def _run(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    centred: bool,
    recipe: str,
    out_dtype: torch.dtype,
    transposed: bool,
) -> tuple[Tensor, ...]:
    """The output, and of the norm: transposed codes and their scales, mean, rstd."""
    product = RECIPES[recipe].output
    codes, scale, codes_t, scale_t, _, mean, rstd = norm_quant_op(
        x,
        None,
        norm_weight,
        norm_bias,
        eps,
        weight_offset,
        centred,
        product.left.format,
        "row",
        None,
        math.inf,
        transposed,
    )
    left: Operand = codes.unsqueeze(0).flatten(0, -2), scale.reshape(-1)
    out = scaled_matmul(left, operand(weight, product.right, contract=1), out_dtype, bias)
    return out.view(*x.shape[:-1], weight.shape[0]), codes_t, scale_t, mean, rstd


def _setup(ctx: Any, args: tuple[Any, ...], results: tuple[Tensor, ...]) -> Tensor:
    x, norm_weight, norm_bias, weight, bias, _, ctx.weight_offset, ctx.centred, ctx.recipe, *_ = args
    out, *kept = results
    ctx.bias_dtype, ctx.weight_dtype = None if bias is None else bias.dtype, weight.dtype
    ctx.save_for_backward(x, norm_weight, norm_bias, weight, *kept)
    return out


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, norm_weight, norm_bias, weight, codes_t, scale_t, mean, rstd = ctx.saved_tensors
    wants_x, for_norm_weight, for_norm_bias, wants_weight, wants_bias, *_ = ctx.needs_input_grad
    recipe = RECIPES[ctx.recipe]
    grad = grad.unsqueeze(0).flatten(0, -2)
    dx = dnorm_weight = dnorm_bias = dweight = dbias = None
    if wants_x or for_norm_weight or for_norm_bias:
        left = operand(grad, recipe.grad_input.left, contract=1)
        right = operand(weight, recipe.grad_input.right, contract=0)
        dy = scaled_matmul(left, right, x.dtype).view(x.shape)
        dx, dnorm_weight, dnorm_bias = norm_backward(
            dy,
            x,
            mean,
            rstd,
            norm_weight,
            norm_bias,
            None,
            ctx.weight_offset,
            ctx.centred,
            for_norm_weight or for_norm_bias,
        )
    if wants_weight:
        left = operand(grad, recipe.grad_weight.left, contract=0)
        dweight = scaled_matmul(left, (codes_t, scale_t), ctx.weight_dtype)
    if wants_bias:
        dbias = grad.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return (
        dx if wants_x else None,
        dnorm_weight if for_norm_weight else None,
        dnorm_bias if for_norm_bias else None,
        dweight,
        dbias,
        *(None,) * 6,
    )


_NormLinear = fused_function("norm_linear", _run, _setup, _backward)


def _norm_linear(
    function: str,
    centred: bool,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    recipe: str,
) -> Tensor:
    checks.check_choice(function, "recipe", recipe, RECIPE_NAMES)
    sizes = _arguments.last_size(function, x)
    _arguments.check(function, x, sizes, norm_weight, norm_bias, eps, None)
    if x.dtype not in NARROW:
        raise TypeError(f"{function}: x has dtype {x.dtype}; expected float32, bfloat16 or float16")
    checks.check_floating(function, weight=weight, bias=bias)
    checks.check_same_device(function, "x", x, weight=weight, bias=bias)
    if weight.dim() != 2 or weight.shape[1] != sizes[0]:
        raise ValueError(
            f"{function}: x must be (..., in_features) and weight (out_features, in_features), "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{function}: bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    device = x.device.type
    out_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    tensors = (
        x.contiguous(),
        _arguments.packed(norm_weight),
        _arguments.packed(norm_bias),
        weight,
        bias,
    )
    rest = (eps, weight_offset, centred, recipe, out_dtype)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return _NormLinear.apply(*tensors, *rest, weight.requires_grad)
    return _run(*tensors, *rest, False)[0]


def rms_norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    norm_bias: Tensor | None = None,
    weight_offset: float = 0.0,
    recipe: str = "fp8-row",
) -> Tensor:
    """``rms_norm(x) @ weight.T + bias`` with the matmuls in low precision and the norm written as codes only.

    Args:
        x: ``(..., in_features)``; float32, bfloat16 or float16. The output has its dtype, or the autocast dtype under
            autocast.
        norm_weight: Scale of the norm ``(in_features,)`` or None, in the dtype of x or float32.
        weight: ``(out_features, in_features)``, in any floating dtype.
        bias: ``(out_features,)`` or None.
        eps: Added to the mean square. Default 1e-6.
        norm_bias: Shift of the norm. Default: none.
        weight_offset: Added to `norm_weight`. Default 0.
        recipe: ``"int8-row"`` or ``"fp8-row"``, as of `narrowgauge.quant.linear`.

    Returns:
        What `rms_norm` followed by `narrowgauge.quant.linear` gives, up to one code of the activations: the norm is
        not rounded to the dtype of x in between.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, a device, eps or the recipe does not fit.

    Source: arXiv 1910.07467.
    """
    return _norm_linear(
        "rms_norm_linear", False, x, norm_weight, norm_bias, weight, bias, eps, weight_offset, recipe
    )


def layer_norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    weight_offset: float = 0.0,
    recipe: str = "fp8-row",
) -> Tensor:
    """``layer_norm(x) @ weight.T + bias``, otherwise as `rms_norm_linear`.

    Args:
        x, weight, bias, weight_offset, recipe: As in `rms_norm_linear`.
        norm_weight, norm_bias: Of the norm, ``(in_features,)`` or None, in the dtype of x or float32.
        eps: Added to the variance. Default 1e-5.

    Raises:
        TypeError, ValueError: As `rms_norm_linear`.

    Source: arXiv 1607.06450.
    """
    return _norm_linear(
        "layer_norm_linear", True, x, norm_weight, norm_bias, weight, bias, eps, weight_offset, recipe
    )


class _NormLinearModule(nn.Module):
    """A norm and a `narrowgauge.quant.Linear`, computed together."""

    norm_type: ClassVar[type[nn.Module]]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        eps: float | None = None,
        weight_offset: float = 0.0,
        recipe: str = "fp8-row",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.check_choice(type(self).__name__, "recipe", recipe, RECIPE_NAMES)
        options: dict[str, Any] = {} if eps is None else {"eps": eps}
        self.norm: Any = self.norm_type(
            in_features, weight_offset=weight_offset, device=device, dtype=dtype, **options
        )
        self.linear = Linear(in_features, out_features, bias, recipe=recipe, device=device, dtype=dtype)

    @classmethod
    def from_modules(cls, norm: nn.Module, linear: Linear) -> Self:
        """A layer that consists of these two modules."""
        name = f"{cls.__name__}.from_modules"
        for argument, module, wanted in (("norm", norm, cls.norm_type), ("linear", linear, Linear)):
            if not isinstance(module, wanted):
                raise TypeError(
                    f"{name}: {argument} must be a narrowgauge {wanted.__name__}, got {type(module).__name__}"
                )
        if norm.normalized_shape != (linear.in_features,):
            raise ValueError(
                f"{name}: norm normalizes over {norm.normalized_shape}, but linear takes "
                f"{linear.in_features} features"
            )
        if getattr(norm, "casting", "gemma") != "gemma" or getattr(norm, "output_scale", 1.0) != 1.0:
            raise ValueError(
                f'{name}: norm must have casting="gemma" and output_scale=1, '
                f"got {norm.casting!r} and {norm.output_scale}"
            )
        checks.check_choice(name, "linear.recipe", linear.recipe, RECIPE_NAMES)
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new.norm, new.linear = norm, linear
        new.training = norm.training
        return new


class RMSNormLinear(_NormLinearModule):
    """`narrowgauge.nn.RMSNorm` and `narrowgauge.quant.Linear` as one layer; see `rms_norm_linear`.

    Its ``state_dict`` is that of the two as ``norm`` and ``linear``; ``from_modules(norm, linear)`` joins two.

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        bias: Learn a bias of the linear layer. Default True.
        eps: Of the norm. Default None: machine epsilon of the compute dtype.
        weight_offset: Of the norm. Default 0.
        recipe: ``"int8-row"`` or ``"fp8-row"`` (default).
        device: Of the parameters.
        dtype: Of the parameters.
    """

    norm_type = RMSNorm

    def forward(self, x: Tensor) -> Tensor:
        norm, linear = self.norm, self.linear
        return rms_norm_linear(
            x,
            norm.weight,
            linear.weight,
            linear.bias,
            _arguments.machine_eps(x.dtype) if norm.eps is None else norm.eps,
            norm_bias=norm.bias,
            weight_offset=norm.weight_offset,
            recipe=linear.recipe,
        )


class LayerNormLinear(_NormLinearModule):
    """`narrowgauge.nn.LayerNorm` and `narrowgauge.quant.Linear` as one layer; see `layer_norm_linear`.

    Its ``state_dict`` is that of the two as ``norm`` and ``linear``; ``from_modules(norm, linear)`` joins two.

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        bias: Learn a bias of the linear layer. Default True.
        eps: Of the norm. Default 1e-5.
        weight_offset: Of the norm. Default 0.
        recipe: ``"int8-row"`` or ``"fp8-row"`` (default).
        device: Of the parameters.
        dtype: Of the parameters.
    """

    norm_type = LayerNorm

    def forward(self, x: Tensor) -> Tensor:
        norm, linear = self.norm, self.linear
        return layer_norm_linear(
            x,
            norm.weight,
            norm.bias,
            linear.weight,
            linear.bias,
            norm.eps,
            weight_offset=norm.weight_offset,
            recipe=linear.recipe,
        )
