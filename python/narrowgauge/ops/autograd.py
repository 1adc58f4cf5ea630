"""Autograd wiring: as little as possible around the forward and backward operators.

A ``torch.autograd.Function`` with the two-argument ``forward(ctx, ...)`` is the cheapest wiring that ``torch.compile``
still captures whole (docs/decisions/autograd-wiring.md has the measurements). Calls that need no gradient go straight
to the inference operator. Under ``torch.func`` transforms and in forward mode the reference runs, which PyTorch
differentiates itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from narrowgauge.ops.operator import Operator

differentiables: dict[str, Differentiable] = {}


class Differentiable:
    """An operator together with the operators that compute its gradient. Call it like the operator."""

    def __init__(
        self,
        inference: Operator,
        forward: Operator,
        setup: Callable[..., Any],
        backward: Callable[..., Any],
    ) -> None:
        self.name = inference.name
        self.inference = inference
        self._kernel = inference.overload._op  # without the Python method around it
        self._apply = fused_function(self.name, forward, setup, backward).apply

    def __call__(self, *args: Any) -> Any:
        if not torch.compiler.is_compiling() and _transformed():
            return self.inference.reference(*args)
        if torch.is_grad_enabled():
            for argument in args:
                if isinstance(argument, Tensor) and argument.requires_grad:
                    return self._apply(*args)
        return self.inference(*args)

    def call_kernel(self, *args: Any) -> Any:
        """The same, a little cheaper, where `narrowgauge.ops.library.kernel_checks` is true."""
        if _functorch_active() or forward_ad._current_level >= 0:
            return self.inference.reference(*args)
        if torch.is_grad_enabled():
            for argument in args:
                if isinstance(argument, Tensor) and argument.requires_grad:
                    return self._apply(*args)
        return self._kernel(*args)


_functorch_active = torch._C._are_functorch_transforms_active


def _transformed() -> bool:
    """Inside a torch.func transform or forward-mode differentiation, which see plain PyTorch only."""
    return _functorch_active() or forward_ad._current_level >= 0


def fused_function(
    name: str,
    run_forward: Callable[..., Any],
    setup: Callable[..., Any],
    backward_formula: Callable[..., Any],
) -> type[torch.autograd.Function]:
    """An autograd function whose backward is a kernel: its second derivative is a clear error."""
    message = (
        f"narrowgauge.{name} cannot be differentiated twice: its backward is a fused kernel without a derivative of "
        "its own. Use the torch.nn layer where a second derivative is needed."
    ).encode()

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            return setup(ctx, args, run_forward(*args))

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> Any:
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
                with torch.no_grad():
                    results = backward_formula(ctx, *gradients)
                wanted = [i for i, result in enumerate(results) if result is not None]
                delayed = torch._C._functions.DelayedError(message, len(wanted))
                poisoned = delayed(*[results[i].detach().requires_grad_() for i in wanted])
                poisoned = poisoned if isinstance(poisoned, tuple) else (poisoned,)
                replaced = dict(zip(wanted, poisoned, strict=True))
                return tuple(replaced.get(i, result) for i, result in enumerate(results))
            return backward_formula(ctx, *gradients)

    Function.__name__ = Function.__qualname__ = name
    return Function


def differentiable(
    inference: Operator,
    *,
    forward: Operator,
    setup: Callable[..., Any],
    backward: Callable[..., Any],
) -> Differentiable:
    """Wires a gradient.

    Args:
        inference: Operator for calls that need no gradient.
        forward: Operator with the same arguments that also returns what the backward needs.
        setup: ``setup(ctx, args, results) -> public results``: saves for the backward as a Function does.
        backward: ``backward(ctx, *gradients)`` returns one gradient (or None) per argument.
    """
    wired = Differentiable(inference, forward, setup, backward)
    differentiables[wired.name] = wired
    return wired
