"""The full residual form: two branches, dropout, factors of rows, a second output, wide sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.backends import all_backends, run_reference
from tests.tolerances import assert_near, assert_same_bits
from torch import Tensor

import narrowgauge as ng
from narrowgauge.nn import functional as ngf
from narrowgauge.ops import registry
from narrowgauge.ops.random import philox_words, uniform

each_norm = pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
each_backend = pytest.mark.parametrize("backend", ["reference", "auto"])
every_run = pytest.mark.parametrize("run", all_backends())


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def add_norm(name: str, *args: Any, **options: Any) -> Any:
    return getattr(ngf, f"add_{name}")(*args, **options)


def torch_norm(name: str, s: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    if name == "layer_norm":
        return F.layer_norm(s, s.shape[-1:], weight, bias, eps)
    y = F.rms_norm(s, s.shape[-1:], weight, eps)
    return y if bias is None else y + bias


@each_norm
@each_backend
@pytest.mark.parametrize("shape", [(5, 17), (2, 3, 129), (4, 64)], ids=str)
def test_everything_at_once_is_the_composition(name: str, shape: tuple[int, ...], backend: Any) -> None:
    """Values and all gradients in float64 beside separate PyTorch operations, that of rowscale too."""
    d = shape[-1]
    tensors = [random(*s, seed=i) for i, s in enumerate([shape] * 3 + [shape[:-1]] + [(d,)] * 4)]
    mask, mask1 = (random(*shape, seed=20 + i) > -0.5 for i in range(2))
    directions = [random(*shape, seed=30 + i) for i in range(3)]
    p, offset = 0.3, 1.0

    def ours(x: Tensor, residual: Tensor, x1: Tensor, rowscale: Tensor, *wb: Tensor) -> tuple[Tensor, ...]:
        weight, bias, weight1, bias1 = wb
        return add_norm(
            name, x, residual, weight, eps=1e-5, bias=bias, weight_offset=offset, x1=x1, weight1=weight1,
            bias1=bias1, dropout_p=p, dropout_mask=(mask, mask1), rowscale=rowscale,
        )  # fmt: skip

    def theirs(x: Tensor, residual: Tensor, x1: Tensor, rowscale: Tensor, *wb: Tensor) -> tuple[Tensor, ...]:
        weight, bias, weight1, bias1 = wb
        s = x * rowscale.unsqueeze(-1) * mask / (1 - p) + x1 * mask1 / (1 - p) + residual
        return (
            torch_norm(name, s, weight + offset, bias, 1e-5),
            torch_norm(name, s, weight1 + offset, bias1, 1e-5),
            s,
        )

    def run(function: Callable[..., Any]) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        results = function(*leaves)
        return [*results, *torch.autograd.grad(results, leaves, directions)]

    with ng.backend(backend):
        actual = run(ours)
    for i, (a, e) in enumerate(zip(actual, run(theirs), strict=True)):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10, msg=lambda text, i=i: f"result {i}: {text}")


@every_run
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(7, 33), (3, 64), (2, 1032)], ids=str)
def test_every_backend_drops_the_same_elements(run: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Bit for bit the mask of numerics: element i of draw k at (seed, offset + k), kept where its number >= p."""
    ones, zeros = torch.ones(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
    rng, p = torch.tensor([-77, 2**33 + 1]), 0.4
    options = (
        None,
        None,
        None,
        None,
        None,
        None,
        None,
        rng,
        p,
        1e-5,
        0.0,
        1.0,
        False,
        "gemma",
        None,
        None,
        True,
    )
    record = registry["general_norm"]
    for draw, (x, x1) in enumerate([(ones, zeros), (zeros, ones)]):
        words = philox_words(torch.tensor([-77, 2**33 + 1 + draw]), ones.numel()).view(shape)
        expected = (uniform(words) >= p).to(dtype) * (1 / (1 - p))
        assert_same_bits(run(record, x, None, x1, *options)[1], expected.to(dtype))

    # The backward draws them again.
    args = (ones, None, zeros, *options)
    _, s, _, _, rstd = run_reference(registry["general_norm_forward"], *args)
    gradients = run(
        registry["general_norm_backward"], zeros, None, s, None, rstd, None, None, None, None, ones,
        *(None, None, None, rng, p, 0.0, 1.0, False, False, 0.0, dtype, dtype, False, True, False),
    )  # fmt: skip
    for draw, gradient in enumerate((gradients[0], gradients[2])):
        words = philox_words(torch.tensor([-77, 2**33 + 1 + draw]), ones.numel()).view(shape)
        assert torch.equal(gradient != 0, uniform(words) >= p)


@each_norm
@each_backend
def test_random_dropout(name: str, backend: Any) -> None:
    x, residual = torch.ones(200, 50), torch.zeros(200, 50)
    with ng.backend(backend):
        torch.manual_seed(3)
        x.requires_grad_()
        _, stream = add_norm(name, x, residual, dropout_p=0.25)
        (gradient,) = torch.autograd.grad(stream.sum(), x)
        torch.manual_seed(3)
        _, again = add_norm(name, x, residual, dropout_p=0.25)
        _, other = add_norm(name, x, residual, x1=x, dropout_p=0.25)
    assert_same_bits(
        gradient, stream.detach()
    )  # what was dropped gets no gradient, and the rest the same factor
    assert_same_bits(again.detach(), stream.detach())
    kept = (stream != 0).float().mean()
    assert abs(kept - 0.75) < 0.02  # 4.6 standard deviations
    assert set(stream.unique().tolist()) == {0.0, torch.tensor(4 / 3).item()}
    # Two branches are dropped independently: both, one or none of them.
    counts = (other / (4 / 3)).round().flatten().int().bincount(minlength=3) / other.numel()
    for count, expected in zip(counts, (0.0625, 0.375, 0.5625), strict=True):
        assert abs(count - expected) < 0.02


@each_norm
def test_dropout_of_nothing_and_of_everything(name: str) -> None:
    x, residual = random(6, 20, dtype=torch.float32), random(6, 20, dtype=torch.float32, seed=1)
    x[2, 3] = torch.inf
    assert_same_bits(add_norm(name, x, residual, dropout_p=0.0)[1], x + residual)
    for options in ({"dropout_p": 1.0}, {"dropout_mask": torch.zeros(6, 20, dtype=torch.bool)}):
        assert_same_bits(add_norm(name, x, residual, **options)[1], residual)
    all_kept = add_norm(name, x, residual, dropout_mask=torch.ones(6, 20, dtype=torch.bool))
    assert_same_bits(all_kept[1], x + residual)


@each_norm
@each_backend
def test_what_is_returned(name: str, backend: Any) -> None:
    x, residual, weight = (random(*s, dtype=torch.float32) for s in ((4, 24), (4, 24), (24,)))
    with ng.backend(backend):
        y, stream = add_norm(name, x, residual, weight)
        alone = add_norm(name, x, residual, weight, prenorm=False)
        assert_near(alone, y.double())
        pair = add_norm(name, x, residual, weight, weight1=2 * weight, prenorm=False)
        assert len(pair) == 2
        triple = add_norm(name, x, residual, weight, weight1=2 * weight)
        assert_near(triple[0], y.double())
        assert_near(triple[1], 2 * y.double())
        assert_same_bits(triple[2], stream)
        # Only a second bias: its weight is one.
        assert_near(
            add_norm(name, x, residual, bias1=weight)[1], (add_norm(name, x, residual)[0] + weight).double()
        )
        # Without a residual the sum is x.
        y, stream = add_norm(name, x, None, weight)
        assert_near(
            y, torch_norm(name, x.double(), weight.double(), None, 1e-5 if name == "layer_norm" else 1e-6)
        )
        assert_same_bits(stream, x)
        y, stream = add_norm(name, x, None, weight, x1=residual)
        assert_same_bits(stream, x + residual)


@each_norm
@each_backend
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (9,)], ids=str)
def test_empty_and_single_rows(name: str, shape: tuple[int, ...], backend: Any) -> None:
    x, weight = random(*shape, dtype=torch.float32), random(shape[-1], dtype=torch.float32)
    leaves = [tensor.requires_grad_() for tensor in (x, weight)]
    with ng.backend(backend):
        y, y1, s = add_norm(
            name, x, x, weight, x1=x, weight1=weight, dropout_p=0.5, rowscale=torch.ones(shape[:-1])
        )
        assert y.shape == y1.shape == s.shape == shape
        gradients = torch.autograd.grad((y.sum() + y1.sum() + s.sum()), leaves)
    assert [g.shape for g in gradients] == [x.shape, weight.shape]


