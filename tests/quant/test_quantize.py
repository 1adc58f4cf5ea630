"""What is special about quantize and dequantize, beside what test_operators.py asks of every operator."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tests.backends import all_backends
from tests.tolerances import assert_same_bits
from torch import Tensor

from narrowgauge.ops.random import philox_words, uniform
from narrowgauge.quant import Quantized, Scheme, dequantize, quantize
from narrowgauge.quant.formats import FORMATS, Float
from narrowgauge.quant.quantize import dequantize_operator, quantize_operator

every_format = pytest.mark.parametrize("format", FORMATS)
every_backend = pytest.mark.parametrize("run", all_backends())
GRANULARITIES = ("tensor", "row", "column")


def largest(format: str) -> float:
    return {"int8": 127.0, "e4m3": 448.0, "e5m2": 57344.0}[format]


def rounded_by_torch(v: Tensor, format: str) -> Tensor:
    """PyTorch's own rounding of values within the format's range."""
    return torch.round(v).to(torch.int8) if format == "int8" else v.to(FORMATS[format].dtype)


def codes_at_scale_one(run: Any, values: Tensor, format: str, rng: Tensor | None = None) -> Tensor:
    """The codes of values within the format's range, in rows whose last element makes the scale 1."""
    values = torch.nn.functional.pad(values, (0, -len(values) % 255)).view(-1, 255)
    rows = torch.nn.functional.pad(values, (0, 1), value=largest(format))
    codes, scale = run(quantize_operator, rows, format, "row", rng, None)
    assert (scale == 1).all()
    return codes[:, :-1].reshape(-1)


@every_backend
@every_format
def test_codes_of_every_bfloat16_are_those_of_torch(format: str, run: Any) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    values = values[values.abs() <= largest(format)]
    codes = codes_at_scale_one(run, values, format)[: len(values)]
    assert_same_bits(codes, rounded_by_torch(values, format))


@every_backend
@every_format
def test_codes_of_random_float32_bits_are_those_of_torch(format: str, run: Any) -> None:
    bits = torch.randint(-(2**31), 2**31, (20000,), generator=torch.Generator().manual_seed(0))
    values = bits.int().view(torch.float32).nan_to_num(0.0).clamp(-largest(format), largest(format))
    near_ties = torch.arange(-200, 200).float() / 2
    near_ties = torch.cat([near_ties, torch.nextafter(near_ties, torch.tensor(1e9))])
    values = torch.cat([values, near_ties.clamp(-largest(format), largest(format)), values * 2.0**-130])
    codes = codes_at_scale_one(run, values, format)[: len(values)]
    assert_same_bits(codes, rounded_by_torch(values, format))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@every_format
@every_backend
def test_scales_and_codes_follow_numpy(run: Any, format: str, granularity: str) -> None:
    x = torch.randn(9, 52, generator=torch.Generator().manual_seed(3)) * 37.5
    codes, scale = run(quantize_operator, x, format, granularity, None, None)
    a = x.numpy()
    axis = {"tensor": None, "row": 1, "column": 0}[granularity]
    expected_scale = np.abs(a).max(axis=axis) / np.float32(largest(format))
    assert expected_scale.dtype == np.float32
    assert_same_bits(scale, torch.from_numpy(np.asarray(expected_scale)))
    divided = a / (expected_scale[:, None] if granularity == "row" else expected_scale)
    clamped = np.clip(divided, np.float32(-largest(format)), np.float32(largest(format)))
    assert_same_bits(codes, rounded_by_torch(torch.from_numpy(clamped), format))


@every_backend
@every_format
@pytest.mark.parametrize("columns", [1, 128, 129, 300, 384])
def test_blocks_are_rows_of_128(run: Any, format: str, columns: int) -> None:
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(4)) * 37.5
    codes, scale = run(quantize_operator, x, format, "block", None, None)
    for i, part in enumerate(x.split(128, 1)):
        alone = quantize(part.contiguous(), Scheme(format, "row"))
        assert_same_bits(codes[:, i * 128 : (i + 1) * 128].contiguous(), alone.codes)
        assert_same_bits(scale[:, i].contiguous(), alone.scale)
    restored = torch.cat(
        [c.float() * s for c, s in zip(codes.split(128, 1), scale.split(1, 1), strict=True)], 1
    )
    (decoded,) = run(dequantize_operator, codes, scale, "block", None)
    assert_same_bits(decoded, restored)


