"""Token-parameter attention: the authors' numbers, and what its normalization must do."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import golden_files
from tests.tolerances import assert_near, assert_same_bits
from torch import Tensor

import narrowgauge as ng
from narrowgauge.nn import functional as ngf
from narrowgauge.ops import library

NORMS = {"l2_norm_gelu": "l2_gelu", "gelu_l2_norm": "gelu_l2", "softmax": "softmax"}
needs_native = pytest.mark.skipif(
    not library.state.cpu.loaded, reason=f"CPU library {library.state.cpu.reason}"
)
each_backend = pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
each_norm = pytest.mark.parametrize("norm", NORMS.values())
each_function = pytest.mark.parametrize("function", [ngf.l2_norm_gelu, ngf.gelu_l2_norm])


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layer(norm: Any = "l2_gelu", tokens: int = 17, **options: Any) -> ng.nn.TokenParameterAttention:
    module = ng.nn.TokenParameterAttention(8, 11, tokens, norm, dtype=torch.float64, **options)
    with torch.no_grad():
        module.key.copy_(random(tokens, 8, seed=1))
        module.value.copy_(random(tokens, 11, seed=2))
    return module


def weights_of(module: ng.nn.TokenParameterAttention, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The weights that the values get, found through values that are one-hot."""
    probe = copy.deepcopy(module)
    probe.value = torch.nn.Parameter(torch.eye(module.num_tokens, dtype=torch.float64))
    return probe(x, mask).detach()


@pytest.mark.parametrize("path", golden_files.files("tokenformer_pattention"), ids=lambda path: path.stem)
@each_backend
def test_the_authors_numbers(path: Path, backend: library.Backend) -> None:
    case, meta = golden_files.read(path)
    tolerance = 1e-11 if meta["dtype"] == "torch.float64" else 1e-5
    key, value = case["param_key"], case["param_value"]
    module = ng.nn.TokenParameterAttention(
        key.shape[1],
        value.shape[1],
        key.shape[0],
        NORMS[meta["norm_activation_type"]],
        scale=meta["scale"],
        dtype=key.dtype,
    )
    module.load_state_dict({"key": key, "value": value, "norm_tokens": torch.tensor(key.shape[0])})
    x = case["in_x"].clone().requires_grad_()

    def check(actual: Tensor | None, expected: Tensor) -> None:
        assert actual is not None
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(actual.detach(), expected, rtol=tolerance, atol=tolerance * scale)

    with ng.backend(backend):
        y = module(x, case.get("in_param_mask"))
        y.backward(case["in_grad_y"])
        check(y, case["out_y"])
        check(x.grad, case["grad_x"])
        check(module.key.grad, case["grad_key"])
        check(module.value.grad, case["grad_value"])
        if "out_scores" in case and meta["norm_activation_type"] != "softmax":
            check(getattr(ngf, meta["norm_activation_type"])(case["out_scores"]), case["out_weights"])


@each_backend
@each_norm
def test_masked_scores_are_zero(norm: str, backend: library.Backend) -> None:
    module, x = layer(norm), random(2, 5, 8).requires_grad_()
    mask = random(5, 17, seed=3) > 0
    with ng.backend(backend):
        y = module(x, mask)
    s = (x @ module.key.T) * mask
    if norm == "softmax":
        weights = s.softmax(-1) * 17
    elif norm == "l2_gelu":
        weights = torch.nn.functional.gelu(s * math.sqrt(17) / s.norm(dim=-1, keepdim=True))
    else:
        e = torch.nn.functional.gelu(s)
        weights = e * math.sqrt(17) / e.norm(dim=-1, keepdim=True)
    expected = weights @ module.value
    assert_near(y.detach(), expected.detach())
    outer = random(2, 5, 11, seed=4)
    inputs = (x, module.key, module.value)
    for a, e in zip(
        torch.autograd.grad(y, inputs, outer), torch.autograd.grad(expected, inputs, outer), strict=True
    ):
        assert_near(a, e)
    if norm != "softmax":
        masked = weights_of(module, x.detach(), mask)[:, ~mask]
        assert masked.numel()
        assert not masked.any()  # gelu(0) = 0


@each_backend
def test_scores_have_a_root_mean_square_of_one(backend: library.Backend) -> None:
    """Read off where GELU is the identity: of large scores."""
    s = random(40, 129).abs() + 1
    with ng.backend(backend):
        a = ngf.l2_norm_gelu(s, count=129 * 400)  # 20 times as large
        b = ngf.gelu_l2_norm(s)
    u = a / 20
    assert_near(u, s / s.square().mean(-1, keepdim=True).sqrt())
    assert_near(u.square().mean(-1).sqrt(), torch.ones(40, dtype=torch.float64))
    assert_near(b.square().mean(-1).sqrt(), torch.ones(40, dtype=torch.float64))


