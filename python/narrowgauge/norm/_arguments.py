"""Argument checks of the public normalization functions, and what their modules share."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, SupportsIndex, cast

import torch
from torch import Tensor, nn

from narrowgauge.norm._reference import compute_dtype
from narrowgauge.ops import checks

Shape = int | Sequence[int]


def as_sizes(normalized_shape: Shape) -> tuple[int, ...]:
    """`normalized_shape` as a tuple."""
    if isinstance(normalized_shape, int):
        return (normalized_shape,)
    if isinstance(normalized_shape, (tuple, list)):
        return tuple(normalized_shape)
    try:
        return (operator.index(cast(SupportsIndex, normalized_shape)),)  # such as a NumPy integer
    except TypeError:
        raise TypeError(
            f"normalized_shape must be an integer or a sequence of integers, got {normalized_shape!r}"
        ) from None


def normalized_sizes(function: str, x: Tensor, normalized_shape: Shape) -> tuple[int, ...]:
    """`normalized_shape` as a tuple, after checking that it is how the shape of x ends."""
    sizes = as_sizes(normalized_shape)
    if not isinstance(x, Tensor):
        raise TypeError(f"{function}: x must be a tensor, got {type(x).__name__}")
    if not sizes or tuple(x.shape[-len(sizes) :]) != sizes:
        raise ValueError(
            f"{function}: x has shape {tuple(x.shape)}, which does not end in normalized_shape {sizes}; "
            "pass the sizes of the trailing dimensions to normalize over"
        )
    return sizes


def last_size(function: str, x: Tensor, name: str = "x") -> tuple[int]:
    """The size of the last dimension, which the residual forms normalize over."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{function}: {name} must be a tensor, got {type(x).__name__}")
    if x.dim() == 0:
        raise ValueError(f"{function}: {name} must have at least one dimension, got a scalar tensor")
    return (x.shape[-1],)


def check_residual_dtype(function: str, x: Tensor, dtype: torch.dtype | None) -> None:
    """The dtype of the returned sum: that of x or float32."""
    if dtype is None or dtype == x.dtype:
        return
    if dtype != torch.float32 or x.dtype == torch.float64:
        raise TypeError(
            f"{function}: residual_dtype is {dtype} for x of {x.dtype}; expected that dtype or float32"
        )


def residual_as(function: str, x: Tensor, residual: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The residual, widened first where the sum is to be wider than it."""
    if not isinstance(residual, Tensor):
        raise TypeError(f"{function}: residual must be a tensor, got {type(residual).__name__}")
    check_residual_dtype(function, x, dtype)
    return residual.to(dtype) if dtype is not None and residual.dtype == x.dtype else residual


def check(
    function: str,
    x: Tensor,
    sizes: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None,
    residual: Tensor | None = None,
) -> None:
    """Raises a TypeError or ValueError that names the first wrong argument."""
    checks.check_floating(function, x=x, weight=weight, bias=bias, residual=residual)
    checks.check_eps(function, eps)
    checks.check_same_device(function, "x", x, weight=weight, bias=bias, residual=residual)
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is None:
            continue
        if tuple(vector.shape) != sizes:
            raise ValueError(
                f"{function}: {name} has shape {tuple(vector.shape)}; expected normalized_shape {sizes}"
            )
        check_companions(function, x, **{name: vector})
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(
                f"{function}: residual has shape {tuple(residual.shape)}; expected that of x, {tuple(x.shape)}"
            )
        check_companions(function, x, residual=residual)
    if out_dtype is not None and out_dtype not in companions(x):
        raise TypeError(
            f"{function}: out_dtype is {out_dtype} for x of {x.dtype}; expected {' or '.join(map(str, companions(x)))}"
        )


def companions(x: Tensor) -> tuple[torch.dtype, ...]:
    """The dtypes that may stand beside x: its own, and float32 unless it is float64."""
    return (x.dtype,) if x.dtype == torch.float64 else (x.dtype, torch.float32)


def check_companions(function: str, x: Tensor, x_name: str = "x", /, **tensors: Tensor | None) -> None:
    """Every given tensor must have a dtype that may stand beside x."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in companions(x):
            raise TypeError(
                f"{function}: {name} has dtype {tensor.dtype} beside {x_name} of {x.dtype}; "
                f"convert it to {' or '.join(map(str, companions(x)))}"
            )


def check_second(function: str, x: Tensor, weight1: Tensor | None, bias1: Tensor | None) -> None:
    """The second pair of weight and bias."""
    checks.check_floating(function, weight1=weight1, bias1=bias1)
    checks.check_same_device(function, "x", x, weight1=weight1, bias1=bias1)
    for name, vector in (("weight1", weight1), ("bias1", bias1)):
        if vector is None:
            continue
        if tuple(vector.shape) != (x.shape[-1],):
            raise ValueError(f"{function}: {name} has shape {tuple(vector.shape)}; expected ({x.shape[-1]},)")
        check_companions(function, x, **{name: vector})


def check_branches(
    function: str, x: Tensor, x1: Tensor | None, rowscale: Tensor | None, dropout_p: Any
) -> None:
    """What stands beside x before the sum."""
    checks.check_floating(function, x1=x1, rowscale=rowscale)
    checks.check_same_device(function, "x", x, x1=x1, rowscale=rowscale)
    if x1 is not None and (x1.shape != x.shape or x1.dtype != x.dtype):
        raise ValueError(
            f"{function}: x1 has shape {tuple(x1.shape)} and dtype {x1.dtype}; expected those of x, "
            f"{tuple(x.shape)} and {x.dtype}"
        )
    if rowscale is not None:
        if rowscale.shape != x.shape[:-1]:
            raise ValueError(
                f"{function}: rowscale has shape {tuple(rowscale.shape)}; expected one factor for each row of x, "
                f"{tuple(x.shape[:-1])}"
            )
        check_companions(function, x, rowscale=rowscale)
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)) or not 0 <= dropout_p <= 1:
        raise ValueError(f"{function}: dropout_p must be a number from 0 to 1, got {dropout_p!r}")


