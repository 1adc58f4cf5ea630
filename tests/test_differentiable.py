"""What every differentiable operator must satisfy. Wiring a gradient adds its tests here by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.backends import in_float64
from tests.tolerances import assert_near, assert_same_bits
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

import narrowgauge as ng
from narrowgauge.ops import Differentiable, Sample, library
from narrowgauge.ops.autograd import differentiables

needs_native = pytest.mark.skipif(
    not library.state.cpu.loaded, reason=f"CPU library {library.state.cpu.reason}"
)
each_operator = pytest.mark.parametrize(
    "wired", [pytest.param(d, id=d.name) for d in differentiables.values()]
)
each_backend = pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])


def is_differentiable(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.is_floating_point()


def samples(wired: Differentiable, dtype: torch.dtype, few: bool = False) -> Iterator[Sample]:
    """All samples, or a few small ones with rows of several elements."""
    count = 0
    for sample in wired.inference.sample_calls(dtype):
        tensors = [argument for argument in sample.args if isinstance(argument, Tensor)]
        small = all(0 < tensor.numel() <= 300 for tensor in tensors) and tensors[0].shape[-1] > 1
        if few and (count == 6 or not small):
            continue
        count += 1
        yield sample
    assert count


def fresh(args: tuple[Any, ...], wanted: Callable[[int], bool] = lambda i: True) -> tuple[Any, ...]:
    """Copies of the arguments; those wanted require grad."""
    return tuple(
        a.detach().clone().requires_grad_(is_differentiable(a) and wanted(i)) if isinstance(a, Tensor) else a
        for i, a in enumerate(args)
    )


def results_of(call: Callable[..., Any], args: tuple[Any, ...]) -> list[Tensor]:
    return tree_leaves(call(*args))


def directions(results: list[Tensor]) -> list[Tensor]:
    """Gradients of the results: random, the same for the same shapes."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(r.shape, generator=generator, dtype=torch.float64).bfloat16().to(r.dtype) for r in results
    ]


def gradients(
    call: Callable[..., Any],
    args: tuple[Any, ...],
    used: Callable[[int], bool] = lambda i: True,
    layout: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> list[Tensor | None]:
    """Gradient of every argument that requires grad, for random gradients of the used results."""
    results = results_of(call, args)
    outer = [layout(gradient) for gradient in directions(results)]
    kept = [i for i in range(len(results)) if used(i)]
    inputs = [argument for argument in args if isinstance(argument, Tensor) and argument.requires_grad]
    return list(
        torch.autograd.grad([results[i] for i in kept], inputs, [outer[i] for i in kept], allow_unused=True)
    )


def truth(wired: Differentiable, sample: Sample, **options: Any) -> list[Tensor | None]:
    """The gradients PyTorch derives from the reference in float64."""
    return gradients(wired.inference.reference, fresh(in_float64(sample.args)), **options)


def assert_all_near(actual: list[Tensor | None], expected: list[Tensor | None], why: str) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if a is None or e is None:
            assert (0 if a is None else a.count_nonzero()) == (0 if e is None else e.count_nonzero()) == 0, (
                why
            )
        else:
            assert_near(a, e, f"{why}, gradient {i}")


@each_backend
@each_operator
def test_gradcheck(wired: Differentiable, backend: library.Backend) -> None:
    with ng.backend(backend):
        for sample in samples(wired, torch.float64):
            args = fresh(sample.args)
            sizes = [a.numel() for a in args if is_differentiable(a)]
            if min(sizes) > 0:
                # A small step, because one sample has values of 1e-4.
                assert torch.autograd.gradcheck(wired, args, eps=1e-7, fast_mode=max(sizes) > 100), sample.why


@each_backend
@each_operator
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_are_near_those_of_the_float64_reference(
    wired: Differentiable, dtype: torch.dtype, backend: library.Backend
) -> None:
    for sample in samples(wired, dtype):
        args = fresh(sample.args)
        with ng.backend(backend):
            actual = gradients(wired, args)
            sum_is_rounded = len(results_of(wired, args)) > 1 and dtype.itemsize == 2
        inputs = [a for a in args if is_differentiable(a)]
        assert [(g.dtype, g.shape) for g in actual] == [(a.dtype, a.shape) for a in inputs], sample.why
        if sum_is_rounded:
            # The backward starts from the sum that was returned. Its rounding reaches float32 gradients too, and is
            # larger than the spread of a row of one element.
            if args[0].shape[-1] == 1:
                continue
            actual = [gradient.to(dtype) for gradient in actual]
        assert_all_near(actual, truth(wired, sample), sample.why)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded": lambda t: t.flatten()[:1].expand(t.numel()).view(t.shape),
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": lambda t: torch.stack([t, t], -1)[..., 1],
}