@each_norm
@pytest.mark.parametrize("before", [None, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("after", [torch.bfloat16, torch.float32], ids=str)
def test_sum_in_another_dtype(name: str, before: torch.dtype | None, after: torch.dtype) -> None:
    x = random(5, 72, dtype=torch.bfloat16).requires_grad_()
    residual = None if before is None else random(5, 72, dtype=before, seed=1).requires_grad_()
    mask = random(5, 72, seed=2) > 0
    y, stream = add_norm(name, x, residual, dropout_p=0.5, dropout_mask=mask, residual_dtype=after)
    exact = x.float() * mask * 2 + (0 if residual is None else residual.float())
    assert_same_bits(stream.detach(), exact.detach().to(after))
    assert y.dtype == torch.bfloat16
    stream.float().sum().backward()
    assert x.grad.dtype == x.dtype
    assert_same_bits(x.grad, (mask * 2).to(x.dtype))
    if residual is not None:
        assert residual.grad.dtype == residual.dtype
        assert_same_bits(residual.grad, torch.ones_like(residual))


@each_norm
def test_strided_arguments(name: str) -> None:
    shape = (4, 3, 24)
    strided = [random(*reversed(shape), dtype=torch.float32, seed=i).permute(2, 1, 0) for i in range(3)]
    mask = (random(*reversed(shape), seed=9) > 0).permute(2, 1, 0)
    rowscale = random(3, 4, dtype=torch.float32).t()
    weight = random(24, 2, dtype=torch.float32)[:, 0]

    def call(x: Tensor, residual: Tensor, x1: Tensor, mask: Tensor, rowscale: Tensor, weight: Tensor) -> Any:
        return add_norm(
            name, x, residual, weight, x1=x1, weight1=weight, rowscale=rowscale, dropout_mask=(mask, mask),
            dropout_p=0.5,
        )  # fmt: skip

    arguments = [*strided, mask, rowscale, weight]
    for a, e in zip(call(*arguments), call(*(t.contiguous() for t in arguments)), strict=True):
        assert a.is_contiguous()
        assert_same_bits(a, e)


@each_norm
def test_compiled_whole(name: str) -> None:
    x, residual, weight = (
        random(*s, dtype=torch.float32).requires_grad_() for s in ((6, 32), (6, 32), (32,))
    )
    rowscale = random(6, dtype=torch.float32)

    def function(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return add_norm(
            name, x, residual, weight, x1=x * 2, weight1=weight * 2, dropout_p=0.3, rowscale=rowscale
        )

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a in compiled(x, residual, weight):
        assert a.grad_fn is not None
    torch.manual_seed(0)
    expected = torch.autograd.grad([r.sum() for r in function(x, residual, weight)], (x, residual, weight))
    torch.manual_seed(0)
    actual = torch.autograd.grad([r.sum() for r in compiled(x, residual, weight)], (x, residual, weight))
    for a, e in zip(actual, expected, strict=True):
        assert_near(a, e.double())


X = torch.randn(3, 8)
MASK = torch.ones(3, 8, dtype=torch.bool)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x1 shape": ({"x1": X[:1]}, ValueError, r"x1 has shape \(1, 8\)"),
    "x1 dtype": ({"x1": X.half()}, ValueError, "x1 has shape .* and dtype torch.float16"),
    "x1 a number": ({"x1": 2.0}, TypeError, "x1 must be a tensor, got float"),
    "x1 elsewhere": ({"x1": X.to("meta")}, ValueError, "x1 is on meta but x is on cpu"),
    "weight1": ({"weight1": X[0, :5]}, ValueError, r"weight1 has shape \(5,\); expected \(8,\)"),
    "bias1 dtype": ({"bias1": X[0].half()}, TypeError, "bias1 has dtype torch.float16"),
    "weight1 elsewhere": ({"weight1": X[0].to("meta")}, ValueError, "weight1 is on meta"),
    "rowscale shape": ({"rowscale": X[0]}, ValueError, r"rowscale has shape \(8,\); .*each row of x, \(3,\)"),
    "rowscale dtype": ({"rowscale": X[:, 0].double()}, TypeError, "rowscale has dtype torch.float64"),
    "dropout_p": ({"dropout_p": 1.5}, ValueError, "dropout_p must be a number from 0 to 1, got 1.5"),
    "dropout_p NaN": ({"dropout_p": float("nan")}, ValueError, "dropout_p must be .* got nan"),
    "dropout_p a flag": ({"dropout_p": True}, ValueError, "dropout_p must be .* got True"),
    "mask dtype": ({"dropout_mask": MASK.float()}, ValueError, "dropout_mask must be a bool tensor .*torch.float32"),
    "mask shape": ({"dropout_mask": MASK[:2]}, ValueError, r"dropout_mask must be .* got torch.bool of shape \(2, 8\)"),
    "mask elsewhere": ({"dropout_mask": MASK.to("meta")}, ValueError, "dropout_mask is on meta"),
    "one mask for two": ({"x1": X, "dropout_mask": MASK}, ValueError, "dropout_mask holds 1 .*expected a pair"),
    "two masks for one": ({"dropout_mask": (MASK, MASK)}, ValueError, "dropout_mask holds 2 .*expected one tensor"),
    "residual_dtype": ({"residual_dtype": torch.half}, TypeError, "residual_dtype is torch.float16 for x of"),
}  # fmt: skip


@each_norm
@each_backend
@pytest.mark.parametrize("case", BAD)
def test_wrong_arguments_are_named(name: str, case: str, backend: Any) -> None:
    wrong, error, message = BAD[case]
    state = torch.get_rng_state()
    with ng.backend(backend), pytest.raises(error, match=f"add_{name}: {message}"):
        add_norm(name, X, X, **{"dropout_p": 0.1, **wrong})
    assert torch.equal(torch.get_rng_state(), state)
