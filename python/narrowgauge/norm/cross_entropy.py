"""Cross-entropy whose gradient is computed in the second sweep of the forward.

    loss = (1 - s) w_k (lse - z_k) + s / V * sum_j w_j (lse - z_j) + z_loss * lse^2,     lse = ln(sum(exp(z)))

with z the logits, or softcap * tanh(logits / softcap), k the target, s the label smoothing, w the class weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from narrowgauge.norm._reference import compute_dtype
from narrowgauge.ops import Sample, SampleMaker, checks, operator
from narrowgauge.ops.autograd import _transformed, fused_function
from narrowgauge.ops.system import system

Reduction = Literal["none", "mean", "sum"]


def _samples(make: SampleMaker, scaled: bool) -> Iterator[Sample]:
    wide = compute_dtype(make.dtype)

    def call(
        rows: int, classes: int, *options: Any, weight: torch.dtype | None = None, z: float = 1.0
    ) -> tuple[Any, ...]:
        target = torch.arange(rows, device=make.device) * 7 % classes
        if rows > 2:
            target[1] = -100
        w = None if weight is None else make(classes, dtype=weight).abs()
        scale = (make(1, dtype=wide),) if scaled else ()
        return make(rows, classes, scale=z), target, w, *scale, *options

    yield Sample(call(3, 150, -100, 0.0, 0.0, 0.0), "several blocks")
    yield Sample(call(5, 17, -100, 0.0, 0.0, 0.0, z=20.0), "an odd row, spread values")
    yield Sample(call(6, 40, -100, 0.1, 1e-2, 5.0, weight=make.dtype), "every option")
    yield Sample(call(6, 33, -100, 0.1, 0.0, 0.0, weight=wide), "wide weights, smoothed")
    yield Sample(call(4, 1, -100, 0.0, 1e-2, 0.0), "one class")
    yield Sample(call(2, 2056, -100, 0.0, 0.0, 3.0), "more than one warp's registers, capped")
    logits, *rest = call(0, 8, -100, 0.0, 0.0, 0.0)
    yield Sample((logits, rest[0], *rest[1:]), "no rows")


def _plain_samples(make: SampleMaker) -> Iterator[Sample]:
    return _samples(make, scaled=False)


def _scaled_samples(make: SampleMaker) -> Iterator[Sample]:
    return _samples(make, scaled=True)


def _scale_samples(make: SampleMaker) -> Iterator[Sample]:
    wide = compute_dtype(make.dtype)
    one = torch.ones(1, dtype=wide, device=make.device)
    yield Sample((make(3, 150), make(1, dtype=wide)), "one factor")
    yield Sample((make(5, 17), make(5, dtype=wide)), "a factor for each row")
    yield Sample((make(5, 17), one), "nothing to do")
    yield Sample((make(0, 8), one), "no rows")


def _rows(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Loss and lse of every row, in plain PyTorch; NaN where the target is no class."""
    z = logits.to(compute_dtype(logits.dtype))
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    classes = z.shape[-1]
    ignored, valid = target == ignore_index, (target >= 0) & (target < classes)
    k = torch.where(valid, target, 0).unsqueeze(-1)
    lse = z.logsumexp(-1)
    log_p = z.log_softmax(-1)
    w = z.new_ones(classes) if weight is None else weight.to(z.dtype)
    loss = -(1 - label_smoothing) * w[k.squeeze(-1)] * log_p.gather(-1, k).squeeze(-1)
    if label_smoothing:
        loss = loss - label_smoothing / classes * (w * log_p).sum(-1)
    if z_loss:
        loss = loss + z_loss * lse.square()
    loss = torch.where(valid, loss, math.nan)
    return torch.where(ignored, 0.0, loss), torch.where(ignored, 0.0, lse)


