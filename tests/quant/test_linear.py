"""The linear layer in low precision, beside the same mathematics written out in float64."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from narrowgauge import quant
from narrowgauge.quant import Linear, Scheme, dequantize, linear, matmul, quantize, quantized_matmul

RECIPES = {"int8-row": "int8", "fp8-row": "e4m3"}
every_recipe = pytest.mark.parametrize("recipe", RECIPES)


def fake_quantize(x: Tensor, format: str, axis: int) -> Tensor:
    """Quantized and restored with one scale for all that a sum along `axis` takes; written independently."""
    x = x.detach().float()
    scale = x.abs().amax(axis, keepdim=True) / torch.tensor(127.0 if format == "int8" else 448.0)
    scale = torch.where(scale == 0, 1.0, scale)
    v = x / scale
    codes = v.round() if format == "int8" else v.clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes.double() * scale.double()


def expected(
    x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor, format: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output and gradients of x, weight and bias."""
    x2, g2 = x.detach().reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    out = fake_quantize(x2, format, 1) @ fake_quantize(weight, format, 1).t()
    if bias is not None:
        out = out + bias.detach().double()
    grad_x = fake_quantize(g2, format, 1) @ fake_quantize(weight, format, 0)
    grad_weight = fake_quantize(g2, format, 0).t() @ fake_quantize(x2, format, 0)
    return out.view(grad.shape), grad_x.view(x.shape), grad_weight, g2.double().sum(0)


def run(layer: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    out = layer(x)
    parameters = [p for p in (x, layer.weight, layer.bias) if p is not None]
    return (out, *torch.autograd.grad(out, parameters, grad))


def assert_close(actual: Tensor, truth: Tensor, tolerance: float = 1e-5) -> None:
    scale = truth.abs().max().clamp(min=1e-30)
    assert ((actual.double() - truth).abs().max() / scale).item() < tolerance


SHAPES = [(37,), (1, 37), (17, 37), (3, 5, 37), (2, 3, 4, 37)]


@every_recipe
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients(shape: tuple[int, ...], bias: bool, recipe: str) -> None:
    torch.manual_seed(0)
    layer = Linear(37, 19, bias, recipe=recipe)
    x, grad = torch.randn(shape, requires_grad=True), torch.randn(*shape[:-1], 19)
    truth = expected(x, layer.weight, layer.bias, grad, RECIPES[recipe])
    actual = run(layer, x, grad)
    for a, t in zip(actual, truth, strict=False):
        assert a.shape == t.shape
        assert a.dtype == torch.float32
        assert_close(a, t)


@every_recipe
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, recipe: str) -> None:
    torch.manual_seed(1)
    layer = Linear(48, 40, recipe=recipe, dtype=dtype)
    x, grad = torch.randn(6, 48, dtype=dtype, requires_grad=True), torch.randn(6, 40, dtype=dtype)
    truth = expected(x, layer.weight, layer.bias, grad, RECIPES[recipe])
    for a, t in zip(run(layer, x, grad), truth, strict=True):
        assert a.dtype == dtype
        assert_close(a, t, 1e-5 if dtype == torch.float64 else torch.finfo(dtype).eps)


