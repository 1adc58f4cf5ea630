"""A linear layer whose three matmuls run in low precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from narrowgauge.ops import system
from narrowgauge.ops.autograd import fused_function
from narrowgauge.ops.checks import check_choice, check_floating, check_same_device
from narrowgauge.quant.matmul import operand, scaled_matmul
from narrowgauge.quant.recipes import RECIPES


def _as_matrix(x: Tensor) -> Tensor:
    return x.unsqueeze(0).flatten(0, -2)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, recipe: str) -> Tensor:
    product = RECIPES[recipe].output
    out = scaled_matmul(
        operand(_as_matrix(x), product.left, contract=1),
        operand(weight, product.right, contract=1),
        x.dtype,
        bias,
    )
    return out.view(*x.shape[:-1], weight.shape[0])


def _setup(ctx: Any, args: tuple[Any, ...], out: Tensor) -> Tensor:
    x, weight, bias, ctx.recipe = args
    wants_x, wants_weight = ctx.needs_input_grad[:2]
    ctx.x_shape, ctx.x_dtype, ctx.weight_dtype = x.shape, x.dtype, weight.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x if wants_weight else None, weight if wants_x else None)
    return out


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    x, weight = ctx.saved_tensors
    wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
    recipe = RECIPES[ctx.recipe]
    grad = _as_matrix(grad)
    grad_x = grad_weight = grad_bias = None
    if wants_x:
        left = operand(grad, recipe.grad_input.left, contract=1)
        right = operand(weight, recipe.grad_input.right, contract=0)
        grad_x = scaled_matmul(left, right, ctx.x_dtype).view(ctx.x_shape)
    if wants_weight:
        left = operand(grad, recipe.grad_weight.left, contract=0)
        right = operand(_as_matrix(x), recipe.grad_weight.right, contract=0)
        grad_weight = scaled_matmul(left, right, ctx.weight_dtype)
    if wants_bias:
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        grad_bias = grad.sum(0, dtype=wide).to(ctx.bias_dtype)
    return grad_x, grad_weight, grad_bias, None


_Linear = fused_function("quant.linear", _forward, _setup, _backward)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, recipe: str = "fp8-row") -> Tensor:
    """``x @ weight.T + bias`` with the operands of the forward and of both backward matmuls quantized.

    Gradients pass the rounding unchanged (straight-through); that of the bias is not quantized.

    Args:
        x: ``(..., in_features)``, any number of leading dimensions and any sizes. The output has its dtype,
            or the autocast dtype under autocast.
        weight: ``(out_features, in_features)``, in any floating dtype: it is quantized from what it is.
        bias: ``(out_features,)`` or None.
        recipe: ``"int8-row"`` or ``"fp8-row"``: int8 or e4m3, one absmax scale per row or column of every
            operand such that it leaves the sum.
    """
    check_choice("linear", "recipe", recipe, RECIPES)
    check_floating("linear", x=x, weight=weight, bias=bias)
    check_same_device("linear", "x", x, weight=weight, bias=bias)
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            "linear: x must be (..., in_features) and weight (out_features, in_features), "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear: bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _Linear.apply(x, weight, bias, recipe)
    return _forward(x, weight, bias, recipe)


class Linear(nn.Linear):
    """`torch.nn.Linear` with its three matmuls in low precision.

    Parameters, their dtype, their initialization and the ``state_dict`` are those of ``torch.nn.Linear``;
    quantized values live only inside a matmul. See `linear` for the arithmetic.

    Args:
        in_features: As in ``torch.nn.Linear``.
        out_features: As in ``torch.nn.Linear``.
        bias: As in ``torch.nn.Linear``.
        recipe: ``"int8-row"`` or ``"fp8-row"``.
        device: As in ``torch.nn.Linear``.
        dtype: As in ``torch.nn.Linear``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        recipe: str = "fp8-row",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_choice("Linear", "recipe", recipe, RECIPES)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.recipe = recipe

    @classmethod
    def from_linear(cls, module: nn.Linear, recipe: str = "fp8-row") -> Linear:
        """A layer that shares the parameters of `module`."""
        if not isinstance(module, nn.Linear):
            raise TypeError(
                f"Linear.from_linear: module must be a torch.nn.Linear, got {type(module).__name__}"
            )
        new = cls(
            module.in_features, module.out_features, module.bias is not None, recipe=recipe, device="meta"
        )
        new.weight, new.bias = module.weight, module.bias
        return new.train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, recipe=self.recipe)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, recipe={self.recipe!r}"


system(
    "quantized_linear",
    title="Linear layers in int8 and fp8",
    source="scaled per row, as in torchao",
    page="quantization.md",
    modules=("quant.Linear",),
    operators=("quantize", "dequantize"),
    bench=("linear",),
    reasons={"golden": "the float64 formula of its three matmuls is the truth"},
)
