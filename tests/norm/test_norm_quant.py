"""Norms with a quantized result, beside the norm in float64 and beside the two separate steps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.backends import all_backends
from tests.tolerances import assert_near, assert_same_bits, assert_within_one_code
from torch import Tensor

import narrowgauge as ng
from narrowgauge.nn.functional import (
    add_layer_norm,
    add_rms_norm,
    layer_norm,
    layer_norm_quant,
    rms_norm,
    rms_norm_quant,
)
from narrowgauge.norm.norm_quant import norm_quant_op
from narrowgauge.ops import library
from narrowgauge.quant import Quantized, Scheme, dequantize, quantize
from narrowgauge.quant.formats import FORMATS, Int

every_backend = pytest.mark.parametrize("run", all_backends())
every_format = pytest.mark.parametrize("format", FORMATS)
each_norm = pytest.mark.parametrize("centred", [False, True], ids=["rms_norm", "layer_norm"])
needs_native = pytest.mark.skipif(
    not library.state.cpu.loaded, reason=f"CPU library {library.state.cpu.reason}"
)
each_backend = pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GRANULARITIES = ("tensor", "row", "block")
NAMES = ("codes", "scale", "codes_t", "scale_t", "residual_out", "mean", "rstd")


def call(run: Any, x: Tensor, **given: Any) -> dict[str, Tensor]:
    """The operator's results by name; arguments not given are absent."""
    values = (
        given.get("residual"),
        given.get("weight"),
        given.get("bias"),
        given.get("eps", 1e-5),
        given.get("weight_offset", 0.0),
        given.get("centred", False),
        given.get("format", "int8"),
        given.get("granularity", "row"),
        given.get("scale"),
        given.get("bound", math.inf),
        given.get("transposed", False),
    )
    return dict(zip(NAMES, run(norm_quant_op, x, *values), strict=True))


def norm64(x: Tensor, weight: Tensor | None, bias: Tensor | None, centred: bool, eps: float = 1e-5) -> Tensor:
    """The norm in float64, by PyTorch."""
    x, weight, bias = (None if t is None else t.double() for t in (x, weight, bias))
    if centred:
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    y = torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)
    return y if bias is None else y + bias


def groups(y: Tensor, granularity: str) -> list[Tensor]:
    """The elements that share a scale, in the order of the scales."""
    rows = y.reshape(-1, y.shape[-1])
    return [part for row in rows for part in (row.split(128) if granularity == "block" else [row])]


def half_a_step(y: Tensor, scale: Tensor, format: str) -> Tensor:
    """How far the nearest code of each value may be from it."""
    target = FORMATS[format]
    if isinstance(target, Int):
        return scale / 2
    relative = y.abs() * 2.0 ** -(target.mantissa + 1)
    return relative.maximum(scale * 2.0 ** (-target.bias - target.mantissa))


