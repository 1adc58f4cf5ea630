"""L1 normalization, in floating point and in integers, against formulas written here in float64."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from tests.tolerances import assert_near, assert_same_bits
from torch import Tensor, nn

import narrowgauge as ng
from narrowgauge.nn import functional as ngf
from narrowgauge.ops import library
from narrowgauge.quant import Quantized, Scheme, dequantize, quantize

KAPPA = math.sqrt(math.pi / 2)
needs_native = pytest.mark.skipif(
    not library.state.cpu.loaded, reason=f"CPU library {library.state.cpu.reason}"
)
each_backend = pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
each_scale = pytest.mark.parametrize("gaussian_scale", [True, False])


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def formula(x: Tensor, factor: float, eps: float = 1e-5) -> Tensor:
    p = x - x.mean(-1, keepdim=True)
    return p / (factor * p.abs().mean(-1, keepdim=True) + eps)


# --- L1LayerNorm --------------------------------------------------------------------------------------------


@each_backend
@each_scale
@pytest.mark.parametrize("size", [1, 17, 64, 129, 1000])
def test_values_and_gradients(size: int, gaussian_scale: bool, backend: library.Backend) -> None:
    x, weight, bias, outer = (random(5, size, seed=i) for i in range(4))
    weight, bias = weight[0], bias[0]
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    expected = formula(x, KAPPA if gaussian_scale else 1.0) * weight + bias
    with ng.backend(backend):
        y = ngf.l1_layer_norm(x, size, weight, bias, gaussian_scale=gaussian_scale)
        actual = torch.autograd.grad(y, inputs, outer)
    assert_near(y.detach(), expected.detach())
    for a, e in zip(actual, torch.autograd.grad(expected, inputs, outer), strict=True):
        assert_near(a, e)


@each_backend
@each_scale
def test_mean_and_deviation_of_the_result(gaussian_scale: bool, backend: library.Backend) -> None:
    with ng.backend(backend):
        y = ngf.l1_layer_norm(3 + 2 * random(7, 129), 129, eps=0.0, gaussian_scale=gaussian_scale)
    assert_near(y.mean(-1), torch.zeros(7, dtype=torch.float64))
    assert_near(y.abs().mean(-1), torch.full((7,), 1 / KAPPA if gaussian_scale else 1.0, dtype=torch.float64))


@each_backend
def test_shift_and_scale_of_the_input_cancel(backend: library.Backend) -> None:
    # Multiples of 1/64 in rows of 64: sums and shifts are exact, and so must the invariance be.
    x = (random(9, 64, dtype=torch.float32) * 64).round() / 64
    with ng.backend(backend):
        y = ngf.l1_layer_norm(x, 64)
        assert_same_bits(ngf.l1_layer_norm(x + 1024, 64), y)
        plain = ngf.l1_layer_norm(x, 64, eps=0.0)
        assert_same_bits(ngf.l1_layer_norm(4 * x, 64, eps=0.0), plain)
        assert_near(ngf.l1_layer_norm(1e3 * x, 64, eps=0.0), plain.double())
    assert not y.equal(plain)


@each_backend
def test_gaussian_rows_are_as_after_layer_norm(backend: library.Backend) -> None:
    x = random(3, 100_000) * 5 - 2
    with ng.backend(backend):
        ratio = ngf.l1_layer_norm(x, 100_000) / nn.functional.layer_norm(x, (100_000,))
        plain = ngf.l1_layer_norm(x, 100_000, gaussian_scale=False)
    assert (ratio - 1).abs().max() < 0.01
    assert plain.std() > 1.2


@each_backend
@pytest.mark.parametrize("eps", [1e-5, 0.0])
@pytest.mark.parametrize("size", [1, 3, 17, 1000])
def test_constant_rows_give_the_bias(size: int, eps: float, backend: library.Backend) -> None:
    x = torch.tensor([[0.1], [-1234.567], [1e30], [0.0]]).expand(4, size).clone().requires_grad_()
    weight, bias = random(2, size, dtype=torch.float32)
    with ng.backend(backend):
        y = ngf.l1_layer_norm(x, size, weight, bias, eps)
        y.sum().backward()
    assert_same_bits(y.detach(), bias.expand(4, size))
    assert x.grad is not None
    assert x.grad.isfinite().all()


@each_backend
def test_gradient_where_an_element_is_the_mean(backend: library.Backend) -> None:
    x = torch.tensor([[-3.0, 0.0, 1.0, 2.0], [5.0, 4.0, 3.0, 4.0]], dtype=torch.float64).requires_grad_()
    outer = random(2, 4)
    with ng.backend(backend):
        (actual,) = torch.autograd.grad(ngf.l1_layer_norm(x, 4), x, outer)
    p = x.detach() - x.detach().mean(-1, keepdim=True)
    assert (p == 0).sum() == 3
    inverse = 1 / (KAPPA * p.abs().mean(-1, keepdim=True) + 1e-5)
    q = p.sign()
    dot = (outer * p * inverse).mean(-1, keepdim=True)
    expected = (outer - outer.mean(-1, keepdim=True) - KAPPA * (q - q.mean(-1, keepdim=True)) * dot) * inverse
    assert_near(actual, expected)


@each_backend
def test_nan_and_infinity_stay_in_their_rows(backend: library.Backend) -> None:
    x = random(4, 40, dtype=torch.float32)
    x[1, 3], x[2, 0] = math.nan, math.inf
    with ng.backend(backend):
        y = ngf.l1_layer_norm(x, 40)
    assert y[1:3].isnan().all()
    assert y[[0, 3]].isfinite().all()


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_narrow_inputs_are_rounded_once(dtype: torch.dtype, backend: library.Backend) -> None:
    module, x = ng.nn.L1LayerNorm(96), random(40, 96, dtype=dtype)
    with ng.backend(backend), torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == dtype
    assert_near(y.detach(), formula(x.double(), KAPPA))


@each_backend
def test_shapes_and_layouts(backend: library.Backend) -> None:
    x = random(6, 4, 10)
    with ng.backend(backend):
        y = ngf.l1_layer_norm(x, (4, 10), random(4, 10, seed=1), random(4, 10, seed=2))
        assert_same_bits(
            ngf.l1_layer_norm(x.mT.contiguous().mT, [4, 10], random(4, 10, seed=1), random(4, 10, seed=2)), y
        )
        assert_near(
            y, formula(x.flatten(1), KAPPA).view(6, 4, 10) * random(4, 10, seed=1) + random(4, 10, seed=2)
        )
        assert ngf.l1_layer_norm(x[:0], 10).shape == (0, 4, 10)
        assert ngf.l1_layer_norm(x[..., :0], 0).shape == (6, 4, 0)


def test_state_is_that_of_layer_norm() -> None:
    stock = nn.LayerNorm(24)
    with torch.no_grad():
        stock.weight.normal_()
        stock.bias.normal_()
    for module in (ng.nn.L1LayerNorm(24), ng.nn.QuantL1LayerNorm(24)):
        assert_same_bits(module.weight.detach(), torch.ones(24))
        assert_same_bits(module.bias.detach(), torch.zeros(24))
        module.load_state_dict(stock.state_dict(), strict=True)
        assert list(module.state_dict()) == list(stock.state_dict())
        assert_same_bits(copy.deepcopy(module)(random(3, 24).float()), module(random(3, 24).float()))
    assert ng.nn.L1LayerNorm(8, bias=False).bias is None
    assert list(ng.nn.L1LayerNorm(8, elementwise_affine=False).parameters()) == []
    assert ng.nn.L1LayerNorm((2, 8), device="meta", dtype=torch.bfloat16).weight.dtype == torch.bfloat16


def test_swapped_into_a_model() -> None:
    model = nn.Sequential(
        nn.Linear(8, 8), nn.LayerNorm(8, eps=1e-3), nn.LayerNorm(8, elementwise_affine=False)
    )
    with torch.no_grad():
        model[1].weight.normal_()
    weight = model[1].weight.detach().clone()
    ng.swap(model, norm="l1")
    assert [type(model[i]) for i in (1, 2)] == [ng.nn.L1LayerNorm] * 2
    assert_same_bits(model[1].weight.detach(), weight)
    assert (model[1].eps, model[2].weight) == (1e-3, None)


GOOD: dict[str, Any] = {
    "x": torch.randn(3, 8),
    "normalized_shape": 8,
    "weight": torch.ones(8),
    "bias": torch.ones(8),
}
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    ({"x": torch.ones(3, 8, dtype=torch.int32)}, TypeError, "x has dtype torch.int32"),
    (
        {"normalized_shape": 7},
        ValueError,
        r"x has shape \(3, 8\), which does not end in normalized_shape \(7,\)",
    ),
    ({"weight": torch.ones(7)}, ValueError, r"weight has shape \(7,\)"),
    ({"bias": torch.ones(8).double()}, TypeError, "bias has dtype torch.float64 beside x of torch.float32"),
    ({"eps": -1.0}, ValueError, "eps must be a finite number >= 0, got -1.0"),
]


@each_backend
@pytest.mark.parametrize(("wrong", "error", "message"), BAD)
def test_bad_input(
    wrong: dict[str, Any], error: type[Exception], message: str, backend: library.Backend
) -> None:
    with ng.backend(backend), pytest.raises(error, match=f"l1_layer_norm: {message}"):
        ngf.l1_layer_norm(**GOOD | wrong)


# --- in integers --------------------------------------------------------------------------------------------


def codes_of(x: Tensor) -> Tensor:
    return x.round().clamp(-127, 127).to(torch.int8)


def quantized(codes: Tensor, scale: float | Tensor = 0.05) -> Quantized:
    granularity = "row" if isinstance(scale, Tensor) else "tensor"
    return Quantized(codes, torch.as_tensor(scale), None, Scheme("int8", granularity), codes.shape)


def integer_truth(
    codes: Tensor, weight: Tensor | None, bias: Tensor | None, limit: float, factor: float, scale: Tensor
) -> Tensor:
    """The float form of the codes, clipped to the range, in units of the output's scale."""
    y = formula(codes.double(), factor, eps=1e-300).clamp(-limit, limit)
    y = y if weight is None else y * weight.double()
    return (y if bias is None else y + bias.double()) / scale.double()


