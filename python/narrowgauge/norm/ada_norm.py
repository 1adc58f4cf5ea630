"""Norms modulated by each sample (AdaLN, as in DiT, arXiv 2212.09748), and the gated residual that goes with them.

    ada_layer_norm, ada_rms_norm    y = norm(x) * (1 + scale) + shift           without weights of its own
    gated_residual                  r = residual + gate * x
    add_ada_layer_norm, ...         r, and the modulated norm of r, in one pass

scale, shift and gate hold one vector for every sample, or for every token: their leading dimensions are the first
leading dimensions of x.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from narrowgauge.norm import _modulated
from narrowgauge.norm._reference import compute_dtype, stored_sum
from narrowgauge.ops import Sample, SampleMaker, checks, differentiable, library, operator, system


def _spread(parameter: Tensor, x: Tensor) -> Tensor:
    """(samples, d) beside x of (samples, tokens, d), ready to be broadcast, in the compute dtype."""
    ones = (1,) * (x.dim() - parameter.dim())
    return parameter.to(compute_dtype(x.dtype)).reshape(*parameter.shape[:-1], *ones, parameter.shape[-1])


def _summed(terms: Tensor, parameter: Tensor | None, wanted: bool) -> Tensor:
    """The gradient of a parameter: terms summed over the tokens of each sample; empty where there is none."""
    if parameter is None or not wanted:
        return terms.new_empty(0, dtype=terms.dtype if parameter is None else parameter.dtype)
    tokens = tuple(range(parameter.dim() - 1, terms.dim() - 1))
    return (terms.sum(tokens) if tokens else terms).to(parameter.dtype, copy=True).contiguous()


def _modulate(s: Tensor, scale: Tensor, shift: Tensor | None, eps: float, centred: bool) -> Tensor:
    y = _modulated.normalize(s, eps, centred)[0] * (1 + _spread(scale, s))
    return y if shift is None else y + _spread(shift, s)


def _calls(make: SampleMaker) -> Iterator[tuple[tuple[Any, ...], str]]:
    """Arguments of `ada_norm`, and why."""
    wide = torch.float64 if make.dtype == torch.float64 else torch.float32

    def call(shape: tuple[int, ...], samples: tuple[int, ...], *, shift: bool = True, centred: bool = True,
             dtype: torch.dtype | None = None) -> tuple[Any, ...]:  # fmt: skip
        d = shape[-1]
        parameters = [make(*samples, d, dtype=dtype) if wanted else None for wanted in (True, shift)]
        return make(*shape), *parameters, 1e-5, centred

    yield call((4, 9), (4,), centred=False), "a vector for each token"
    yield call((3, 5, 17), (3,), shift=False, centred=False), "odd rows, scale alone"
    yield call((2, 2, 3, 8), (2,)), "four dimensions"
    yield call((6, 40), ()), "one vector for all"
    yield call((5, 3, 16), (5,), dtype=wide), "a vector for each sample, wide"
    yield call((2, 70, 33), (2,)), "enough rows for several partial sums of each sample"
    yield call((3, 4, 48), (3, 4), dtype=wide), "a wide vector for each token"
    yield call((0, 4, 8), (0,)), "no samples"
    yield call((2, 0, 8), (2,)), "no tokens"
    yield call((3, 2, 0), (3,)), "rows without elements"
    yield call((2, 2, 1036), (2,)), "longer than one warp's registers"


def _samples(make: SampleMaker) -> Iterator[Sample]:
    for args, why in _calls(make):
        yield Sample(args, why)


def _backward_samples(make: SampleMaker) -> Iterator[Sample]:
    for i, (args, why) in enumerate(_calls(make)):
        x, scale, shift, *options = args
        dresidual = make(*x.shape) if i % 2 else None
        yield Sample((make(*x.shape), x, scale, shift, dresidual, *options, True), why)
    yield Sample((make(6, 40), make(6, 40), make(6, 40), None, None, 1e-5, True, False), "frozen")


@operator(
    "ada_norm(Tensor x, Tensor scale, Tensor? shift, float eps, bool centred) -> Tensor", samples=_samples
)
def ada_norm_op(x: Tensor, scale: Tensor, shift: Tensor | None, eps: float, centred: bool) -> Tensor:
    """y; the backward recomputes what it needs."""
    return _modulate(x.to(compute_dtype(x.dtype)), scale, shift, eps, centred).to(x.dtype).contiguous()


@operator(
    "ada_norm_backward(Tensor dy, Tensor x, Tensor scale, Tensor? shift, Tensor? dresidual, float eps, bool centred,"
    " bool modulation_gradients) -> (Tensor dx, Tensor dscale, Tensor dshift)",
    samples=_backward_samples,
)
def ada_norm_backward_op(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    dresidual: Tensor | None,
    eps: float,
    centred: bool,
    modulation_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """All gradients in one pass over dy and x; dresidual, the gradient of the sum x, is added to dx."""
    compute = compute_dtype(x.dtype)
    g = dy.to(compute)
    x_hat, factor = _modulated.normalize(x.to(compute), eps, centred)
    dx = _modulated.through_norm(g * (1 + _spread(scale, x)), x_hat, factor, centred)
    if dresidual is not None:
        dx = dx + dresidual.to(compute)
    return (
        dx.to(x.dtype).contiguous(),
        _summed(g * x_hat, scale, modulation_gradients),
        _summed(g, shift, modulation_gradients),
    )


def _residual_calls(make: SampleMaker) -> Iterator[tuple[tuple[Any, ...], str]]:
    """x, residual, gate and why."""
    wide = torch.float64 if make.dtype == torch.float64 else torch.float32
    for args, why in _calls(make):
        x, scale = args[:2]
        # A wide stream where the parameters are wide.
        yield (x, make(*x.shape, dtype=wide if scale.dtype == wide else None), make(*scale.shape)), why


def _gated_samples(make: SampleMaker) -> Iterator[Sample]:
    for args, why in _residual_calls(make):
        yield Sample(args, why)


def _gated_backward_samples(make: SampleMaker) -> Iterator[Sample]:
    for (x, residual, gate), why in _residual_calls(make):
        yield Sample((residual, x, gate, True), why)


@operator("gated_residual(Tensor x, Tensor residual, Tensor gate) -> Tensor", samples=_gated_samples)
def gated_residual_op(x: Tensor, residual: Tensor, gate: Tensor) -> Tensor:
    """residual + gate * x, in the dtype of residual."""
    compute = compute_dtype(x.dtype)
    return stored_sum(residual.to(compute) + _spread(gate, x) * x.to(compute), residual)


@operator(
    "gated_residual_backward(Tensor dy, Tensor x, Tensor gate, bool gate_gradient) -> (Tensor dx, Tensor dgate)",
    samples=_gated_backward_samples,
)
def gated_residual_backward_op(
    dy: Tensor, x: Tensor, gate: Tensor, gate_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of x and gate in one pass over dy and x."""
    compute = compute_dtype(x.dtype)
    g = dy.to(compute)
    dx = (g * _spread(gate, x)).to(x.dtype).contiguous()
    return dx, _summed(g * x.to(compute), gate, gate_gradient)


