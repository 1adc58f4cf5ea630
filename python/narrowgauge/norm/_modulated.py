"""What the references and the public functions of the gated, per-head and modulated norms share.

Each normalizes its rows and then scales them by one of several vectors: that of the group, of the head, of the sample.
Arithmetic is float32 (float64 for float64), rounded once at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from narrowgauge.ops import checks


def normalize(s: Tensor, eps: float, centred: bool = False) -> tuple[Tensor, Tensor]:
    """The normalized rows, and the factor of each row that did it (kept as a column)."""
    if centred:
        s = s - s.mean(-1, keepdim=True)
    scale = (s.square().mean(-1, keepdim=True) + eps).rsqrt()
    return s * scale, scale


def through_norm(h: Tensor, x_hat: Tensor, scale: Tensor, centred: bool = False) -> Tensor:
    """The gradient of the rows from `h`, that of the normalized rows."""
    d = h - x_hat * (h * x_hat).mean(-1, keepdim=True)
    if centred:
        d = d - h.mean(-1, keepdim=True)
    return d * scale


def summed_like(terms: Tensor, parameter: Tensor | None, wanted: bool) -> Tensor:
    """The gradient of a parameter that was broadcast over the leading dimensions; empty where there is none."""
    if parameter is None or not wanted:
        return terms.new_empty(0, dtype=terms.dtype if parameter is None else parameter.dtype)
    return terms.sum_to_size(parameter.shape).to(parameter.dtype, copy=True)


def check_tensor(function: str, name: str, tensor: object) -> None:
    """It must be a tensor with at least one dimension."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{function}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dim() == 0:
        raise ValueError(f"{function}: {name} must have at least one dimension, got a scalar tensor")


def check_beside(function: str, x_name: str, x: Tensor, **tensors: Tensor | None) -> None:
    """Every given tensor must be on the device of x, in its dtype or float32."""
    checks.check_floating(function, **{x_name: x}, **tensors)
    checks.check_same_device(function, x_name, x, **tensors)
    companions = (x.dtype,) if x.dtype == torch.float64 else (x.dtype, torch.float32)
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in companions:
            raise TypeError(
                f"{function}: {name} has dtype {tensor.dtype} beside {x_name} of {x.dtype}; "
                f"convert it to {' or '.join(map(str, companions))}"
            )


def check_same(function: str, x: Tensor, **tensors: Tensor) -> None:
    """Every tensor must have the shape and dtype of x."""
    for name, tensor in tensors.items():
        if tensor.shape != x.shape:
            raise ValueError(
                f"{function}: {name} has shape {tuple(tensor.shape)}; expected that of x, {tuple(x.shape)}"
            )
        if tensor.dtype != x.dtype:
            raise TypeError(
                f"{function}: {name} has dtype {tensor.dtype} beside x of {x.dtype}; "
                f"convert it, for example {name}.to(x.dtype)"
            )
