"""ScaleNorm and the unit sphere against plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.tolerances import assert_near

import narrowgauge as ng
from narrowgauge.nn import ScaleNorm
from narrowgauge.nn import functional as ngf

each_backend = pytest.mark.parametrize("backend", ["reference", "auto"])


@each_backend
@pytest.mark.parametrize("d", [1, 17, 129, 640])
def test_equals_plain_pytorch(d: int, backend: ng.ops.library.Backend) -> None:
    torch.manual_seed(d)
    x = torch.randn(40, d, dtype=torch.float64).requires_grad_()
    g = torch.tensor(1.7, dtype=torch.float64).requires_grad_()
    expected = g * F.normalize(x, dim=-1, eps=1e-5)
    outer = torch.randn_like(expected)
    with ng.backend(backend):
        y = ngf.scale_norm(x, g)
        actual = torch.autograd.grad(y, (x, g), outer)
        assert_near(ngf.l2_normalize(x).detach(), F.normalize(x, dim=-1).detach())
    assert_near(y.detach(), expected.detach())
    for a, e in zip(actual, torch.autograd.grad(expected, (x, g), outer), strict=True):
        assert_near(a, e)


@each_backend
def test_lengths_and_directions(backend: ng.ops.library.Backend) -> None:
    """Every row has length g; the gradient does not point along it; eps is a clamp, not an addend."""
    x = torch.randn(5, 33, dtype=torch.float64).requires_grad_()
    g = torch.tensor([3.0], dtype=torch.float64)
    with ng.backend(backend):
        y = ngf.scale_norm(x, g, 1e-5)
        (dx,) = torch.autograd.grad(y.sin().sum(), x)
        short = ngf.scale_norm(1e-7 * torch.ones(1, 4, dtype=torch.float64), g, 1e-5)
    assert_near(y.detach().norm(dim=-1), torch.full((5,), 3.0, dtype=torch.float64))
    assert_near((dx * x).sum(-1).detach(), torch.zeros(5, dtype=torch.float64))
    assert_near(short, torch.full((1, 4), 3e-2, dtype=torch.float64))


@each_backend
def test_special_numbers(backend: ng.ops.library.Backend) -> None:
    x = torch.randn(3, 17).requires_grad_()
    with torch.no_grad():
        x[0] = 0
        x[1, 4] = float("nan")
    with ng.backend(backend):
        y = ngf.scale_norm(x, torch.ones(1))
        (dx,) = torch.autograd.grad(y[0].sum(), x)
    assert y[0].abs().max() == 0
    assert y[1].isnan().all()
    assert y[2].isfinite().all()
    assert_near(dx[0], torch.full((17,), 1e5))


@each_backend
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"x": None}, TypeError, "x must be a tensor, got NoneType"),
        ({"x": torch.ones(3, dtype=torch.bool)}, TypeError, "x has dtype torch.bool"),
        ({"g": torch.ones(2)}, ValueError, r"g has shape \(2,\); expected one element"),
        ({"g": torch.ones(1).half()}, TypeError, "g has dtype torch.float16 beside x"),
        ({"g": 2.0}, TypeError, "g must be a tensor, got float"),
        ({"eps": -1.0}, ValueError, "eps must be a finite number"),
    ],
)
def test_wrong_arguments(
    wrong: dict[str, Any], error: type[Exception], message: str, backend: ng.ops.library.Backend
) -> None:
    with ng.backend(backend), pytest.raises(error, match=f"scale_norm: {message}"):
        ngf.scale_norm(**{"x": torch.ones(3, 4), "g": torch.ones(1), **wrong})


def test_module() -> None:
    layer = ScaleNorm(16)
    x = torch.randn(2, 5, 16)
    assert_near(layer(x).detach(), F.rms_norm(x.double(), (16,), eps=0.0))  # as it starts
    with torch.no_grad():
        layer.g.fill_(2.5)
    copy = ScaleNorm(16)
    copy.load_state_dict(layer.state_dict())
    truth = 2.5 * F.normalize(x.double(), dim=-1)
    assert_near(copy(x).detach(), truth)
    torch._dynamo.reset()
    assert_near(torch.compile(layer, fullgraph=True, backend="aot_eager")(x).detach(), truth)
    narrow = copy.bfloat16()(x.bfloat16().transpose(0, 1))
    assert narrow.dtype == torch.bfloat16
    assert_near(narrow.detach(), 2.5 * F.normalize(x.bfloat16().double(), dim=-1).transpose(0, 1))