@each_backend
@each_scale
@pytest.mark.parametrize(("bits", "limit"), [(8, 4.0), (6, 4.0), (4, 2.0), (8, 8.0), (2, 0.5)])
@pytest.mark.parametrize("size", [2, 17, 129, 1000])
def test_integers_are_within_a_step_of_the_float_form(
    size: int, bits: int, limit: float, gaussian_scale: bool, backend: library.Backend
) -> None:
    factor = KAPPA if gaussian_scale else 1.0
    for spread in (40, 3, 0.4):
        codes = codes_of(random(50, size, seed=size) * spread + 7)
        codes[0], codes[1, 0] = 5, 127
        for weight, bias in ((None, None), random(2, size, seed=1)):
            with ng.backend(backend):
                q = ngf.quant_l1_layer_norm(
                    quantized(codes), weight, bias, bits=bits, limit=limit, gaussian_scale=gaussian_scale
                )
            assert q.codes.dtype == torch.int8
            assert q.codes.abs().max() <= 2 ** (bits - 1) - 1
            expected = integer_truth(codes, weight, bias, limit, factor, q.scale)
            # Half a step of rounding, and a little for the 12 to 16 bits of what it is made of.
            assert (q.codes - expected).abs().max() < 0.6


@each_backend
def test_extreme_rows_in_integers(backend: library.Backend) -> None:
    rows = [torch.zeros(300), torch.full((300,), 127.0), torch.full((300,), -128.0)]
    rows += [torch.tensor([-128.0, 127.0]).repeat(150), torch.tensor([0.0, 1.0]).repeat(150)]
    rows += [torch.cat([torch.full((299,), 5.0), torch.tensor([v])]) for v in (6.0, 4.0, 127.0, -128.0)]
    codes = torch.stack(rows).to(torch.int8)
    with ng.backend(backend):
        q = ngf.quant_l1_layer_norm(quantized(codes))
        wide = ngf.quant_l1_layer_norm(
            quantized(torch.cat([codes[7], torch.zeros(2**18 - 300)]).to(torch.int8))
        )
    assert (q.codes - integer_truth(codes, None, None, 4.0, KAPPA, q.scale)).abs().max() < 0.6
    assert not q.codes[:3].any()
    assert wide.codes.abs().max() == 127