@every_backend
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", quantize_operator.dtypes)
def test_a_value_that_is_not_finite_spoils_its_group_and_no_other(
    run: Any, bad: float, dtype: torch.dtype
) -> None:
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    clean = quantize(x, Scheme("int8", "row"))
    x[2, 33] = bad
    for format in FORMATS:
        codes, scale = run(quantize_operator, x, format, "row", None, None)
        assert scale.isnan().tolist() == [False, False, True, False, False]
        assert (codes[2].float() == 0).all()
        restored = dequantize(Quantized(codes, scale, None, Scheme(format, "row"), x.shape))
        assert restored.isnan().sum() == 40
        assert restored[2].isnan().all()
        if format == "int8":
            kept = [0, 1, 3, 4]
            assert_same_bits(codes[kept], clean.codes[kept])
        codes, scale = run(quantize_operator, x, format, "tensor", None, None)
        assert scale.isnan()
        assert (codes.float() == 0).all()
        codes, scale = run(quantize_operator, x, format, "column", None, None)
        assert scale.isnan().nonzero().tolist() == [[33]]


@every_backend
@every_format
def test_groups_of_zeros_and_of_values_too_small_to_scale(format: str, run: Any) -> None:
    smallest = 2.0**-149
    x = torch.tensor([[0.0, 0.0, 0.0], [smallest, -smallest, 0.0], [3.0, 0.0, 1.5]])
    codes, scale = run(quantize_operator, x, format, "row", None, None)
    assert scale[:2].tolist() == [1.0, 1.0]
    assert (codes[:2].float() == 0).all()
    assert codes[2, 0].item() == largest(format)


@every_format
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_codes_do_not_change_with_a_power_of_two(format: str, granularity: str) -> None:
    x = torch.randn(12, 50, generator=torch.Generator().manual_seed(5))
    scheme = Scheme(format, granularity)
    expected = quantize(x, scheme)
    for power in (-60, -7, 1, 40):
        q = quantize(x * 2.0**power, scheme)
        assert_same_bits(q.codes, expected.codes)
        assert_same_bits(q.scale, expected.scale * 2.0**power)


@every_format
def test_rounding_errs_by_half_a_step_at_most(format: str) -> None:
    x = torch.randn(20, 77, generator=torch.Generator().manual_seed(6)) * 100
    q = quantize(x, Scheme(format, "row"))
    v = (x.double() / q.scale.double()[:, None]).abs()
    if format == "int8":
        step = torch.ones_like(v)
    else:
        target = FORMATS[format]
        assert isinstance(target, Float)
        exponent = torch.frexp(v).exponent - 1
        step = 2.0 ** (exponent.clamp(min=1 - target.bias) - target.mantissa).double()
    error = (dequantize(q, torch.float64) - x.double()).abs() / q.scale.double()[:, None]
    assert (error <= step / 2 * (1 + 1e-5)).all()


# --- stochastic rounding ------------------------------------------------------------------------------------


