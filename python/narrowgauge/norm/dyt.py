"""Dynamic Tanh (Zhu et al., arXiv 2503.10622) and Derf (arXiv 2512.10938): elementwise layers in place of a norm.

    y = weight * f(alpha * x + shift) + bias,    f = tanh (DyT, without shift) or erf (Derf)

alpha and shift are one scalar each; weight and bias belong to the channels, which are the last dimension or the second.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from narrowgauge.norm import _arguments
from narrowgauge.norm._arguments import Shape, packed
from narrowgauge.norm._reference import compute_dtype
from narrowgauge.norm._replacement import ReplacedNorm, norm_replacement
from narrowgauge.ops import Sample, SampleMaker, checks, differentiable, library, operator
from narrowgauge.ops.system import system


def _along_channels(vector: Tensor, x: Tensor, channels_last: bool) -> Tensor:
    """A weight or bias in the compute dtype, shaped to be broadcast over x."""
    vector = vector.to(compute_dtype(x.dtype))
    return vector if channels_last else vector.view(-1, *[1] * (x.dim() - 2))


def _samples(make: SampleMaker) -> Iterator[Sample]:
    wide = torch.float64 if make.dtype == torch.float64 else torch.float32

    def call(*shape: int, shift: bool = False, bias: bool = True, channels: int | None = None, erf: bool = False,
             scale: float = 1.0, parameters: torch.dtype | None = None) -> tuple[object, ...]:  # fmt: skip
        count = shape[-1] if channels is None else channels
        return (
            make(*shape, scale=scale),
            make(1, dtype=parameters),
            make(1, dtype=parameters) if shift else None,
            make(count, dtype=parameters),
            make(count, dtype=parameters) if bias else None,
            channels is None,
            erf,
        )

    yield Sample(call(3, 64), "tanh; a multiple of every vector width")
    yield Sample(call(2, 3, 17, bias=False), "tanh without bias; three dimensions and an odd row")
    yield Sample(call(5, 1, shift=True), "rows of one element, a shift")
    yield Sample(call(129), "a single row without a batch dimension")
    yield Sample(call(0, 8), "no rows")
    yield Sample(call(4, 0), "rows without elements")
    yield Sample(call(2, 6, 4, 5, channels=6), "channels first")
    yield Sample(call(3, 5, 16, channels=5, shift=True, erf=True), "erf, channels first")
    yield Sample(call(4, 24, shift=True, erf=True), "erf with everything")
    yield Sample(call(3, 40, scale=30.0), "tanh saturates")
    yield Sample(call(3, 40, shift=True, erf=True, scale=30.0), "erf saturates")
    yield Sample(call(70, 33, shift=True, erf=True), "erf; enough rows for several partial sums")
    yield Sample(call(2, 1032, parameters=wide), "several columns of threads, wide parameters")


@operator(
    "dyt(Tensor x, Tensor alpha, Tensor? shift, Tensor weight, Tensor? bias, bool channels_last, bool erf) -> Tensor",
    samples=_samples,
)
def dyt_op(
    x: Tensor,
    alpha: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    channels_last: bool,
    erf: bool,
) -> Tensor:
    """weight * f(alpha * x + shift) + bias, with f = erf or tanh."""
    y = _along_channels(weight, x, channels_last) * _squashed(x, alpha, shift, erf)[0]
    if bias is not None:
        y = y + _along_channels(bias, x, channels_last)
    return y.to(x.dtype, memory_format=torch.contiguous_format)


def _squashed(x: Tensor, alpha: Tensor, shift: Tensor | None, erf: bool) -> tuple[Tensor, Tensor]:
    """f and its derivative at alpha * x + shift."""
    compute = compute_dtype(x.dtype)
    u = alpha.to(compute) * x.to(compute)
    if shift is not None:
        u = u + shift.to(compute)
    if erf:
        return torch.erf(u), 2 / math.sqrt(math.pi) * torch.exp(-u.square())
    f = torch.tanh(u)
    return f, 1 - f.square()


def _backward_samples(make: SampleMaker) -> Iterator[Sample]:
    for sample in _samples(make):
        yield Sample((make(*sample.args[0].shape), *sample.args, True), sample.why)
    x, alpha, weight = make(6, 40), make(1), make(40)
    yield Sample((make(6, 40), x, alpha, None, weight, None, True, False, False), "frozen parameters")


@operator(
    "dyt_backward(Tensor dy, Tensor x, Tensor alpha, Tensor? shift, Tensor weight, Tensor? bias, bool channels_last,"
    " bool erf, bool parameter_gradients)"
    " -> (Tensor dx, Tensor dalpha, Tensor dshift, Tensor dweight, Tensor dbias)",
    samples=_backward_samples,
)
def dyt_backward_op(
    dy: Tensor,
    x: Tensor,
    alpha: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    channels_last: bool,
    erf: bool,
    parameter_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All gradients in one pass over dy and x. Those of absent or frozen parameters are empty."""
    compute = compute_dtype(x.dtype)
    f, derivative = _squashed(x, alpha, shift, erf)
    g = dy.to(compute)
    du = g * _along_channels(weight, x, channels_last) * derivative
    dx = (alpha.to(compute) * du).to(x.dtype, memory_format=torch.contiguous_format)

    def summed(parameter: Tensor | None, terms: Tensor) -> Tensor:
        if parameter is None or not parameter_gradients:
            return terms.new_empty(0, dtype=compute if parameter is None else parameter.dtype)
        if parameter is alpha or parameter is shift:
            return terms.sum().to(parameter.dtype).view(parameter.shape)
        others = [i for i in range(x.dim()) if i != (x.dim() - 1 if channels_last else 1)]
        return (terms.sum(others) if others else terms.clone()).to(parameter.dtype)

    return (
        dx,
        summed(alpha, du * x.to(compute)),
        summed(shift, du),
        summed(weight, g * f),
        summed(bias, g),
    )