@each_backend
def test_the_scale_of_the_input_does_not_matter(backend: library.Backend) -> None:
    module, x = layer(), random(6, 8)
    with ng.backend(backend):
        y = module(x)
        assert_near(module(1000 * x).detach(), y.detach())
        assert_near(layer(scale=0.125)(x).detach(), y.detach())
        assert not torch.allclose(module(-x), y)


@each_backend
@each_function
def test_zeros_give_zeros_and_no_gradient(function: Any, backend: library.Backend) -> None:
    s = random(3, 24)
    s[1] = 0
    s.requires_grad_()
    with ng.backend(backend):
        a = function(s)
        a.sum().backward()
    assert s.grad is not None
    assert a.isfinite().all()
    assert not a[1].any()
    assert not s.grad[1].any()
    assert s.grad[0].any()


@each_backend
@each_function
def test_nan_stays_in_its_row(function: Any, backend: library.Backend) -> None:
    for bad in (math.nan, math.inf):
        s = random(3, 24, dtype=torch.float32)
        s[1, 3] = bad
        with ng.backend(backend):
            a = function(s)
        assert a[1].isnan().any()
        assert a[[0, 2]].isfinite().all()


@each_backend
@each_function
def test_any_dimension_and_layout(function: Any, backend: library.Backend) -> None:
    s = random(4, 17, 3)
    with ng.backend(backend):
        rows = function(s.transpose(1, 2).contiguous()).transpose(1, 2)
        assert_same_bits(function(s, 1).contiguous(), rows.contiguous())
        assert_same_bits(function(s, dim=-2, eps=0.0).contiguous(), rows.contiguous())
        assert_same_bits(function(s.mT, -1).mT.contiguous(), rows.contiguous())
        assert function(s[:0]).shape == (0, 17, 3)
        with torch.no_grad():
            assert function(s, 1, eps=2.0).abs().max() < rows.abs().max()


@each_backend
@pytest.mark.parametrize("norm", ["l2_gelu", "gelu_l2"])
@pytest.mark.parametrize("delta", [1, 8])
def test_exact_growth_changes_nothing(norm: str, delta: int, backend: library.Backend) -> None:
    module, x = layer(norm), random(2, 5, 8)
    with ng.backend(backend):
        before = module(x).detach()
        old = module.key.detach().clone(), module.value.detach().clone()
        module.grow(delta)
        module.grow(delta, "exact")
        assert module.num_tokens == 17 + 2 * delta
        assert int(module.norm_tokens) == 17
        assert_same_bits(module.key[:17].detach(), old[0])
        assert_same_bits(module.value[:17].detach(), old[1])
        assert_near(module(x).detach(), before)
        module(x).square().sum().backward()
    assert module.key.grad is not None
    assert module.key.grad[17:].abs().min() > 0  # the new tokens learn


def test_growth_of_the_authors_changes_the_output() -> None:
    module, x = layer(), random(6, 8)
    before = module(x).detach()
    module.grow(8, mode="official")
    assert int(module.norm_tokens) == 25
    assert (module.key[17:] != 0).all()
    grown = weights_of(module, x)
    s = x @ module.key.detach().T
    assert_near(grown, torch.nn.functional.gelu(s * 5 / s.norm(dim=-1, keepdim=True)))
    assert not torch.allclose(module(x), before, atol=1e-3)
    with torch.no_grad():
        module.key[17:] = 0  # what "exact" leaves, with the larger factor
    assert (module(x) - before).abs().max() > 0.01 * before.abs().max()


@each_norm
def test_grown_layers_are_saved_and_loaded(norm: str, tmp_path: Path) -> None:
    module, x = layer(norm), random(6, 8)
    module.grow(8, "official" if norm == "softmax" else "exact")
    torch.save(module.state_dict(), tmp_path / "state.pt")
    other = layer(norm, tokens=25)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for copied in (other, copy.deepcopy(module)):
        assert_same_bits(copied(x).detach(), module(x).detach())
    other.reset_parameters()
    assert int(other.norm_tokens) == 25
    # The buffer is an integer: no conversion of the layer rounds it.
    assert int(layer("l2_gelu", tokens=257).to(torch.bfloat16).norm_tokens) == 257


@each_backend
def test_the_softmax_sums_to_the_number_of_tokens(backend: library.Backend) -> None:
    module, x = layer("softmax"), random(6, 8)
    with ng.backend(backend):
        assert_near(weights_of(module, x).sum(-1), torch.full((6,), 17.0, dtype=torch.float64))
        large = module(1e4 * x)  # exp alone would overflow
    assert large.isfinite().all()


