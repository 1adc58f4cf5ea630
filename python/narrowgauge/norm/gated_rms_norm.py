"""Gated RMSNorm (Mamba-2, arXiv 2405.21060, and gated linear attention): an RMSNorm and the gate beside it in one pass.

    y = (rms(x) * weight + bias) * act(z)        norm_before_gate
    y = rms(x * act(z)) * weight + bias          otherwise

`act` is silu or the sigmoid. The mean square may be taken over groups of consecutive channels instead of the whole row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from narrowgauge.norm import _arguments, _modulated
from narrowgauge.norm._arguments import packed
from narrowgauge.norm._reference import compute_dtype
from narrowgauge.ops import Sample, SampleMaker, checks, differentiable, library, operator, system

ACTIVATIONS = ("silu", "sigmoid")


def _activation(z: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """act(z) and its derivative."""
    sigma = z.sigmoid()
    slope = sigma * (1 - sigma)
    return (z * sigma, sigma + z * slope) if name == "silu" else (sigma, slope)


def _grouped(s: Tensor, group_size: int) -> Tensor:
    """(..., d) as (..., groups, group_size)."""
    return s.reshape(*s.shape[:-1], s.shape[-1] // group_size if group_size else 1, group_size)


def _calls(make: SampleMaker) -> Iterator[tuple[tuple[Any, ...], str]]:
    """Arguments of the forward, and why."""
    wide = torch.float64 if make.dtype == torch.float64 else torch.float32

    def call(shape: tuple[int, ...], *, weight: bool = True, bias: bool = False, group: int | None = None,
             first: bool = False, activation: str = "silu",
             dtype: torch.dtype | None = None) -> tuple[Any, ...]:  # fmt: skip
        d = shape[-1]
        parameters = [make(d, dtype=dtype) if wanted else None for wanted in (weight, bias)]
        return make(*shape), make(*shape), *parameters, 1e-5, group or d, first, activation

    yield call((3, 64), first=True), "norm first"
    yield call((2, 3, 17)), "gate first, odd rows"
    yield call((6, 40), bias=True, group=8, first=True), "norm first, groups, weight and bias"
    yield call((4, 48), weight=False, bias=True, activation="sigmoid"), "bias only, sigmoid"
    yield call((7, 24), group=8, bias=True, activation="sigmoid", dtype=wide), "groups, wide parameters"
    yield call((5, 24), group=3, weight=False, first=True), "odd groups, no parameters"
    yield call((70, 33), bias=True), "enough rows for several partial sums"
    yield call((0, 8)), "no rows"
    yield call((4, 0)), "rows without elements"
    yield call((3, 1036), bias=True, first=True), "longer than one warp's registers"


def _samples(make: SampleMaker) -> Iterator[Sample]:
    for args, why in _calls(make):
        yield Sample(args, why)


def _backward_samples(make: SampleMaker) -> Iterator[Sample]:
    for args, why in _calls(make):
        yield Sample((make(*args[0].shape), *args, True), why)
    x, z, weight = make(6, 40), make(6, 40), make(40)
    yield Sample((make(6, 40), x, z, weight, None, 1e-5, 40, True, "silu", False), "frozen weight")


@operator(
    "gated_rms_norm(Tensor x, Tensor z, Tensor? weight, Tensor? bias, float eps, int group_size,"
    " bool norm_before_gate, str activation) -> Tensor",
    samples=_samples,
)
def gated_rms_norm_op(
    x: Tensor,
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    activation: str,
) -> Tensor:
    """y; the backward recomputes what it needs."""
    compute = compute_dtype(x.dtype)
    s, gate = x.to(compute), _activation(z.to(compute), activation)[0]
    if not norm_before_gate:
        s = s * gate
    y = _modulated.normalize(_grouped(s, group_size), eps)[0].reshape(x.shape)
    if weight is not None:
        y = y * weight.to(compute)
    if bias is not None:
        y = y + bias.to(compute)
    if norm_before_gate:
        y = y * gate
    return y.to(x.dtype).contiguous()


@operator(
    "gated_rms_norm_backward(Tensor dy, Tensor x, Tensor z, Tensor? weight, Tensor? bias, float eps,"
    " int group_size, bool norm_before_gate, str activation, bool affine_gradients)"
    " -> (Tensor dx, Tensor dz, Tensor dweight, Tensor dbias)",
    samples=_backward_samples,
)
def gated_rms_norm_backward_op(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    activation: str,
    affine_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All gradients in one pass over dy, x and z."""
    compute = compute_dtype(x.dtype)
    g, s, wide_z = dy.to(compute), x.to(compute), z.to(compute)
    gate, slope = _activation(wide_z, activation)
    x_hat, scale = _modulated.normalize(_grouped(s if norm_before_gate else s * gate, group_size), eps)
    normalized = x_hat.reshape(x.shape)
    if norm_before_gate:
        affine = normalized if weight is None else normalized * weight.to(compute)
        dgate = g * (affine if bias is None else affine + bias.to(compute))
        g = g * gate
    h = g if weight is None else g * weight.to(compute)
    ds = _modulated.through_norm(_grouped(h, group_size), x_hat, scale).reshape(x.shape)
    if norm_before_gate:
        dx = ds
    else:
        dx, dgate = ds * gate, ds * s
    return (
        dx.to(x.dtype).contiguous(),
        (dgate * slope).to(z.dtype).contiguous(),
        _modulated.summed_like(g * normalized, weight, affine_gradients),
        _modulated.summed_like(g, bias, affine_gradients),
    )