def _setup(ctx: Any, args: tuple[Any, ...], y: Tensor) -> Tensor:
    ctx.save_for_backward(*args[:5])
    ctx.options = args[5:]
    return y


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:5]
    results = dyt_backward_op(dy.contiguous(), *saved, *ctx.options, any(wanted[1:]))
    return (*(d if want else None for d, want in zip(results, wanted, strict=True)), None, None)


_dyt = differentiable(dyt_op, forward=dyt_op, setup=_setup, backward=_gradients)


def dyt(
    x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor | None = None, *, channels_last: bool = True
) -> Tensor:
    """Dynamic Tanh: ``weight * tanh(alpha * x) + bias``.

    Args:
        x: Input; float32, bfloat16, float16 or float64; any layout. Its channels are the trailing dimensions, as many
            as `weight` has, or the second dimension.
        alpha: One number, shape ``(1,)`` or ``()``; in the dtype of x or float32, as are weight and bias.
        weight: Scale of the channels.
        bias: Shift of the channels, of the shape of weight. Default: none.
        channels_last: Whether the channels come last (the default) or second, as in ``(N, C, H, W)``.

    Returns:
        A tensor of the shape and dtype of x. Arithmetic is float32 (float64 for float64), rounded once.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape or a device does not fit.

    Source: arXiv 2503.10622.
    """
    return _call("dyt", x, alpha, None, weight, bias, channels_last, False)


def derf(
    x: Tensor,
    alpha: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    channels_last: bool = True,
) -> Tensor:
    """Derf: ``weight * erf(alpha * x + shift) + bias``.

    Args:
        x, alpha, weight, bias, channels_last: As in `dyt`.
        shift: One number, shape ``(1,)`` or ``()``, in the dtype of x or float32.

    Returns:
        A tensor of the shape and dtype of x.

    Raises:
        TypeError, ValueError: As `dyt`.

    Source: arXiv 2512.10938.
    """
    if not isinstance(shift, Tensor):
        raise TypeError(f"derf: shift must be a tensor of one element, got {type(shift).__name__}")
    return _call("derf", x, alpha, shift, weight, bias, channels_last, True)


def _call(function: str, x: Tensor, alpha: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor | None,
          channels_last: bool, erf: bool) -> Tensor:  # fmt: skip
    if library.kernel_checks(x):
        try:
            return _dyt.call_kernel(x, alpha, shift, weight, bias, channels_last, erf)
        except (RuntimeError, TypeError):
            pass  # a guard refused: the checks below say which argument
    _check(function, x, alpha, shift, weight, bias, channels_last)
    x, weight, bias = x.contiguous(), weight.contiguous(), packed(bias)
    if weight.dim() == 1:
        return _dyt(x, alpha, shift, weight, bias, channels_last, erf)
    rows = x.reshape(*x.shape[: x.dim() - weight.dim()], weight.numel())
    flat_bias = None if bias is None else bias.flatten()
    return _dyt(rows, alpha, shift, weight.flatten(), flat_bias, True, erf).view(x.shape)


