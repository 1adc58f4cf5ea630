"""QK-norm: RMSNorm of every query and key head (arXiv 2010.04245 in the form of Qwen3, Gemma 3 and OLMo 2), with the
rotary position embedding that follows it (RoPE, arXiv 2104.09864) in the same pass.

    n = x / sqrt(mean(x^2) + eps) * (weight + weight_offset)       over the last dimension, that of a head
    y = n * cos + rotated(n) * sin                                 when there are cos and sin

`rotated` takes the channels in pairs (a, b) and gives (-b, a). A pair is the channels i and i + head_dim / 2, or with
`interleaved` the channels 2 i and 2 i + 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from narrowgauge.norm import _modulated
from narrowgauge.norm._arguments import packed
from narrowgauge.norm._reference import compute_dtype
from narrowgauge.ops import Sample, SampleMaker, checks, differentiable, operator, system


def _rotated(n: Tensor, interleaved: bool) -> Tensor:
    """(-b, a) for every pair (a, b) of channels."""
    if interleaved:
        return torch.stack((-n[..., 1::2], n[..., ::2]), -1).flatten(-2)
    a, b = n.chunk(2, -1)
    return torch.cat((-b, a), -1)


def _scaled(x_hat: Tensor, weight: Tensor | None, weight_offset: float) -> Tensor:
    return x_hat if weight is None else x_hat * (weight.to(x_hat.dtype) + weight_offset)


def _calls(make: SampleMaker) -> Iterator[tuple[tuple[Any, ...], str]]:
    """Arguments of the forward, and why."""
    wide = torch.float64 if make.dtype == torch.float64 else torch.float32

    def call(shape: tuple[int, ...], *, weight: tuple[int, ...] | None = None,
             table: tuple[int, ...] | None = None, interleaved: bool = False, offset: float = 0.0,
             dtype: torch.dtype | None = None) -> tuple[Any, ...]:  # fmt: skip
        tables = [None, None] if table is None else [make(*table, shape[-1], dtype=dtype) for _ in range(2)]
        scale = None if weight is None else make(*weight, shape[-1], dtype=dtype)
        return make(*shape), scale, *tables, 1e-5, offset, interleaved

    yield call((3, 64), weight=()), "no heads"
    yield call((2, 4, 3, 8), weight=(3,), dtype=wide), "a weight for each head, wide"
    yield call((2, 3, 2, 6), table=(2, 3), interleaved=True), "pairs side by side, positions of each sample"
    yield call((3, 2, 10), weight=(2,), table=(3,), interleaved=True, offset=1.0), "zero-centred, odd pairs"
    yield call((5, 3, 8), weight=(), table=(5,), dtype=wide), "halves, wide tables"
    yield call((35, 3, 33), weight=(3,)), "odd rows, enough of them for several partial sums"
    yield call((2, 3, 130), weight=(), table=(2,)), "halves that no vector divides"
    yield call((2, 4, 2, 64), weight=(), table=(4,), interleaved=True), "vectors of pairs"
    yield call((2, 9, 32), weight=(9,), table=(2,)), "vectors of halves"
    yield call((0, 2, 8), weight=()), "no rows"
    yield call((3, 2, 0)), "rows without elements"
    yield call((2, 1, 1040), weight=(), table=(2,)), "longer than one warp's registers"


def _samples(make: SampleMaker) -> Iterator[Sample]:
    for args, why in _calls(make):
        yield Sample(args, why)


def _backward_samples(make: SampleMaker) -> Iterator[Sample]:
    for args, why in _calls(make):
        yield Sample((make(*args[0].shape), *args, True), why)
    yield Sample((make(6, 40), make(6, 40), make(40), None, None, 1e-5, 0.0, False, False), "frozen weight")


@operator(
    "head_rms_norm(Tensor x, Tensor? weight, Tensor? cos, Tensor? sin, float eps, float weight_offset,"
    " bool interleaved) -> Tensor",
    samples=_samples,
)
def head_rms_norm_op(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    weight_offset: float,
    interleaved: bool,
) -> Tensor:
    """y; the backward recomputes what it needs."""
    compute = compute_dtype(x.dtype)
    y = _scaled(_modulated.normalize(x.to(compute), eps)[0], weight, weight_offset)
    if cos is not None and sin is not None:
        rotated = _rotated(y, interleaved)
        y = y * cos.to(compute).unsqueeze(-2) + rotated * sin.to(compute).unsqueeze(-2)
    return y.to(x.dtype).contiguous()


@operator(
    "head_rms_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? cos, Tensor? sin, float eps,"
    " float weight_offset, bool interleaved, bool affine_gradients) -> (Tensor dx, Tensor dweight)",
    samples=_backward_samples,
)
def head_rms_norm_backward_op(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    weight_offset: float,
    interleaved: bool,
    affine_gradients: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of x and weight in one pass over dy and x."""
    compute = compute_dtype(x.dtype)
    g = dy.to(compute)
    if cos is not None and sin is not None:
        # The transpose of the rotation by a quarter turn is its negative.
        turned = _rotated(g * sin.to(compute).unsqueeze(-2), interleaved)
        g = g * cos.to(compute).unsqueeze(-2) - turned
    x_hat, scale = _modulated.normalize(x.to(compute), eps)
    dx = _modulated.through_norm(_scaled(g, weight, weight_offset), x_hat, scale)
    return dx.to(x.dtype).contiguous(), _modulated.summed_like(g * x_hat, weight, affine_gradients)