@every_backend
@every_format
@each_norm
def test_values_are_within_half_a_step_of_the_float64_norm(run: Any, format: str, centred: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for i, columns in enumerate((1, 17, 129, 300, 384, 1025, 4097)):
        x = (torch.randn(3, columns, generator=generator) + 0.5).to(DTYPES[i % 3])
        weight = torch.randn(columns, generator=generator)
        bias = torch.randn(columns, generator=generator) if i % 2 else None
        truth = norm64(x, weight, bias, centred)
        for granularity in ("row", "block"):
            out = call(
                run, x, weight=weight, bias=bias, centred=centred, format=format, granularity=granularity
            )
            parts = groups(truth, granularity)
            expected = torch.stack([part.abs().max() for part in parts]) / FORMATS[format].largest
            assert_near(out["scale"].flatten(), torch.where(expected == 0, 1.0, expected))
            for codes, scale, y in zip(
                groups(out["codes"].double(), granularity),
                out["scale"].flatten().double(),
                parts,
                strict=True,
            ):
                allowed = half_a_step(y, scale, format) + 1e-5 * y.abs().max()
                assert ((codes * scale - y).abs() <= allowed).all(), (columns, granularity)


@every_backend
@every_format
def test_fused_is_the_two_steps_within_a_code(run: Any, format: str) -> None:
    for columns, dtype in (
        (1, DTYPES[0]),
        (37, DTYPES[1]),
        (64, DTYPES[2]),
        (1000, DTYPES[0]),
        (2056, DTYPES[1]),
    ):
        generator = torch.Generator().manual_seed(columns)
        x, weight = torch.randn(5, columns, generator=generator), torch.randn(columns, generator=generator)
        x, weight, bias = x.to(dtype), weight.to(dtype), torch.randn(columns, generator=generator)
        y = rms_norm(x, columns, weight, 1e-5, bias=bias, weight_offset=1.0, out_dtype=torch.float32)
        for granularity in ("row", "block"):
            out = call(
                run, x, weight=weight, bias=bias, weight_offset=1.0, format=format, granularity=granularity
            )
            unfused = quantize(y, Scheme(format, granularity))
            assert_near(out["scale"], unfused.scale)
            assert_within_one_code(out["codes"], unfused.codes)
            # Away from ties, that is for nearly all elements, the codes are the same.
            assert (out["codes"].float() != unfused.codes.float()).float().mean() < 0.01


@every_backend
@every_format
@each_norm
def test_the_transposed_copy_is_the_norm_quantized_along_rows_of_its_transpose(
    run: Any, format: str, centred: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    for i, (rows, columns) in enumerate(((1, 19), (5, 72), (128, 3), (130, 64), (272, 9), (16, 200))):
        x = torch.randn(rows, columns, generator=generator).to(DTYPES[i % 3])
        residual = torch.randn(rows, columns, generator=generator) if i % 2 else None
        weight, bias = torch.randn(columns, generator=generator), torch.randn(columns, generator=generator)
        truth = norm64(x.float() if residual is None else x.float() + residual, weight, bias, centred).t()
        for granularity in ("row", "block"):
            out = call(
                run,
                x,
                residual=residual,
                weight=weight,
                bias=bias,
                centred=centred,
                format=format,
                granularity=granularity,
                transposed=True,
            )
            expected = quantize(truth.contiguous(), Scheme(format, granularity))
            assert_near(out["scale_t"], expected.scale)
            assert_within_one_code(out["codes_t"], expected.codes)
            alone = call(
                run,
                x,
                residual=residual,
                weight=weight,
                bias=bias,
                centred=centred,
                format=format,
                granularity=granularity,
            )
            for name in ("codes", "scale", "residual_out", "mean", "rstd"):
                assert_same_bits(out[name], alone[name], name)


@every_backend
@every_format
def test_a_given_scale_saturates_and_its_transposed_codes_are_the_same_codes(run: Any, format: str) -> None:
    generator = torch.Generator().manual_seed(2)
    largest = FORMATS[format].largest
    for rows, columns in ((130, 72), (16, 9)):
        x, weight = torch.randn(rows, columns, generator=generator), torch.ones(columns)
        weight[0] = 1e6
        scale = torch.tensor(2.0 / largest)
        out = call(
            run,
            x,
            weight=weight,
            format=format,
            granularity="tensor",
            scale=scale,
            transposed=True,
            centred=True,
        )
        assert_same_bits(out["codes_t"], out["codes"].t().contiguous())
        assert out["scale"].numel() == out["scale_t"].numel() == 0
        truth = norm64(x, weight, None, True)
        beyond = truth.abs() > 2.0
        assert beyond[:, 0].all()
        assert not beyond.all()
        values = out["codes"].double() * scale.double()
        assert (values[beyond] == truth[beyond].sign() * largest * scale.double()).all()
        allowed = half_a_step(truth, scale.double(), format) + 1e-5
        assert ((values - truth).abs() <= allowed)[~beyond].all()


@every_backend
@every_format
def test_values_that_are_not_numbers(run: Any, format: str) -> None:
    x = torch.randn(4, 300, generator=torch.Generator().manual_seed(3))
    x[0], x[1, 7], x[2, 290] = 0.0, torch.nan, torch.inf
    for centred in (False, True):
        out = call(run, x, format=format, centred=centred)
        assert out["scale"].isnan().tolist() == [False, True, True, False]
        assert out["scale"][0] == 1
        assert (out["codes"][:3].float() == 0).all()
        # Blocks are not finite where the norm is not: RMSNorm gives 0 beside an infinity, LayerNorm NaN.
        out = call(run, x, format=format, centred=centred, granularity="block", transposed=True)
        y = norm64(x, None, None, centred)
        expected = torch.stack([part.isnan().any() for part in groups(y, "block")]).view(4, 3)
        assert torch.equal(out["scale"].isnan(), expected)
        assert (out["scale"][0] == 1).all()
        assert torch.equal(out["scale_t"].isnan().flatten(), y.isnan().any(0))
        assert (out["codes_t"].float()[y.isnan().any(0)] == 0).all()
    # A scale that was given cannot become NaN: the code does, where there is one.
    codes = call(run, x, format=format, granularity="tensor", scale=torch.tensor(0.1))["codes"].float()
    assert (codes[1] == 0).all() if format == "int8" else codes[1].isnan().all()
    weight = torch.ones(300)
    weight[5] = torch.inf
    out = call(run, x, weight=weight, format=format, granularity="tensor", scale=torch.tensor(0.1))
    assert out["codes"][3, 5].float().abs() == FORMATS[format].largest


@every_backend
def test_scales_are_bounded_from_above(run: Any) -> None:
    x = torch.randn(8, 40, generator=torch.Generator().manual_seed(4))
    x[0] = 0.0
    free = call(run, x, transposed=True)
    bound = free["scale"][1:].median().item()
    out = call(run, x, bound=bound, transposed=True)
    expected = free["scale"].clamp(max=bound)
    expected[0] = 1.0
    assert torch.equal(out["scale"], expected)
    assert torch.equal(out["scale_t"], free["scale_t"].clamp(max=bound))
    y = rms_norm(x, 40, None, 1e-5)
    assert_within_one_code(out["codes"], (y / expected.unsqueeze(1)).round().clamp(-127, 127).to(torch.int8))


@every_backend
@each_norm
def test_residual_is_that_of_the_norm_alone(run: Any, centred: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        x = torch.randn(6, 72, generator=generator).to(dtype)
        for residual_dtype in {dtype, torch.float32}:
            residual = torch.randn(6, 72, generator=generator).to(residual_dtype)
            weight = torch.randn(72, generator=generator)
            out = call(run, x, residual=residual, weight=weight, centred=centred)
            if centred:
                y, expected = add_layer_norm(x, residual, weight, None, 1e-5, out_dtype=torch.float32)
            else:
                y, expected = add_rms_norm(x, residual, weight, 1e-5, out_dtype=torch.float32)
            assert_same_bits(out["residual_out"], expected)
            assert_within_one_code(out["codes"], quantize(y, Scheme("int8", "row")).codes)


# --- gradients ----------------------------------------------------------------------------------------------


@each_backend
@each_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_is_that_of_the_norm(
    backend: library.Backend, centred: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    inputs = x, weight, bias, residual = random(2, 7, 33), random(33), random(33), random(2, 7, 33)
    dy, dstream = torch.randn(2, 7, 33, generator=generator), random(2, 7, 33).detach()
    with ng.backend(backend):
        for granularity in GRANULARITIES:
            given = {"qdtype": "e4m3", "granularity": granularity, "residual": residual}
            given["scale"] = 0.01 if granularity == "tensor" else None
            if centred:
                q, stream = layer_norm_quant(x, weight, bias, 1e-5, **given)
            else:
                q, stream = rms_norm_quant(x, weight, 1e-5, bias=bias, **given)
            actual = torch.autograd.grad([dequantize(q), stream], inputs, [dy, dstream], retain_graph=True)
            partly = torch.autograd.grad(dequantize(q, dtype), [x, weight], dy.to(dtype))
            for a, e in zip(actual, truth_of(inputs, centred, dy, dstream), strict=True):
                assert_near(a, e)
            assert_near(partly[0], truth_of(inputs, centred, dy.to(dtype), dstream * 0)[0])
            assert partly[1].dtype == dtype


def truth_of(inputs: tuple[Tensor, ...], centred: bool, dy: Tensor, dstream: Tensor) -> tuple[Tensor, ...]:
    """The gradients of the norm in float64. With a narrow residual it was the rounded sum that was kept."""
    x, weight, bias, residual = (t.detach().double().requires_grad_() for t in inputs)
    total = x + residual
    kept = total + (total.detach().to(inputs[3].dtype).double() - total.detach())
    y = norm64(kept, weight, bias, centred)
    return torch.autograd.grad([y, total], [x, weight, bias, residual], [dy.double(), dstream.double()])


@each_backend
def test_what_has_a_gradient(backend: library.Backend) -> None:
    x, weight = torch.randn(4, 24), torch.randn(24, requires_grad=True)
    with ng.backend(backend):
        q, transposed = rms_norm_quant(x, weight, qdtype="e5m2", transposed=True)
        assert not any(t.requires_grad for t in (q.codes, q.scale, transposed.codes, transposed.scale))
        (dweight,) = torch.autograd.grad(dequantize(q).sum(), weight)
        assert_near(dweight, torch.autograd.grad(rms_norm(x, 24, weight, 1e-6).sum(), weight)[0])
        with torch.no_grad():
            assert rms_norm_quant(x, weight, qdtype="e5m2").straight_through is None
        assert not dequantize(rms_norm_quant(x, weight.detach(), qdtype="e5m2")).requires_grad
        # Only the sum was used.
        residual = torch.randn(4, 24, requires_grad=True)
        _, stream = rms_norm_quant(x, weight, qdtype="int8", residual=residual)
        assert torch.equal(torch.autograd.grad(stream.sum(), residual)[0], torch.ones(4, 24))


def test_the_way_of_the_gradient_takes_no_memory_and_ends_after_one_derivative() -> None:
    x = torch.randn(64, 24, requires_grad=True)
    q = rms_norm_quant(x, qdtype="int8")
    assert q.straight_through is not None
    assert q.straight_through.shape == x.shape
    assert q.straight_through.untyped_storage().nbytes() == 4
    (dx,) = torch.autograd.grad((dequantize(q) ** 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        dx.sum().backward()


# --- the public functions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8,), (2, 3, 8), (3, 200), (0, 8), (4, 0)])
def test_public_functions(shape: tuple[int, ...]) -> None:
    x, residual, weight = torch.randn(shape), torch.randn(shape), torch.ones(shape[-1])
    blocks = math.ceil(shape[-1] / 128)
    rows = math.prod(shape[:-1])
    for granularity, sizes, sizes_t in (
        ("row", shape[:-1], (shape[-1],)),
        ("block", (*shape[:-1], blocks), (shape[-1], math.ceil(rows / 128))),
        ("tensor", (), ()),
    ):
        given = {"qdtype": "int8", "granularity": granularity}
        if granularity == "tensor":
            given["scale"] = torch.tensor([0.05])
        q = rms_norm_quant(x, weight, 1e-5, **given)
        assert q.scheme == Scheme("int8", granularity)
        assert q.codes.shape == q.shape == shape
        assert q.scale.shape == sizes
        if x.numel():
            y = norm64(x, weight, None, False)
            assert ((dequantize(q) - y).abs() <= 0.0251).all()
        both, transposed, stream = layer_norm_quant(x, weight, residual=residual, transposed=True, **given)
        assert isinstance(both, Quantized)
        assert torch.equal(stream, x + residual)
        assert transposed.codes.shape == transposed.shape == (shape[-1], rows)
        assert transposed.scale.shape == sizes_t
        if x.numel():
            expected = dequantize(both).reshape(rows, -1).t()
            assert (dequantize(transposed) - expected).abs().max() <= 0.051
        else:
            assert (transposed.scale == 1).all() or granularity == "tensor"


def test_other_layouts_and_compile() -> None:
    x, weight = torch.randn(6, 32), torch.randn(32, requires_grad=True)
    expected = rms_norm_quant(x, weight, qdtype="e4m3", granularity="block")
    strided = rms_norm_quant(
        x.t().contiguous().t(), weight.repeat_interleave(2)[::2], qdtype="e4m3", granularity="block"
    )
    assert_same_bits(strided.codes, expected.codes)

    def function(x: Tensor, weight: Tensor) -> Tensor:
        q, transposed = layer_norm_quant(x, weight, qdtype="e4m3", transposed=True)
        return dequantize(q) + dequantize(transposed).t()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight), function(x, weight))
    actual, expected = (torch.autograd.grad(f(x, weight).sum(), weight)[0] for f in (compiled, function))
    assert_near(actual, expected)


X = torch.randn(2, 6)
BAD_CALLS = {
    "qdtype": ({"qdtype": "int7"}, ValueError, "qdtype must be one of 'int8', 'e4m3'"),
    "granularity": (
        {"granularity": "column"},
        ValueError,
        "granularity must be one of 'tensor', 'row', 'block'; got 'column'",
    ),
    "no scale": ({"granularity": "tensor"}, ValueError, 'granularity="tensor" needs scale'),
    "scale beside rows": ({"scale": 0.1}, ValueError, 'scale belongs to granularity="tensor"'),
    "scale": ({"granularity": "tensor", "scale": -1.0}, ValueError, "scale must be a finite number > 0"),
    "scales": ({"granularity": "tensor", "scale": X}, ValueError, "scale must be one float32 number"),
    "bound": ({"scale_upper_bound": 0}, ValueError, "scale_upper_bound must be a finite number > 0"),
    "bound of a given scale": (
        {"granularity": "tensor", "scale": 0.1, "scale_upper_bound": 1.0},
        ValueError,
        "scale_upper_bound has no meaning",
    ),
    "weight": ({"weight": X[0, :5]}, ValueError, "weight has shape"),
    "eps": ({"eps": -1.0}, ValueError, "eps must be"),
    "float64": ({"x": X.double()}, TypeError, "x has dtype torch.float64"),
    "integers": ({"x": X.long()}, TypeError, "x has dtype torch.int64"),
    "list": ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    "scalar": ({"x": X[0, 0]}, ValueError, "x must have at least one dimension"),
    "residual": ({"residual": X[:1]}, ValueError, "residual has shape"),
    "device": ({"weight": torch.ones(6, device="meta")}, ValueError, "weight is on meta but x is on cpu"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
@pytest.mark.parametrize("function", [rms_norm_quant, layer_norm_quant])
def test_bad_calls_name_the_function_and_the_argument(function: Any, case: str) -> None:
    given, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=f"{function.__name__}: .*{message}"):
        function(**{"x": X, "qdtype": "int8", **given})


def test_layer_norm_quant_takes_its_arguments_in_torchs_order() -> None:
    x, weight, bias = torch.randn(3, 8), torch.randn(8), torch.randn(8)
    q = layer_norm_quant(x, weight, bias, 1e-2, qdtype="int8")
    y = layer_norm(x, 8, weight, bias, 1e-2)
    assert ((dequantize(q) - y).abs() <= q.scale.unsqueeze(-1) * 0.5001).all()


@needs_native
def test_the_operator_guards_what_the_kernels_rely_on() -> None:
    x = torch.randn(2, 6)
    for given, message in (
        ({"eps": -1.0}, "eps must be"),
        ({"bound": 0.0}, "scale_upper_bound must be > 0"),
        ({"granularity": "column"}, "granularity must be tensor, row or block"),
        ({"granularity": "tensor"}, "scale goes with granularity tensor"),
        ({"scale": torch.ones(())}, "scale goes with granularity tensor"),
        ({"granularity": "tensor", "scale": torch.ones(2)}, "scale must be one float32 number"),
        ({"format": "int7"}, "format must be"),
        ({"residual": x[:1]}, "residual must have the shape of x"),
        ({"weight": x[0, :5]}, "weight must have shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(lambda record, *args: record(*args), x, **given)
