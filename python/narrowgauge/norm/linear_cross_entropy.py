"""The last linear layer and cross-entropy, a chunk of rows at a time: the logits never exist as a whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from narrowgauge.norm._reference import compute_dtype
from narrowgauge.norm.cross_entropy import (
    Reduction,
    _check_classes,
    _check_options,
    _is_one,
    _one_over_count,
    _Options,
    _reduced,
    cross_entropy,
    cross_entropy_inplace_op,
    cross_entropy_op,
)
from narrowgauge.ops import checks
from narrowgauge.ops.autograd import _transformed, fused_function


def _default_chunk(rows: int, features: int, classes: int) -> int:
    """Rows whose logits take about the memory of x, and at least enough of them for a fast matmul."""
    return max(128, rows * features // max(classes, 1))


def _chunked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    options: _Options,
    reduction: Reduction,
    chunk_rows: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Loss, lse, and the gradients of x, weight and bias where they are wanted."""
    wide = compute_dtype(x.dtype)
    scale = _one_over_count(target, class_weight, reduction, options.ignore_index, wide)
    dx = torch.empty_like(x) if x.requires_grad else None
    # Sums over all rows: in the compute dtype, as an optimizer's master gradient would be.
    dweight = torch.zeros_like(weight, dtype=wide) if weight.requires_grad else None
    dbias = torch.zeros_like(bias, dtype=wide) if bias is not None and bias.requires_grad else None
    losses, sums = [], []
    for start in range(0, x.shape[0], chunk_rows):
        rows, k = x[start : start + chunk_rows], target[start : start + chunk_rows]
        logits = F.linear(rows, weight, bias)
        if dx is None and dweight is None and dbias is None:
            loss, lse = cross_entropy_op(logits, k, class_weight, *options)
        else:
            loss, lse = cross_entropy_inplace_op(logits, k, class_weight, scale, *options)
            dlogits = logits
            if dx is not None:
                torch.mm(dlogits, weight, out=dx[start : start + chunk_rows])
            if dweight is not None:
                if dweight.dtype == dlogits.dtype:
                    dweight.addmm_(dlogits.t(), rows)
                else:
                    dweight.add_(torch.mm(dlogits.t(), rows))
            if dbias is not None:
                dbias.add_(dlogits.sum(0, dtype=wide))
        losses.append(loss)
        sums.append(lse)
        del logits
    loss = torch.cat(losses) if losses else x.new_empty(0, dtype=wide)
    lse = torch.cat(sums) if sums else x.new_empty(0, dtype=wide)
    dweight = None if dweight is None else dweight.to(weight.dtype)
    dbias = None if dbias is None or bias is None else dbias.to(bias.dtype)
    return _reduced(loss, reduction, scale), lse, dx, dweight, dbias


def _setup(ctx: Any, args: tuple[Any, ...], results: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    loss, lse, *gradients = results
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*gradients)
    return loss, lse


