"""LayerNorm and RMSNorm beside torch.nn.functional and beside the identities they satisfy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.backends import all_backends, in_float64, run_reference
from tests.tolerances import assert_near, assert_same_bits
from torch import Tensor

import narrowgauge as ng
from narrowgauge.nn import functional as ngf
from narrowgauge.ops import Operator, SampleMaker, registry


@dataclass
class Norm:
    """One of the two norms with one order of arguments."""

    name: str
    centred: bool

    def __call__(
        self, x: Tensor, sizes: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, **options: Any
    ):
        return getattr(ngf, self.name)(x, sizes, weight, bias=bias, eps=eps, **options)

    def add(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Any = None,
        bias: Any = None,
        eps: float = 1e-5,
        **options: Any,
    ):
        return getattr(ngf, f"add_{self.name}")(x, residual, weight, bias=bias, eps=eps, **options)

    def torch(
        self, x: Tensor, sizes: tuple[int, ...], weight: Any = None, bias: Any = None, eps: float = 1e-5
    ):
        if self.centred:
            return F.layer_norm(x, sizes, weight, bias, eps)
        y = F.rms_norm(x, sizes, weight, eps)
        return y if bias is None else y + bias

    def operator(self, pattern: str) -> Operator:
        return registry[pattern.format(self.name)]


NORMS = [Norm("layer_norm", True), Norm("rms_norm", False)]
each_norm = pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.name)
each_backend = pytest.mark.parametrize("backend", ["reference", "auto"])
every_run = pytest.mark.parametrize("run", all_backends())


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64
    ).to(dtype)


def with_gradients(function: Callable[..., Tensor], *tensors: Tensor | None) -> list[Tensor]:
    """The result, and the gradients of the tensors for one random direction."""
    tensors = tuple(None if t is None else t.detach().clone().requires_grad_() for t in tensors)
    y = function(*tensors)
    y.backward(random(*y.shape, seed=9).bfloat16().to(y.dtype))
    return [y.detach(), *(t.grad for t in tensors if t is not None)]


@each_backend
@each_norm
@pytest.mark.parametrize(
    ("shape", "count"),
    [
        ((3, 1), 1),
        ((2, 5, 17), 1),
        ((3, 129), 1),
        ((2, 4097), 1),
        ((2, 3, 4, 5), 2),
        ((3, 2, 7), 3),
        ((0, 6), 1),
    ],
    ids=str,
)
def test_equals_torch_in_float64(norm: Norm, shape: tuple[int, ...], count: int, backend: Any) -> None:
    sizes = shape[-count:]
    x, weight, bias = (random(*s, dtype=torch.float64, seed=i) for i, s in enumerate((shape, sizes, sizes)))
    for w, b in ((weight, bias), (weight, None), (None, None)):
        expected = with_gradients(lambda x, w, b: norm.torch(x, sizes, w, b), x, w, b)
        with ng.backend(backend):
            actual = with_gradients(lambda x, w, b: norm(x, sizes, w, b), x, w, b)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


@each_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [17, 129, 4097, 40000])
def test_long_and_odd_rows(norm: Norm, columns: int, dtype: torch.dtype) -> None:
    x, weight, bias = (
        random(3, columns, dtype=dtype),
        random(columns, dtype=dtype, seed=1),
        random(columns, seed=2),
    )
    actual = with_gradients(lambda x, w, b: norm(x, columns, w, b), x, weight, bias)
    expected = with_gradients(
        lambda x, w, b: norm.torch(x, (columns,), w, b), x.double(), weight.double(), bias.double()
    )
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_near(a, e, f"result {i}")


@every_run
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rows", "columns"), [(3, 16448), (2, 8209), (130, 8208), (1, 25000), (2, 4100)], ids=str
)
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_rows_beyond_the_registers(run: Any, name: str, rows: int, columns: int, dtype: torch.dtype) -> None:
    """CUDA keeps such rows in the shared memory of one block or of a cluster, or reads them once per pass.

    The emulator has clusters of two blocks of 48 KiB, so that all three come up in the forward and the backward.
    dweight is summed in a kernel of its own, here in up to two chunks.
    """
    make = SampleMaker(dtype)
    x, weight, bias, dy = make(rows, columns), make(columns), make(columns), make(rows, columns)
    forward = (x, weight, bias, 1e-5, 0.0, None)
    record = registry[f"{name}_forward"]
    results = run(record, *forward)
    for i, (a, e) in enumerate(zip(results, run_reference(record, *in_float64(forward)), strict=True)):
        assert_near(a, e, f"forward, result {i}")

    statistics = run_reference(record, *forward)[1:]
    backward = (dy, x, *statistics, weight, bias, None, 0.0, True)
    record = registry[f"{name}_backward"]
    results = run(record, *backward)
    for i, (a, e) in enumerate(zip(results, run_reference(record, *in_float64(backward)), strict=True)):
        assert_near(a, e, f"backward, result {i}")


@each_backend
def test_rms_norm_without_eps_is_that_of_torch(backend: Any) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = (random(4, 33) * 1e-3).to(dtype)
        with ng.backend(backend):
            y = ngf.rms_norm(x, 33)
        eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        assert_near(y, F.rms_norm(x.double(), (33,), eps=eps))


@every_run
@each_norm
def test_weight_offset_is_added_to_the_weight(norm: Norm, run: Any) -> None:
    """Bit for bit, because weight + offset is formed in float32 before anything else."""
    x, weight, bias = random(5, 72), random(72, seed=1), random(72, seed=2)
    (with_offset,) = run(norm.operator("{}"), x, weight, bias, 1e-5, 1.0, None)
    (without,) = run(norm.operator("{}"), x, weight + 1, bias, 1e-5, 0.0, None)
    assert_same_bits(with_offset, without)
    narrow = weight.bfloat16()
    (with_offset,) = run(norm.operator("{}"), x.bfloat16(), narrow, None, 1e-5, 1.0, None)
    (without,) = run(norm.operator("{}"), x.bfloat16(), narrow.float() + 1, None, 1e-5, 0.0, None)
    assert_same_bits(with_offset, without)


@each_norm
def test_gradient_of_the_weight_does_not_see_the_offset(norm: Norm) -> None:
    x, weight = random(5, 72), random(72, seed=1)
    (_, dx, dweight) = with_gradients(lambda x, w: norm(x, 72, w, weight_offset=1.0), x, weight)
    (_, expected_dx, expected) = with_gradients(lambda x, w: norm(x, 72, w), x, weight + 1)
    assert_same_bits(dx, expected_dx)
    assert_same_bits(dweight, expected)


@each_backend
def test_rms_norm_of_centred_rows_is_layer_norm(backend: Any) -> None:
    x, weight = random(6, 45, dtype=torch.float64) + 3, random(45, dtype=torch.float64)
    with ng.backend(backend):
        centred = ngf.rms_norm(x - x.mean(-1, keepdim=True), 45, weight, 1e-5)
        torch.testing.assert_close(centred, ngf.layer_norm(x, 45, weight), rtol=1e-12, atol=1e-12)


@every_run
@each_norm
def test_invariances(norm: Norm, run: Any) -> None:
    """Without eps the scale of a row does not matter: not to a bit where it is a power of two."""
    x = random(4, 96)

    def y(x: Tensor) -> Tensor:
        return run(norm.operator("{}"), x, None, None, 0.0, 0.0, None)[0]

    assert_same_bits(y(8 * x), y(x))
    assert_same_bits(y(x * 2.0**-30), y(x))
    assert_same_bits(y(-x), -y(x))
    assert_near(y(3 * x), y(x).double())
    if norm.centred:
        x = (x * 1024).round() / 1024  # so that the shifts below are exact
        assert_near(y(x + 4), y(x).double())


@each_backend
@each_norm
def test_gradient_is_orthogonal_to_what_does_not_matter(norm: Norm, backend: Any) -> None:
    x, weight = random(6, 45, dtype=torch.float64) + 1, random(45, dtype=torch.float64)
    with ng.backend(backend):
        _, dx, _ = with_gradients(lambda x, w: norm(x, 45, w, eps=0.0), x, weight)
    assert dx.abs().max() > 0.1
    torch.testing.assert_close((dx * x).sum(-1), torch.zeros(6).double(), rtol=0, atol=1e-12)
    if norm.centred:
        torch.testing.assert_close(dx.sum(-1), torch.zeros(6).double(), rtol=0, atol=1e-12)


@every_run
@each_norm
def test_residual_form_is_the_sum_and_then_the_norm(norm: Norm, run: Any) -> None:
    """Bit for bit, where the sum is stored in float32; with a narrow x the result is rounded once more."""
    residual, weight, bias = random(5, 72, seed=1), random(72, seed=2), random(72, seed=3)
    for dtype in (torch.float32, torch.bfloat16):
        x = random(5, 72, dtype=dtype)
        y, stream = run(norm.operator("add_{}"), x, residual, weight, bias, 1e-5, 0.0, None)
        assert_same_bits(stream, x.float() + residual)
        (plain,) = run(norm.operator("{}"), stream, weight, bias, 1e-5, 0.0, None)
        assert_same_bits(y, plain.to(dtype))


@each_norm
def test_narrow_sum_is_rounded_after_the_norm_has_seen_it(norm: Norm) -> None:
    x, residual, weight = random(5, 72).bfloat16(), random(5, 72, seed=1).bfloat16(), random(72, seed=2)
    y, stream = norm.add(x, residual, weight)
    exact = x.float() + residual.float()
    assert_same_bits(stream, exact.bfloat16())
    assert_same_bits(y, norm(exact, 72, weight).bfloat16())
    assert not torch.equal(y, norm(stream, 72, weight))


@each_norm
@pytest.mark.parametrize("before", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("after", [torch.bfloat16, torch.float32], ids=str)
def test_residual_dtype(norm: Norm, before: torch.dtype, after: torch.dtype) -> None:
    x, residual, weight = random(5, 72).bfloat16(), random(5, 72, seed=1).to(before), random(72, seed=2)
    x.requires_grad_()
    residual.requires_grad_()
    y, stream = norm.add(x, residual, weight, residual_dtype=after)
    exact = x.float() + residual.float()
    assert_same_bits(stream.detach(), exact.to(after).detach())
    assert_same_bits(y.detach(), norm(exact, 72, weight).bfloat16().detach())
    (y.float().square().sum() + 3 * stream.float().sum()).backward()
    assert (x.grad.dtype, residual.grad.dtype) == (torch.bfloat16, before)
    truth = exact.detach().double().requires_grad_()
    (norm.torch(truth, (72,), weight.double()).square().sum() + 3 * truth.sum()).backward()
    for gradient in (x.grad, residual.grad):
        assert_near(gradient.bfloat16(), truth.grad)


@each_norm
def test_wide_result_of_a_narrow_input(norm: Norm) -> None:
    x, weight = random(5, 72).bfloat16(), random(72, seed=1).bfloat16()
    y, dx, dweight = with_gradients(lambda x, w: norm(x, 72, w, out_dtype=torch.float32), x, weight)
    wide = with_gradients(lambda x, w: norm(x, 72, w), x.float(), weight.float())
    assert_same_bits(y, wide[0])
    assert_near(dx, wide[1].double())
    assert_near(dweight, wide[2].double())
    y, stream = norm.add(x, x, weight, out_dtype=torch.float32)
    assert (y.dtype, stream.dtype) == (torch.float32, torch.bfloat16)
    assert_same_bits(y, norm(2 * x.float(), 72, weight.float()))


@every_run
def test_large_mean_and_tiny_variance(run: Any) -> None:
    """The variance is that of centred values; mean(x^2) - mean(x)^2 would have no digit left."""
    deviation, mean = 0.1, 1e4
    x = random(4, 512) * deviation + mean
    (y,) = run(registry["layer_norm"], x, None, None, 1e-5, 0.0, None)
    truth = F.layer_norm(x.double(), (512,))
    # What remains is the rounding of the mean, a few units in its last place.
    unit = 2.0 ** (13 - 23)
    torch.testing.assert_close(y.double(), truth, rtol=0.01, atol=3 * unit / deviation)


@every_run
@each_norm
def test_row_of_zeros(norm: Norm, run: Any) -> None:
    x, weight, bias = random(3, 40), random(40, seed=1), random(40, seed=2)
    x[1] = 0
    y, *statistics = run(norm.operator("{}_forward"), x, weight, bias, 1e-6, 0.0, None)
    assert_same_bits(y[1], bias)
    gradients = run(
        norm.operator("{}_backward"), random(3, 40, seed=4), x, *statistics, weight, bias, None, 0.0, True
    )
    assert all(gradient.isfinite().all() for gradient in gradients)


@every_run
@each_norm
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_not_finite_stays_in_its_row(norm: Norm, run: Any, dtype: torch.dtype, value: float) -> None:
    clean, weight = random(4, 72, dtype=dtype), random(72, seed=1)
    x, dy = clean.clone(), random(4, 72, seed=2, dtype=dtype)
    x[2, 70] = value
    others = [0, 1, 3]
    forward, backward = norm.operator("{}_forward"), norm.operator("{}_backward")
    y, *statistics = run(forward, x, weight, None, 1e-5, 0.0, None)
    expected, *expected_statistics = run_reference(forward, x, weight, None, 1e-5, 0.0, None)
    assert_near(y, expected.double())
    assert not y[2].isfinite().all()
    clean_y, *clean_statistics = run(forward, clean, weight, None, 1e-5, 0.0, None)
    assert_same_bits(y[others], clean_y[others])

    dx, dweight, _ = run(backward, dy, x, *statistics, weight, None, None, 0.0, True)
    clean_dx, *_ = run(backward, dy, clean, *clean_statistics, weight, None, None, 0.0, True)
    assert_same_bits(dx[others], clean_dx[others])
    assert not dx[2].isfinite().any()
    wrong, expected_wrong = (
        ~r[1].isfinite()
        for r in (
            (dx, dweight),
            run_reference(backward, dy, x, *expected_statistics, weight, None, None, 0.0, True),
        )
    )
    assert torch.equal(wrong, expected_wrong)
    assert wrong.any()


@every_run
@each_norm
def test_squares_that_overflow_give_zeros(norm: Norm, run: Any) -> None:
    """Beyond 1.8e19 the square of a float32 is infinite, so rstd is 0 and so is the row."""
    x = random(3, 40)
    x[1] *= 1e30
    (y,) = run(norm.operator("{}"), x, None, None, 1e-5, 0.0, None)
    assert (y[1] == 0).all()
    assert_near(y, run_reference(norm.operator("{}"), x, None, None, 1e-5, 0.0, None)[0].double())
    # The largest float16 is far from it: arithmetic is float32.
    large = (random(3, 40) * 1e4).half()
    call = (large, None, None, 1e-5, 0.0, None)
    (y,) = run(norm.operator("{}"), *call)
    assert_near(y, run_reference(norm.operator("{}"), *in_float64(call))[0])


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": lambda t: torch.stack([t, t], -1)[..., 1],
    "expanded": lambda t: t[..., :1].expand(t.shape),
    "reversed strides": lambda t: (
        t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))
    ),
}


@each_backend
@each_norm
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_arguments_in_any_layout(norm: Norm, layout: Callable[[Tensor], Tensor], backend: Any) -> None:
    x, residual, weight, bias = (
        random(3, 4, 40),
        random(3, 4, 40, seed=1),
        random(40, seed=2),
        random(40, seed=3),
    )
    calls: list[tuple[Callable[..., Any], tuple[Tensor, ...]]] = [
        (lambda x, w, b: norm(x, 40, w, b), (x, weight, bias)),
        (lambda x, w, b: norm(x, (4, 40), w.expand(4, 40), b.expand(4, 40)), (x, weight, bias)),
        (lambda x, r, w, b: torch.cat(norm.add(x, r, w, b)), (x, residual, weight, bias)),
    ]
    with ng.backend(backend):
        for call, tensors in calls:
            strided = [layout(tensor) for tensor in tensors]
            before = [tensor.clone() for tensor in strided]
            leaves = [tensor.clone().requires_grad_() for tensor in tensors]
            y = call(*(layout(leaf) for leaf in leaves))
            assert y.is_contiguous()
            assert_same_bits(y.detach(), call(*(tensor.contiguous() for tensor in strided)))
            dy = random(*y.shape, seed=9)
            y.backward(dy)
            packed = [tensor.clone().requires_grad_() for tensor in tensors]
            call(*(layout(tensor).contiguous() for tensor in packed)).backward(dy)
            for a, e in zip(leaves, packed, strict=True):
                assert_same_bits(a.grad, e.grad)
            for a, e in zip(strided, before, strict=True):
                assert torch.equal(a, e)


@each_norm
def test_empty_tensors(norm: Norm) -> None:
    for shape in ((0, 8), (4, 0), (2, 0, 8)):
        x, weight = random(*shape), random(shape[-1])
        y, dx, dweight = with_gradients(lambda x, w: norm(x, x.shape[-1], w), x, weight)
        assert y.shape == dx.shape == shape
        assert torch.equal(dweight, torch.zeros_like(weight))
        y, stream = norm.add(x, x, weight)
        assert y.shape == stream.shape == shape
