"""The mathematics of LayerNorm and RMSNorm in plain PyTorch, shared by their operators' references.

Statistics and arithmetic are float32 (float64 for float64 inputs), with one rounding at the end. The variance is
computed from centred values.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from narrowgauge.ops import Sample, SampleMaker


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an input of `dtype` is normalized."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    out_dtype: torch.dtype | None,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns y, the sum that was normalized (in the compute dtype), mean and rstd."""
    compute = compute_dtype(x.dtype)
    s = x.to(compute)
    if residual is not None:
        s = s + residual.to(compute)
    mean = s.mean(-1, keepdim=True) if centred else s.new_zeros(())
    deviation = s - mean if centred else s
    rstd = (deviation.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = deviation * rstd
    if weight is not None:
        y = y * (weight.to(compute) + weight_offset)
    if bias is not None:
        y = y + bias.to(compute)
    return y.to(out_dtype or x.dtype).contiguous(), s, mean.squeeze(-1) if centred else mean, rstd.squeeze(-1)


def stored_sum(s: Tensor, residual: Tensor) -> Tensor:
    """The new residual stream: a fresh tensor in the dtype of the old one."""
    return s.to(residual.dtype, copy=True, memory_format=torch.contiguous_format)


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dresidual: Tensor | None,
    weight_offset: float,
    affine_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dx, dweight and dbias (empty where there is nothing to return)."""
    compute = compute_dtype(x.dtype)
    g, s, scale = dy.to(compute), x.to(compute), rstd.unsqueeze(-1)
    x_hat = s * scale if mean is None else (s - mean.unsqueeze(-1)) * scale
    h = g if weight is None else g * (weight.to(compute) + weight_offset)
    dx = h - x_hat * (h * x_hat).mean(-1, keepdim=True)
    if mean is not None:
        dx = dx - h.mean(-1, keepdim=True)
    dx = dx * scale
    if dresidual is not None:
        dx = dx + dresidual.to(compute)

    def summed(parameter: Tensor | None, terms: Tensor) -> Tensor:
        if parameter is None or not affine_gradients:
            return terms.new_empty(0, dtype=compute if parameter is None else parameter.dtype)
        return (
            terms.flatten(0, -2).sum(0).to(parameter.dtype) if terms.dim() > 1 else terms.to(parameter.dtype)
        )

    return dx.to(x.dtype).contiguous(), summed(weight, g * x_hat), summed(bias, g.clone())


SHAPES = (
    ((3, 64), "a multiple of every vector width"),
    ((2, 3, 17), "three dimensions and an odd row"),
    ((5, 1), "rows of one element"),
    ((129,), "a single row without a batch dimension"),
    ((0, 8), "no rows"),
    ((4, 0), "rows without elements"),
    ((70, 33), "enough rows for several partial sums of the weight gradient"),
    ((2, 1028), "longer than one warp's registers"),
)


def forward_samples(make: SampleMaker, residual: bool) -> Iterator[Sample]:
    """Calls of a forward operator: every shape, and every way to be affine."""
    wide = torch.float64 if make.dtype == torch.float64 else torch.float32

    def call(x: Tensor, *rest: object) -> tuple[object, ...]:
        return (x, make(*x.shape), *rest) if residual else (x, *rest)

    for shape, why in SHAPES:
        d = shape[-1]
        yield Sample(call(make(*shape), make(d), None, 1e-6, 0.0, None), why)
    yield Sample(call(make(6, 40), None, None, 1e-5, 0.0, None), "no weight")
    yield Sample(call(make(6, 40), make(40), make(40), 1e-5, 0.0, None), "weight and bias")
    yield Sample(call(make(6, 40), None, make(40), 1e-5, 0.0, None), "bias only")
    yield Sample(call(make(6, 40), make(40), None, 1e-6, 1.0, None), "zero-centred weight")
    yield Sample(
        call(make(6, 40), make(40, dtype=wide), make(40, dtype=wide), 1e-6, 0.0, None), "wide weight"
    )
    yield Sample(call(make(6, 40), make(40), None, 1e-6, 0.0, wide), "wide output")
    yield Sample(call(make(3, 48, scale=1e4), make(48), None, 1e-6, 0.0, None), "large values")
    yield Sample(call(make(3, 48, scale=1e-4), make(48), None, 1e-6, 0.0, None), "eps dominates")
    if residual:
        x = make(6, 40)
        yield Sample((x, make(6, 40, dtype=wide), make(40), None, 1e-6, 0.0, None), "wide residual")


def backward_samples(make: SampleMaker, centred: bool) -> Iterator[Sample]:
    """Calls of a backward operator."""
    wide = torch.float64 if make.dtype == torch.float64 else torch.float32

    def call(shape: tuple[int, ...], *, weight: bool = True, bias: bool = False, residual: bool = False,
             offset: float = 0.0, affine_gradients: bool = True, dy_dtype: torch.dtype | None = None,
             weight_dtype: torch.dtype | None = None) -> tuple[object, ...]:  # fmt: skip
        x = make(*shape)
        _, _, mean, rstd = forward(x, None, None, None, 1e-5, 0.0, None, centred)
        statistics = (mean, rstd) if centred else (rstd,)
        parameters = [make(shape[-1], dtype=weight_dtype) if wanted else None for wanted in (weight, bias)]
        dresidual = make(*shape) if residual else None
        return (
            make(*shape, dtype=dy_dtype),
            x,
            *statistics,
            *parameters,
            dresidual,
            offset,
            affine_gradients,
        )

    for shape, why in SHAPES:
        yield Sample(call(shape), why)
    yield Sample(call((6, 40), weight=False), "no weight")
    yield Sample(call((6, 40), bias=True), "weight and bias")
    yield Sample(call((70, 40), weight=False, bias=True), "bias only, several partial sums")
    yield Sample(call((6, 40), offset=1.0, residual=True), "zero-centred weight, residual gradient")
    yield Sample(call((70, 40), bias=True, residual=True, weight_dtype=wide), "everything, wide weight")
    yield Sample(call((6, 40), affine_gradients=False), "frozen weight")
    yield Sample(call((6, 40), dy_dtype=wide), "wide output gradient")