@each_backend
def test_constant_rows_in_integers_give_the_bias(backend: library.Backend) -> None:
    bias = random(40, dtype=torch.float32)
    with ng.backend(backend):
        q = ngf.quant_l1_layer_norm(quantized(torch.full((3, 40), 9, dtype=torch.int8)), None, bias)
    assert ((q.codes * q.scale - bias).abs() <= q.scale * 0.52).all()


@each_backend
def test_the_scale_of_the_input_cancels(backend: library.Backend) -> None:
    codes = codes_of(random(6, 129) * 30)
    scale = torch.tensor([1e-3, 1.0, 7e4, 1e-30, math.nan, 1.0])
    with ng.backend(backend):
        first = ngf.quant_l1_layer_norm(quantized(codes, 0.05))
        second = ngf.quant_l1_layer_norm(quantized(codes, 1e20))
        rows = ngf.quant_l1_layer_norm(quantized(codes, scale))
    for q in (second, rows):
        assert_same_bits(q.codes, first.codes)
    assert_same_bits(second.scale, first.scale)
    # A row that held NaN or infinity stays NaN.
    assert_same_bits(rows.scale, torch.where(scale.isnan(), torch.nan, first.scale))


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_float_tensors_are_quantized_on_the_way(dtype: torch.dtype, backend: library.Backend) -> None:
    module = ng.nn.QuantL1LayerNorm(96)
    with torch.no_grad():
        module.weight.uniform_(0.5, 1.5)
    x = random(20, 96, dtype=dtype)
    with ng.backend(backend):
        y = module(x)
        q = module(quantize(x, Scheme("int8", "row")))
        assert_same_bits(y.detach(), dequantize(q, dtype))
    assert y.dtype == dtype
    expected = formula(x.double(), KAPPA) * module.weight.double()
    assert (y.double() - expected).abs().max() < 0.1
    assert (y.double() - expected).abs().mean() < 0.02


