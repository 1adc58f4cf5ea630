"""Gradients of the row norms: the same wiring for LayerNorm and RMSNorm, which differ in the statistics they keep."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from narrowgauge.ops import Differentiable, Operator, differentiable


def plain(inference: Operator, forward: Operator, backward: Operator) -> Differentiable:
    """Wires ``op(x, weight, bias, eps, weight_offset, out_dtype) -> y``."""

    def setup(ctx: Any, args: tuple[Any, ...], results: tuple[Tensor, ...]) -> Tensor:
        x, weight, bias, _, ctx.weight_offset, _ = args
        y, *statistics = results
        ctx.save_for_backward(x, weight, bias, *statistics)
        return y

    def gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, *statistics = ctx.saved_tensors
        _, for_weight, for_bias, *_ = ctx.needs_input_grad
        dx, dweight, dbias = backward(
            dy.contiguous(), x, *statistics, weight, bias, None, ctx.weight_offset, for_weight or for_bias
        )
        return dx, dweight if for_weight else None, dbias if for_bias else None, None, None, None

    return differentiable(inference, forward=forward, setup=setup, backward=gradients)


def with_residual(inference: Operator, forward: Operator, backward: Operator) -> Differentiable:
    """Wires ``op(x, residual, weight, bias, eps, weight_offset, out_dtype) -> (y, residual_out)``."""

    def setup(ctx: Any, args: tuple[Any, ...], results: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        x, _, weight, bias, _, ctx.weight_offset, _ = args
        y, residual_out, *statistics = results
        ctx.x_dtype = x.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(residual_out, weight, bias, *statistics)
        return y, residual_out

    def gradients(ctx: Any, dy: Tensor | None, dresidual: Tensor | None) -> tuple[Tensor | None, ...]:
        s, weight, bias, *statistics = ctx.saved_tensors
        if dy is None:  # only the sum was used: its gradient passes through
            return (
                None if dresidual is None else dresidual.to(ctx.x_dtype),
                dresidual,
                None,
                None,
                None,
                None,
                None,
            )
        _, _, for_weight, for_bias, *_ = ctx.needs_input_grad
        dresidual = None if dresidual is None else dresidual.contiguous()
        ds, dweight, dbias = backward(
            dy.contiguous(),
            s,
            *statistics,
            weight,
            bias,
            dresidual,
            ctx.weight_offset,
            for_weight or for_bias,
        )
        return (
            ds.to(ctx.x_dtype),
            ds,
            dweight if for_weight else None,
            dbias if for_bias else None,
            None,
            None,
            None,
        )

    return differentiable(inference, forward=forward, setup=setup, backward=gradients)