@every_recipe
def test_wide_parameters_beside_narrow_inputs(recipe: str) -> None:
    layer = Linear(16, 8, recipe=recipe)
    x = torch.randn(4, 16).bfloat16().requires_grad_()
    out, grad_x, grad_weight, grad_bias = run(layer, x, torch.ones(4, 8).bfloat16())
    assert (out.dtype, grad_x.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (grad_weight.dtype, grad_bias.dtype) == (torch.float32, torch.float32)


@every_recipe
@pytest.mark.parametrize(("tokens", "width", "out"), [(0, 5, 3), (4, 0, 3), (4, 5, 0), (1, 1, 1)])
def test_sizes_of_zero_and_one(tokens: int, width: int, out: int, recipe: str) -> None:
    weight = torch.randn(out, width, requires_grad=True)
    bias = torch.randn(out, requires_grad=True)
    x = torch.randn(tokens, width, requires_grad=True)
    y = linear(x, weight, bias, recipe=recipe)
    y.sum().backward()
    truth = (
        expected(x, weight, bias, torch.ones(tokens, out), RECIPES[recipe]) if width * out * tokens else None
    )
    assert y.shape == (tokens, out)
    if width == 0:
        assert torch.equal(y, bias.expand(4, 3))
    if truth is not None:
        assert_close(y, truth[0])
    assert weight.grad is not None
    assert weight.grad.shape == weight.shape
    assert torch.equal(bias.grad, torch.full((out,), float(tokens)))


@every_recipe
def test_quantization_error_is_small(recipe: str) -> None:
    torch.manual_seed(2)
    plain = nn.Linear(256, 128)
    x, grad = torch.randn(64, 256, requires_grad=True), torch.randn(64, 128)
    for a, e in zip(run(Linear.from_linear(plain, recipe), x, grad), run(plain, x, grad), strict=True):
        assert (a - e).norm() / e.norm() < {"int8-row": 0.015, "fp8-row": 0.05}[recipe]


@every_recipe
def test_products_that_no_gradient_needs_are_skipped(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    products: list[Any] = []

    def counted(*args: Any) -> Tensor:
        products.append(args)
        return matmul.scaled_matmul(*args)

    # The function `linear` hides its module from an import by name.
    monkeypatch.setattr(sys.modules[linear.__module__], "scaled_matmul", counted)
    x = torch.randn(5, 12, requires_grad=True)

    def count(layer: nn.Module, x: Tensor) -> int:
        products.clear()
        layer(x).sum().backward()
        return len(products)

    layer = Linear(12, 7, recipe=recipe)
    assert count(layer, x) == 3
    assert count(layer, x.detach()) == 2
    layer.weight.requires_grad_(False)
    layer.bias.grad = None
    assert count(layer, x) == 2
    assert layer.weight.grad is not None  # from the calls before
    assert torch.equal(layer.bias.grad, torch.full((7,), 5.0))
    assert count(layer, x.detach()) == 1


@every_recipe
def test_a_value_that_is_not_finite_stays_visible(recipe: str) -> None:
    layer = Linear(12, 7, recipe=recipe)
    x = torch.randn(5, 12)
    x[2, 3] = torch.inf
    assert layer(x).isnan().any(1).tolist() == [False, False, True, False, False]


# --- the matmuls of the devices -----------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (16, 8, 8), (17, 9, 3), (33, 130, 40)])
def test_int8_product_is_exact_whatever_the_padding(m: int, k: int, n: int) -> None:
    left = torch.randint(-127, 128, (m, k), dtype=torch.int8)
    right = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    product = matmul._int8_product(left, right.t().contiguous().t())
    assert torch.equal(product.long(), left.long() @ right.long().t())


@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (16, 16, 16), (17, 30, 5)])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_fp8_product_pads_what_the_device_wants_padded(
    m: int, k: int, n: int, out_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scaled_mm(
        a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, *, bias: Any = None, out_dtype: torch.dtype
    ) -> Tensor:
        """What torch._scaled_mm asks of its arguments on a GPU, and what it computes."""
        assert a.is_contiguous()
        assert b.t().is_contiguous()
        assert a.shape[1] % 16 == 0
        assert b.shape[1] % 16 == 0
        if out_dtype == torch.bfloat16:
            assert scale_a.shape == (a.shape[0], 1)
            assert scale_b.shape == (1, b.shape[1])
            assert scale_a.is_contiguous()
            assert scale_b.is_contiguous()
            assert bias is None or (bias.dtype, bias.shape) == (torch.bfloat16, b.shape[1:])
        else:
            assert scale_a.numel() == scale_b.numel() == 1
            assert bias is None
        product = a.float() @ b.float() * scale_a * scale_b
        return (product if bias is None else product + bias).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(matmul, "_has_tensor_cores", lambda codes: True)
    scheme = Scheme("e4m3", "row")
    x, weight, bias = torch.randn(m, k), torch.randn(n, k), torch.randn(n)
    left, right = matmul.operand(x, scheme, contract=1), matmul.operand(weight, scheme, contract=1)
    actual = matmul.scaled_matmul(left, right, out_dtype, bias)
    truth = dequantize(quantize(x, scheme)) @ dequantize(quantize(weight, scheme)).t() + bias
    assert actual.dtype == out_dtype
    assert_close(actual, truth.double(), 2e-2 if out_dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("format", ["int8", "e4m3", "e5m2"])
def test_quantized_matmul(format: str) -> None:
    a, b = torch.randn(6, 21), torch.randn(4, 21)
    qa, qb = quantize(a, Scheme(format, "row")), quantize(b, Scheme(format, "row"))
    truth = dequantize(qa, torch.float64) @ dequantize(qb, torch.float64).t()
    assert_close(quantized_matmul(qa, qb), truth)
    assert quantized_matmul(qa, qb, torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="same K and format"):
        quantized_matmul(qa, quantize(b[:, :20], Scheme(format, "row")))
    with pytest.raises(ValueError, match=r"b\.scheme\.granularity must be one of 'row'"):
        quantized_matmul(qa, quantize(b, Scheme(format)))
    with pytest.raises(TypeError, match="a must be a Quantized"):
        quantized_matmul(a, qb)


# --- with the rest of PyTorch -------------------------------------------------------------------------------


@every_recipe
def test_state_dict_goes_both_ways(recipe: str) -> None:
    plain, low = nn.Linear(6, 4), Linear(6, 4, recipe=recipe)
    low.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(low.weight, plain.weight)
    nn.Linear(6, 4).load_state_dict(low.state_dict(), strict=True)
    assert list(low.state_dict()) == ["weight", "bias"]
    assert list(Linear(6, 4, bias=False, recipe=recipe).state_dict()) == ["weight"]


def test_same_initialization_as_torch() -> None:
    torch.manual_seed(3)
    plain = nn.Linear(6, 4)
    torch.manual_seed(3)
    low = Linear(6, 4)
    assert isinstance(low, nn.Linear)
    assert torch.equal(low.weight, plain.weight)
    assert torch.equal(low.bias, plain.bias)


def test_from_linear_shares_parameters() -> None:
    plain = nn.Linear(6, 4).eval()
    low = Linear.from_linear(plain, "int8-row")
    assert low.weight is plain.weight
    assert low.bias is plain.bias
    assert not low.training
    assert Linear.from_linear(nn.Linear(6, 4, bias=False)).bias is None
    assert repr(low) == "Linear(in_features=6, out_features=4, bias=True, recipe='int8-row')"
    assert copy.deepcopy(low).recipe == "int8-row"


@every_recipe
def test_autocast_gives_the_dtype_that_nn_linear_gives(recipe: str) -> None:
    plain = nn.Linear(24, 10)
    low = Linear.from_linear(plain, recipe)
    x = torch.randn(3, 24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        expected_out, out = plain(x), low(x)
        grads = torch.autograd.grad(out.float().sum(), (x, low.weight, low.bias))
    assert out.dtype == expected_out.dtype == torch.bfloat16
    assert [g.dtype for g in grads] == [torch.float32] * 3
    # Inside autocast the product of codes stays exact: the same as rounding the input by hand.
    assert torch.equal(out, linear(x.bfloat16(), low.weight, low.bias, recipe=recipe))


@every_recipe
def test_compile_captures_forward_and_backward(recipe: str) -> None:
    layer = Linear(24, 10, recipe=recipe)
    x, grad = torch.randn(3, 5, 24, requires_grad=True), torch.randn(3, 5, 10)
    eager = run(layer, x, grad)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    out = compiled(x)
    for a, e in zip(
        (out, *torch.autograd.grad(out, (x, layer.weight, layer.bias), grad)), eager, strict=True
    ):
        assert torch.equal(a, e)


@every_recipe
def test_checkpointing_repeats_the_same_bits(recipe: str) -> None:
    layer = Linear(24, 10, recipe=recipe)
    x, grad = torch.randn(3, 24, requires_grad=True), torch.randn(3, 10)
    eager = run(layer, x, grad)
    out = checkpoint(layer, x, use_reentrant=False)
    for a, e in zip(
        (out, *torch.autograd.grad(out, (x, layer.weight, layer.bias), grad)), eager, strict=True
    ):
        assert torch.equal(a, e)


def test_double_backward_is_refused() -> None:
    layer, x = Linear(4, 3), torch.randn(2, 4, requires_grad=True)
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        first.sum().backward()


X, W = torch.randn(2, 6), torch.randn(4, 6)
BAD_CALLS = {
    "recipe": (
        lambda: Linear(6, 4, recipe="fp8-tensor"),
        ValueError,
        "recipe must be one of 'int8-row', 'fp8-row'",
    ),
    "recipe of a call": (lambda: linear(X, W, recipe="int4"), ValueError, "recipe must be one of"),
    "from_linear recipe": (
        lambda: Linear.from_linear(nn.Linear(6, 4), "x"),
        ValueError,
        "recipe must be one of",
    ),
    "from_linear module": (
        lambda: Linear.from_linear(nn.Conv1d(1, 1, 1)),
        TypeError,
        "must be a torch.nn.Linear",
    ),
    "x type": (lambda: linear([1.0], W), TypeError, "x must be a tensor, got list"),
    "x dtype": (lambda: linear(X.int(), W), TypeError, "x has dtype torch.int32; expected"),
    "weight dtype": (lambda: linear(X, W.int()), TypeError, "weight has dtype torch.int32"),
    "width": (lambda: linear(X[:, :5], W), ValueError, r"got \(2, 5\) and \(4, 6\)"),
    "scalar": (lambda: linear(torch.tensor(1.0), W), ValueError, "x must be"),
    "weight": (lambda: linear(X, W[0]), ValueError, r"weight \(out_features, in_features\)"),
    "bias": (lambda: linear(X, W, torch.zeros(6)), ValueError, r"bias must have shape \(4,\), got \(6,\)"),
    "device": (lambda: linear(X, W.to("meta")), ValueError, "weight is on meta but x is on cpu"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_name_the_argument(case: str) -> None:
    call, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        call()


def test_recipes_name_a_scheme_for_every_operand() -> None:
    for name, recipe in quant.RECIPES.items():
        assert recipe.name == name
        for product in (recipe.output, recipe.grad_input, recipe.grad_weight):
            assert product.left.granularity == product.right.granularity == "row"
