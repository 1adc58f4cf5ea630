"""A norm and a low-precision linear layer as one, beside the two layers apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.backends import REQUIRE_NATIVE
from tests.tolerances import assert_near
from torch import Tensor, nn

import narrowgauge as ng
from narrowgauge.nn import LayerNorm, LayerNormLinear, RMSNorm, RMSNormLinear
from narrowgauge.nn.functional import layer_norm_linear, rms_norm_linear
from narrowgauge.ops import library
from narrowgauge.quant import Linear, linear

PAIRS = [(RMSNormLinear, RMSNorm), (LayerNormLinear, LayerNorm)]
each_pair = pytest.mark.parametrize(("joined", "norm"), PAIRS, ids=["rms", "layer"])
each_recipe = pytest.mark.parametrize("recipe", ["int8-row", "fp8-row"])
needs_native = pytest.mark.skipif(
    not library.state.cpu.loaded and not REQUIRE_NATIVE, reason=f"CPU library {library.state.cpu.reason}"
)
each_backend = pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])


def gradients(layer: Any, x: Tensor, parameters: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    out = layer(x)
    return (out, *torch.autograd.grad(out, [x, *parameters], grad))


@each_backend
@each_pair
@each_recipe
@pytest.mark.parametrize("shape", [(5, 33), (2, 70, 40), (24,), (0, 16)])
def test_joined_is_the_two_layers(
    joined: Any, norm: Any, recipe: str, shape: tuple[int, ...], backend: library.Backend
) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = joined(shape[-1], 19, recipe=recipe, eps=1e-5)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(shape, generator=generator, requires_grad=True)
    grad = torch.randn(*shape[:-1], 19, generator=generator)
    parameters = list(layer.parameters())
    with ng.backend(backend):
        actual = gradients(layer, x, parameters, grad)
        expected = gradients(nn.Sequential(layer.norm, layer.linear), x, parameters, grad)
    for a, e in zip(actual, expected, strict=True):
        assert_near(a, e)  # in float32 nothing is rounded between norm and codes


@each_pair
@each_recipe
def test_bfloat16_is_nearer_to_the_norm_in_float32(joined: Any, norm: Any, recipe: str) -> None:
    generator = torch.Generator().manual_seed(1)
    layer = joined(512, 96, recipe=recipe, eps=1e-5, dtype=torch.bfloat16)
    x = torch.randn(64, 512, generator=generator).bfloat16()
    wide = joined(512, 96, recipe=recipe, eps=1e-5)
    wide.load_state_dict(layer.state_dict())
    truth = linear(wide.norm(x.float()), wide.linear.weight, wide.linear.bias, recipe=recipe)
    fused, apart = layer(x), layer.linear(layer.norm(x))
    assert fused.dtype == torch.bfloat16
    assert_near(fused, truth.bfloat16())
    assert (fused - truth).norm() < (apart - truth).norm()


@each_pair
def test_what_is_kept_for_the_backward(joined: Any, norm: Any) -> None:
    layer = joined(256, 8, bias=False)
    x = torch.randn(128, 256, requires_grad=True)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    parameters = sum(p.nbytes for p in layer.parameters())
    # x, one byte of code per element, a scale per channel, statistics per row, and no normed x.
    assert sum(kept.values()) - parameters <= x.nbytes + x.numel() + 4 * 256 + 2 * 4 * 128


@each_pair
def test_frozen_weight_needs_no_transposed_copy(joined: Any, norm: Any) -> None:
    layer = joined(16, 8)
    layer.linear.weight.requires_grad_(False)
    x = torch.randn(3, 16, requires_grad=True)
    out = layer(x)
    assert not any(t is not None and t.numel() and t.dtype.itemsize == 1 for t in out.grad_fn.saved_tensors)
    out.sum().backward()
    assert layer.linear.weight.grad is None
    assert x.grad is not None
    assert layer.norm.weight.grad is not None


@each_pair
def test_modules(joined: Any, norm: Any) -> None:
    layer = joined(24, 6, recipe="int8-row")
    assert sorted(layer.state_dict()) == sorted(
        [*(f"norm.{name}" for name, _ in layer.norm.named_parameters()), "linear.weight", "linear.bias"]
    )
    other = joined(24, 6, recipe="int8-row")
    other.load_state_dict(layer.state_dict())
    x = torch.randn(5, 24)
    assert torch.equal(layer(x), other(x))

    shared = joined.from_modules(layer.norm, layer.linear)
    assert shared.linear.weight is layer.linear.weight
    assert torch.equal(shared(x), layer(x))

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    actual, expected = (
        torch.autograd.grad(f(x).square().sum(), list(layer.parameters())) for f in (compiled, layer)
    )
    for a, e in zip(actual, expected, strict=True):
        assert_near(a, e)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    y = x.clone().requires_grad_()
    (dy,) = torch.autograd.grad(layer(y).square().sum(), y, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        dy.sum().backward()


def test_gemma_norm_and_default_eps() -> None:
    layer = RMSNormLinear(16, 4, weight_offset=1.0)
    assert layer.norm.weight.abs().max() == 0
    assert layer.norm.eps is None
    x = torch.randn(3, 16)
    assert_near(layer(x), layer.linear(layer.norm(x)))


def test_modules_that_do_not_fit() -> None:
    ours, theirs = RMSNorm(8), nn.RMSNorm(8)
    with pytest.raises(TypeError, match="norm must be a narrowgauge RMSNorm, got RMSNorm"):
        RMSNormLinear.from_modules(theirs, Linear(8, 4))
    with pytest.raises(TypeError, match="linear must be a narrowgauge Linear, got Linear"):
        RMSNormLinear.from_modules(ours, nn.Linear(8, 4))
    with pytest.raises(ValueError, match="but linear takes 9 features"):
        RMSNormLinear.from_modules(ours, Linear(9, 4))
    with pytest.raises(ValueError, match='casting="gemma"'):
        RMSNormLinear.from_modules(RMSNorm(8, casting="llama"), Linear(8, 4))
    with pytest.raises(ValueError, match="recipe must be one of"):
        LayerNormLinear(8, 4, recipe="fp9")


X, W = torch.randn(2, 6), torch.randn(3, 6)
BAD_CALLS = {
    "recipe": ({"recipe": "fp9"}, ValueError, "recipe must be one of 'int8-row', 'fp8-row'"),
    "x": ({"x": X.double()}, TypeError, "x has dtype torch.float64"),
    "norm_weight": ({"norm_weight": X[0, :5]}, ValueError, "weight has shape"),
    "weight": ({"weight": W[:, :5]}, ValueError, r"x must be \(..., in_features\)"),
    "bias": ({"bias": X[0]}, ValueError, "bias must have shape"),
    "eps": ({"eps": -1.0}, ValueError, "eps must be"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
@pytest.mark.parametrize("function", [rms_norm_linear, layer_norm_linear])
def test_bad_calls_name_the_function_and_the_argument(function: Any, case: str) -> None:
    given, error, message = BAD_CALLS[case]
    arguments = {"x": X, "norm_weight": None, "weight": W, **given}
    if function is layer_norm_linear:
        arguments["norm_bias"] = None
    with pytest.raises(error, match=f"{function.__name__}: .*{message}"):
        function(**arguments)
