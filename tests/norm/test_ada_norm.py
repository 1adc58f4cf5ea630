"""AdaLN and the gated residual against plain PyTorch, sample by sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.tolerances import assert_near
from torch import Tensor

import narrowgauge as ng
from narrowgauge.nn import AdaLayerNorm, AdaRMSNorm
from narrowgauge.nn import functional as ngf

each_backend = pytest.mark.parametrize("backend", ["reference", "auto"])


def by_hand(x: Tensor, scale: Tensor, shift: Tensor, centred: bool) -> Tensor:
    """The loop over samples that the definition is."""
    d = x.shape[-1:]
    norm = F.layer_norm if centred else F.rms_norm
    return torch.stack(
        [norm(xs, d, eps=1e-6) * (1 + s) + t for xs, s, t in zip(x, scale, shift, strict=True)]
    )


@each_backend
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("shape", [(3, 1, 17), (2, 50, 129), (2, 3, 4, 40), (4, 7, 640)])
def test_equals_a_loop_over_samples(
    shape: tuple[int, ...], centred: bool, backend: ng.ops.library.Backend
) -> None:
    torch.manual_seed(shape[-1])
    samples, d = shape[0], shape[-1]
    leaves = [
        torch.randn(*s, dtype=torch.float64).requires_grad_() for s in (shape, (samples, d), (samples, d))
    ]
    expected = by_hand(*leaves, centred)
    outer = torch.randn_like(expected)
    function = ngf.ada_layer_norm if centred else ngf.ada_rms_norm
    ones = (1,) * (len(shape) - 2)
    for form in ((samples, d), (samples, *ones, d)):  # both ways in which models have them
        with ng.backend(backend):
            y = function(leaves[0], leaves[1].view(form), leaves[2].view(form))
            actual = torch.autograd.grad(y, leaves, outer)
        assert_near(y.detach(), expected.detach())
        for a, e in zip(actual, torch.autograd.grad(expected, leaves, outer, retain_graph=True), strict=True):
            assert_near(a, e)


@each_backend
def test_one_vector_for_each_token_or_for_all(backend: ng.ops.library.Backend) -> None:
    x, scale, shift = (torch.randn(3, 5, 16, dtype=torch.float64).requires_grad_() for _ in range(3))
    expected = F.layer_norm(x, (16,), eps=1e-6) * (1 + scale) + shift
    with ng.backend(backend):
        y = ngf.ada_layer_norm(x, scale, shift)
        actual = torch.autograd.grad(y.sin().sum(), (x, scale, shift))
        assert_near(y.detach(), expected.detach())
        for a, e in zip(actual, torch.autograd.grad(expected.sin().sum(), (x, scale, shift)), strict=True):
            assert_near(a, e)
        shared = ngf.ada_rms_norm(x, scale[0, 0])
    assert_near(shared.detach(), (F.rms_norm(x, (16,), eps=1e-6) * (1 + scale[0, 0])).detach())


@each_backend
@pytest.mark.parametrize("centred", [True, False])
def test_residual_and_norm_together_equal_the_two_apart(
    centred: bool, backend: ng.ops.library.Backend
) -> None:
    shapes = ((2, 9, 33), (2, 9, 33), (2, 33), (2, 33), (2, 33))
    leaves = [torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    x, residual, gate, scale, shift = leaves
    stream = residual + gate.unsqueeze(1) * x
    expected = (by_hand(stream, scale, shift, centred), stream)
    outer = [torch.randn_like(e) for e in expected]
    together = ngf.add_ada_layer_norm if centred else ngf.add_ada_rms_norm
    apart = ngf.ada_layer_norm if centred else ngf.ada_rms_norm
    with ng.backend(backend):
        fused = together(*leaves)
        alone = ngf.gated_residual(residual, x, gate)
        two_calls = (apart(alone, scale, shift), alone)
        for results in (fused, two_calls):
            for a, e in zip(results, expected, strict=True):
                assert_near(a.detach(), e.detach())
            actual = torch.autograd.grad(results, leaves, outer)
            truth = torch.autograd.grad(expected, leaves, outer, retain_graph=True)
            for a, e in zip(actual, truth, strict=True):
                assert_near(a, e)


@each_backend
def test_a_modulation_of_zero_is_the_plain_norm_and_a_closed_gate_the_residual(
    backend: ng.ops.library.Backend,
) -> None:
    """How DiT begins to train."""
    x, residual, zero = torch.randn(2, 5, 24), torch.randn(2, 5, 24), torch.zeros(2, 24)
    with ng.backend(backend):
        assert_near(ngf.ada_layer_norm(x, zero, zero), F.layer_norm(x.double(), (24,), eps=1e-6))
        assert ngf.gated_residual(residual, x, zero).equal(residual)
        y, stream = ngf.add_ada_layer_norm(x, residual, zero, zero, zero)
    assert stream.equal(residual)
    assert_near(y, F.layer_norm(residual.double(), (24,), eps=1e-6))


@each_backend
def test_a_large_mean_costs_no_accuracy(backend: ng.ops.library.Backend) -> None:
    x = (torch.randn(2, 3, 512) + 1e4).requires_grad_()
    scale = torch.randn(2, 512)
    wide = x.detach().double().requires_grad_()
    truth = F.layer_norm(wide, (512,), eps=1e-6) * (1 + scale.double().unsqueeze(1))
    with ng.backend(backend):
        y = ngf.ada_layer_norm(x, scale)
        outer = torch.randn_like(y)
        (actual,) = torch.autograd.grad(y, x, outer)
    (expected,) = torch.autograd.grad(truth, wide, outer.double())
    # The mean of such numbers is known to half a unit, 5e-4; a difference of large squares would be off by more than 1.
    torch.testing.assert_close(y.double(), truth, rtol=1e-3, atol=5e-3)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-3, atol=5e-3)


@each_backend
def test_special_numbers(backend: ng.ops.library.Backend) -> None:
    x, scale, shift = torch.randn(3, 2, 16), torch.zeros(3, 16), torch.zeros(3, 16)
    x[0], x[1, 0, 3], shift[2, 5] = 7.0, float("nan"), float("inf")
    with ng.backend(backend):
        y = ngf.ada_layer_norm(x, scale, shift)
    assert y[0].abs().max() == 0  # constant rows
    assert y[1, 0].isnan().all()
    assert y[1, 1].isfinite().all()
    assert y[2, :, 5].isinf().all()


def test_narrow_tensors_in_any_layout_beside_a_wide_stream() -> None:
    x = torch.randn(24, 5, 2).bfloat16().permute(2, 1, 0)
    residual, gate, scale = torch.randn(2, 5, 24), torch.randn(2, 24), torch.randn(2, 24)
    y, stream = ngf.add_ada_rms_norm(x, residual, gate, scale.bfloat16())
    assert (y.dtype, stream.dtype) == (torch.bfloat16, torch.float32)
    total = residual.double() + gate.double().unsqueeze(1) * x.double()
    assert_near(stream, total)
    assert_near(y, F.rms_norm(total, (24,), eps=1e-6) * (1 + scale.bfloat16().double().unsqueeze(1)))


GOOD: dict[str, Any] = {"x": torch.ones(2, 5, 8), "scale": torch.ones(2, 8), "shift": torch.ones(2, 8)}
SHAPES: list[tuple[str, tuple[int, ...]]] = [
    ("other samples", (3, 8)), ("other size", (2, 7)), ("other tokens", (2, 4, 8)), ("too many", (2, 5, 1, 8)),
]  # fmt: skip


@each_backend
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"x": "no"}, TypeError, "x must be a tensor, got str"),
        ({"x": torch.tensor(1.0)}, ValueError, "x must have at least one dimension"),
        ({"scale": 1.0}, TypeError, "scale must be a tensor, got float"),
        ({"scale": torch.ones(2, 8).half()}, TypeError, "scale has dtype torch.float16 beside x"),
        ({"shift": torch.ones(8)}, ValueError, "shift has a vector for each of .* expand one"),
        ({"eps": -1e-5}, ValueError, "eps must be a finite number"),
        *(
            ({name: torch.ones(*shape)}, ValueError, rf"{name} has shape .* beside x of shape \(2, 5, 8\)")
            for name in ("scale", "shift")
            for _, shape in SHAPES[:3]
        ),
    ],
)
def test_wrong_arguments(
    wrong: dict[str, Any], error: type[Exception], message: str, backend: ng.ops.library.Backend
) -> None:
    with ng.backend(backend), pytest.raises(error, match=f"ada_layer_norm: {message}"):
        ngf.ada_layer_norm(**{**GOOD, **wrong})


@each_backend
def test_wrong_residuals_and_gates(backend: ng.ops.library.Backend) -> None:
    x, gate = torch.ones(2, 5, 8), torch.ones(2, 8)
    with ng.backend(backend):
        with pytest.raises(
            ValueError, match=r"gated_residual: residual has shape \(2, 4, 8\); expected that of x"
        ):
            ngf.gated_residual(torch.ones(2, 4, 8), x, gate)
        with pytest.raises(TypeError, match="gated_residual: residual must be a tensor, got NoneType"):
            ngf.gated_residual(None, x, gate)
        with pytest.raises(ValueError, match=r"gated_residual: gate has shape \(3, 8\)"):
            ngf.gated_residual(x, x, torch.ones(3, 8))
        with pytest.raises(
            ValueError, match=r"add_ada_rms_norm: gate has a vector for each of .* expand one"
        ):
            ngf.add_ada_rms_norm(x, x, torch.ones(8), gate)


@pytest.mark.parametrize("layer", [AdaLayerNorm(24), AdaRMSNorm(24)], ids=["AdaLayerNorm", "AdaRMSNorm"])
def test_modules(layer: AdaLayerNorm) -> None:
    x, scale, shift = torch.randn(2, 5, 24), torch.randn(2, 24), torch.randn(2, 24)
    truth = by_hand(x.double(), scale.double(), shift.double(), type(layer) is AdaLayerNorm)
    assert_near(layer(x, scale, shift), truth)
    assert not layer.state_dict()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_near(compiled(x, scale.unsqueeze(1), shift.unsqueeze(1)), truth)
    assert repr(layer) == f"{type(layer).__name__}(24, eps=1e-06)"
    with pytest.raises(
        ValueError, match=rf"{type(layer).__name__}: x has shape \(2, 5, 8\); expected \(..., 24\)"
    ):
        layer(x[..., :8], scale, shift)


def test_autocast_keeps_the_dtype_of_the_input() -> None:
    x, scale = torch.randn(2, 3, 8), torch.randn(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert ngf.ada_layer_norm(x, scale).equal(ngf.ada_layer_norm(x, scale.clone()))
        assert ngf.ada_layer_norm(x.bfloat16(), scale).dtype == torch.bfloat16