def _check(
    function: str,
    x: Tensor,
    alpha: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    channels_last: bool,
) -> None:
    """Raises a TypeError or ValueError that names the first wrong argument."""
    for name, value in (("x", x), ("alpha", alpha), ("weight", weight)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{function}: {name} must be a tensor, got {type(value).__name__}")
    tensors = {"alpha": alpha, "shift": shift, "weight": weight, "bias": bias}
    checks.check_floating(function, x=x, **tensors)
    checks.check_same_device(function, "x", x, **tensors)
    for name, scalar in (("alpha", alpha), ("shift", shift)):
        if scalar is not None and scalar.numel() != 1:
            raise ValueError(
                f"{function}: {name} has shape {tuple(scalar.shape)}; expected one number, shape (1,)"
            )
    sizes = tuple(weight.shape)
    if channels_last:
        if not sizes or tuple(x.shape[-len(sizes) :]) != sizes:
            raise ValueError(
                f"{function}: x has shape {tuple(x.shape)}, which does not end in the shape of weight, {sizes}; "
                "pass channels_last=False where the channels are the second dimension"
            )
    elif x.dim() < 2 or sizes != (x.shape[1],):
        raise ValueError(
            f"{function}: weight has shape {sizes}; with channels_last=False it must be the size of the second "
            f"dimension of x, whose shape is {tuple(x.shape)}"
        )
    if bias is not None and bias.shape != weight.shape:
        raise ValueError(f"{function}: bias has shape {tuple(bias.shape)}; expected that of weight, {sizes}")
    _arguments.check_companions(function, x, **tensors)


class _Squash(nn.Module):
    """The parameters that DyT and Derf share."""

    alpha: Tensor
    shift: Tensor | None
    weight: Tensor
    bias: Tensor | None

    def __init__(self, normalized_shape: Shape, alpha_init: float, shift_init: float | None, bias: bool,
                 channels_last: bool, device: torch.device | str | None,
                 dtype: torch.dtype | None) -> None:  # fmt: skip
        super().__init__()
        self.normalized_shape = _arguments.as_sizes(normalized_shape)
        if not channels_last and len(self.normalized_shape) != 1:
            raise ValueError(
                f"{type(self).__name__}: normalized_shape must be one size, the number of channels, with "
                f"channels_last=False; got {self.normalized_shape}"
            )
        for name, value in (("alpha_init", alpha_init), ("shift_init", shift_init)):
            if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value)):
                raise ValueError(f"{type(self).__name__}: {name} must be a finite number, got {value!r}")
        self.alpha_init, self.shift_init, self.channels_last = alpha_init, shift_init, channels_last
        self.alpha = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        if shift_init is not None:
            self.shift = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        _arguments.register_affine(
            self, self.normalized_shape, weight=True, bias=bias, device=device, dtype=dtype
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets alpha (and shift) to their initial values, the weight to one and the bias to zero."""
        nn.init.constant_(self.alpha, self.alpha_init)
        if self.shift_init is not None:
            assert self.shift is not None
            nn.init.constant_(self.shift, self.shift_init)
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        shift = "" if self.shift_init is None else f"shift_init={self.shift_init}, "
        return (
            f"{self.normalized_shape}, alpha_init={self.alpha_init}, {shift}bias={self.bias is not None}, "
            f"channels_last={self.channels_last}"
        )


class DyT(_Squash):
    """Dynamic Tanh, ``weight * tanh(alpha * x) + bias``: an elementwise layer in place of a norm.

    Args:
        normalized_shape: Size, or sizes, of the trailing dimensions; with channels_last=False the number of channels.
        alpha_init: Initial value of alpha. Default 0.5; language models need other values, see
            `narrowgauge.convert.convert_norm_to_dyt`.
        bias: Learn a bias. Default True.
        channels_last: Whether the channels come last (the default) or second.

    Parameters are ``alpha`` of shape (1,), ``weight`` (ones) and ``bias`` (zeros). Source: arXiv 2503.10622.
    """

    def __init__(
        self,
        normalized_shape: Shape,
        alpha_init: float = 0.5,
        bias: bool = True,
        channels_last: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, alpha_init, None, bias, channels_last, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return dyt(x, self.alpha, self.weight, self.bias, channels_last=self.channels_last)


class Derf(_Squash):
    """Derf, ``weight * erf(alpha * x + shift) + bias``: DyT with the error function and a learned shift.

    Args:
        normalized_shape, bias, channels_last: As in `DyT`.
        alpha_init: Initial value of alpha. Default 0.5, that of DyT: the paper's own value was not available.
        shift_init: Initial value of shift. Default 0.

    Parameters are those of DyT and ``shift`` of shape (1,). Source: arXiv 2512.10938.
    """

    def __init__(
        self,
        normalized_shape: Shape,
        alpha_init: float = 0.5,
        shift_init: float = 0.0,
        bias: bool = True,
        channels_last: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, alpha_init, shift_init, bias, channels_last, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        assert self.shift is not None
        return derf(x, self.alpha, self.shift, self.weight, self.bias, channels_last=self.channels_last)


@norm_replacement("dyt")
def _dyt_in_place_of(norm: ReplacedNorm) -> DyT:
    norm.need_weight()
    return DyT(norm.normalized_shape, bias=norm.bias, device=norm.device, dtype=norm.dtype)


@norm_replacement("derf")
def _derf_in_place_of(norm: ReplacedNorm) -> Derf:
    norm.need_weight()
    return Derf(norm.normalized_shape, bias=norm.bias, device=norm.device, dtype=norm.dtype)


system(
    "dyt",
    title="Dynamic Tanh (DyT) and Derf",
    source="arXiv 2503.10622, 2512.10938",
    page="norm/dyt.md",
    functions=("dyt", "derf", "convert.convert_norm_to_dyt"),
    modules=("DyT", "Derf"),
    operators=("dyt", "dyt_backward"),
    golden=("dyt",),
    bench=("dyt", "derf"),
)
