"""The modules: constructors and state of torch.nn's, and the options on top."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from tests.tolerances import assert_near, assert_same_bits
from torch import Tensor, nn

import narrowgauge as ng

PAIRS = [(ng.nn.LayerNorm, nn.LayerNorm), (ng.nn.RMSNorm, nn.RMSNorm)]
each_pair = pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=["LayerNorm", "RMSNorm"])
each_module = pytest.mark.parametrize("module", [ours for ours, _ in PAIRS], ids=["LayerNorm", "RMSNorm"])


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64
    ).to(dtype)


def randomize(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(random(*parameter.shape, seed=i + 1))
    return module


def outputs(module: nn.Module, x: Tensor) -> list[Tensor]:
    module.zero_grad()
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(random(*y.shape, seed=9).to(y.dtype))
    return [y.detach(), x.grad, *(parameter.grad for parameter in module.parameters())]


@each_pair
def test_constructor_begins_like_that_of_torch(ours: Any, theirs: Any) -> None:
    mine, stock = (inspect.signature(module).parameters for module in (ours, theirs))
    assert set(stock) <= set(mine)
    for name in stock:
        assert mine[name].default == stock[name].default, name
    common = [name for name in stock if name not in ("device", "dtype")]  # which are given by name
    assert list(mine)[: len(common)] == common


@each_pair
@pytest.mark.parametrize("shape", [8, (8,), [3, 4], torch.Size([2, 3, 4])], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"eps": 1e-3}, {"elementwise_affine": False}, {"bias": False}, {"dtype": torch.float64}],
    ids=str,
)
def test_state_and_values_are_those_of_torch(
    ours: Any, theirs: Any, shape: Any, options: dict[str, Any]
) -> None:
    if "bias" in options and theirs is nn.RMSNorm:
        pytest.skip("torch.nn.RMSNorm has no bias")
    mine, stock = ours(shape, **options), theirs(shape, **options)
    assert mine.normalized_shape == stock.normalized_shape
    assert (mine.eps, mine.elementwise_affine) == (stock.eps, stock.elementwise_affine)
    fresh, expected = mine.state_dict(), stock.state_dict()
    assert list(fresh) == list(expected)
    for name in fresh:
        assert_same_bits(fresh[name], expected[name], name)

    mine.load_state_dict(randomize(stock).state_dict(), strict=True)
    back = theirs(shape, **options)
    back.load_state_dict(mine.state_dict(), strict=True)
    for name, value in back.state_dict().items():
        assert_same_bits(value, stock.state_dict()[name], name)
    x = random(5, *mine.normalized_shape, dtype=options.get("dtype", torch.float32))
    for a, e in zip(outputs(mine, x), outputs(stock, x), strict=True):
        assert_near(a, e.double())
    assert_near(mine.eval()(x).detach(), stock.eval()(x).detach().double())


@each_pair
def test_a_state_of_another_size_is_refused(ours: Any, theirs: Any) -> None:
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        ours(8).load_state_dict(theirs(9).state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        ours(8).load_state_dict(theirs(8, elementwise_affine=False).state_dict())


@each_module
def test_device_and_dtype(module: Any) -> None:
    made = module(8, device="meta", dtype=torch.bfloat16, bias=True)
    assert {(p.device.type, p.dtype) for p in made.parameters()} == {("meta", torch.bfloat16)}
    assert made(torch.empty(3, 8, device="meta", dtype=torch.bfloat16)).shape == (3, 8)
    made = made.to_empty(device="cpu")
    made.reset_parameters()
    assert_same_bits(made.weight.detach(), torch.ones(8, dtype=torch.bfloat16))
    assert_same_bits(made.bias.detach(), torch.zeros(8, dtype=torch.bfloat16))
    wide = randomize(module(8, bias=True))
    y = wide(random(3, 8).bfloat16())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert {p.grad.dtype for p in wide.parameters()} == {torch.float32}


@each_module
def test_zero_centred_weight(module: Any) -> None:
    centred, plain = module(24, bias=True, weight_offset=1.0), module(24, bias=True)
    assert_same_bits(centred.weight.detach(), torch.zeros(24))
    x = random(4, 24)
    for a, e in zip(outputs(centred, x), outputs(plain, x), strict=True):
        assert_same_bits(a, e)
    randomize(centred)
    with torch.no_grad():
        plain.weight.copy_(centred.weight + 1)
        plain.bias.copy_(centred.bias)
    for a, e in zip(outputs(centred, x), outputs(plain, x), strict=True):
        assert_same_bits(a, e)


@each_module
def test_copied_and_pickled(module: Any) -> None:
    original, x = randomize(module((3, 8), bias=True, weight_offset=0.5)), random(2, 3, 8)
    for other in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
        assert repr(other) == repr(original)
        assert_same_bits(other(x).detach(), original(x).detach())


def test_repr_tells_the_options() -> None:
    assert repr(ng.nn.LayerNorm(8, bias=False)) == (
        "LayerNorm((8,), eps=1e-05, elementwise_affine=True, bias=False, weight_offset=0.0)"
    )
    assert repr(ng.nn.RMSNorm((2, 8), 1e-6, weight_offset=1.0, casting="llama", output_scale=0.5)) == (
        "RMSNorm((2, 8), eps=1e-06, elementwise_affine=True, weight_offset=1.0, casting='llama', bias=False, "
        "output_scale=0.5)"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weight_dtype", [None, torch.float32], ids=["weight like x", "float32 weight"])
def test_llama_casting_is_the_formula_of_transformers(
    dtype: torch.dtype, weight_dtype: torch.dtype | None
) -> None:
    """The normalized value is rounded before it meets the weight, and the product is rounded again."""
    module = randomize(ng.nn.RMSNorm(96, 1e-6, casting="llama", dtype=weight_dtype or dtype))
    x = random(40, 96, dtype=dtype)
    wide = x.float()
    normalized = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    expected = (module.weight.to(dtype) * normalized.to(dtype)).detach()
    actual = module(x).detach()
    assert actual.dtype == dtype
    assert_near(actual, expected.double())
    if dtype != torch.float32:
        # Where the float32 values differ by a rounding, their narrow ones are the same but for rare ties.
        assert (actual != expected).float().mean() < 2e-3
        fused = randomize(ng.nn.RMSNorm(96, 1e-6, dtype=weight_dtype or dtype))(x).detach()
        assert (fused != expected).float().mean() > 0.05


def test_no_casting_computes_in_the_dtype_of_x() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        module = randomize(ng.nn.RMSNorm((4, 24), 1e-6, casting="none", dtype=dtype))
        x = random(50, 4, 24, dtype=dtype)
        expected = (x * (x.square().mean((-2, -1), keepdim=True) + 1e-6).rsqrt() * module.weight).detach()
        actual = module(x).detach()
        assert_near(actual, expected.double())
        if dtype.itemsize == 2:
            # PyTorch rounds the sum before it divides: the factor of a row may be the other of two neighbours.
            fused = randomize(ng.nn.RMSNorm((4, 24), 1e-6, dtype=dtype))(x).detach()
            assert (actual != expected).float().mean() < 0.3 * (fused != expected).float().mean()


@each_module
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("affine", [{}, {"bias": True}, {"elementwise_affine": False}], ids=str)
def test_memory_efficient_gradients(module: Any, dtype: torch.dtype, affine: dict[str, Any]) -> None:
    """The gradients of the plain layer, from the output alone, which is the only tensor of its size that is kept."""
    plain = module((4, 30), weight_offset=1.0, dtype=dtype, **affine)
    thrifty = module((4, 30), weight_offset=1.0, dtype=dtype, memory_efficient=True, **affine)
    for layer in (plain, thrifty):  # weights from 0.5 to 1.5: away from zero
        for i, parameter in enumerate(layer.parameters()):
            nn.init.uniform_(parameter, -0.5, 0.5, generator=torch.Generator().manual_seed(i))
    x = random(6, 4, 30, dtype=dtype) + 0.5
    for i, (a, e) in enumerate(zip(outputs(thrifty, x), outputs(plain, x), strict=True)):
        if i == 0 and dtype != torch.bfloat16:
            assert_near(a, e.double())
        else:  # y is rounded, and divided by a weight down to 1/2
            scale = e.double().abs().max().item()
            tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
            torch.testing.assert_close(a.double(), e.double(), rtol=tolerance, atol=tolerance * scale)

    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = thrifty(x.requires_grad_())
    large = [t for t in kept if t.numel() == x.numel()]
    assert [t.data_ptr() for t in large] == [y.data_ptr()]


@each_module
def test_memory_efficient_weight_at_zero(module: Any) -> None:
    """Documented: x cannot come back where the weight is zero, so its gradient is zero; all stays finite."""
    layer = module(8, memory_efficient=True)
    with torch.no_grad():
        layer.weight[3] = 0
    x = random(4, 8)
    _, dx, dweight, *_ = outputs(layer, x)
    assert dx.isfinite().all()
    assert dweight[3] == 0
    assert (dweight[:3] != 0).all()
    with torch.no_grad():
        assert_same_bits(layer(x), layer(x.requires_grad_()).detach())


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("partial", [0.25, 0.5, 1.0])
def test_partial_rms_norm(partial: float, backend: Any) -> None:
    layer = randomize(ng.nn.RMSNorm((3, 11), 1e-5, partial=partial, bias=True, output_scale=0.5)).double()
    x = random(5, 3, 11, dtype=torch.float64).requires_grad_()
    with ng.backend(backend):
        y = layer(x)
    flat, count = x.flatten(1), int(partial * 33)
    rms = ((flat[:, :count] ** 2).sum(-1, keepdim=True) / count + 1e-5).sqrt()
    expected = ((flat / rms).view_as(x) * layer.weight + layer.bias) * 0.5
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for a, e in zip(
        *(torch.autograd.grad(r.square().sum(), (x, *layer.parameters())) for r in (y, expected)), strict=True
    ):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)


def test_partial_and_memory_efficient_are_checked() -> None:
    for wrong in (0, -0.5, 1.5, float("nan"), True, "half"):
        with pytest.raises(ValueError, match="partial must be a number above 0 and up to 1"):
            ng.nn.RMSNorm(8, partial=wrong)
        with pytest.raises(ValueError, match="rms_norm: partial must be a number above 0 and up to 1"):
            ng.nn.functional.rms_norm(torch.ones(2, 8), 8, partial=wrong)
    with pytest.raises(ValueError, match=r"RMSNorm: partial=0.1 of 8 channels selects none; raise partial"):
        ng.nn.RMSNorm(8, partial=0.1)
    with pytest.raises(ValueError, match="partial and memory_efficient exclude each other"):
        ng.nn.functional.rms_norm(torch.ones(2, 8), 8, partial=0.5, memory_efficient=True)
    for option in ({"partial": 0.5}, {"memory_efficient": True}):
        with pytest.raises(ValueError, match='go with casting="gemma" only'):
            ng.nn.RMSNorm(8, casting="llama", **option)
    assert repr(ng.nn.RMSNorm(8, partial=0.5, memory_efficient=False)).endswith("partial=0.5)")
    assert repr(ng.nn.LayerNorm(8, memory_efficient=True)).endswith("memory_efficient=True)")


@pytest.mark.parametrize("casting", ["gemma", "llama", "none"])
def test_castings_differentiate(casting: Any) -> None:
    module = randomize(
        ng.nn.RMSNorm(12, 1e-5, weight_offset=1.0, casting=casting, bias=True, output_scale=0.25)
    ).double()
    x = random(3, 12, dtype=torch.float64).requires_grad_()
    parameters = dict(module.named_parameters())

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *parameters.values()))


@pytest.mark.parametrize("casting", ["gemma", "llama", "none"])
@pytest.mark.parametrize("affine", [{}, {"bias": True}, {"elementwise_affine": False}], ids=str)
def test_output_scale_multiplies_the_result(casting: Any, affine: dict[str, Any]) -> None:
    plain = randomize(ng.nn.RMSNorm(24, 1e-6, weight_offset=1.0, casting=casting, **affine))
    scaled = randomize(
        ng.nn.RMSNorm(24, 1e-6, weight_offset=1.0, casting=casting, output_scale=0.3, **affine)
    )
    x = random(4, 24)
    for a, e in zip(outputs(scaled, x), outputs(plain, x), strict=True):
        assert_near(a, 0.3 * e.double())


def test_constructors_refuse_what_they_do_not_know() -> None:
    with pytest.raises(
        ValueError, match="RMSNorm: casting must be one of 'gemma', 'llama', 'none'; got 'fp8'"
    ):
        ng.nn.RMSNorm(8, casting="fp8")
    for module, _ in PAIRS:
        for eps in (-1e-6, float("nan"), float("inf"), "1e-6"):
            with pytest.raises(ValueError, match="eps must be a finite number >= 0"):
                module(8, eps)


@pytest.mark.parametrize("layer", [ng.nn.LayerNorm, ng.nn.RMSNorm])
def test_normalized_shape_may_be_any_integer(layer: type[nn.Module]) -> None:
    assert layer(np.int64(8))(torch.randn(2, 8)).shape == (2, 8)
    with pytest.raises(TypeError, match=r"normalized_shape must be an integer .*2\.5"):
        layer(2.5)