@each_backend
@each_operator
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_output_gradients_in_any_layout(
    wired: Differentiable, layout: Callable[[Tensor], Tensor], backend: library.Backend
) -> None:
    with ng.backend(backend):
        for sample in samples(wired, torch.float32, few=True):
            args = fresh(sample.args)
            plain = gradients(wired, args, layout=lambda t: layout(t).contiguous())
            for a, e in zip(gradients(wired, args, layout=layout), plain, strict=True):
                assert_same_bits(a, e, sample.why)


@each_backend
@each_operator
def test_one_argument_that_requires_grad_gets_the_gradient_it_gets_among_all(
    wired: Differentiable, backend: library.Backend
) -> None:
    with ng.backend(backend):
        for sample in samples(wired, torch.bfloat16, few=True):
            together = gradients(wired, fresh(sample.args))
            positions = [i for i, argument in enumerate(sample.args) if is_differentiable(argument)]
            for position, expected in zip(positions, together, strict=True):
                args = fresh(sample.args, lambda i, position=position: i == position)
                results = results_of(wired, args)
                torch.autograd.backward(results, directions(results))
                assert_same_bits(args[position].grad, expected, f"{sample.why}, argument {position}")
                others = [args[i] for i in positions if i != position]
                assert all(other.grad is None for other in others), sample.why


@each_backend
@each_operator
def test_results_that_are_not_used(wired: Differentiable, backend: library.Backend) -> None:
    for sample in samples(wired, torch.float32, few=True):
        for only in range(len(results_of(wired, sample.args))):
            with ng.backend(backend):
                actual = gradients(wired, fresh(sample.args), used=lambda i, only=only: i == only)
            expected = truth(wired, sample, used=lambda i, only=only: i == only)
            assert_all_near(actual, expected, f"{sample.why}, only result {only}")


@each_backend
@each_operator
def test_arguments_and_what_is_saved_stay_as_they_are(
    wired: Differentiable, backend: library.Backend
) -> None:
    with ng.backend(backend):
        for sample in samples(wired, torch.float32, few=True):
            args = fresh(sample.args)
            results = results_of(wired, args)
            first_results = [result.detach().clone() for result in results]
            inputs = [a for a in args if is_differentiable(a)]
            outer = directions(results)
            first, second = (torch.autograd.grad(results, inputs, outer, retain_graph=True) for _ in range(2))
            for a, b in [
                *zip(first, second, strict=True),
                *zip(first_results, results, strict=True),
                *zip(outer, directions(results), strict=True),
                *((a, b) for a, b in zip(args, sample.args, strict=True) if isinstance(a, Tensor)),
            ]:
                assert_same_bits(a.detach(), b.detach(), sample.why)


@each_operator
def test_the_same_call_gives_the_same_bits(wired: Differentiable) -> None:
    for sample in samples(wired, torch.float32):
        for a, b in zip(
            gradients(wired, fresh(sample.args)), gradients(wired, fresh(sample.args)), strict=True
        ):
            assert_same_bits(a, b, sample.why)


@each_operator
def test_gradients_do_not_share_memory(wired: Differentiable) -> None:
    for sample in samples(wired, torch.float32, few=True):
        for used in range(len(results_of(wired, sample.args))):
            args = fresh(sample.args)
            results = results_of(wired, args)
            torch.autograd.backward(results[used], directions(results)[used])
            grads = [a.grad for a in args if is_differentiable(a) and a.grad is not None]
            assert len({grad.data_ptr() for grad in grads}) == len(grads), sample.why


@each_operator
def test_what_backward_needs_must_not_be_overwritten(wired: Differentiable) -> None:
    """PyTorch notices, because the tensors are saved the ordinary way."""
    sample = next(samples(wired, torch.float32, few=True))
    args = fresh(sample.args)
    first, *rest = args
    changed = first * 1
    results = results_of(wired, (changed, *rest))
    for tensor in (changed, *results):  # a backward starts from arguments, or from results
        tensor.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        results[0].sum().backward()


@each_operator
def test_no_graph_where_none_is_wanted(wired: Differentiable) -> None:
    sample = next(samples(wired, torch.float32, few=True))
    args = fresh(sample.args)
    with_graph = [result.detach() for result in results_of(wired, args)]
    assert all(result.requires_grad for result in results_of(wired, args))
    with torch.no_grad():
        without = results_of(wired, args)
    with torch.inference_mode():
        inference = results_of(wired, args)
    plain = results_of(wired, sample.args)
    for results in (without, inference, plain):
        for result, expected in zip(results, with_graph, strict=True):
            assert result.grad_fn is None
            assert not result.requires_grad
            assert_same_bits(result, expected)


