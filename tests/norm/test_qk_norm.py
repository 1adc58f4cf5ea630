"""QK-norm: RMSNorm on a reshaped view, then RoPE, both in plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.tolerances import assert_near
from torch import Tensor

import narrowgauge as ng
from narrowgauge.nn import QKNorm
from narrowgauge.nn import functional as ngf

each_backend = pytest.mark.parametrize("backend", ["reference", "auto"])


def angles(positions: int, d: int) -> Tensor:
    """(positions, d / 2), as the embedding has them."""
    frequencies = 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    return torch.arange(positions, dtype=torch.float64).outer(frequencies)


def turned(n: Tensor, angle: Tensor, interleaved: bool) -> Tensor:
    """Each pair as a complex number, multiplied by e^(i angle). n is (..., positions, heads, d)."""
    d = n.shape[-1]
    pairs = n.unflatten(-1, (d // 2, 2)) if interleaved else n.unflatten(-1, (2, d // 2)).transpose(-1, -2)
    product = torch.view_as_complex(pairs.contiguous()) * torch.polar(
        torch.ones_like(angle), angle
    ).unsqueeze(-2)
    result = torch.view_as_real(product)
    return result.flatten(-2) if interleaved else result.transpose(-1, -2).flatten(-2)


@each_backend
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("d", [2, 6, 18, 64, 128, 258])
def test_equals_a_norm_of_a_view_and_then_a_rotation(
    d: int, per_head: bool, interleaved: bool, backend: ng.ops.library.Backend
) -> None:
    torch.manual_seed(d)
    batch, positions, heads, kv_heads = 2, 5, 4, 2
    q, k = (
        torch.randn(batch, positions, h * d, dtype=torch.float64).requires_grad_() for h in (heads, kv_heads)
    )
    weights = [
        torch.randn(*((h, d) if per_head else (d,)), dtype=torch.float64).requires_grad_()
        for h in (heads, kv_heads)
    ]
    angle = angles(positions, d)
    leaves = [q, k, *weights]
    expected = []
    for x, h, weight in zip((q, k), (heads, kv_heads), weights, strict=True):
        view = x.unflatten(-1, (h, d))
        rows = [F.rms_norm(view[..., i, :], (d,), weight[i] if per_head else weight, 1e-6) for i in range(h)]
        expected.append(turned(torch.stack(rows, -2), angle, interleaved))
    outer = [torch.randn_like(e) for e in expected]
    truth = torch.autograd.grad(expected, leaves, outer)
    for width in (d, d // 2):  # tables of both widths
        table = angle
        if width == d:
            table = angle.repeat_interleave(2, -1) if interleaved else torch.cat((angle, angle), -1)
        with ng.backend(backend):
            actual = ngf.qk_norm(
                q.unflatten(-1, (heads, d)),
                k.unflatten(-1, (kv_heads, d)),
                *weights,
                1e-6,
                cos=table.cos(),
                sin=table.sin(),
                interleaved=interleaved,
            )
            gradients = torch.autograd.grad(actual, leaves, outer)
        for a, e in zip([*actual, *gradients], [*expected, *truth], strict=True):
            assert_near(a.detach(), e.detach())


@each_backend
def test_without_a_rotation(backend: ng.ops.library.Backend) -> None:
    x, weight = torch.randn(3, 4, 17), torch.randn(17)
    with ng.backend(backend):
        y = ngf.head_rms_norm(x, weight, 1e-6)
        centred = ngf.head_rms_norm(x, weight - 1, 1e-6, weight_offset=1.0)
        plain = ngf.head_rms_norm(x, None, 1e-6)
    truth = F.rms_norm(x.double(), (17,), weight.double(), 1e-6)
    assert_near(y, truth)
    assert_near(centred, truth)
    assert_near(plain, F.rms_norm(x.double(), (17,), None, 1e-6))


@each_backend
def test_a_rotation_keeps_lengths_and_the_difference_of_positions(backend: ng.ops.library.Backend) -> None:
    """What a rotary embedding is for: the product of q and k depends on how far apart they are."""
    angle = angles(9, 32)
    q, k = (torch.randn(32, dtype=torch.float64).expand(9, 1, 32) for _ in range(2))
    with ng.backend(backend):
        q, k = ngf.qk_norm(q, k, None, None, 0.0, cos=angle.cos(), sin=angle.sin())
    assert_near(q.norm(dim=-1), torch.full((9, 1), 32**0.5, dtype=torch.float64))
    scores = q[:, 0] @ k[:, 0].T
    assert_near(scores[3:, 3:], scores[:-3, :-3])
    assert not torch.allclose(scores[0], scores[1])


def test_positions_of_each_sample_and_learned_tables() -> None:
    x = torch.randn(2, 3, 2, 8, dtype=torch.float64).requires_grad_()
    angle = torch.stack([angles(7, 8)[:3], angles(7, 8)[4:]]).requires_grad_()
    y = ngf.head_rms_norm(x, None, cos=angle.cos(), sin=angle.sin())
    expected = turned(F.rms_norm(x, (8,), eps=1e-6), angle, False)
    assert_near(y.detach(), expected.detach())
    outer = torch.randn_like(y)
    for a, e in zip(
        torch.autograd.grad(y, (x, angle), outer),
        torch.autograd.grad(expected, (x, angle), outer),
        strict=True,
    ):
        assert_near(a, e)
    same = ngf.head_rms_norm(x[:1], None, cos=angle[:1].cos(), sin=angle[:1].sin())  # a table of one sample
    assert_near(same.detach(), expected[:1].detach())


def test_bfloat16_with_wide_tables_in_any_layout() -> None:
    x = torch.randn(2, 4, 6, 32).bfloat16().transpose(1, 2)  # (batch, positions, heads, d), not contiguous
    angle = angles(6, 32).float()
    y = ngf.head_rms_norm(x, torch.ones(32), cos=angle.cos(), sin=angle.sin())
    assert y.dtype == torch.bfloat16
    assert_near(y, turned(F.rms_norm(x.double(), (32,), eps=1e-6), angle.double(), False))


@each_backend
def test_special_numbers(backend: ng.ops.library.Backend) -> None:
    x = torch.randn(3, 2, 16)
    x[0, 1], x[1, 0, 4], x[2, 1, 2] = 0, float("nan"), float("inf")
    with ng.backend(backend):
        y = ngf.head_rms_norm(x, None)
    assert y[0, 1].abs().max() == 0
    assert y[1, 0].isnan().all()
    assert y[2, 1].isnan().sum() == 1  # inf / inf
    assert y[1, 1].isfinite().all()


TABLE = torch.ones(5, 8)
GOOD: dict[str, Any] = {
    "q": torch.ones(2, 5, 3, 8), "k": torch.ones(2, 5, 1, 8), "q_weight": None, "k_weight": None,
    "cos": TABLE, "sin": TABLE,
}  # fmt: skip


@each_backend
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"q": 1.0}, TypeError, "q must be a tensor, got float"),
        ({"k": torch.ones(8, dtype=torch.int64)}, TypeError, "k has dtype torch.int64"),
        ({"q_weight": torch.ones(7)}, ValueError, r"q_weight has shape \(7,\) beside q"),
        ({"k_weight": torch.ones(3, 8)}, ValueError, r"k_weight has shape \(3, 8\) beside k"),
        ({"k_weight": torch.ones(8).half()}, TypeError, "k_weight has dtype torch.float16 beside k"),
        ({"sin": None}, ValueError, "cos and sin go together; got only cos"),
        ({"cos": torch.ones(4, 8)}, ValueError, r"cos has shape \(4, 8\) beside q"),
        ({"sin": torch.ones(5, 6)}, ValueError, r"sin has shape \(5, 6\) beside q"),
        ({"q": torch.ones(2, 5, 3, 7)}, ValueError, "q has shape .* an even head_dim"),
        ({"eps": float("inf")}, ValueError, "eps must be a finite number"),
    ],
)
def test_wrong_arguments(
    wrong: dict[str, Any], error: type[Exception], message: str, backend: ng.ops.library.Backend
) -> None:
    with ng.backend(backend), pytest.raises(error, match=f"qk_norm: {message}"):
        ngf.qk_norm(**{**GOOD, **wrong})


def test_module() -> None:
    layer = QKNorm(16, 4, 2, weight_offset=1.0)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "q_weight": (4, 16),
        "k_weight": (2, 16),
    }
    assert layer.q_weight.abs().max() == 0
    with torch.no_grad():
        layer.q_weight.normal_()
    copy = QKNorm(16, 4, 2, weight_offset=1.0)
    copy.load_state_dict(layer.state_dict())
    q, k, angle = torch.randn(3, 5, 4, 16), torch.randn(3, 5, 2, 16), angles(5, 16).float()
    y, _ = copy(q, k, angle.cos(), angle.sin())
    normed = F.rms_norm(q.double(), (16,), eps=1e-6) * (layer.q_weight.double() + 1)
    truth = turned(normed, angle.double(), False).detach()
    assert_near(y.detach(), truth)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_near(compiled(q, k, angle.cos(), angle.sin())[0].detach(), truth)
    shared = QKNorm(16)
    assert shared.q_weight.shape == shared.k_weight.shape == (16,)
    with pytest.raises(ValueError, match="num_kv_heads needs num_heads"):
        QKNorm(16, num_kv_heads=2)