def _backward(ctx: Any, g: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    one = _is_one(g)
    gradients = [d if d is None or one else (d * g).to(d.dtype) for d in ctx.saved_tensors]
    return *gradients, None, None, None, None, None


_function = fused_function("linear_cross_entropy", _chunked, _setup, _backward)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    class_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    return_lse: bool = False,
    chunk_rows: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``cross_entropy(x @ weight.T + bias, target)`` without ever holding all logits.

    The rows are taken in chunks. For each, the matmul gives its logits, their gradient is written over them, and the
    gradients of x, weight and bias follow at once, in the forward: three matmuls, as in the unfused form.

    Args:
        x: Rows of features, shape ``(..., H)``; float32, bfloat16, float16 or float64.
        weight: Of the linear layer, shape ``(C, H)``, in the dtype of x.
        target: Class indices, int64, shape ``(...)``.
        bias: Shape ``(C,)``, in the dtype of x. Default: none.
        ignore_index, label_smoothing, z_loss, softcap, return_lse: As in `cross_entropy`.
        class_weight: Weight of each class in the loss, shape ``(C,)``; its `weight`. Default: none.
        reduction: ``"mean"`` (the default) or ``"sum"``; without a gradient also ``"none"``.
        chunk_rows: Rows in a chunk. Default: as many as have logits of the size of x, and at least 128.

    Returns:
        The loss, in float32 (float64 for float64).

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, a device or an option does not fit; on the CPU, a target is no class.

    Source: in the style of Liger Kernel's fused linear cross-entropy, arXiv 2410.10989.
    """
    name = "linear_cross_entropy"
    checks.check_floating(name, x=x, weight=weight, bias=bias)
    options = _check_options(name, ignore_index, label_smoothing, z_loss, softcap, reduction)
    checks.check_same_device(name, "x", x, weight=weight, bias=bias)
    if x.dim() == 0 or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{name}: weight has shape {tuple(weight.shape)} beside x of {tuple(x.shape)}; expected "
            "(classes, features) with the features of x"
        )
    classes, features = weight.shape
    if bias is not None and tuple(bias.shape) != (classes,):
        raise ValueError(f"{name}: bias has shape {tuple(bias.shape)}; expected ({classes},)")
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    for other, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(
                f"{name}: {other} has dtype {tensor.dtype} beside x of {x.dtype}; convert one of them"
            )
    if chunk_rows is not None and (not isinstance(chunk_rows, int) or chunk_rows < 1):
        raise ValueError(f"{name}: chunk_rows must be a positive integer, got {chunk_rows!r}")
    _check_classes(name, x, classes, target, x.shape[:-1], class_weight, ignore_index)
    gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    if gradient and reduction == "none":
        raise ValueError(
            f'{name}: reduction="none" has no gradient here, because the gradient of weight sums over rows in the '
            'forward; use "mean" or "sum", or cross_entropy on the logits'
        )
    if _transformed() and not torch.compiler.is_compiling():
        return cross_entropy(
            F.linear(x, weight, bias).movedim(-1, min(x.dim() - 1, 1)),
            target,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            weight=class_weight,
            reduction=reduction,
            return_lse=return_lse,
        )
    rows, k = x.reshape(-1, features).contiguous(), target.reshape(-1).to(torch.int64).contiguous()
    class_weight = None if class_weight is None else class_weight.detach().contiguous()
    chunk = chunk_rows or _default_chunk(rows.shape[0], features, classes)
    rest = (k, class_weight, options, reduction, chunk)
    if gradient:
        loss, lse = _function.apply(rows, weight, bias, *rest)
    else:
        bias = None if bias is None else bias.detach()
        loss, lse, *_ = _chunked(rows.detach(), weight.detach(), bias, *rest)
    lse = lse.view(target.shape)
    loss = loss.view(target.shape) if reduction == "none" else loss
    return (loss, lse) if return_lse else loss


class LinearCrossEntropyLoss(nn.Module):
    """A linear layer to classes and cross-entropy, in one; the logits never exist as a whole.

    Args:
        in_features: Size of the rows.
        num_classes: Number of classes.
        bias: Learn a bias. Default False, as the output layer of a language model.
        class_weight: Weight of each class in the loss, a buffer. Default: none.
        ignore_index, label_smoothing, z_loss, softcap, reduction, chunk_rows: As in `linear_cross_entropy`.

    ``forward(x, target)`` gives the loss. `weight` and `bias` are initialised as in ``torch.nn.Linear``; to share
    the weight of an embedding assign it: ``loss.weight = embedding.weight``.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        bias: bool = False,
        *,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        reduction: Reduction = "mean",
        chunk_rows: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_options("LinearCrossEntropyLoss", ignore_index, label_smoothing, z_loss, softcap, reduction)
        linear = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.weight, self.bias = linear.weight, linear.bias
        self.register_buffer("class_weight", class_weight)
        self.ignore_index, self.label_smoothing, self.z_loss = ignore_index, label_smoothing, z_loss
        self.softcap, self.reduction, self.chunk_rows = softcap, reduction, chunk_rows

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        loss = linear_cross_entropy(
            x,
            self.weight,
            target,
            bias=self.bias,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            class_weight=self.get_buffer("class_weight") if self.class_weight is not None else None,
            reduction=self.reduction,
            chunk_rows=self.chunk_rows,
        )
        assert isinstance(loss, Tensor)
        return loss

    def extra_repr(self) -> str:
        classes, features = self.weight.shape
        return (
            f"in_features={features}, num_classes={classes}, bias={self.bias is not None}, "
            f"reduction={self.reduction!r}"
        )