def _gradient(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> Tensor:
    z = logits.to(compute_dtype(logits.dtype))
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    classes = z.shape[-1]
    ignored, valid = target == ignore_index, (target >= 0) & (target < classes)
    k = torch.where(valid, target, 0).unsqueeze(-1)
    w = z.new_ones(classes) if weight is None else weight.to(z.dtype)
    w_k = w[k]
    total = (1 - label_smoothing) * w_k + label_smoothing / classes * w.sum() + 2 * z_loss * lse.unsqueeze(-1)
    d = z.softmax(-1) * total - label_smoothing / classes * w
    d = d.scatter_add(-1, k, -(1 - label_smoothing) * w_k)
    if scale is not None:
        d = d * scale
    if softcap:
        d = d * (1 - (z / softcap).square())
    d = torch.where(valid.unsqueeze(-1), d, math.nan)
    return torch.where(ignored.unsqueeze(-1), 0.0, d).to(logits.dtype).contiguous()


_OPTIONS = "int ignore_index, float label_smoothing, float z_loss, float softcap"


@operator(
    f"cross_entropy(Tensor logits, Tensor target, Tensor? weight, {_OPTIONS}) -> (Tensor loss, Tensor lse)",
    samples=_plain_samples,
)
def cross_entropy_op(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of every row."""
    return _rows(logits, target, weight, ignore_index, label_smoothing, z_loss, softcap)


@operator(
    f"cross_entropy_forward(Tensor logits, Tensor target, Tensor? weight, Tensor? scale, {_OPTIONS})"
    " -> (Tensor loss, Tensor lse, Tensor dlogits)",
    samples=_scaled_samples,
)
def cross_entropy_forward_op(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As cross_entropy, with scale * the gradient of the sum of losses."""
    options = (ignore_index, label_smoothing, z_loss, softcap)
    loss, lse = _rows(logits, target, weight, *options)
    return loss, lse, _gradient(logits, target, weight, scale, lse, *options)


@operator(
    f"cross_entropy_forward_(Tensor(a!) logits, Tensor target, Tensor? weight, Tensor? scale, {_OPTIONS})"
    " -> (Tensor loss, Tensor lse)",
    samples=_scaled_samples,
)
def cross_entropy_inplace_op(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """As cross_entropy_forward, with the gradient written over the logits."""
    options = (ignore_index, label_smoothing, z_loss, softcap)
    loss, lse = _rows(logits, target, weight, *options)
    logits.copy_(_gradient(logits, target, weight, scale, lse, *options))
    return loss, lse


@operator("scale_rows_(Tensor(a!) x, Tensor factor) -> ()", samples=_scale_samples)
def scale_rows_op(x: Tensor, factor: Tensor) -> None:
    """x *= factor, one for all or one for each row; not touched where the factor is 1."""
    x.copy_(x.to(factor.dtype) * factor.reshape(-1, *(1,) * (x.dim() - 1)))


class _Options(NamedTuple):
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float


def _one_over_count(
    target: Tensor,
    weight: Tensor | None,
    reduction: Reduction,
    ignore_index: int,
    dtype: torch.dtype,
    count: int | None = None,
) -> Tensor | None:
    """What a mean divides by, inverted: the weights of the targets that count, summed. None for other reductions.

    count: their sum, where `_check_classes` has found it.
    """
    if reduction != "mean":
        return None
    if count is not None:
        return torch.full((1,), 1 / count, dtype=dtype, device=target.device)
    counted = target != ignore_index
    if weight is None:
        total = counted.sum(dtype=dtype)
    else:
        classes = weight.shape[0]
        known = counted & (target >= 0) & (target < classes)
        total = torch.where(known, weight[torch.where(known, target, 0)].to(dtype), 0.0).sum()
    return total.reciprocal().reshape(1)


def _reduced(loss: Tensor, reduction: Reduction, scale: Tensor | None, count: int | None = None) -> Tensor:
    """Sums are float64, so that they hardly depend on how PyTorch cuts them over threads."""
    if reduction == "none":
        return loss
    if reduction == "mean" and count is not None:
        return loss.mean(dtype=torch.float64).to(loss.dtype)
    total = loss.sum(dtype=torch.float64)
    return (total if scale is None else total * scale.double().squeeze()).to(loss.dtype)


def _forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: _Options,
    reduction: Reduction,
    in_place: bool,
    count: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(logits.dtype)
    scale = _one_over_count(target, weight, reduction, options.ignore_index, dtype, count)
    if in_place:
        loss, lse = cross_entropy_inplace_op(logits, target, weight, scale, *options)
        torch.autograd.graph.increment_version(logits)
        dlogits = logits
    else:
        loss, lse, dlogits = cross_entropy_forward_op(logits, target, weight, scale, *options)
    return _reduced(loss, reduction, scale, count), lse, dlogits


def _setup(ctx: Any, args: tuple[Any, ...], results: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    loss, lse, dlogits = results
    ctx.in_place, ctx.used = args[5], False
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(dlogits)
    return loss, lse


def _is_one(g: Tensor) -> bool:
    """Whether it is known without waiting for a device that the gradient which arrives is 1."""
    return g.numel() == 1 and g.is_cpu and not torch.compiler.is_compiling() and g.item() == 1.0


def _backward(ctx: Any, g: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    (dlogits,) = ctx.saved_tensors
    rest = (None,) * 6
    if not ctx.in_place:
        return (dlogits if _is_one(g) else (dlogits * g.unsqueeze(-1)).to(dlogits.dtype)), *rest
    if ctx.used:
        raise RuntimeError(
            "cross_entropy: inplace_grad=True allows one backward, which has scaled the gradient in place; "
            "pass inplace_grad=False to go through the graph again"
        )
    ctx.used = True
    scale_rows_op(dlogits, g.to(compute_dtype(dlogits.dtype)).reshape(-1).contiguous())
    return dlogits, *rest


_function = fused_function("cross_entropy", _forward, _setup, _backward)


def _check_number(function: str, name: str, value: Any, low: float, high: float = math.inf) -> None:
    if not isinstance(value, (int, float)) or not low <= value <= high or math.isinf(value):
        bound = f"from {low} to {high}" if high < math.inf else f"a finite number >= {low}"
        raise ValueError(f"{function}: {name} must be {bound}, got {value!r}")


def _check_options(
    function: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    reduction: str,
    reductions: tuple[str, ...] = ("none", "mean", "sum"),
) -> _Options:
    checks.check_choice(function, "reduction", reduction, reductions)
    _check_number(function, "label_smoothing", label_smoothing, 0, 1)
    _check_number(function, "z_loss", z_loss, 0)
    if softcap is not None:
        _check_number(function, "softcap", softcap, 0)
        if softcap == 0:
            raise ValueError(f"{function}: softcap must be positive, got 0; pass None for no cap")
    if not isinstance(ignore_index, int):
        raise TypeError(f"{function}: ignore_index must be an integer, got {ignore_index!r}")
    return _Options(ignore_index, float(label_smoothing), float(z_loss), float(softcap or 0.0))


def _check_classes(
    function: str,
    x: Tensor,
    classes: int,
    target: Tensor,
    shape: torch.Size,
    weight: Tensor | None,
    ignore_index: int,
) -> int | None:
    """Target and class weights beside logits (or the rows that give them).

    Returns how many targets there are where it is known, without waiting for a device, that all count alike.
    """
    if not isinstance(target, Tensor):
        raise TypeError(f"{function}: target must be a tensor, got {type(target).__name__}")
    if target.is_floating_point():
        raise TypeError(
            f"{function}: target has dtype {target.dtype}: class probabilities are not supported; pass class "
            "indices (int64), or use torch.nn.functional.cross_entropy"
        )
    if target.dtype not in (torch.int64, torch.int32, torch.uint8):
        raise TypeError(f"{function}: target has dtype {target.dtype}; expected int64 class indices")
    if target.shape != shape:
        raise ValueError(f"{function}: target has shape {tuple(target.shape)}; expected {tuple(shape)}")
    checks.check_same_device(function, "the input", x, target=target, weight=weight)
    if weight is not None:
        checks.check_floating(function, weight=weight)
        companions = (x.dtype,) if x.dtype == torch.float64 else (x.dtype, torch.float32)
        if tuple(weight.shape) != (classes,) or weight.dtype not in companions:
            raise ValueError(
                f"{function}: weight has shape {tuple(weight.shape)} and dtype {weight.dtype}; expected "
                f"({classes},) and {' or '.join(map(str, companions))}"
            )
    if target.numel() and classes == 0:
        raise ValueError(f"{function}: there must be at least one class")
    count = target.numel()
    if not target.is_cpu or torch.compiler.is_compiling() or _transformed() or not count:
        return None
    low, high = (int(bound) for bound in target.aminmax())
    if low >= 0 and high < classes and not low <= ignore_index <= high:
        return count if weight is None else None
    wrong = (target != ignore_index) & ((target < 0) | (target >= classes))
    if bool(wrong.any()):
        bad = int(target[wrong][0])
        raise ValueError(
            f"{function}: target contains {bad}; expected classes from 0 to {classes - 1}, "
            f"or ignore_index {ignore_index}"
        )
    return None


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    inplace_grad: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy between logits and class indices; loss and gradient in one go over the logits.

    Args:
        logits: Shape ``(C)``, ``(N, C)`` or ``(N, C, d1, ...)``; float32, bfloat16, float16 or float64; any layout.
        target: Class indices, int64, of the shape of logits without C. (Class probabilities are refused.)
        ignore_index: Targets of this value give no loss and no gradient. Default -100.
        label_smoothing: Share of the target that is spread over all classes. Default 0.
        z_loss: Factor of the squared log-sum-exp that is added to each row's loss. Default 0.
        softcap: Replace the logits by ``softcap * tanh(logits / softcap)`` first, as in Gemma 2. Default: none.
        weight: Weight of each class, shape ``(C,)``, in the dtype of logits or float32; has no gradient. Default: none.
        reduction: ``"mean"`` (the default) divides the sum by the weights of the targets that count, summed;
            ``"sum"``; or ``"none"``.
        inplace_grad: Write the gradient over the logits, which are then gone: saves a tensor of their size. Allows
            one backward. Applies where logits need a gradient and outside of ``torch.compile``. Default False.
        return_lse: Also return the log-sum-exp of each row (0 where ignored), without gradient. Default False.

    Returns:
        The loss, in float32 (float64 for float64) whatever the dtype of logits. The mean is NaN where every target is
        ignored, as in torch. A row with +inf or NaN is NaN, unless it is ignored.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, a device or an option does not fit; on the CPU, a target is no class. (On CUDA, where
            looking would cost a synchronization, the loss is NaN.)

    Source: gradient in the forward as in Liger Kernel, arXiv 2410.10989; z-loss, PaLM, arXiv 2204.02311.
    """
    name = "cross_entropy"
    checks.check_floating(name, logits=logits)
    if logits.dim() == 0:
        raise ValueError(f"{name}: logits must have at least one dimension, got a scalar tensor")
    options = _check_options(name, ignore_index, label_smoothing, z_loss, softcap, reduction)
    dim = 0 if logits.dim() == 1 else 1
    shape = torch.Size([*logits.shape[:dim], *logits.shape[dim + 1 :]])
    classes = logits.shape[dim]
    count = _check_classes(name, logits, classes, target, shape, weight, ignore_index)
    rows = (logits if dim == logits.dim() - 1 else logits.movedim(dim, -1)).contiguous()
    target = target.to(torch.int64).contiguous()
    weight = None if weight is None else weight.detach().contiguous()
    if _transformed() and not torch.compiler.is_compiling():
        loss, lse = _rows(rows, target, weight, *options)
        loss, lse = (
            _reduced(loss, reduction, _one_over_count(target, weight, reduction, ignore_index, loss.dtype)),
            lse.detach(),
        )
    elif torch.is_grad_enabled() and logits.requires_grad:
        in_place = inplace_grad and not torch.compiler.is_compiling()
        loss, lse = _function.apply(rows, target, weight, options, reduction, in_place, count)
    else:
        loss, lse = cross_entropy_op(rows, target, weight, *options)
        scale = None
        if count is None:
            scale = _one_over_count(target, weight, reduction, ignore_index, loss.dtype)
        loss = _reduced(loss, reduction, scale, count)
    return (loss, lse) if return_lse else loss


class CrossEntropyLoss(nn.Module):
    """Cross-entropy between logits and class indices; takes the place of `torch.nn.CrossEntropyLoss`.

    Args:
        weight: Weight of each class, shape ``(C,)``. A buffer. Default: none.
        ignore_index, label_smoothing, z_loss, softcap, reduction, inplace_grad, return_lse: As in `cross_entropy`.
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        reduction: Reduction = "mean",
        inplace_grad: bool = False,
        return_lse: bool = False,
    ) -> None:
        super().__init__()
        _check_options("CrossEntropyLoss", ignore_index, label_smoothing, z_loss, softcap, reduction)
        self.register_buffer("weight", weight)
        self.ignore_index, self.label_smoothing, self.z_loss = ignore_index, label_smoothing, z_loss
        self.softcap, self.reduction = softcap, reduction
        self.inplace_grad, self.return_lse = inplace_grad, return_lse

    def forward(self, logits: Tensor, target: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return cross_entropy(
            logits,
            target,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            weight=self.weight,
            reduction=self.reduction,
            inplace_grad=self.inplace_grad,
            return_lse=self.return_lse,
        )

    def extra_repr(self) -> str:
        return (
            f"ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}, z_loss={self.z_loss}, "
            f"softcap={self.softcap}, reduction={self.reduction!r}"
        )


system(
    "cross_entropy",
    title="Cross-entropy, alone and with the last linear layer",
    source="arXiv 2410.10989",
    page="norm/cross_entropy.md",
    functions=("cross_entropy", "linear_cross_entropy"),
    modules=("CrossEntropyLoss", "LinearCrossEntropyLoss"),
    operators=("cross_entropy", "cross_entropy_forward", "cross_entropy_forward_", "scale_rows_"),
    bench=("cross_entropy", "linear_cross_entropy"),
    reasons={"golden": "nothing recorded: the tests compare with PyTorch's own loss in float64"},
)