Masks = Tensor | tuple[Tensor, Tensor] | None


def dropout_masks(
    function: str, x: Tensor, x1: Tensor | None, given: Masks
) -> tuple[Tensor | None, Tensor | None]:
    """The masks of x and of x1, checked."""
    if given is None:
        return None, None
    masks = tuple(given) if isinstance(given, (tuple, list)) else (given,)
    if len(masks) != (1 if x1 is None else 2):
        raise ValueError(
            f"{function}: dropout_mask holds {len(masks)} of the masks; expected "
            + ("one tensor, the mask of x" if x1 is None else "a pair, the mask of x and that of x1")
        )
    for mask in masks:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != x.shape:
            what = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
            raise ValueError(
                f"{function}: dropout_mask must be a bool tensor (True = keep) of the shape of x "
                f"{tuple(x.shape)}, got {what}"
            )
        checks.check_same_device(function, "x", x, dropout_mask=mask)
    packed_masks = [mask.contiguous() for mask in masks]
    return packed_masks[0], packed_masks[1] if x1 is not None else None


def check_partial(function: str, partial: Any, d: int) -> int:
    """How many channels of d the fraction `partial` selects."""
    if isinstance(partial, bool) or not isinstance(partial, (int, float)) or not 0 < partial <= 1:
        raise ValueError(
            f"{function}: partial must be a number above 0 and up to 1, or None for all channels; got {partial!r}"
        )
    if int(partial * d) == 0:
        raise ValueError(f"{function}: partial={partial} of {d} channels selects none; raise partial")
    return int(partial * d)


def packed(vector: Tensor | None) -> Tensor | None:
    """A weight or bias as kernels take it."""
    return None if vector is None else vector.contiguous()


def machine_eps(dtype: torch.dtype) -> float:
    """What ``eps=None`` means: the machine epsilon of the compute dtype, as in ``torch.nn.functional.rms_norm``."""
    return torch.finfo(compute_dtype(dtype)).eps


def flattened(
    norm: Callable[..., Tensor],
    x: Tensor,
    sizes: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    *rest: object,
) -> Tensor:
    """Calls an operator over the last dimension with several trailing dimensions flattened into it."""
    rows = x.reshape(*x.shape[: -len(sizes)], math.prod(sizes)).contiguous()
    weight, bias = (None if vector is None else vector.flatten().contiguous() for vector in (weight, bias))
    return norm(rows, weight, bias, *rest).view(x.shape)


def register_affine(
    module: nn.Module,
    normalized_shape: tuple[int, ...],
    *,
    weight: bool,
    bias: bool,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> None:
    """Registers the parameters ``weight`` and ``bias`` (or None) of a norm, uninitialised."""
    for name, wanted in (("weight", weight), ("bias", bias)):
        values = nn.Parameter(torch.empty(normalized_shape, device=device, dtype=dtype)) if wanted else None
        module.register_parameter(name, values)