def _setup(ctx: Any, args: tuple[Any, ...], y: Tensor) -> Tensor:
    ctx.save_for_backward(*args[:4])
    ctx.options = args[4:]
    return y


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    _, _, for_weight, for_bias, *_ = ctx.needs_input_grad
    dx, dz, dweight, dbias = gated_rms_norm_backward_op(
        dy.contiguous(), *ctx.saved_tensors, *ctx.options, for_weight or for_bias
    )
    return dx, dz, dweight if for_weight else None, dbias if for_bias else None, None, None, None, None


_gated_rms_norm = differentiable(
    gated_rms_norm_op, forward=gated_rms_norm_op, setup=_setup, backward=_gradients
)


def gated_rms_norm(
    x: Tensor,
    z: Tensor,
    weight: Tensor | None,
    eps: float = 1e-5,
    *,
    bias: Tensor | None = None,
    group_size: int | None = None,
    norm_before_gate: bool,
    activation: Literal["silu", "sigmoid"] = "silu",
) -> Tensor:
    """RMSNorm over the last dimension, multiplied by a gate.

    Args:
        x: Input of shape ``(..., d)``; float32, bfloat16, float16 or float64; any layout.
        z: What the gate is made of, of the shape and dtype of x.
        weight: Scale of shape ``(d,)``, in the dtype of x or float32, or None.
        eps: Added to the mean square. Default 1e-5.
        bias: Shift of shape ``(d,)``, in the dtype of x or float32. Default: none.
        group_size: Channels that share a mean square; it must divide d. Default: all of them.
        norm_before_gate: True: ``norm(x) * act(z)``. False: ``norm(x * act(z))``. It has no default, because libraries
            disagree: Mamba's function has True, the layers of vLLM and SGLang False.
        activation: ``"silu"`` (default) or ``"sigmoid"``.

    Returns:
        A tensor of the shape and dtype of x. Arithmetic is float32 (float64 for float64), rounded once.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, a device, eps, group_size or activation does not fit.

    Source: arXiv 2405.21060; `state-spaces/mamba`.
    """
    if library.kernel_checks(x) and library.kernel_checks(z) and x.dim() > 0:
        try:
            return _gated_rms_norm.call_kernel(
                x,
                z,
                weight,
                bias,
                eps,
                x.shape[-1] if group_size is None else group_size,
                norm_before_gate,
                activation,
            )
        except (RuntimeError, TypeError):
            pass  # a guard refused: the checks below say which argument
    name = "gated_rms_norm"
    sizes = _arguments.last_size(name, x)
    _arguments.check(name, x, sizes, weight, bias, eps, None)
    _modulated.check_tensor(name, "z", z)
    checks.check_floating(name, z=z)
    checks.check_same_device(name, "x", x, z=z)
    _modulated.check_same(name, x, z=z)
    group_size = sizes[0] if group_size is None else group_size
    _check_group_size(name, group_size, sizes[0])
    checks.check_choice(name, "activation", activation, ACTIVATIONS)
    return _gated_rms_norm(
        x.contiguous(),
        z.contiguous(),
        packed(weight),
        packed(bias),
        eps,
        group_size,
        bool(norm_before_gate),
        activation,
    )


def _check_group_size(function: str, group_size: int, d: int) -> None:
    if not isinstance(group_size, int) or group_size < min(d, 1) or (group_size and d % group_size):
        raise ValueError(f"{function}: group_size must be a positive divisor of {d}, got {group_size!r}")


class GatedRMSNorm(nn.Module):
    """RMSNorm with a gate: ``forward(x, z)``.

    Args:
        hidden_size: Size of the last dimension.
        eps: Added to the mean square. Default 1e-5.
        group_size: Channels that share a mean square. Default: all of them.
        norm_before_gate: Whether the gate multiplies the normalized row (True) or the input of the norm (False).
        activation: ``"silu"`` (default) or ``"sigmoid"``.
        bias: Learn a bias as well. Default False.

    Parameters are `weight` (ones) and `bias` (zeros), as in Mamba's layer.

    Source: arXiv 2405.21060.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        *,
        norm_before_gate: bool,
        activation: Literal["silu", "sigmoid"] = "silu",
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.check_eps("GatedRMSNorm", eps)
        checks.check_choice("GatedRMSNorm", "activation", activation, ACTIVATIONS)
        if group_size is not None:
            _check_group_size("GatedRMSNorm", group_size, hidden_size)
        self.hidden_size, self.eps, self.group_size = hidden_size, eps, group_size
        self.norm_before_gate, self.activation = norm_before_gate, activation
        _arguments.register_affine(self, (hidden_size,), weight=True, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the weight to one and the bias to zero."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return gated_rms_norm(
            x,
            z,
            self.weight,
            self.eps,
            bias=self.bias,
            group_size=self.group_size,
            norm_before_gate=self.norm_before_gate,
            activation=self.activation,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.hidden_size}, eps={self.eps}, group_size={self.group_size}, "
            f"norm_before_gate={self.norm_before_gate}, activation={self.activation!r}, "
            f"bias={self.bias is not None}"
        )


system(
    "gated_rms_norm",
    title="Gated RMSNorm",
    source="arXiv 2405.21060",
    page="norm/gated.md",
    functions=("gated_rms_norm",),
    modules=("GatedRMSNorm",),
    operators=("gated_rms_norm", "gated_rms_norm_backward"),
    golden=("gated_rmsnorm",),
    bench=("gated_rms_norm",),
)