def straight_through(x: Tensor, module: Any, outer: Tensor) -> list[Tensor]:
    """The gradients of the float form at the quantized input, by autograd."""
    at = dequantize(quantize(x, Scheme("int8", "row"))).double().requires_grad_()
    parameters = [p.detach().double().requires_grad_() for p in module.parameters()]
    y = formula(at, KAPPA) * parameters[0] + parameters[1]
    return list(torch.autograd.grad(y, [at, *parameters], outer.double()))


@each_backend
def test_gradient_straight_through_the_roundings(backend: library.Backend) -> None:
    module, x = ng.nn.QuantL1LayerNorm(96), random(20, 96, dtype=torch.float32).requires_grad_()
    with torch.no_grad():
        module.weight.uniform_(0.5, 1.5)
    outer = random(20, 96, dtype=torch.float32, seed=1)
    with ng.backend(backend):
        actual = torch.autograd.grad(module(x), [x, *module.parameters()], outer)
    for a, e in zip(actual, straight_through(x.detach(), module, outer), strict=True):
        assert_near(a, e)


@each_backend
def test_quantized_gradient_is_right_on_average(backend: library.Backend) -> None:
    torch.manual_seed(0)
    module = ng.nn.QuantL1LayerNorm(96, gradient="quantized", limit=6.0)
    with torch.no_grad():
        module.weight.uniform_(0.5, 1.5)
    x, outer = (
        random(20, 96, dtype=torch.float32).requires_grad_(),
        random(20, 96, dtype=torch.float32, seed=1),
    )
    inputs = [x, *module.parameters()]
    with ng.backend(backend):
        draws = [torch.autograd.grad(module(x), inputs, outer) for _ in range(64)]
    expected = straight_through(x.detach(), module, outer)
    assert not draws[0][0].equal(draws[1][0])  # stochastic
    for one, mean, e in zip(
        draws[0], (torch.stack(d).mean(0) for d in zip(*draws, strict=True)), expected, strict=True
    ):
        assert (one - e).norm() < 0.05 * e.norm()
        # The weight and x_hat are rounded to nearest, which no average removes.
        assert (mean - e).norm() < 0.02 * e.norm()
        assert (mean - e).norm() < (one - e).norm()