def _add_samples(make: SampleMaker) -> Iterator[Sample]:
    for (rest, _), ((x, residual, gate), why) in zip(_calls(make), _residual_calls(make), strict=True):
        yield Sample((x, residual, gate, *rest[1:]), why)


@operator(
    "add_ada_norm(Tensor x, Tensor residual, Tensor gate, Tensor scale, Tensor? shift, float eps, bool centred)"
    " -> (Tensor y, Tensor residual_out)",
    samples=_add_samples,
)
def add_ada_norm_op(
    x: Tensor,
    residual: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    eps: float,
    centred: bool,
) -> tuple[Tensor, Tensor]:
    """The modulated norm of residual + gate * x, and the sum itself in the dtype of residual."""
    compute = compute_dtype(x.dtype)
    s = residual.to(compute) + _spread(gate, x) * x.to(compute)
    return _modulate(s, scale, shift, eps, centred).to(x.dtype).contiguous(), stored_sum(s, residual)


def _ada_setup(ctx: Any, args: tuple[Any, ...], y: Tensor) -> Tensor:
    ctx.save_for_backward(*args[:3])
    ctx.options = args[3:]
    return y


def _ada_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    _, for_scale, for_shift, *_ = ctx.needs_input_grad
    dx, dscale, dshift = ada_norm_backward_op(
        dy.contiguous(), *ctx.saved_tensors, None, *ctx.options, for_scale or for_shift
    )
    return dx, dscale if for_scale else None, dshift if for_shift else None, None, None


def _gated_setup(ctx: Any, args: tuple[Any, ...], y: Tensor) -> Tensor:
    x, _, gate = args
    ctx.save_for_backward(x, gate)
    return y


def _gated_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    for_x, _, for_gate = ctx.needs_input_grad
    if not (for_x or for_gate):
        return None, dy, None
    dx, dgate = gated_residual_backward_op(dy.contiguous(), *ctx.saved_tensors, for_gate)
    return dx, dy, dgate if for_gate else None