@each_backend
@each_operator
def test_double_backward_is_refused_and_the_first_order_stays_right(
    wired: Differentiable, backend: library.Backend
) -> None:
    with ng.backend(backend):
        for sample in samples(wired, torch.float32, few=True):
            args = fresh(sample.args)
            results = results_of(wired, args)
            inputs = [a for a in args if is_differentiable(a)]
            first = torch.autograd.grad(results, inputs, directions(results), create_graph=True)
            for a, e in zip(first, gradients(wired, fresh(sample.args)), strict=True):
                assert_same_bits(a.detach(), e, sample.why)
            for gradient in first:
                with pytest.raises(
                    RuntimeError, match=f"narrowgauge.{wired.name} cannot be differentiated twice"
                ):
                    gradient.square().sum().backward(retain_graph=True)


@each_backend
@each_operator
def test_compiled_whole(wired: Differentiable, backend: library.Backend) -> None:
    torch._dynamo.reset()  # one code object serves all operators, and PyTorch limits its recompilations
    compiled = torch.compile(wired, fullgraph=True, backend="aot_eager", dynamic=False)
    with ng.backend(backend):
        for sample in list(samples(wired, torch.float32, few=True))[-2:]:
            args = fresh(sample.args)
            for a, e in zip(results_of(compiled, args), results_of(wired, args), strict=True):
                assert a.grad_fn is not None
                assert_near(a.detach(), e.detach().double(), sample.why)
            expected = [None if g is None else g.double() for g in gradients(wired, args)]
            assert_all_near(gradients(compiled, args), expected, sample.why)


@each_operator
def test_compiled_once_for_all_row_counts(wired: Differentiable) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(wired, fullgraph=True, backend=counter, dynamic=True)
    *_, sample = samples(wired, torch.float32, few=True)
    rows = max(a.shape[0] for a in sample.args if isinstance(a, Tensor) and a.dim() > 1)
    frames = []
    for count in (rows, rows - 1, rows - 2):
        args = fresh(tuple(a[:count] if isinstance(a, Tensor) and a.dim() > 1 else a for a in sample.args))
        expected = [None if g is None else g.double() for g in gradients(wired, args)]
        assert_all_near(gradients(compiled, args), expected, sample.why)
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1] > 0


@each_backend
@each_operator
def test_autocast_changes_nothing(wired: Differentiable, backend: library.Backend) -> None:
    with ng.backend(backend):
        for dtype in (torch.float32, torch.bfloat16):
            for sample in samples(wired, dtype, few=True):
                args = fresh(sample.args)
                plain, expected = results_of(wired, args), gradients(wired, args)
                with torch.autocast("cpu", torch.bfloat16):
                    inside = results_of(wired, args)
                    actual = gradients(wired, args)
                for a, e in zip([*inside, *actual], [*plain, *expected], strict=True):
                    assert_same_bits(a.detach(), e.detach(), sample.why)


def loss_of(wired: Differentiable, x: Tensor, rest: tuple[Any, ...]) -> Callable[[Tensor], Tensor]:
    outer = directions(results_of(wired, (x, *rest)))

    def loss(x: Tensor) -> Tensor:
        return sum((r * d).sum() for r, d in zip(results_of(wired, (x, *rest)), outer, strict=True))

    return loss


@each_operator
def test_functional_transforms(wired: Differentiable) -> None:
    """grad, jacrev, vmap and forward mode, all of the first argument, beside the ordinary gradient."""
    *_, sample = (s for s in samples(wired, torch.float64, few=True) if s.args[0].dim() == 2)
    x, *rest = sample.args
    expected = gradients(wired, fresh(sample.args, lambda i: i == 0))[0]
    loss = loss_of(wired, x, tuple(rest))
    assert_near(torch.func.grad(loss)(x), expected)
    assert_near(torch.func.jacrev(loss)(x), expected)

    tangent = torch.randn_like(x)
    derivative = (expected * tangent).sum()
    assert_near(torch.func.jvp(loss, (x,), (tangent,))[1], derivative)
    with forward_ad.dual_level():
        assert_near(forward_ad.unpack_dual(loss(forward_ad.make_dual(x, tangent))).tangent, derivative)

    batched = torch.stack([x, 2 * x, -x])
    rows = torch.func.vmap(lambda one: wired(one, *rest))(batched)
    gradient_rows = torch.func.vmap(torch.func.grad(loss))(batched)
    for i, one in enumerate(batched):
        for a, e in zip(tree_leaves(rows), results_of(wired, (one, *rest)), strict=True):
            assert_near(a[i], e)
        assert_near(gradient_rows[i], gradients(wired, fresh((one, *rest), lambda i: i == 0))[0])