def test_trains_in_integers() -> None:
    torch.manual_seed(0)
    for gradient in ("float", "quantized"):
        model = nn.Sequential(
            nn.Linear(8, 32), ng.nn.QuantL1LayerNorm(32, gradient=gradient), nn.Linear(32, 1)
        )
        x = torch.randn(256, 8)
        target = x[:, :1].abs()
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        losses = []
        for _ in range(60):
            loss = (model(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0], gradient


@pytest.mark.parametrize("gradient", ["float", "quantized"])
def test_compiled_whole(gradient: Any) -> None:
    torch._dynamo.reset()
    for module in (ng.nn.L1LayerNorm(32), ng.nn.QuantL1LayerNorm(32, gradient=gradient)):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        x = random(6, 32, dtype=torch.float32).requires_grad_()
        y = compiled(x)
        assert_near(y.detach(), module(x).detach().double())
        y.square().sum().backward()
        assert x.grad is not None
        assert x.grad.abs().max() > 0


BAD_INTEGERS: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (torch.ones(3, 8), {}, TypeError, "q must be a Quantized"),
    (
        quantize(torch.ones(3, 8), Scheme("e4m3", "row")),
        {},
        ValueError,
        "q is e4m3 per row .*; expected int8",
    ),
    (quantize(torch.ones(3, 8), Scheme("int8", "column")), {}, ValueError, "q is int8 per column"),
    (
        quantized(torch.zeros(1, 2**18 + 1, dtype=torch.int8)),
        {},
        ValueError,
        ".*expected rows of at most 262144",
    ),
    (quantized(torch.zeros(3, 8, dtype=torch.int8)), {"bits": 9}, ValueError, "bits must be one of 2, 3"),
    (
        quantized(torch.zeros(3, 8, dtype=torch.int8)),
        {"limit": 9.0},
        ValueError,
        "limit must be between 0.5 and 8",
    ),
    (
        quantized(torch.zeros(3, 8, dtype=torch.int8)),
        {"bias": torch.ones(7)},
        ValueError,
        r"bias has shape \(7,\)",
    ),
]


@each_backend
@pytest.mark.parametrize(("q", "options", "error", "message"), BAD_INTEGERS)
def test_bad_quantized_input(
    q: Any, options: dict[str, Any], error: type[Exception], message: str, backend: library.Backend
) -> None:
    with ng.backend(backend), pytest.raises(error, match=f"quant_l1_layer_norm: {message}"):
        ngf.quant_l1_layer_norm(q, **options)


def test_bad_options_of_the_integer_layer() -> None:
    for options, message in (
        ({"bits": 1}, "bits must be one of"),
        ({"gradient": "none"}, "gradient must be one of 'float', 'quantized'; got 'none'"),
        ({"normalized_shape": (2, 4)}, r"normalized_shape is \(2, 4\); expected one size"),
    ):
        with pytest.raises(ValueError, match=f"QuantL1LayerNorm: {message}"):
            ng.nn.QuantL1LayerNorm(**{"normalized_shape": 8} | options)  # type: ignore[arg-type]
