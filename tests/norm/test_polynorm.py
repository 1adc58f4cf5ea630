"""PolyNorm and SeeDNorm beside their formulas in plain PyTorch: there are no recorded numbers of the authors' code."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.tolerances import assert_near, assert_same_bits
from torch import Tensor, nn

import narrowgauge as ng
from narrowgauge.nn import PolyNorm, SeeDNorm
from narrowgauge.nn.functional import poly_norm, seed_norm

each_backend = pytest.mark.parametrize("backend", ["reference", "auto"])


def formula(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """PolyNorm written once more, by powers and with torch's own RMSNorm."""
    norms = [torch.nn.functional.rms_norm(x**power, x.shape[-1:], eps=eps) for power in (3, 2, 1)]
    return torch.einsum("p...,p->...", torch.stack(norms), weight) + bias


@each_backend
@pytest.mark.parametrize("shape", [(3, 1), (4, 17), (2, 3, 129), (40, 8), (2, 4099)], ids=str)
def test_values_and_gradients(shape: tuple[int, ...], backend: Any) -> None:
    tensors = [torch.randn(*size, dtype=torch.float64) for size in (shape, (3,), (1,))]
    ours, theirs = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))
    dy = torch.randn(shape, dtype=torch.float64)
    with ng.backend(backend):
        y = poly_norm(*ours)
        y.backward(dy)
    expected = formula(*theirs)
    expected.backward(dy)
    assert_near(y.detach(), expected.detach())
    for a, e in zip(ours, theirs, strict=True):
        assert a.grad is not None
        assert e.grad is not None
        assert_near(a.grad, e.grad)


@each_backend
def test_laws(backend: Any) -> None:
    x, bias = torch.randn(5, 33, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    with ng.backend(backend):
        linear = poly_norm(x, torch.tensor([0.0, 0, 1]).double(), bias)
        assert_near(linear, torch.nn.functional.rms_norm(x, (33,), eps=1e-6))
        cube = poly_norm(x, torch.tensor([1.0, 0, 0]).double(), eps=0.0)
        assert_near(cube.square().mean(-1), torch.ones(5, dtype=torch.float64), "unit mean square")
        even = poly_norm(x, torch.tensor([0.0, 1, 0]).double())
        assert_same_bits(poly_norm(-x, torch.tensor([0.0, 1, 0]).double()), even)
        weight = torch.randn(3, dtype=torch.float64)
        torch.testing.assert_close(
            poly_norm(100 * x, weight, eps=0.0), poly_norm(x, weight, eps=0.0), rtol=1e-9, atol=1e-9
        )


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_does_not_overflow(dtype: torch.dtype, backend: Any) -> None:
    """Sixth powers of float16's largest values are within float32."""
    x = torch.randn(4, 64).mul(2e4).clamp(-6e4, 6e4).to(dtype)
    weight, bias = torch.randn(3), torch.randn(1)
    with ng.backend(backend):
        y = poly_norm(x, weight, bias)
    assert y.dtype == dtype
    assert_near(y, formula(x.double(), weight.double(), bias.double()))


@each_backend
def test_special_values_and_layouts(backend: Any) -> None:
    x, weight, bias = torch.randn(4, 6, 5), torch.randn(3), torch.randn(1)
    with ng.backend(backend):
        plain = poly_norm(x, weight, bias)
        assert_same_bits(poly_norm(x.transpose(0, 1).contiguous().transpose(0, 1), weight, bias), plain)
        assert poly_norm(x[:0], weight).shape == (0, 6, 5)
        assert_same_bits(poly_norm(torch.zeros(2, 5), weight, bias), bias.expand(2, 5).clone())
        x[0, 0, 0], x[1, 0, 0] = math.nan, math.inf
        y = poly_norm(x, weight, bias)
    assert y[0, 0].isnan().all()
    assert y[1, 0, 0].isnan()
    assert_same_bits(y[2:], plain[2:])


def test_modules() -> None:
    layer, seeds = PolyNorm(), SeeDNorm(12)
    assert layer.weight.tolist() == pytest.approx([1 / 3] * 3)
    assert layer.bias is not None
    assert layer.bias.item() == 0
    assert PolyNorm(bias=False).bias is None
    x = torch.randn(3, 12, requires_grad=True)
    assert_near(layer(x).detach(), formula(x.double(), layer.weight.double(), torch.zeros(1)).detach())
    assert_near(seeds(x).detach(), torch.nn.functional.rms_norm(x.double(), (12,), eps=1e-6).detach())
    for module in (layer, seeds):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        (expected,) = torch.autograd.grad(module(x).square().sum(), x)
        (actual,) = torch.autograd.grad(compiled(x).square().sum(), x)
        assert_near(actual, expected.double())
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.normal_()
        twin: nn.Module = type(module)() if module is layer else SeeDNorm(12)
        twin.load_state_dict(module.state_dict())
        assert_same_bits(twin(x).detach(), module(x).detach())
    torch._dynamo.reset()


def test_seed_norm_is_its_formula() -> None:
    x, alpha, beta, gamma = (torch.randn(*s, dtype=torch.float64) for s in ((4, 9), (9,), (9,), (9,)))
    factor = torch.tanh(x @ beta).unsqueeze(-1) * alpha + gamma
    expected = factor * torch.nn.functional.rms_norm(x, (9,), eps=1e-6)
    assert_near(seed_norm(x, alpha, beta, gamma), expected)
    inputs = tuple(t.requires_grad_() for t in (x, alpha, beta, gamma))
    assert torch.autograd.gradcheck(seed_norm, inputs)
    narrow = seed_norm(x.bfloat16(), alpha.float(), beta.float(), gamma.float())
    assert narrow.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: poly_norm(torch.ones(2, 4), torch.ones(2)), ValueError, r"weight has shape \(2,\); expected \(3,\)"),
        (lambda: poly_norm(torch.ones(2, 4), torch.ones(3), torch.ones(4)), ValueError, r"bias has shape \(4,\)"),
        (lambda: poly_norm(torch.ones(2, 4), torch.ones(3), eps=-1), ValueError, "eps must be a finite number"),
        (lambda: poly_norm(torch.tensor(1.0), torch.ones(3)), ValueError, "x must have at least one dimension"),
        (lambda: poly_norm([1.0], torch.ones(3)), TypeError, "x must be a tensor, got list"),
        (lambda: poly_norm(torch.ones(2), [1, 1, 1]), TypeError, "weight must be a tensor, got list"),
        (lambda: poly_norm(torch.ones(2), torch.ones(3).half()), TypeError, "weight has dtype torch.float16"),
        (lambda: seed_norm(*map(torch.ones, (2, 2, 3, 2))), ValueError, r"beta has shape \(3,\)"),
        (lambda: seed_norm(torch.ones(2), torch.ones(2), None, torch.ones(2)), TypeError, "beta must be a tensor"),
        (lambda: PolyNorm(math.nan), ValueError, "eps must be a finite number"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
