"""Gated RMSNorm: Mamba's recorded numbers, both orders against plain PyTorch, and its limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.golden_files import files, read
from tests.tolerances import assert_near
from torch import Tensor

import narrowgauge as ng
from narrowgauge.nn import GatedRMSNorm
from narrowgauge.nn import functional as ngf

each_backend = pytest.mark.parametrize("backend", ["reference", "auto"])


@each_backend
@pytest.mark.parametrize("path", files("gated_rmsnorm"), ids=lambda path: path.stem)
def test_recorded_numbers(path: Path, backend: ng.ops.library.Backend) -> None:
    case, meta = read(path)
    leaves = {
        name: case[name].clone().requires_grad_()
        for name in ("in_x", "in_z", "param_weight", "param_bias")
        if name in case
    }
    with ng.backend(backend):
        y = ngf.gated_rms_norm(
            leaves["in_x"],
            leaves["in_z"],
            leaves["param_weight"],
            meta["eps"],
            bias=leaves.get("param_bias"),
            group_size=meta["group_size"],
            norm_before_gate=meta["norm_before_gate"],
            activation=meta["activation"],
        )
        (y * case["in_grad_y"]).sum().backward()
    results = {"out_y": y.detach()} | {f"grad_{n.split('_')[1]}": leaf.grad for n, leaf in leaves.items()}
    for name, actual in results.items():
        expected = case[name]
        torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-6 * float(expected.abs().max()))


def by_hand(
    x: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, groups: int, first: bool, act: Any
) -> Tensor:
    """Group by group, with PyTorch's own norm and activation."""
    if not first:
        x = x * act(z)
    parts = [F.rms_norm(part, part.shape[-1:], eps=1e-5) for part in x.chunk(groups, -1)]
    y = torch.cat(parts, -1) * weight
    y = y if bias is None else y + bias
    return y * act(z) if first else y


@each_backend
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("d", "groups"), [(1, 1), (17, 1), (129, 3), (64, 4), (640, 1)])
def test_equals_plain_pytorch(
    d: int, groups: int, first: bool, activation: str, backend: ng.ops.library.Backend
) -> None:
    torch.manual_seed(d)
    leaves = [
        torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in ((5, d), (5, d), (d,), (d,))
    ]
    x, z, weight, bias = leaves
    expected = by_hand(x, z, weight, bias, groups, first, F.silu if activation == "silu" else torch.sigmoid)
    outer = torch.randn_like(expected)
    with ng.backend(backend):
        y = ngf.gated_rms_norm(
            x,
            z,
            weight,
            1e-5,
            bias=bias,
            group_size=d // groups,
            norm_before_gate=first,
            activation=activation,
        )
        actual = torch.autograd.grad(y, leaves, outer)
    assert_near(y.detach(), expected.detach())
    for a, e in zip(actual, torch.autograd.grad(expected, leaves, outer), strict=True):
        assert_near(a, e)


@each_backend
@pytest.mark.parametrize("first", [True, False])
def test_an_open_gate_is_no_gate(first: bool, backend: ng.ops.library.Backend) -> None:
    x, weight = torch.randn(4, 48, dtype=torch.float64), torch.randn(48, dtype=torch.float64)
    with ng.backend(backend):
        y = ngf.gated_rms_norm(
            x, torch.full_like(x, 800.0), weight, 1e-5, norm_before_gate=first, activation="sigmoid"
        )
        assert_near(y, F.rms_norm(x, (48,), weight, 1e-5))


@each_backend
def test_special_numbers(backend: ng.ops.library.Backend) -> None:
    x, weight = torch.randn(4, 33), torch.ones(33)
    z = torch.randn(4, 33)
    x[1, 3], z[2, 5] = float("nan"), float("inf")
    z[3] = -1e4  # exp(1e4) overflows
    x[0] = 0
    with ng.backend(backend):
        y = ngf.gated_rms_norm(x, z, weight, norm_before_gate=True)
    assert y[0].abs().max() == 0
    assert y[1].isnan().all()
    assert y[2, 5].isinf()
    assert y[2].isfinite().sum() == 32
    assert y[3].abs().max() == 0


def test_any_layout_and_bfloat16() -> None:
    x, z = torch.randn(40, 6).T, torch.randn(6, 80)[:, ::2]
    weight = torch.randn(40)
    y = ngf.gated_rms_norm(x, z, weight, group_size=20, norm_before_gate=False)
    assert_near(y, by_hand(x.double(), z.double(), weight.double(), None, 2, False, F.silu))
    narrow = ngf.gated_rms_norm(x.bfloat16(), z.bfloat16(), weight, group_size=20, norm_before_gate=False)
    truth = by_hand(x.bfloat16().double(), z.bfloat16().double(), weight.double(), None, 2, False, F.silu)
    assert narrow.dtype == torch.bfloat16
    assert_near(narrow, truth)


GOOD: dict[str, Any] = {"x": torch.ones(3, 8), "z": torch.ones(3, 8), "weight": torch.ones(8)}


@each_backend
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": torch.ones(3, 8, dtype=torch.int32)}, TypeError, "x has dtype torch.int32"),
        ({"z": torch.ones(3, 7)}, ValueError, r"z has shape \(3, 7\); expected that of x"),
        ({"z": torch.ones(3, 8).bfloat16()}, TypeError, "z has dtype torch.bfloat16 beside x"),
        ({"z": None}, TypeError, "z must be a tensor, got NoneType"),
        ({"weight": torch.ones(7)}, ValueError, r"weight has shape \(7,\)"),
        ({"bias": torch.ones(9)}, ValueError, r"bias has shape \(9,\)"),
        ({"eps": -1.0}, ValueError, "eps must be a finite number"),
        ({"group_size": 3}, ValueError, "group_size must be a positive divisor of 8, got 3"),
        ({"group_size": 0}, ValueError, "group_size must be a positive divisor of 8, got 0"),
        ({"activation": "gelu"}, ValueError, "activation must be one of 'silu', 'sigmoid'; got 'gelu'"),
    ],
)
def test_wrong_arguments(
    wrong: dict[str, Any], error: type[Exception], message: str, backend: ng.ops.library.Backend
) -> None:
    with ng.backend(backend), pytest.raises(error, match=f"gated_rms_norm: {message}"):
        ngf.gated_rms_norm(**{**GOOD, "norm_before_gate": True, **wrong})


def test_the_order_has_no_default() -> None:
    with pytest.raises(TypeError, match="norm_before_gate"):
        ngf.gated_rms_norm(**GOOD)
    with pytest.raises(TypeError, match="norm_before_gate"):
        GatedRMSNorm(8)


def test_module() -> None:
    layer = GatedRMSNorm(24, group_size=8, norm_before_gate=False, bias=True)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {"weight": (24,), "bias": (24,)}
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.normal_()
    copy = GatedRMSNorm(24, group_size=8, norm_before_gate=False, bias=True)
    copy.load_state_dict(layer.state_dict())
    x, z = torch.randn(2, 5, 24), torch.randn(2, 5, 24)
    truth = by_hand(*(t.double() for t in (x, z, layer.weight, layer.bias)), 3, False, F.silu)
    assert_near(copy(x, z).detach(), truth.detach())
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_near(compiled(x, z).detach(), truth.detach())
    assert "group_size=8" in repr(layer)
    with pytest.raises(ValueError, match="GatedRMSNorm: group_size must be a positive divisor of 24, got 7"):
        GatedRMSNorm(24, group_size=7, norm_before_gate=True)