def _setup(ctx: Any, args: tuple[Any, ...], y: Tensor) -> Tensor:
    ctx.save_for_backward(*args[:4])
    ctx.options = args[4:]
    return y


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, cos, sin = ctx.saved_tensors
    _, for_weight, for_cos, for_sin, *_ = ctx.needs_input_grad
    dx, dweight = head_rms_norm_backward_op(dy.contiguous(), x, weight, cos, sin, *ctx.options, for_weight)
    dcos = dsin = None
    if for_cos or for_sin:
        # Tables are constants nearly always; learned ones have their gradient from plain PyTorch.
        eps, weight_offset, interleaved = ctx.options
        compute = compute_dtype(x.dtype)
        n = _scaled(_modulated.normalize(x.to(compute), eps)[0], weight, weight_offset)
        dcos = _modulated.summed_like((dy * n).sum(-2), cos, for_cos) if for_cos else None
        if for_sin:
            dsin = _modulated.summed_like((dy * _rotated(n, interleaved)).sum(-2), sin, for_sin)
    return dx, dweight if for_weight else None, dcos, dsin, None, None, None


_head_rms_norm = differentiable(head_rms_norm_op, forward=head_rms_norm_op, setup=_setup, backward=_gradients)


def _table(function: str, name: str, table: Tensor, x: Tensor, x_name: str, interleaved: bool) -> Tensor:
    """cos or sin with as many channels as a head, and without leading dimensions of one."""
    d = x.shape[-1]
    if table.shape[-1] == d // 2:
        table = table.repeat_interleave(2, -1) if interleaved else torch.cat((table, table), -1)
    while table.dim() > 2 and table.shape[0] == 1:
        table = table.squeeze(0)
    positions = tuple(table.shape[:-1])
    if table.shape[-1] != d or not positions or positions != tuple(x.shape[-2 - len(positions) : -2]):
        raise ValueError(
            f"{function}: {name} has shape {tuple(table.shape)} beside {x_name} of shape {tuple(x.shape)}; "
            f"expected (positions, {d}) or (positions, {d // 2}) for {x_name} of shape "
            f"(..., positions, heads, {d})"
        )
    return table.contiguous()


def _checked(
    function: str,
    x_name: str,
    x: Tensor,
    weight_name: str,
    weight: Tensor | None,
    eps: float,
    weight_offset: float,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
) -> tuple[Any, ...]:
    """The operator's arguments, after checks whose errors say the names that the public function has for them."""
    _modulated.check_tensor(function, x_name, x)
    checks.check_eps(function, eps)
    _modulated.check_beside(function, x_name, x, **{weight_name: weight, "cos": cos, "sin": sin})
    d = x.shape[-1]
    if weight is not None and tuple(weight.shape) not in ((d,), tuple(x.shape[-2:])):
        raise ValueError(
            f"{function}: {weight_name} has shape {tuple(weight.shape)} beside {x_name} of shape "
            f"{tuple(x.shape)}; expected (head_dim,) or (heads, head_dim)"
        )
    if (cos is None) != (sin is None):
        raise ValueError(f"{function}: cos and sin go together; got only {'sin' if cos is None else 'cos'}")
    if cos is not None and sin is not None:
        if d % 2 or x.dim() < 3:
            raise ValueError(
                f"{function}: {x_name} has shape {tuple(x.shape)}; to be rotated it must be "
                "(..., positions, heads, head_dim) with an even head_dim"
            )
        cos, sin = (
            _table(function, name, table, x, x_name, interleaved)
            for name, table in (("cos", cos), ("sin", sin))
        )
    return x.contiguous(), packed(weight), cos, sin, eps, weight_offset, bool(interleaved)


