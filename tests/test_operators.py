"""What every registered operator must satisfy, on every backend. Adding an operator adds its tests here by itself."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from tests.backends import all_backends, in_float64, native_backends, results_of, run_emulated, run_reference
from tests.tolerances import assert_near, assert_same_bits
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

import narrowgauge  # noqa: F401 (registers the operators)
from narrowgauge.ops import Operator, Sample, library, registry

# The sanitizers watch memory, for which two orders of the threads are enough: `make asan` asks for fewer.
SCHEDULES = int(os.environ.get("NARROWGAUGE_EMULATOR_SCHEDULES", "8"))

RECORDS = [pytest.param(record, id=name) for name, record in sorted(registry.items())]


def calls(record: Operator) -> list[Any]:
    return [pytest.param(record, dtype, id=f"{record.name}-{str(dtype)[6:]}") for dtype in record.dtypes]


CALLS = [call for _, record in sorted(registry.items()) for call in calls(record)]
needs_native = pytest.mark.skipif(
    not library.state.cpu.loaded, reason=f"CPU library {library.state.cpu.reason}"
)


def check(record: Operator, sample: Sample, actual: list[Tensor]) -> None:
    """The results are the reference's bit for bit, or near the same reference in float64."""
    if record.tolerance == "exact":
        expected, compare = run_reference(record, *sample.args), assert_same_bits
    else:
        expected, compare = run_reference(record, *in_float64(sample.args)), assert_near
    assert len(actual) == len(expected)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        compare(a, e, f"{sample.why}, result {i}")


@pytest.mark.parametrize("run", all_backends())
@pytest.mark.parametrize(("record", "dtype"), CALLS)
def test_values(record: Operator, dtype: torch.dtype, run: Any) -> None:
    for sample in record.sample_calls(dtype):
        check(record, sample, run(record, *sample.args))


@pytest.mark.parametrize("run", native_backends())
@pytest.mark.parametrize(("record", "dtype"), CALLS)
def test_results_have_the_shapes_and_dtypes_of_the_reference(
    record: Operator, dtype: torch.dtype, run: Any
) -> None:
    for sample in record.sample_calls(dtype):
        for actual, expected in zip(
            run(record, *sample.args), run_reference(record, *sample.args), strict=True
        ):
            assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), sample.why


@pytest.mark.emulator
@pytest.mark.parametrize(("record", "dtype"), CALLS)
def test_emulated_bits_do_not_depend_on_the_schedule(record: Operator, dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.bfloat16):
        pytest.skip(
            "the schedule does not depend on the dtype; float32 and bfloat16 cover both vector widths"
        )
    for sample in record.sample_calls(dtype):
        first = run_emulated(record, *sample.args, seed=1)
        for seed in range(2, SCHEDULES + 1):
            for a, b in zip(first, run_emulated(record, *sample.args, seed=seed), strict=True):
                assert_same_bits(b, a, f"{sample.why}, schedule {seed}")


@needs_native
@pytest.mark.parametrize(("record", "dtype"), CALLS)
def test_bits_do_not_depend_on_threads_or_instruction_set(record: Operator, dtype: torch.dtype) -> None:
    threads, isa = torch.get_num_threads(), library.cpu_isa()
    try:
        for sample in record.sample_calls(dtype):
            torch.set_num_threads(1)
            first = results_of(record, record.overload, sample.args)
            for count, name in [(2, isa), (3, isa), *((2, other) for other in library.available_cpu_isas())]:
                torch.set_num_threads(count)
                library.set_cpu_isa(name)
                for a, b in zip(first, results_of(record, record.overload, sample.args), strict=True):
                    assert_same_bits(b, a, f"{sample.why}, {count} threads, {name}")
    finally:
        torch.set_num_threads(threads)
        library.set_cpu_isa(isa)


def misaligned(tensor: Tensor) -> Tensor:
    """The same values one element past an aligned address."""
    storage = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    return storage[1:].view(tensor.shape).copy_(tensor)


@needs_native
@pytest.mark.parametrize(("record", "dtype"), CALLS)
def test_misaligned_arguments(record: Operator, dtype: torch.dtype) -> None:
    for sample in record.sample_calls(dtype):
        args = tree_map_only(Tensor, misaligned, sample.args)
        results = tree_leaves(record.overload(*args))
        for value, declared in zip(args, record.overload._schema.arguments, strict=True):
            if declared.alias_info is not None and declared.alias_info.is_write:
                results += tree_leaves(value)
        check(record, sample, [result for result in results if isinstance(result, Tensor)])


@pytest.mark.emulator
@pytest.mark.parametrize(("record", "dtype"), CALLS)
def test_misaligned_arguments_emulated(record: Operator, dtype: torch.dtype) -> None:
    for sample in record.sample_calls(dtype):
        check(record, sample, run_emulated(record, *sample.args, offset=1))


@pytest.mark.parametrize("record", RECORDS)
def test_opcheck(record: Operator) -> None:
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    for sample in record.sample_calls(record.dtypes[0]):
        results = run_reference(record, *sample.args)
        tensors = [leaf for leaf in tree_leaves((sample.args, results)) if isinstance(leaf, Tensor)]
        if any(bool(tensor.float().isnan().any()) for tensor in results):
            continue  # opcheck compares without regard for NaN
        # test_schema compares tensors by multiplying them, which PyTorch's CPU float8 cannot.
        float8 = any(tensor.is_floating_point() and tensor.dtype.itemsize == 1 for tensor in tensors)
        torch.library.opcheck(record.overload, sample.args, test_utils=checks[1:] if float8 else checks)


@needs_native
@pytest.mark.parametrize("record", RECORDS)
def test_kernels_refuse_arguments_that_are_not_contiguous(record: Operator) -> None:
    sample = next(iter(record.sample_calls(record.dtypes[0])))
    for i, argument in enumerate(sample.args):
        if not isinstance(argument, Tensor) or argument.dim() == 0 or argument.numel() < 2:
            continue
        strided = torch.stack([argument, argument], -1)[..., 0]
        assert not strided.is_contiguous()
        args = (*sample.args[:i], strided, *sample.args[i + 1 :])
        with pytest.raises(RuntimeError, match="contiguous"):
            record.overload(*args)


@pytest.mark.parametrize("record", RECORDS)
def test_bytes_moved_counts_arguments_and_results(record: Operator) -> None:
    for sample in record.sample_calls(record.dtypes[0]):
        tensors = [leaf for leaf in tree_leaves(sample.args) if isinstance(leaf, Tensor)]
        read = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        assert record.bytes_moved(*sample.args) >= read, sample.why


@pytest.mark.parametrize("record", RECORDS)
def test_samples_say_why_and_cover_the_hard_shapes(record: Operator) -> None:
    samples = list(record.sample_calls(record.dtypes[0]))
    tensors = [leaf for sample in samples for leaf in tree_leaves(sample.args) if isinstance(leaf, Tensor)]
    assert all(sample.why for sample in samples)
    assert any(tensor.numel() == 0 for tensor in tensors), "no empty tensor among the samples"
    assert any(tensor.numel() % 2 == 1 and tensor.numel() > 1 for tensor in tensors), "no odd size"
