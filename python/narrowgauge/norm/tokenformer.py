"""Token-parameter attention (TokenFormer, arXiv 2410.23168) and the normalization of its scores.

A row s of scores over n learned tokens becomes a row of weights in one of three ways:

    l2_gelu    gelu(s * rho)           rho = 1 / sqrt(sum(s^2) / count + eps)
    gelu_l2    gelu(s) * rho           rho = 1 / sqrt(sum(gelu(s)^2) / count + eps)
    softmax    n * softmax(s)

with the exact GELU, count = n unless the layer has grown, and rho = 0 where it would be 1 / 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from narrowgauge.norm import _reference
from narrowgauge.ops import Sample, SampleMaker, checks, differentiable, library, operator, system

Mode = Literal["l2_gelu", "gelu_l2", "softmax"]


def _rho(v: Tensor, count: float, eps: float) -> Tensor:
    """1 / root mean square of each row, the last dimension kept."""
    mean_square = v.square().sum(-1, keepdim=True) / count + eps if count else v.new_zeros(*v.shape[:-1], 1)
    positive = mean_square > 0
    return torch.where(positive, torch.where(positive, mean_square, 1).rsqrt(), 0)


def _gelu_slope(u: Tensor) -> Tensor:
    """Derivative of GELU: Phi(u) + u * phi(u)."""
    return 0.5 * (1 + torch.erf(u * math.sqrt(0.5))) + u * torch.exp(-0.5 * u * u) / math.sqrt(2 * math.pi)


def _forward(s: Tensor, count: float, eps: float, gelu_first: bool) -> tuple[Tensor, Tensor]:
    wide = s.to(_reference.compute_dtype(s.dtype))
    if gelu_first:
        e = F.gelu(wide)
        rho = _rho(e, count, eps)
        a = e * rho
    else:
        rho = _rho(wide, count, eps)
        a = F.gelu(wide * rho)
    return a.to(s.dtype).contiguous(), rho.squeeze(-1)


LONG = ((1, 8208), "vectors beyond the registers"), ((2, 2053), "an odd row beyond the registers")


def _samples(make: SampleMaker) -> Iterator[Sample]:
    for gelu_first in (False, True):
        yield Sample((make(6, 40), 17.0, 0.0, gelu_first), "the count of a grown layer")
        yield Sample((make(6, 48, scale=20), 48.0, 0.25, gelu_first), "eps, large scores")
        for shape, why in _reference.SHAPES + LONG:
            yield Sample((make(*shape), float(shape[-1]), 0.0, gelu_first), why)


def _samples_with_zeros(make: SampleMaker) -> Iterator[Sample]:
    """Also a row of zeros, where the function is not continuous."""
    yield from _samples(make)
    for gelu_first in (False, True):
        s = make(4, 24)
        s[1] = 0
        yield Sample((s, 24.0, 0.0, gelu_first), "a row of zeros")


def _backward_samples(make: SampleMaker) -> Iterator[Sample]:
    for sample in _samples_with_zeros(make):
        s, count, eps, gelu_first = sample.args
        rho = _forward(s, count, eps, gelu_first)[1]
        yield Sample((make(*s.shape), s, rho, count, gelu_first), sample.why)


@operator(
    "norm_gelu(Tensor s, float count, float eps, bool gelu_first) -> Tensor",
    samples=_samples,
)
def norm_gelu_op(s: Tensor, count: float, eps: float, gelu_first: bool) -> Tensor:
    """The weights, for calls that need no gradient."""
    return _forward(s, count, eps, gelu_first)[0]


@operator(
    "norm_gelu_forward(Tensor s, float count, float eps, bool gelu_first) -> (Tensor a, Tensor rho)",
    samples=_samples_with_zeros,
)
def norm_gelu_forward_op(s: Tensor, count: float, eps: float, gelu_first: bool) -> tuple[Tensor, Tensor]:
    """The weights, and rho of each row for the backward."""
    return _forward(s, count, eps, gelu_first)


@operator(
    "norm_gelu_backward(Tensor da, Tensor s, Tensor rho, float count, bool gelu_first) -> Tensor",
    samples=_backward_samples,
)
def norm_gelu_backward_op(da: Tensor, s: Tensor, rho: Tensor, count: float, gelu_first: bool) -> Tensor:
    """The gradient of the scores in one pass over da and s; u and gelu(s) are computed anew."""
    compute = _reference.compute_dtype(s.dtype)
    g, wide, scale = da.to(compute), s.to(compute), rho.unsqueeze(-1)

    def through_norm(h: Tensor, normed: Tensor) -> Tensor:
        return (h - normed * ((h * normed).sum(-1, keepdim=True) / count if count else 0)) * scale

    if gelu_first:
        ds = through_norm(g, F.gelu(wide) * scale) * _gelu_slope(wide)
    else:
        u = wide * scale
        ds = through_norm(g * _gelu_slope(u), u)
    return ds.to(s.dtype).contiguous()


def _setup(ctx: Any, args: tuple[Any, ...], results: tuple[Tensor, ...]) -> Tensor:
    s, ctx.count, _, ctx.gelu_first = args
    a, rho = results
    ctx.save_for_backward(s, rho)
    return a


def _gradients(ctx: Any, da: Tensor) -> tuple[Tensor | None, ...]:
    ds = norm_gelu_backward_op(da.contiguous(), *ctx.saved_tensors, ctx.count, ctx.gelu_first)
    return ds, None, None, None


_norm_gelu = differentiable(norm_gelu_op, forward=norm_gelu_forward_op, setup=_setup, backward=_gradients)


def _call(name: str, s: Tensor, dim: int, eps: float, count: float | None, gelu_first: bool) -> Tensor:
    if count is None and dim == -1 and library.kernel_checks(s) and s.dim() > 0:
        try:
            return _norm_gelu.call_kernel(s, float(s.shape[-1]), eps, gelu_first)
        except (RuntimeError, TypeError):
            pass  # a guard refused: the checks below say which argument
    checks.check_floating(name, s=s)
    checks.check_eps(name, eps)
    if not isinstance(dim, int) or not -s.dim() <= dim < s.dim():
        raise ValueError(f"{name}: dim is {dim!r}, but s has {s.dim()} dimensions")
    if count is None:
        count = s.shape[dim]
    elif not isinstance(count, (int, float)) or not 0 < count < math.inf:
        raise ValueError(f"{name}: count must be a finite number > 0, got {count!r}")
    rows = s.movedim(dim, -1).contiguous()
    return _norm_gelu(rows, float(count), eps, gelu_first).movedim(-1, dim)


def l2_norm_gelu(s: Tensor, dim: int = -1, eps: float = 0.0, *, count: float | None = None) -> Tensor:
    """Scores divided by their root mean square, then the exact GELU, in one pass over memory.

    Args:
        s: Scores; float32, bfloat16, float16 or float64; any layout.
        dim: Dimension to normalize over. Default: the last, for which no copy is made.
        eps: Added to the mean square. Default 0, as in the authors' code; a row of zeros gives zeros, not NaN.
        count: What the sum of squares is divided by. Default: the size of `dim`.

    Returns:
        A tensor of the shape and dtype of s; the arithmetic is float32 (float64 for float64), rounded once.

    Raises:
        TypeError: s is not a floating-point tensor.
        ValueError: dim, eps or count does not fit.

    Source: arXiv 2410.23168.
    """
    return _call("l2_norm_gelu", s, dim, eps, count, gelu_first=False)


def gelu_l2_norm(s: Tensor, dim: int = -1, eps: float = 0.0, *, count: float | None = None) -> Tensor:
    """The exact GELU of the scores, then divided by its root mean square, in one pass over memory.

    Arguments, result and errors are those of `l2_norm_gelu`.
    """
    return _call("gelu_l2_norm", s, dim, eps, count, gelu_first=True)


class TokenParameterAttention(nn.Module):
    """Takes the place of `torch.nn.Linear`: the input attends to learned pairs of key and value tokens.

    Args:
        in_features: Size of the input's last dimension.
        out_features: Size of the output's last dimension.
        num_tokens: Number of key and value tokens.
        norm: How scores become weights: ``"l2_gelu"`` (the released models), ``"gelu_l2"`` or ``"softmax"`` (times
            the number of tokens).
        scale: Factor of the scores. Default None: 1; there is no 1 / sqrt(in_features).
        eps: Added to the mean square of the scores. Default 0, as in the authors' code.
        dropout: Probability of dropping a weight, in training only. Default 0.
        num_layers: Layers of the model, which the initial values are divided by. Default 1.

    Attributes:
        key: Shape ``(num_tokens, in_features)``; starts normal with standard deviation 0.02.
        value: Shape ``(num_tokens, out_features)``; starts normal with 2 / (num_layers * sqrt(in_features)).
        norm_tokens: Buffer, the number of tokens in the factor sqrt(n) of the norm: `num_tokens` until `grow`.

    Source: arXiv 2410.23168, class Pattention of its repository.
    """

    key: nn.Parameter
    value: nn.Parameter
    norm_tokens: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_tokens: int,
        norm: Mode = "l2_gelu",
        scale: float | None = None,
        eps: float = 0.0,
        *,
        dropout: float = 0.0,
        num_layers: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "TokenParameterAttention"
        checks.check_choice(name, "norm", norm, ("l2_gelu", "gelu_l2", "softmax"))
        checks.check_eps(name, eps)
        sizes = {"in_features": in_features, "out_features": out_features, "num_tokens": num_tokens}
        sizes["num_layers"] = num_layers
        for argument, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}: {argument} must be a positive integer, got {size!r}")
        if not isinstance(dropout, (int, float)) or not 0 <= dropout <= 1:
            raise ValueError(f"{name}: dropout must be between 0 and 1, got {dropout!r}")
        if scale is not None and not (isinstance(scale, (int, float)) and math.isfinite(scale)):
            raise ValueError(f"{name}: scale must be a finite number or None, got {scale!r}")
        self.in_features, self.out_features, self.norm = in_features, out_features, norm
        self.scale, self.eps, self.dropout, self.num_layers = scale, eps, dropout, num_layers
        self.key = nn.Parameter(torch.empty(num_tokens, in_features, device=device, dtype=dtype))
        self.value = nn.Parameter(torch.empty(num_tokens, out_features, device=device, dtype=dtype))
        self.register_buffer("norm_tokens", torch.tensor(num_tokens, device=device))
        self._norm_tokens = num_tokens  # the buffer's value, known without asking the device
        self.reset_parameters()

    @property
    def num_tokens(self) -> int:
        return self.key.shape[0]

    def reset_parameters(self) -> None:
        """Draws keys and values, and forgets that the layer has grown."""
        nn.init.normal_(self.key, std=0.02)
        nn.init.normal_(self.value, std=self._value_std)
        self._count_tokens(self.num_tokens)

    @property
    def _value_std(self) -> float:
        return 2 / (self.num_layers * math.sqrt(self.in_features))

    def _count_tokens(self, count: int) -> None:
        self._norm_tokens = count
        self.norm_tokens.fill_(count)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if not self.norm_tokens.is_meta:
            self._norm_tokens = int(self.norm_tokens)

    @torch.no_grad()
    def grow(self, delta: int, mode: Literal["exact", "official"] = "exact") -> None:
        """Appends tokens. The parameters are new objects: make the optimizer anew, or add them to it.

        Args:
            delta: How many.
            mode: ``"exact"``: new keys are zero and the factor sqrt(n) stays as it was, so the layer computes what it
                did and learns on from there; not for the softmax. ``"official"``, as the authors' loader: new keys
                and values are drawn like the first ones and the factor counts them, which changes the outputs.

        Raises:
            ValueError: delta or mode does not fit; the layer is as it was.
        """
        name = "TokenParameterAttention.grow"
        checks.check_choice(name, "mode", mode, ("exact", "official"))
        if not isinstance(delta, int) or delta < 1:
            raise ValueError(f"{name}: delta must be a positive integer, got {delta!r}")
        if mode == "exact" and self.norm == "softmax":
            raise ValueError(
                f'{name}: mode "exact" is not possible with norm="softmax", where every token takes its share; '
                'use mode="official"'
            )
        key = self.key.new_zeros(delta, self.in_features)
        if mode == "official":
            nn.init.normal_(key, std=0.02)
        value = nn.init.normal_(self.value.new_empty(delta, self.out_features), std=self._value_std)
        self.key = nn.Parameter(torch.cat([self.key, key]), self.key.requires_grad)
        self.value = nn.Parameter(torch.cat([self.value, value]), self.value.requires_grad)
        if mode == "official":
            self._count_tokens(self.num_tokens)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The output of shape ``(..., L, out_features)``.

        Args:
            x: Input of shape ``(..., L, in_features)``.
            mask: Boolean of shape ``(L, num_tokens)``: where False, the score is 0 (not minus infinity: with the
                softmax such a token still has weight).
        """
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(
                f"TokenParameterAttention: x has shape {tuple(x.shape)}; expected (..., L, {self.in_features})"
            )
        s = F.linear(x if self.scale is None else x * self.scale, self.key)
        if mask is not None:
            if mask.dtype != torch.bool or mask.shape != s.shape[-2:]:
                raise ValueError(
                    f"TokenParameterAttention: mask is {mask.dtype} of shape {tuple(mask.shape)}; "
                    f"expected torch.bool of shape {tuple(s.shape[-2:])}"
                )
            s = s.masked_fill(~mask, 0)
        if self.norm == "softmax":
            a = s.softmax(-1) * self.num_tokens
        else:
            a = _call(self.norm, s, -1, self.eps, self._norm_tokens, self.norm == "gelu_l2")
        return F.dropout(a, self.dropout, self.training) @ self.value

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, num_tokens={self.num_tokens}, norm={self.norm!r}, "
            f"scale={self.scale}, eps={self.eps}, dropout={self.dropout}"
        )


system(
    "tokenformer",
    title="TokenFormer token-parameter attention",
    source="arXiv 2410.23168",
    page="norm/tokenformer.md",
    functions=("l2_norm_gelu", "gelu_l2_norm"),
    modules=("TokenParameterAttention",),
    operators=("norm_gelu", "norm_gelu_forward", "norm_gelu_backward"),
    golden=("tokenformer_pattention",),
    bench=("norm_gelu",),
)