def _add_setup(ctx: Any, args: tuple[Any, ...], results: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    x, _, gate, scale, shift, *ctx.options = args
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(results[1], x, gate, scale, shift)
    return results


def _add_gradients(ctx: Any, dy: Tensor | None, dresidual: Tensor | None) -> tuple[Tensor | None, ...]:
    s, x, gate, scale, shift = ctx.saved_tensors
    for_x, _, for_gate, for_scale, for_shift, *_ = ctx.needs_input_grad
    ds, dscale, dshift = dresidual, None, None
    if dy is not None:
        dresidual = None if dresidual is None else dresidual.contiguous()
        wanted = for_scale or for_shift
        ds, dscale, dshift = ada_norm_backward_op(
            dy.contiguous(), s, scale, shift, dresidual, *ctx.options, wanted
        )
    dx = dgate = None
    if ds is not None and (for_x or for_gate):
        dx, dgate = gated_residual_backward_op(ds.contiguous(), x, gate, for_gate)
    return (
        dx,
        ds,
        dgate if for_gate else None,
        dscale if for_scale else None,
        dshift if for_shift else None,
        None,
        None,
    )


_ada_norm = differentiable(ada_norm_op, forward=ada_norm_op, setup=_ada_setup, backward=_ada_gradients)
_gated_residual = differentiable(
    gated_residual_op, forward=gated_residual_op, setup=_gated_setup, backward=_gated_gradients
)
_add_ada_norm = differentiable(
    add_ada_norm_op, forward=add_ada_norm_op, setup=_add_setup, backward=_add_gradients
)


def _per_sample(function: str, name: str, parameter: Tensor, x: Tensor) -> Tensor:
    """The parameter without the dimensions of one that stand for tokens, after a check of its shape."""
    shape, leading = tuple(parameter.shape), list(parameter.shape[:-1])
    while leading and leading[-1] == 1:
        leading.pop()
    if shape[-1] != x.shape[-1] or len(leading) >= x.dim() or leading != list(x.shape[: len(leading)]):
        raise ValueError(
            f"{function}: {name} has shape {shape} beside x of shape {tuple(x.shape)}; expected one vector for each "
            f"sample, (samples, {x.shape[-1]}) or (samples, 1, {x.shape[-1]}), or one for each token"
        )
    return parameter.reshape(*leading, shape[-1]).contiguous()


def _check(function: str, x: Tensor, eps: float | None, **parameters: Tensor | None) -> None:
    _modulated.check_tensor(function, "x", x)
    _modulated.check_beside(function, "x", x, **parameters)
    if eps is not None:
        checks.check_eps(function, eps)


def _ada(function: str, x: Tensor, scale: Tensor, shift: Tensor | None, eps: float, centred: bool) -> Tensor:
    if library.kernel_checks(x):
        try:
            return _ada_norm.call_kernel(x, scale, shift, eps, centred)
        except (RuntimeError, TypeError):
            pass  # a guard refused: what follows says why, or brings the arguments into the operator's form
    _modulated.check_tensor(function, "scale", scale)
    _check(function, x, eps, scale=scale, shift=shift)
    scale, shift = _pair(function, scale, shift, x)
    return _ada_norm(x.contiguous(), scale, shift, eps, centred)


def _pair(function: str, scale: Tensor, shift: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor | None]:
    scale = _per_sample(function, "scale", scale, x)
    if shift is None:
        return scale, None
    shift = _per_sample(function, "shift", shift, x)
    if shift.shape != scale.shape:
        raise ValueError(
            f"{function}: shift has a vector for each of {tuple(shift.shape[:-1])} and scale for each of "
            f"{tuple(scale.shape[:-1])}; expand one of them"
        )
    return scale, shift


def ada_layer_norm(x: Tensor, scale: Tensor, shift: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """LayerNorm over the last dimension, modulated: ``norm(x) * (1 + scale) + shift``.

    Args:
        x: Input of shape ``(samples, tokens, d)``, or with more dimensions, or fewer; float32, bfloat16, float16 or
            float64; any layout.
        scale: One vector for each sample, of shape ``(samples, d)`` or ``(samples, 1, d)``, or one for each token, of
            the shape of x; in the dtype of x or float32. Its leading dimensions are the first ones of x.
        shift: As scale. Default: none.
        eps: Added to the variance. Default 1e-6, that of DiT.

    Returns:
        A tensor of the shape and dtype of x. Arithmetic is float32 (float64 for float64), rounded once.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, a device or eps does not fit.

    Source: arXiv 2212.09748.
    """
    return _ada("ada_layer_norm", x, scale, shift, eps, True)


def ada_rms_norm(x: Tensor, scale: Tensor, shift: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """RMSNorm over the last dimension, modulated: as `ada_layer_norm`, without the mean."""
    return _ada("ada_rms_norm", x, scale, shift, eps, False)


def gated_residual(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """``residual + gate * x``, with one gate for each sample, in one pass over memory.

    Args:
        residual: Residual stream, shape of x, in the dtype of x or float32.
        x: Output of the branch, of shape ``(samples, tokens, d)``, or with more dimensions, or fewer.
        gate: One vector for each sample or token, as scale in `ada_layer_norm`.

    Returns:
        The new residual stream, in the dtype of the old one.

    Raises:
        TypeError, ValueError: As `ada_layer_norm`.

    Source: arXiv 2212.09748.
    """
    if library.kernel_checks(x):
        try:
            return _gated_residual.call_kernel(x, residual, gate)
        except (RuntimeError, TypeError):
            pass  # as in _ada
    name = "gated_residual"
    for argument, tensor in (("residual", residual), ("gate", gate)):
        _modulated.check_tensor(name, argument, tensor)
    _check(name, x, None, residual=residual, gate=gate)
    _check_residual(name, residual, x)
    return _gated_residual(x.contiguous(), residual.contiguous(), _per_sample(name, "gate", gate, x))


def _check_residual(function: str, residual: Tensor, x: Tensor) -> None:
    if residual.shape != x.shape:
        raise ValueError(
            f"{function}: residual has shape {tuple(residual.shape)}; expected that of x, {tuple(x.shape)}"
        )


def _add_ada(
    function: str,
    x: Tensor,
    residual: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    eps: float,
    centred: bool,
) -> tuple[Tensor, Tensor]:
    for argument, tensor in (("residual", residual), ("gate", gate), ("scale", scale)):
        _modulated.check_tensor(function, argument, tensor)
    _check(function, x, eps, residual=residual, gate=gate, scale=scale, shift=shift)
    _check_residual(function, residual, x)
    gate = _per_sample(function, "gate", gate, x)
    scale, shift = _pair(function, scale, shift, x)
    if gate.shape != scale.shape:
        raise ValueError(
            f"{function}: gate has a vector for each of {tuple(gate.shape[:-1])} and scale for each of "
            f"{tuple(scale.shape[:-1])}; expand one of them"
        )
    return _add_ada_norm(x.contiguous(), residual.contiguous(), gate, scale, shift, eps, centred)


def add_ada_layer_norm(
    x: Tensor,
    residual: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """`gated_residual` and the `ada_layer_norm` of its result, in one pass over memory.

    Args:
        x: Output of the branch.
        residual: Residual stream, shape of x, in the dtype of x or float32.
        gate: Of the branch, one vector for each sample or token, as scale in `ada_layer_norm`.
        scale, shift, eps: As in `ada_layer_norm`.

    Returns:
        The modulated norm in the dtype of x, and the new residual stream. The norm is taken of the un-rounded sum.

    Raises:
        TypeError, ValueError: As `ada_layer_norm`.
    """
    return _add_ada("add_ada_layer_norm", x, residual, gate, scale, shift, eps, True)


def add_ada_rms_norm(
    x: Tensor,
    residual: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """`gated_residual` and the `ada_rms_norm` of its result: as `add_ada_layer_norm`, without the mean."""
    return _add_ada("add_ada_rms_norm", x, residual, gate, scale, shift, eps, False)


class AdaLayerNorm(nn.Module):
    """Modulated LayerNorm: ``forward(x, scale, shift)``; without parameters of its own.

    Scale and shift come from a linear layer of the caller's, which DiT starts at zero.

    Args:
        hidden_size: Size of the last dimension.
        eps: Added to the variance. Default 1e-6.

    Source: arXiv 2212.09748.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        checks.check_eps(type(self).__name__, eps)
        self.hidden_size, self.eps = hidden_size, eps

    def _check_size(self, x: Tensor) -> None:
        if isinstance(x, Tensor) and x.shape[-1:] != (self.hidden_size,):
            raise ValueError(
                f"{type(self).__name__}: x has shape {tuple(x.shape)}; expected (..., {self.hidden_size})"
            )

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
        self._check_size(x)
        return ada_layer_norm(x, scale, shift, self.eps)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, eps={self.eps}"


class AdaRMSNorm(AdaLayerNorm):
    """Modulated RMSNorm; as `AdaLayerNorm`, without the mean.

    Args:
        hidden_size: Size of the last dimension.
        eps: Added to the mean square. Default 1e-6.
    """

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
        self._check_size(x)
        return ada_rms_norm(x, scale, shift, self.eps)


system(
    "ada_norm",
    title="AdaLN: modulated LayerNorm and RMSNorm, gated residual",
    source="arXiv 2212.09748",
    page="norm/adaln.md",
    functions=("ada_layer_norm", "ada_rms_norm", "add_ada_layer_norm", "add_ada_rms_norm", "gated_residual"),
    modules=("AdaLayerNorm", "AdaRMSNorm"),
    operators=("ada_norm", "ada_norm_backward", "add_ada_norm", "gated_residual", "gated_residual_backward"),
    bench=("ada_layer_norm", "add_ada_layer_norm", "gated_residual"),
    reasons={
        "golden": "no recorded numbers of the authors' code; the tests compare with plain PyTorch in float64"
    },
)