def head_rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
) -> Tensor:
    """RMSNorm of every head, then the rotary position embedding where asked for, in one pass over memory.

    Args:
        x: Queries, keys or values of shape ``(..., heads, head_dim)``; with cos and sin
            ``(..., positions, heads, head_dim)``; float32, bfloat16, float16 or float64; any layout.
        weight: Scale of shape ``(head_dim,)`` for all heads or ``(heads, head_dim)``, in the dtype of x or float32, or
            None.
        eps: Added to the mean square. Default 1e-6.
        weight_offset: Added to the weight; 1 for a zero-centred weight, as in Gemma. Default 0.
        cos, sin: Tables of shape ``(positions, head_dim)`` or ``(positions, head_dim / 2)``, or with the leading
            dimensions of x before them, in the dtype of x or float32. Default: no rotation.
        interleaved: Rotate the channels 2 i and 2 i + 1 together, instead of i and i + head_dim / 2. Default False.

    Returns:
        A tensor of the shape and dtype of x. Arithmetic is float32 (float64 for float64), rounded once.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, a device or eps does not fit.

    Source: arXiv 2010.04245, arXiv 2104.09864.
    """
    rest = (eps, weight_offset, cos, sin, interleaved)
    return _head_rms_norm(*_checked("head_rms_norm", "x", x, "weight", weight, *rest))


def qk_norm(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """`head_rms_norm` of the queries and of the keys, which may have fewer heads.

    Args:
        q, k: Queries and keys of shape ``(..., heads, head_dim)``.
        q_weight, k_weight: Their scales, of shape ``(head_dim,)`` or ``(heads, head_dim)``, or None.
        eps, weight_offset, cos, sin, interleaved: As in `head_rms_norm`, for both.

    Returns:
        The normalized (and rotated) queries and keys.

    Raises:
        TypeError, ValueError: As `head_rms_norm`.
    """
    rest = (eps, weight_offset, cos, sin, interleaved)
    for_q = _checked("qk_norm", "q", q, "q_weight", q_weight, *rest)
    for_k = _checked("qk_norm", "k", k, "k_weight", k_weight, *rest)
    return _head_rms_norm(*for_q), _head_rms_norm(*for_k)


class QKNorm(nn.Module):
    """RMSNorm of query and key heads, and their rotary embedding: ``forward(q, k, cos=None, sin=None)``.

    Args:
        head_dim: Size of a head.
        num_heads: Heads of q, to learn a weight for each of them. Default None: one weight for all.
        num_kv_heads: Heads of k, where there are fewer. Default: num_heads.
        eps: Added to the mean square. Default 1e-6.
        weight_offset: Added to the weights; with 1 (Gemma) they start at zeros, else at ones. Default 0.
        interleaved: Which channels are rotated together; see `head_rms_norm`. Default False.

    Parameters are `q_weight` and `k_weight`. OLMo 2 normalizes all heads of a token together, before they are split:
    that is `RMSNorm` of size heads * head_dim.

    Source: arXiv 2010.04245.
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        eps: float = 1e-6,
        weight_offset: float = 0.0,
        interleaved: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.check_eps("QKNorm", eps)
        if num_kv_heads is not None and num_heads is None:
            raise ValueError(
                "QKNorm: num_kv_heads needs num_heads; without both, one weight serves all heads"
            )
        self.head_dim, self.num_heads = head_dim, num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.eps, self.weight_offset, self.interleaved = eps, weight_offset, interleaved

        def parameter(heads: int | None) -> nn.Parameter:
            shape = (head_dim,) if heads is None else (heads, head_dim)
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.q_weight, self.k_weight = parameter(self.num_heads), parameter(self.num_kv_heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the effective weights to one."""
        for weight in (self.q_weight, self.k_weight):
            nn.init.constant_(weight, 1.0 - self.weight_offset)

    def forward(
        self, q: Tensor, k: Tensor, cos: Tensor | None = None, sin: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return qk_norm(
            q,
            k,
            self.q_weight,
            self.k_weight,
            self.eps,
            weight_offset=self.weight_offset,
            cos=cos,
            sin=sin,
            interleaved=self.interleaved,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.head_dim}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, eps={self.eps}, "
            f"weight_offset={self.weight_offset}, interleaved={self.interleaved}"
        )


system(
    "qk_norm",
    title="QK-norm and per-head RMSNorm, with rotary embedding",
    source="arXiv 2010.04245, arXiv 2104.09864",
    page="norm/qk_norm.md",
    functions=("head_rms_norm", "qk_norm"),
    modules=("QKNorm",),
    operators=("head_rms_norm", "head_rms_norm_backward"),
    bench=("qk_norm",),
    reasons={
        "golden": "no recorded numbers of the authors' code; the tests compare with plain PyTorch in float64"
    },
)