def philox_4x32_10(counter: list[int], key: list[int]) -> list[int]:
    """One block, as in the paper, on Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 >> 32 ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, p0 >> 32 ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_philox_known_answers() -> None:
    """The known-answer tests that the authors of Philox publish with Random123."""
    ones = 0xFFFFFFFF
    assert philox_4x32_10([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox_4x32_10([ones] * 4, [ones] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    answer = [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]
    assert philox_4x32_10(pi, [0xA4093822, 0x299F31D0]) == answer


@pytest.mark.parametrize("start", [0, 3, 2**34 - 2, 2**62 + 1])
def test_philox_words_are_counted_by_element(start: int) -> None:
    seed, offset = -0x123456789ABCDEF, 0x7EDCBA9876543210
    words = philox_words(torch.tensor([seed, offset]), 7, start)
    low = 0xFFFFFFFF
    key = [seed & low, seed >> 32 & low]
    for i, word in enumerate(words.tolist(), start):
        counter = [i // 4 & low, i // 4 >> 32, offset & low, offset >> 32]
        assert word == philox_4x32_10(counter, key)[i % 4]


STOCHASTIC = [
    ("int8", 3.3, 3.0, 4.0),
    ("int8", -3.3, -4.0, -3.0),
    ("e4m3", 17.3, 16.0, 18.0),
    ("e4m3", -2.3 * 2.0**-9, -3 * 2.0**-9, -2 * 2.0**-9),
    ("e4m3", 0.25 * 2.0**-9, 0.0, 2.0**-9),
    ("e5m2", 17.3, 16.0, 20.0),
    ("e5m2", 2.6 * 2.0**-16, 2 * 2.0**-16, 3 * 2.0**-16),
]


@every_backend
@pytest.mark.parametrize(("format", "value", "below", "above"), STOCHASTIC)
def test_stochastic_rounding_is_unbiased(
    run: Any, format: str, value: float, below: float, above: float
) -> None:
    count = 16384
    codes = codes_at_scale_one(run, torch.full((count,), value), format, torch.tensor([11, 3]))[:count]
    codes = codes.double()
    assert set(codes.unique().tolist()) == {below, above}
    share = (value - below) / (above - below)
    sigma = math.sqrt(share * (1 - share) / count)
    assert abs((codes == above).double().mean().item() - share) < 4 * sigma


@every_backend
@every_format
def test_stochastic_rounding_keeps_values_on_the_grid(run: Any, format: str) -> None:
    if format == "int8":
        grid = torch.arange(-127.0, 128.0)
    else:
        grid = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(FORMATS[format].dtype).float()
        grid = grid[grid.isfinite()]
    for seed in range(4):
        codes = codes_at_scale_one(run, grid, format, torch.tensor([seed, 0]))
        assert_same_bits(codes[: len(grid)].float(), grid)


@every_format
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_given_noise_replays_given_bits(format: str, granularity: str) -> None:
    x = torch.randn(7, 45, generator=torch.Generator().manual_seed(2))
    rng = torch.tensor([99, 1])
    words = philox_words(rng, x.numel()).view(x.shape)
    scheme = Scheme(format, granularity)
    drawn = quantize(x, scheme, rounding="stochastic", rng=rng)
    replayed = quantize(x, scheme, rounding="stochastic", noise=uniform(words))
    # 24 bits decide all but the smallest subnormals of a float format, which look at up to 32.
    scaled = dequantize(drawn).abs()
    visible = torch.ones_like(scaled, dtype=torch.bool) if format == "int8" else scaled > 0
    assert visible.sum() > 0.9 * visible.numel()
    assert_same_bits(replayed.codes[visible], drawn.codes[visible])


@every_format
def test_a_shard_draws_what_it_draws_within_the_whole(format: str) -> None:
    x = torch.randn(8, 31, generator=torch.Generator().manual_seed(4))
    rng = torch.tensor([5, 6])
    whole = quantize(x, Scheme(format, "row"), rounding="stochastic", rng=rng)
    words = philox_words(rng, 3 * 31, start=5 * 31)
    noise = uniform(words).view(3, 31)
    shard = quantize(x[5:], Scheme(format, "row"), rounding="stochastic", noise=noise)
    assert_same_bits(shard.codes, whole.codes[5:])


def test_sources_of_randomness() -> None:
    x = torch.rand(400) * 10

    def codes(rng: Any) -> Tensor:
        return quantize(x, Scheme("int8"), rounding="stochastic", rng=rng).codes

    assert torch.equal(codes(7), codes(torch.tensor([7, 0])))
    assert torch.equal(codes(2**64 - 1), codes(-1))
    assert not torch.equal(codes(7), codes(8))
    assert not torch.equal(codes(torch.tensor([7, 0])), codes(torch.tensor([7, 1])))
    first = codes(torch.Generator().manual_seed(3))
    assert torch.equal(first, codes(torch.Generator().manual_seed(3)))
    torch.manual_seed(5)
    first, second = codes(None), codes(None)
    torch.manual_seed(5)
    assert torch.equal(codes(None), first)
    assert not torch.equal(first, second)


# --- the public functions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(), (5,), (0,), (3, 0), (0, 3), (2, 3, 5), (2, 0, 3)])
def test_shapes(shape: tuple[int, ...], granularity: str) -> None:
    x = torch.randn(shape)
    q = quantize(x, Scheme("int8", granularity))
    assert q.codes.shape == q.shape == x.shape
    expected = {"tensor": (), "row": shape[:-1], "column": shape[-1:]}[granularity]
    assert tuple(q.scale.shape) == expected
    assert dequantize(q).shape == x.shape
    if x.numel() == 0:
        assert (q.scale == 1).all()


@every_format
def test_a_column_is_a_row_of_the_transpose(format: str) -> None:
    x = torch.randn(70, 130, generator=torch.Generator().manual_seed(8))
    columns = quantize(x, Scheme(format, "column"))
    rows = quantize(x.t(), Scheme(format, "row"))
    assert columns.codes.is_contiguous()
    assert_same_bits(columns.codes.t(), rows.codes)
    assert_same_bits(columns.scale, rows.scale)


def test_layouts_dtypes_and_gradients() -> None:
    x = torch.randn(6, 10, 8)
    scheme = Scheme("e4m3", "row")
    expected = quantize(x, scheme)
    for strided in (x.transpose(0, 1).contiguous().transpose(0, 1), x.double(), x.clone().requires_grad_()):
        q = quantize(strided, scheme)
        assert_same_bits(q.codes, expected.codes)
        assert not q.scale.requires_grad
    expanded = x[:, :1].expand(6, 10, 8)
    assert torch.equal(
        quantize(expanded, scheme).codes.float(), quantize(expanded.clone(), scheme).codes.float()
    )
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert_same_bits(dequantize(expected, dtype), dequantize(expected).to(dtype))
    assert dequantize(expected).dtype == torch.float32
    assert quantize(torch.tensor([1e300, 1.0], dtype=torch.float64), Scheme("int8")).scale.isnan()


def test_schemes_are_values() -> None:
    assert Scheme("int8", "row") == Scheme("int8", "row", "absmax")
    assert len({Scheme("int8"), Scheme("int8", "tensor"), Scheme("e4m3")}) == 2
    assert str(Scheme("e5m2", "row")) == "e5m2 per row (absmax)"
    with pytest.raises(AttributeError):
        Scheme("int8").format = "e4m3"  # type: ignore[misc]


def test_compile_captures_the_whole() -> None:
    x = torch.randn(5, 33)
    rng = torch.tensor([1, 2])

    def there_and_back(x: Tensor, rng: Tensor) -> Tensor:
        nearest = dequantize(quantize(x, Scheme("int8", "row")))
        return nearest + dequantize(quantize(x, Scheme("e4m3"), rounding="stochastic", rng=rng))

    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, rng), there_and_back(x, rng))


X = torch.randn(4, 6)
INT8 = Scheme("int8")
BAD_CALLS = {
    "format": (
        lambda: Scheme("int7"),
        ValueError,
        r"format must be one of 'int8', 'e4m3', 'e5m2'; got 'int7'",
    ),
    "granularity": (
        lambda: Scheme("int8", "tile"),
        ValueError,
        r"granularity must be one of 'tensor', 'row'",
    ),
    "scale rule": (
        lambda: Scheme("int8", "row", "delayed"),
        ValueError,
        r"scale_rule must be one of 'absmax'",
    ),
    "not a tensor": (lambda: quantize([1.0], INT8), TypeError, r"x must be a tensor, got list"),
    "integers": (lambda: quantize(X.int(), INT8), TypeError, r"x has dtype torch.int32; expected"),
    "complex": (lambda: quantize(X.cfloat(), INT8), TypeError, r"x has dtype torch.complex64"),
    "scheme": (lambda: quantize(X, "int8"), TypeError, r"scheme must be a Scheme, for example"),
    "rounding": (lambda: quantize(X, INT8, rounding="up"), ValueError, r"rounding must be one of 'nearest'"),
    "rng and nearest": (lambda: quantize(X, INT8, rng=3), ValueError, r"rng and noise belong to rounding"),
    "both": (
        lambda: quantize(X, INT8, rounding="stochastic", rng=3, noise=torch.rand(4, 6)),
        ValueError,
        r"give rng or noise, not both",
    ),
    "noise shape": (
        lambda: quantize(X, INT8, rounding="stochastic", noise=torch.rand(6)),
        ValueError,
        r"noise must be a float32 tensor .* got torch.float32 of shape \(6,\)",
    ),
    "noise dtype": (
        lambda: quantize(X, INT8, rounding="stochastic", noise=torch.rand(4, 6).double()),
        ValueError,
        r"noise must be a float32 tensor",
    ),
    "rng dtype": (
        lambda: quantize(X, INT8, rounding="stochastic", rng=torch.zeros(2)),
        ValueError,
        r"rng must be an int64 tensor \[seed, offset\], got torch.float32",
    ),
    "rng type": (
        lambda: quantize(X, INT8, rounding="stochastic", rng="1"),
        TypeError,
        r"rng must be an int64 tensor .* got str",
    ),
    "not quantized": (lambda: dequantize(X), TypeError, r"q must be a Quantized"),
    "dtype": (lambda: dequantize(quantize(X, INT8), torch.int8), ValueError, r"dtype must be one of"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_name_the_argument(case: str) -> None:
    call, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        call()
