"""RMSNorm with a quantized result, beside the two separate steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.backends import all_backends
from tests.tolerances import assert_near, assert_same_bits, assert_within_one_code
from torch import Tensor

from narrowgauge.nn.functional import add_rms_norm, rms_norm, rms_norm_quant
from narrowgauge.norm.rms_norm_quant import add_rms_norm_quant_op, rms_norm_quant_op
from narrowgauge.quant import Scheme, dequantize, quantize
from narrowgauge.quant.formats import FORMATS

every_backend = pytest.mark.parametrize("run", all_backends())
every_format = pytest.mark.parametrize("format", FORMATS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@every_backend
@every_format
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 37, 64, 1000, 2056])
def test_fused_is_the_two_steps_within_a_code(
    run: Any, columns: int, dtype: torch.dtype, format: str
) -> None:
    generator = torch.Generator().manual_seed(columns)
    x, weight = torch.randn(5, columns, generator=generator), torch.randn(columns, generator=generator)
    x, weight, bias = x.to(dtype), weight.to(dtype), torch.randn(columns, generator=generator)
    codes, scale = run(rms_norm_quant_op, x, weight, bias, 1e-5, 1.0, format)
    y = rms_norm(x, columns, weight, 1e-5, bias=bias, weight_offset=1.0, out_dtype=torch.float32)
    unfused = quantize(y, Scheme(format, "row"))
    assert_near(scale, unfused.scale)
    assert_within_one_code(codes, unfused.codes)
    # Away from ties, that is for nearly all elements, the codes are the same.
    assert (codes.float() != unfused.codes.float()).float().mean() < 0.01


@every_backend
@every_format
def test_residual_is_that_of_the_norm_alone(run: Any, format: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        x = torch.randn(6, 72, generator=generator).to(dtype)
        for residual_dtype in (dtype, torch.float32):
            residual = torch.randn(6, 72, generator=generator).to(residual_dtype)
            weight = torch.randn(72, generator=generator)
            codes, _, stream = run(add_rms_norm_quant_op, x, residual, weight, None, 1e-6, 0.0, format)
            y, expected = add_rms_norm(x, residual, weight, 1e-6, out_dtype=torch.float32)
            assert_same_bits(stream, expected)
            assert_within_one_code(codes, quantize(y, Scheme(format, "row")).codes)


@every_backend
def test_a_row_that_is_not_finite_is_nan_and_no_other(run: Any) -> None:
    x = torch.randn(4, 40)
    x[1, 7] = torch.nan
    codes, scale = run(rms_norm_quant_op, x, None, None, 1e-5, 0.0, "e4m3")
    assert scale.isnan().tolist() == [False, True, False, False]
    assert (codes[1].float() == 0).all()


@pytest.mark.parametrize("shape", [(8,), (2, 3, 8), (0, 8), (4, 0)])
def test_public_function(shape: tuple[int, ...]) -> None:
    x, residual = torch.randn(shape), torch.randn(shape)
    q = rms_norm_quant(x, torch.ones(shape[-1]), 1e-5, qdtype="int8")
    assert q.scheme == Scheme("int8", "row")
    assert q.codes.shape == q.shape == shape
    assert q.scale.shape == shape[:-1]
    if x.numel():
        y = rms_norm(x, shape[-1], torch.ones(shape[-1]), 1e-5)
        assert ((dequantize(q) - y).abs() <= q.scale.unsqueeze(-1) * 0.5001).all()
    else:
        assert (q.scale == 1).all()
    both, stream = rms_norm_quant(x, None, 1e-5, qdtype="int8", residual=residual)
    assert torch.equal(stream, x + residual)
    assert_near(dequantize(both), dequantize(rms_norm_quant(stream, None, 1e-5, qdtype="int8")))


def test_other_layouts_and_compile() -> None:
    x, weight = torch.randn(6, 32), torch.randn(32)
    expected = rms_norm_quant(x, weight, qdtype="e4m3")
    strided = rms_norm_quant(x.t().contiguous().t(), weight, qdtype="e4m3")
    assert_same_bits(strided.codes, expected.codes)

    def function(x: Tensor) -> Tensor:
        return dequantize(rms_norm_quant(x, weight, qdtype="e4m3"))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), dequantize(expected))


X = torch.randn(2, 6)
BAD_CALLS = {
    "qdtype": (lambda: rms_norm_quant(X, qdtype="int7"), ValueError, "qdtype must be one of 'int8', 'e4m3'"),
    "granularity": (
        lambda: rms_norm_quant(X, qdtype="int8", granularity="tensor"),
        ValueError,
        "granularity must be one of 'row'; got 'tensor'",
    ),
    "weight": (lambda: rms_norm_quant(X, X[0, :5], qdtype="int8"), ValueError, "weight has shape"),
    "eps": (lambda: rms_norm_quant(X, None, -1.0, qdtype="int8"), ValueError, "eps must be"),
    "float64": (lambda: rms_norm_quant(X.double(), qdtype="int8"), TypeError, "x has dtype torch.float64"),
    "residual": (
        lambda: rms_norm_quant(X, qdtype="int8", residual=X[:1]),
        ValueError,
        "residual has shape",
    ),
    "gradient": (
        lambda: rms_norm_quant(X.clone().requires_grad_(), qdtype="int8"),
        RuntimeError,
        "x requires grad, but a quantized result has no gradient",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_name_the_argument(case: str) -> None:
    call, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        call()