def test_dropout_is_for_training() -> None:
    torch.manual_seed(0)
    module, plain, x = layer(dropout=0.5), layer(), random(64, 8)
    assert_same_bits(module.eval()(x).detach(), plain(x).detach())
    dropped = weights_of(module.train(), x)
    kept = dropped != 0
    assert 0.4 < kept.double().mean() < 0.6
    assert_near(dropped[kept], 2 * weights_of(plain, x)[kept])


def test_initial_values() -> None:
    torch.manual_seed(0)
    module = ng.nn.TokenParameterAttention(64, 96, 512, num_layers=4)
    assert (tuple(module.key.shape), tuple(module.value.shape)) == ((512, 64), (512, 96))
    assert module.key.std().item() == pytest.approx(0.02, rel=0.03)
    assert module.value.std().item() == pytest.approx(2 / (4 * 8), rel=0.03)
    assert list(module.state_dict()) == ["key", "value", "norm_tokens"]
    assert (module.norm, module.scale, module.eps, module.dropout) == ("l2_gelu", None, 0.0, 0.0)


@each_backend
@each_norm
def test_narrow_dtypes_and_autocast(norm: str, backend: library.Backend) -> None:
    module, x = layer(norm).float(), random(6, 8, dtype=torch.float32)
    expected = layer(norm)(x.double()).detach()
    with ng.backend(backend):
        narrow = copy.deepcopy(module).bfloat16()(x.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            mixed = module(x)
    for y in (narrow, mixed):
        assert y.dtype == torch.bfloat16
        assert (y.double() - expected).abs().max() < 0.05 * expected.abs().max()


@each_norm
def test_compiled_whole(norm: str) -> None:
    torch._dynamo.reset()
    module, x = layer(norm), random(2, 5, 8).requires_grad_()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    y, expected = compiled(x), module(x)
    assert_near(y.detach(), expected.detach())
    for a, e in zip(
        torch.autograd.grad(y.sum(), (x, module.key)),
        torch.autograd.grad(expected.sum(), (x, module.key)),
        strict=True,
    ):
        assert_near(a, e)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"norm": "l1"}, "norm must be one of 'l2_gelu', 'gelu_l2', 'softmax'; got 'l1'"),
    ({"num_tokens": 0}, "num_tokens must be a positive integer, got 0"),
    ({"eps": -1.0}, "eps must be a finite number >= 0, got -1.0"),
    ({"dropout": 1.5}, "dropout must be between 0 and 1, got 1.5"),
    ({"scale": math.inf}, "scale must be a finite number or None, got inf"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="TokenParameterAttention: " + message):
        ng.nn.TokenParameterAttention(**{"in_features": 8, "out_features": 8, "num_tokens": 4} | options)


def test_bad_input_leaves_the_layer_as_it_was() -> None:
    module, x = layer("softmax"), random(2, 5, 8)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    calls: list[tuple[Any, str]] = [
        (lambda: module(x[..., :7]), r"x has shape \(2, 5, 7\); expected \(..., L, 8\)"),
        (lambda: module(x, torch.ones(5, 17)), "mask is torch.float32 .* expected torch.bool"),
        (lambda: module(x, torch.ones(4, 17, dtype=torch.bool)), r"mask .* \(4, 17\); expected .* \(5, 17\)"),
        (lambda: module.grow(0), "delta must be a positive integer, got 0|not possible"),
        (lambda: module.grow(3), 'mode "exact" is not possible with norm="softmax"'),
        (lambda: module.grow(3, "random"), "mode must be one of 'exact', 'official'; got 'random'"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()
    assert module.num_tokens == 17
    for name, value in module.state_dict().items():
        assert_same_bits(value, before[name], name)


@each_backend
@each_function
def test_bad_scores(function: Any, backend: library.Backend) -> None:
    name, s = function.__name__, random(3, 8)
    with ng.backend(backend):
        for call, error, message in (
            (lambda: function(s.int()), TypeError, "s has dtype torch.int32"),
            (lambda: function([1.0]), TypeError, "s must be a tensor, got list"),
            (lambda: function(s, 2), ValueError, "dim is 2, but s has 2 dimensions"),
            (lambda: function(s, eps=-1), ValueError, "eps must be a finite number >= 0, got -1"),
            (lambda: function(s, count=0), ValueError, "count must be a finite number > 0, got 0"),
        ):
            with pytest.raises(error, match=f"{name}: {message}"):
                call()
