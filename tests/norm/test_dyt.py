"""DyT and Derf: recorded calls of the authors' layer, torch's own functions, and what follows from the formula."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.golden_files import files, read
from tests.tolerances import assert_near, assert_same_bits
from torch import Tensor, nn

import narrowgauge as ng
from narrowgauge.convert import convert_norm_to_dyt
from narrowgauge.nn import Derf, DyT
from narrowgauge.nn.functional import derf, dyt

each_backend = pytest.mark.parametrize("backend", ["reference", "auto"])
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@each_backend
@pytest.mark.parametrize("path", files("dyt"), ids=lambda path: path.stem)
def test_recorded_calls(path: Path, backend: Any) -> None:
    case, meta = read(path)
    x = case["in_x"].clone().requires_grad_()
    channels = case["param_weight"].shape
    layer = DyT(
        tuple(channels), meta["alpha_init"], channels_last=meta["channels_last"], dtype=case["in_x"].dtype
    )
    layer.load_state_dict({name[6:]: value for name, value in case.items() if name.startswith("param_")})
    with ng.backend(backend):
        y = layer(x)
        y.backward(case["in_grad_y"])
    tolerance = 1e-12 if x.dtype == torch.float64 else 1e-5
    recorded = {"y": y, "x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    for name, actual in recorded.items():
        expected = case["out_y" if name == "y" else f"grad_{name}"]
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def hard_numbers(dtype: torch.dtype) -> Tensor:
    """Magnitudes from subnormal to huge, densely where the functions bend, and both signs."""
    spread = torch.logspace(-44, 38, 20_001, dtype=torch.float64)
    middle = torch.linspace(0, 12, 200_001, dtype=torch.float64)
    x = torch.cat([spread, middle, torch.tensor([0.0, math.inf], dtype=torch.float64)])
    return torch.cat([x, -x]).to(dtype)


def units_in_the_last_place(actual: Tensor, truth: Tensor) -> float:
    """The largest error, in units of the last place of the true value (of the smallest normal number near zero)."""
    info = torch.finfo(actual.dtype)
    exponent = torch.frexp(truth.abs().clamp(min=info.tiny)).exponent - 1
    return (
        ((actual.double() - truth).abs() / torch.ldexp(torch.full_like(truth, info.eps), exponent))
        .max()
        .item()
    )


@pytest.mark.parametrize("isa", ng.ops.library.available_cpu_isas())
@pytest.mark.parametrize("function", ["tanh", "erf"])
def test_float_functions_are_accurate(function: str, isa: str) -> None:
    """Beside torch in float64, which is right to a unit of a double."""
    x = hard_numbers(torch.float32)
    one, zero = torch.ones(1), torch.zeros(1)
    weight = torch.ones(x.numel())
    before = ng.ops.library.cpu_isa()
    assert before is not None
    ng.ops.library.set_cpu_isa(isa)
    try:
        actual = dyt(x, one, weight) if function == "tanh" else derf(x, one, zero, weight)
    finally:
        ng.ops.library.set_cpu_isa(before)
    assert units_in_the_last_place(actual, getattr(torch, function)(x.double())) < 2.5
    assert actual.abs().max() <= 1


@pytest.mark.parametrize("function", ["tanh", "erf"])
def test_double_functions_are_accurate(function: str) -> None:
    x = hard_numbers(torch.float64)
    one, zero = torch.ones(1).double(), torch.zeros(1).double()
    weight = torch.ones(x.numel()).double()
    actual = dyt(x, one, weight) if function == "tanh" else derf(x, one, zero, weight)
    torch.testing.assert_close(actual, getattr(torch, function)(x), rtol=1e-15, atol=1e-300)


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_numbers(dtype: torch.dtype, backend: Any) -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, 2.0, 3.0, math.nan], dtype=dtype)
    one, zero, weight = (
        torch.ones(1, dtype=dtype),
        torch.zeros(1, dtype=dtype),
        torch.full((9,), 2.0, dtype=dtype),
    )
    with ng.backend(backend):
        for y in (dyt(x, one, weight), derf(x, one, zero, weight)):
            assert y[[0, 8]].isnan().all()
            assert y[1:5].tolist() == [2, -2, 0, 0]
        assert dyt(x, one, weight)[4].signbit()
        rows = x[1:8].clone().requires_grad_()
        derf(rows, one, zero, weight[1:8]).sum().backward()
        assert rows.grad is not None
        assert rows.grad[:2].tolist() == [0, 0]


# --- what follows from the formula --------------------------------------------------------------------------


def tensors(*shape: int, channels: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    d = shape[-1] if channels is None else channels
    sizes = (shape, (1,), (1,), (d,), (d,))
    return tuple(torch.randn(*size, dtype=torch.float64) for size in sizes)  # type: ignore[return-value]


@each_backend
def test_laws(backend: Any) -> None:
    x, alpha, shift, weight, bias = tensors(6, 17)
    with ng.backend(backend):
        assert_same_bits(dyt(-x, alpha, weight), -dyt(x, alpha, weight))
        for y in (dyt(x * 50, alpha, weight, bias), derf(x * 50, alpha, shift, weight, bias)):
            assert ((y - bias).abs() <= weight.abs() + 1e-12).all()
        small = torch.full((1,), 1e-6, dtype=torch.float64)
        torch.testing.assert_close(dyt(x, small, weight / small), x * weight, rtol=1e-10, atol=1e-10)
        linear = 2 / math.sqrt(math.pi) * x * weight
        zero = torch.zeros_like(shift)
        torch.testing.assert_close(derf(x, small, zero, weight / small), linear, rtol=1e-10, atol=1e-10)


@each_backend
@pytest.mark.parametrize("shape", [(3, 1), (4, 17), (2, 3, 129), (70, 8), (2, 1, 4099)], ids=str)
def test_gradients_are_those_of_torch(shape: tuple[int, ...], backend: Any) -> None:
    ours, theirs = ([t.clone().requires_grad_() for t in tensors(*shape)] for _ in range(2))
    for a, b in zip(ours, theirs, strict=True):
        b.data.copy_(a.data)
    dy = torch.randn(shape, dtype=torch.float64)
    with ng.backend(backend):
        y = derf(*ours) + dyt(ours[0], ours[1], *ours[3:])
        y.backward(dy)
    x, alpha, shift, weight, bias = theirs
    expected = weight * torch.erf(alpha * x + shift) + bias + weight * torch.tanh(alpha * x) + bias
    expected.backward(dy)
    assert_near(y.detach(), expected.detach())
    for a, e in zip(ours, theirs, strict=True):
        assert a.grad is not None
        assert e.grad is not None
        assert_near(a.grad, e.grad)


@each_backend
@pytest.mark.parametrize(
    "shape", [(2, 5, 7, 3), (3, 4, 64), (2, 3), (1, 2, 33, 33), (0, 3, 4), (2, 3, 0)], ids=str
)
def test_channels_first_is_channels_last_of_the_moved_axis(shape: tuple[int, ...], backend: Any) -> None:
    x, alpha, shift, weight, bias = (t.requires_grad_() for t in tensors(*shape, channels=shape[1]))
    dy = torch.randn(shape, dtype=torch.float64)
    inputs = (x, alpha, shift, weight, bias)
    with ng.backend(backend):
        first = derf(*inputs, channels_last=False)
        grads = torch.autograd.grad(first, inputs, dy)
        last = derf(x.movedim(1, -1), *inputs[1:]).movedim(-1, 1)
        expected = torch.autograd.grad(last, inputs, dy)
    assert_near(first.detach(), last.detach())
    for a, e in zip(grads, expected, strict=True):
        assert_near(a, e)


def test_sums_over_many_rows_keep_their_digits() -> None:
    """A full reduction in float32, of terms that are all of one sign."""
    x = torch.rand(3000, 257) + 0.5
    alpha, weight = torch.tensor([0.7], requires_grad=True), torch.ones(257, requires_grad=True)
    dyt(x, alpha, weight).sum().backward()
    slope = 1 - torch.tanh(alpha.detach().double() * x.double()).square()
    assert alpha.grad is not None
    assert_near(alpha.grad, (slope * x.double()).sum().view(1))


@each_backend
def test_layouts_shapes_and_parameters(backend: Any) -> None:
    x, alpha, shift, weight, bias = tensors(4, 6, 5)
    with ng.backend(backend):
        plain = dyt(x, alpha, weight, bias)
        assert_same_bits(dyt(x.transpose(0, 1).contiguous().transpose(0, 1), alpha, weight, bias), plain)
        assert_same_bits(dyt(x, alpha[0], torch.stack([weight, bias], 1)[:, 0], bias), plain)
        weight2, bias2 = torch.randn(2, 6, 5, dtype=torch.float64)
        assert_near(dyt(x, alpha, weight2, bias2), weight2 * torch.tanh(alpha * x) + bias2)
        assert dyt(x[:0], alpha, weight).shape == (0, 6, 5)
        wide = derf(x.bfloat16(), alpha.float(), shift.float(), weight.float(), bias.float())
    assert wide.dtype == torch.bfloat16
    assert_near(wide, weight * torch.erf(alpha * x.bfloat16().double() + shift) + bias)


# --- modules ------------------------------------------------------------------------------------------------


def test_modules_start_as_documented_and_round_trip() -> None:
    layer, other = DyT(8), Derf((3, 4), 0.7, -0.2, bias=False)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "alpha": (1,),
        "weight": (8,),
        "bias": (8,),
    }
    assert layer.alpha.item() == 0.5
    assert (layer.weight == 1).all()
    assert (layer.bias == 0).all()
    assert sorted(other.state_dict()) == ["alpha", "shift", "weight"]
    x = torch.randn(5, 3, 4)
    assert_near(other(x).detach(), torch.erf(0.7 * x.double() - 0.2).detach())
    twin = Derf((3, 4), bias=False)
    twin.load_state_dict(other.state_dict())
    assert_same_bits(twin(x).detach(), other(x).detach())
    assert "alpha_init=0.7" in repr(other)


@pytest.mark.parametrize("layer", [DyT(6, channels_last=False), Derf(6, channels_last=False)], ids=repr)
def test_compiled_whole(layer: nn.Module) -> None:
    x = torch.randn(2, 6, 3, 3, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    (actual,) = torch.autograd.grad(compiled(x).square().sum(), x)
    assert_near(actual, expected.double())
    torch._dynamo.reset()


def test_conversion_takes_patterns_functions_and_numbers() -> None:
    def model() -> nn.Module:
        block = nn.ModuleDict(
            {"attention_norm": ng.nn.RMSNorm(4), "mlp_norm": nn.LayerNorm(4), "q_norm": nn.RMSNorm(4)}
        )
        return nn.ModuleDict({"layers": nn.ModuleList([block]), "norm": nn.LayerNorm(4, bias=False)})

    converted = convert_norm_to_dyt(model(), {"*.attention_norm": 0.8, "*.mlp_norm": 0.2, "norm": 0.1})
    block = converted["layers"][0]
    assert [block[name].alpha_init for name in ("attention_norm", "mlp_norm")] == [0.8, 0.2]
    assert converted["norm"].alpha.item() == pytest.approx(0.1)
    assert isinstance(block["q_norm"], nn.RMSNorm)
    assert [block[name].bias is None for name in ("attention_norm", "mlp_norm")] == [True, False]
    assert converted["norm"].bias is None
    by_function = convert_norm_to_dyt(model(), lambda name, _: None if "q_norm" in name else 0.3)
    assert sum(isinstance(module, DyT) for module in by_function.modules()) == 3
    assert sum(isinstance(module, DyT) for module in convert_norm_to_dyt(model(), 1).modules()) == 4


def test_conversion_of_convolutional_and_shared_norms() -> None:
    class LayerNorm2d(nn.LayerNorm):
        pass

    shared = nn.LayerNorm(3).double().eval()
    model = nn.ModuleList([LayerNorm2d(6), shared, shared, nn.BatchNorm2d(6)])
    convert_norm_to_dyt(model)
    assert model[0](torch.randn(2, 6, 3, 3)).shape == (2, 6, 3, 3)
    assert model[1] is model[2]
    assert (model[1].weight.dtype, model[1].training) == (torch.float64, False)
    assert isinstance(model[3], nn.BatchNorm2d)


@pytest.mark.parametrize(("name", "kind"), [("dyt", DyT), ("derf", Derf)])
def test_swap_puts_them_in_place_of_norms_with_a_weight(name: str, kind: type[nn.Module]) -> None:
    model = nn.Sequential(nn.LayerNorm((2, 3)), nn.RMSNorm(3), nn.LayerNorm(3, elementwise_affine=False))
    weight = model[0].weight
    report = ng.swap(model, norm=name)
    assert [type(module) for module in model] == [kind, kind, nn.LayerNorm]
    assert model[0].weight is weight
    assert (model[0].bias is None, model[1].bias is None) == (False, True)
    assert "has no weight" in str(report)
    assert model(torch.randn(5, 2, 3)).shape == (5, 2, 3)


# --- bad input ----------------------------------------------------------------------------------------------

ONE, THREE = torch.ones(1), torch.ones(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dyt(torch.ones(2, 4), ONE, THREE), r"x has shape \(2, 4\), which does not end in .* \(3,\)"),
        (lambda: dyt(torch.ones(2, 3), torch.ones(2), THREE), r"alpha has shape \(2,\); expected one number"),
        (lambda: dyt(torch.ones(2, 3), ONE, THREE, torch.ones(2)), r"bias has shape \(2,\)"),
        (
            lambda: dyt(torch.ones(2, 4, 3), ONE, THREE, channels_last=False),
            "weight has shape .* second dimension",
        ),
        (lambda: derf(torch.ones(2, 3), ONE, torch.ones(2), THREE), r"shift has shape \(2,\)"),
        (lambda: dyt(torch.ones(2, 3, device="meta"), ONE, THREE), "alpha is on cpu but x is on meta"),
        (lambda: DyT((2, 3), channels_last=False), "normalized_shape must be one size"),
        (lambda: DyT(3, math.nan), "alpha_init must be a finite number, got nan"),
        (lambda: convert_norm_to_dyt(nn.LayerNorm(3)), "model is itself a LayerNorm"),
        (lambda: convert_norm_to_dyt(nn.Sequential(nn.Linear(2, 2))), "no LayerNorm or RMSNorm"),
    ],
)
def test_wrong_values_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dyt([1.0], ONE, THREE), "x must be a tensor, got list"),
        (lambda: dyt(torch.ones(2, 3), 0.5, THREE), "alpha must be a tensor, got float"),
        (lambda: dyt(torch.ones(2, 3).int(), ONE, THREE), "x has dtype torch.int32"),
        (lambda: dyt(torch.ones(2, 3), ONE.double(), THREE), "alpha has dtype torch.float64 beside x"),
        (lambda: derf(torch.ones(2, 3), ONE, None, THREE), "shift must be a tensor of one element"),
        (lambda: convert_norm_to_dyt(nn.Sequential(nn.LayerNorm(2)), "0.5"), "alpha_init must be a number"),
    ],
)
def test_wrong_types_are_named(call: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()
