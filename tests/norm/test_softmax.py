"""Softmax and its relatives beside the authors' numbers, PyTorch's in float64, and what each form promises."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.backends import all_backends, run_cpu
from tests.golden_files import files, read
from tests.tolerances import assert_near, assert_same_bits
from torch import Tensor

import narrowgauge as ng
from narrowgauge.nn import LogSoftmax, Softmax
from narrowgauge.nn.functional import log_softmax, logsumexp, softmax, sum_exp_extended
from narrowgauge.norm.softmax import ALGORITHMS, softmax_op, sum_exp_extended_op
from narrowgauge.ops import library

INF = math.inf
SIZES = (1, 17, 129, 1000, 4097)
needs_native = pytest.mark.skipif(
    not library.state.cpu.loaded, reason=f"CPU library {library.state.cpu.reason}"
)
each_backend = pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
each_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)


def rows(*shape: int, spread: float = 5.0, shift: float = 0.0, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread + shift


def assert_relative(actual: Tensor, truth: Tensor, tolerance: float) -> None:
    """Per entry, for entries that float32 holds as normal numbers."""
    normal = truth > 1e-37
    error = (actual.double() - truth).abs() / truth
    assert error[normal].max() <= tolerance
    assert (actual[~normal].double() <= 1.1e-37).all()


# --- the authors' code ---------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("path", files("two_pass_softmax"), ids=lambda p: p.stem)
def test_golden(path: Path) -> None:
    case, _ = read(path)
    y = softmax(case["in_x"], algorithm="two_pass")
    assert_relative(y, case["out_y_float64_reference"], 5e-7)
    assert_relative(y, case["out_y"].double(), 5e-7)
    lse = case["out_lse_float64_reference"].double()
    tolerance = 5e-7 * max(1.0, lse.abs().item())
    assert abs(logsumexp(case["in_x"]).double() - lse) <= tolerance
    mantissa, exponent = sum_exp_extended(case["in_x"])
    theirs = case["out_sum_mantissa"].double().log() + case["out_sum_exponent"].double() * math.log(2)
    assert exponent == exponent.round()
    assert 1 <= mantissa < 2
    ours = mantissa.double().log() + exponent.double() * math.log(2)
    assert abs(ours - theirs) <= 5e-7 * max(1.0, theirs.abs().item())


# --- float64 truth -------------------------------------------------------------------------------

INPUTS = {
    "normal": lambda n: rows(3, n),
    "spread": lambda n: rows(3, n, spread=300.0),
    "shifted": lambda n: rows(3, n, shift=5000.0),
    "spread and shifted": lambda n: rows(3, n, spread=300.0, shift=5000.0),
    "negative": lambda n: rows(3, n, spread=50.0, shift=-4000.0),
}


@needs_native
@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("n", [*SIZES, 70001])
def test_two_pass_is_within_five_ten_millionths_of_every_entry(n: int, make: Callable[[int], Tensor]) -> None:
    x = make(n)
    y = softmax(x, algorithm="two_pass")
    assert_relative(y, x.double().softmax(-1), 5e-7)
    assert ((y.double().sum(-1) - 1).abs() <= 2e-7 * math.sqrt(n) + 1e-7).all()


@each_backend
@each_algorithm
@pytest.mark.parametrize("n", [*SIZES, 70001])
def test_every_form_is_near_the_truth(n: int, algorithm: str, backend: library.Backend) -> None:
    x = rows(3, n)
    with ng.backend(backend):
        y, log_y = softmax(x, algorithm=algorithm), log_softmax(x, algorithm=algorithm)
        wide, log_wide = (
            softmax(x.double(), algorithm=algorithm),
            log_softmax(x.double(), algorithm=algorithm),
        )
        lse, wide_lse = logsumexp(x), logsumexp(x.double())
    truth, log_truth = x.double().softmax(-1), x.double().log_softmax(-1)
    assert_relative(y, truth, 1e-5)
    assert_near(log_y, log_truth)
    torch.testing.assert_close(wide, truth, rtol=2e-14, atol=0)
    torch.testing.assert_close(log_wide, log_truth, rtol=1e-14, atol=1e-13)
    torch.testing.assert_close(wide_lse, x.double().logsumexp(-1), rtol=1e-15, atol=1e-14)
    assert_near(lse, x.double().logsumexp(-1))


@needs_native
@each_algorithm
def test_a_common_shift_changes_nothing(algorithm: str) -> None:
    x = rows(4, 1000).mul(2**10).round().div(2**10)  # so that the shifted values are exact
    for shift in (-4096.0, 4096.0):
        assert (softmax(x + shift, algorithm=algorithm) - softmax(x, algorithm=algorithm)).abs().max() < 1e-6
        # x - logsumexp(x) would lose the digits that lse has before the point.
        shifted = log_softmax(x + shift, algorithm=algorithm)
        torch.testing.assert_close(shifted.double(), x.double().log_softmax(-1), rtol=4e-7, atol=2e-6)


SPECIAL = torch.tensor(
    [
        [-INF, 0.0, 1.0, -INF],
        [-INF, -INF, -INF, -INF],
        [INF, 0.0, 1.0, 2.0],
        [INF, INF, -INF, 0.0],
        [math.nan, 0.0, 1.0, 2.0],
        [INF, math.nan, 0.0, 0.0],
        [-INF, math.nan, -INF, -INF],
        [1e30, 0.0, 1e30, -1e30],
        [-1e30, -2e30, -1e30, -INF],
        [3e4, 3e4 - 1, -3e4, 0.0],
        [-3e38, 3e38, 3e38, -3e38],
    ]
)


@pytest.mark.parametrize("run", all_backends())
@each_algorithm
@pytest.mark.parametrize("columns", [4, 17, 700])
def test_infinities_nan_and_huge_values_are_as_in_torch(run: object, columns: int, algorithm: str) -> None:
    x = torch.cat([SPECIAL, torch.full((len(SPECIAL), columns - 4), -INF)], 1)
    for dtype in (torch.float32, torch.float64):
        z = x.to(dtype)
        for log, truth in ((False, z.softmax(-1)), (True, z.log_softmax(-1))):
            (y,) = run(softmax_op, z, None, log, False, algorithm, None)  # type: ignore[operator]
            torch.testing.assert_close(y, truth, equal_nan=True, rtol=1e-6, atol=1e-7)
        (y,) = run(softmax_op, z, None, False, True, algorithm, None)  # type: ignore[operator]
        assert (y[1] == 0).all()
        assert y[6].isnan().all()


@each_backend
def test_log_sum_exp_of_special_values(backend: library.Backend) -> None:
    with ng.backend(backend):
        lse, (mantissa, exponent) = logsumexp(SPECIAL), sum_exp_extended(SPECIAL[:-1])
    torch.testing.assert_close(lse, SPECIAL.logsumexp(-1), equal_nan=True)
    assert (mantissa[1], exponent[1]) == (0, -INF)
    assert (mantissa[2], mantissa[3]) == (INF, INF)
    assert mantissa[[4, 5, 6]].isnan().all()
    ours = mantissa.double().log() + exponent.double() * math.log(2)
    finite = [0, 7, 8, 9]
    torch.testing.assert_close(ours[finite], SPECIAL.double().logsumexp(-1)[finite], rtol=1e-6, atol=0)


# --- masks ---------------------------------------------------------------------------------------


@each_backend
@each_algorithm
@pytest.mark.parametrize(
    "shape", [(9,), (4, 1, 7, 9), (3, 1, 9), (7, 1), (1, 3, 7, 9), (4, 3, 7, 9)], ids=str
)
def test_masks_are_as_if_written_into_x(
    shape: tuple[int, ...], algorithm: str, backend: library.Backend
) -> None:
    x = rows(4, 3, 7, 9)
    keep = rows(*shape, seed=1) > 0
    added = rows(*shape, seed=2)
    with ng.backend(backend):
        boolean = softmax(x, algorithm=algorithm, mask=keep)
        zeroed = softmax(x, algorithm=algorithm, mask=keep, zero_masked=True)
        additive = log_softmax(x, algorithm=algorithm, mask=added)
        narrow = softmax(x.bfloat16(), algorithm=algorithm, mask=added)
    truth = x.double().masked_fill(~keep, -INF).softmax(-1)
    torch.testing.assert_close(boolean.double(), truth, equal_nan=True, rtol=4e-6, atol=1e-7)
    torch.testing.assert_close(zeroed.double(), truth.nan_to_num(0.0), rtol=4e-6, atol=1e-7)
    assert_near(additive, (x.double() + added).log_softmax(-1))
    assert narrow.dtype == torch.bfloat16
    assert_near(narrow, (x.bfloat16().double() + added).softmax(-1))


@each_backend
def test_gradients_through_masks(backend: library.Backend) -> None:
    keep = rows(3, 1, 8, seed=1) > 0
    keep[1] = False  # a row of nothing, given 0
    for log in (False, True):
        function = log_softmax if log else softmax
        x, truth_x = (rows(2, 3, 4, 8).double().requires_grad_() for _ in range(2))
        bias, truth_bias = (rows(4, 8, seed=3).double().requires_grad_() for _ in range(2))
        outer = rows(2, 3, 4, 8, seed=4).double()
        with ng.backend(backend):
            (function(x, mask=bias) * outer).sum().backward()
        torch_function = torch.log_softmax if log else torch.softmax
        (torch_function(truth_x + truth_bias, -1) * outer).sum().backward()
        torch.testing.assert_close(x.grad, truth_x.grad)
        torch.testing.assert_close(bias.grad, truth_bias.grad)
    x.grad = truth_x.grad = None
    with ng.backend(backend):
        (softmax(x, mask=keep, zero_masked=True) * outer).sum().backward()
    filled = truth_x.masked_fill(~keep, -INF).softmax(-1).masked_fill(~keep.any(-1, keepdim=True), 0.0)
    (filled * outer).sum().backward()
    torch.testing.assert_close(x.grad, truth_x.grad.nan_to_num(0.0))


# --- layouts, dtypes, threads --------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_any_dimension_of_any_layout(dim: int) -> None:
    x = rows(3, 4, 5).transpose(0, 2).double().requires_grad_()
    twin = x.detach().clone().requires_grad_()
    outer = rows(5, 4, 3, seed=1).double()
    for ours, theirs in (
        (softmax(x, dim), twin.softmax(dim)),
        (log_softmax(x, dim), twin.log_softmax(dim)),
        (logsumexp(x, dim, keepdim=True), twin.logsumexp(dim, keepdim=True)),
        (logsumexp(x, dim), twin.logsumexp(dim)),
    ):
        torch.testing.assert_close(ours, theirs)
        o = outer if ours.shape == outer.shape else outer.sum(dim, keepdim=ours.dim() == 3)
        torch.testing.assert_close(
            torch.autograd.grad(ours, x, o)[0], torch.autograd.grad(theirs, twin, o)[0]
        )
    mask = rows(5, 4, 1, seed=2) > 0
    filled = twin.masked_fill(~mask, -INF).softmax(dim)
    torch.testing.assert_close(softmax(x, dim, mask=mask), filled, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0,), (2, 0, 3)])
def test_empty(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, requires_grad=True)
    y = softmax(x)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape
    assert_same_bits(logsumexp(x.detach()), torch.logsumexp(x.detach(), -1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_summed_in_float32(dtype: torch.dtype) -> None:
    x = rows(4, 4097).to(dtype)
    assert_near(softmax(x), x.double().softmax(-1))
    wide = softmax(x, dtype=torch.float32, algorithm="two_pass")
    assert wide.dtype == torch.float32
    assert_relative(wide, x.double().softmax(-1), 5e-7)
    assert_relative(softmax(x, dtype=torch.float64).float(), x.double().softmax(-1), 5e-7)
    twin = x.clone().requires_grad_()
    softmax(twin, dtype=torch.float32)[:, 0].sum().backward()
    assert twin.grad is not None
    assert twin.grad.dtype == dtype


@needs_native
@each_algorithm
def test_one_long_row_has_the_same_bits_on_any_number_of_threads_and_among_others(algorithm: str) -> None:
    x = rows(9, 150_001)  # several segments; nine rows are not cut over threads, one is
    dy = rows(9, 150_001, seed=1)
    y = softmax(x, algorithm=algorithm)
    assert_relative(y, x.double().softmax(-1), 1e-5)
    dx = torch.ops.narrowgauge.softmax_backward(dy, y, None, False, None)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert_same_bits(softmax(x[4], algorithm=algorithm), y[4])
            one = torch.ops.narrowgauge.softmax_backward(dy[4], y[4], None, False, None)
            assert_same_bits(one, dx[4])
    finally:
        torch.set_num_threads(threads)
    p, g = y.double(), dy.double()
    assert_near(dx, p * (g - (p * g).sum(-1, keepdim=True)))
    x[4, 140_000] = 1e5  # beyond the range of extended exponents, in the last segment
    assert softmax(x[4], algorithm=algorithm)[140_000] == 1


@needs_native
def test_exp_in_packs_is_within_one_unit_in_the_last_place() -> None:
    """Seen through rows (x, 0), whose softmax is e^x / (1 + e^x): close to e^x itself for x <= -5."""
    x = -torch.rand(4000, 1, dtype=torch.float64).mul(80).add(5)
    for dtype, tolerance in ((torch.float32, 1.2e-7), (torch.float64, 2.5e-16)):
        narrow = x.to(dtype)
        y = softmax(torch.cat([narrow, torch.zeros_like(narrow)], 1), algorithm="three_pass")[:, :1]
        truth = narrow.double().sigmoid()
        assert ((y.double() - truth).abs() / truth).max() < 2.5 * tolerance


def test_merging_two_halves_only_rounds() -> None:
    """The law by which a vocabulary is cut over devices."""
    x = rows(5, 1000, spread=100.0, shift=300.0)
    (m1, e1), (m2, e2) = sum_exp_extended(x[:, :300]), sum_exp_extended(x[:, 300:])
    top = torch.maximum(e1, e2)
    merged = m1 * torch.exp2(e1 - top) + m2 * torch.exp2(e2 - top)
    lse = merged.double().log() + top.double() * math.log(2)
    torch.testing.assert_close(lse, x.double().logsumexp(-1), rtol=2e-7, atol=0)


@pytest.mark.parametrize("run", all_backends())
def test_extended_sum_is_normalized(run: object) -> None:
    x = torch.tensor([[0.0, -INF], [math.log(2) * 1000, 0.0], [-2000.0, -2000.0]], dtype=torch.float64)
    mantissa, exponent = run(sum_exp_extended_op, x)  # type: ignore[operator]
    assert ((mantissa >= 1) & (mantissa < 2)).all()
    torch.testing.assert_close(
        mantissa.log() + exponent * math.log(2), x.logsumexp(-1), rtol=1e-14, atol=1e-14
    )


# --- modules, compile, errors --------------------------------------------------------------------


def test_modules() -> None:
    x, mask = rows(3, 5), rows(5, seed=1) > 0
    assert_same_bits(Softmax(dim=1)(x), softmax(x, 1))
    assert_same_bits(
        LogSoftmax(0, algorithm="online")(x, mask), log_softmax(x, 0, algorithm="online", mask=mask)
    )
    assert Softmax().state_dict() == {}
    assert "algorithm='online'" in repr(LogSoftmax(algorithm="online"))


def test_compiled_whole() -> None:
    keep = rows(6, 8, seed=1) > -3

    def function(x: Tensor) -> Tensor:
        return softmax(x, 0).sum(1) @ log_softmax(x, mask=keep) + logsumexp(x, 0)

    x, twin = rows(6, 8).requires_grad_(), rows(6, 8).requires_grad_()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), function(twin), equal_nan=True)
    compiled(x).sum().backward()
    function(twin).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad, equal_nan=True)


X = torch.randn(2, 6)
BAD_CALLS = {
    "not a tensor": (lambda: softmax([1.0]), TypeError, "x must be a tensor, got list"),
    "integers": (lambda: softmax(X.long()), TypeError, "x has dtype torch.int64"),
    "dim": (lambda: softmax(X, 2), ValueError, "dim must be between -2 and 1"),
    "dim of lse": (lambda: logsumexp(X, -3), ValueError, "logsumexp: dim must be between -2 and 1"),
    "algorithm": (
        lambda: softmax(X, algorithm="fast"),
        ValueError,
        "algorithm must be one of 'auto', 'two_pass'",
    ),
    "dtype": (lambda: softmax(X, dtype=torch.int32), TypeError, "dtype is torch.int32"),
    "mask shape": (
        lambda: softmax(X, mask=X[:, :5]),
        ValueError,
        "mask has shape .2, 5., which does not broadcast",
    ),
    "mask dims": (lambda: softmax(X, mask=X[None]), ValueError, "does not broadcast"),
    "mask dtype": (lambda: log_softmax(X, mask=X.long()), TypeError, "mask has dtype torch.int64"),
    "mask type": (lambda: softmax(X, mask=1), TypeError, "mask must be a tensor, got int"),
    "module": (lambda: Softmax(algorithm="fast"), ValueError, "Softmax: algorithm must be one of"),
    "scalar": (lambda: sum_exp_extended(torch.tensor(1.0)), ValueError, "at least one dimension"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_name_the_argument(case: str) -> None:
    call, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        call()


@needs_native
@pytest.mark.parametrize("isa", library.available_cpu_isas())
@pytest.mark.parametrize("columns", [5, 150, 8300])
def test_two_pass_has_the_same_bits_on_every_instruction_set(columns: int, isa: str) -> None:
    x = rows(3, columns, spread=200.0)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        args = (x.to(dtype), None, False, False, "two_pass", None)
        assert_same_bits(run_cpu(isa)(softmax_op, *args)[0], softmax_op(*args))
