"""Argument checks whose errors name the argument, what was given and the remedy."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

FLOATING_NAMES = "float32, bfloat16, float16 or float64"


def check_floating(function: str, **tensors: Tensor | None) -> None:
    """Every given tensor must be a floating-point tensor of a supported dtype."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{function}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise TypeError(
                f"{function}: {name} has dtype {tensor.dtype}; expected {FLOATING_NAMES}. "
                f"Convert it first, for example {name}.float()"
            )


def check_same_device(function: str, first_name: str, first: Tensor, **tensors: Tensor | None) -> None:
    """Every given tensor must be where the first one is."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(
                f"{function}: {name} is on {tensor.device} but {first_name} is on {first.device}; "
                f"move one of them, for example {name}.to({first_name}.device)"
            )


def check_eps(function: str, eps: Any) -> None:
    """An eps must be a finite number that is not negative."""
    if not isinstance(eps, (int, float)) or not 0 <= eps < math.inf:
        raise ValueError(f"{function}: eps must be a finite number >= 0, got {eps!r}")


def check_choice(function: str, name: str, value: Any, choices: Iterable[Any]) -> None:
    """A value must be one of the choices."""
    choices = tuple(choices)
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{function}: {name} must be one of {listed}; got {value!r}")
