"""Running an operator on every implementation there is, from one test."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.emulator.loading import load_emulator
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from narrowgauge.ops import Operator, library

Run = Callable[..., list[Tensor]]


def results_of(record: Operator, call: Callable[..., Any], args: tuple[Any, ...]) -> list[Tensor]:
    """Calls with private copies of the arguments; returns the results, then the arguments the call may change."""
    args = tree_map_only(Tensor, lambda t: t.detach().clone(), args)
    results = tree_leaves(call(*args))
    for value, declared in zip(args, record.overload._schema.arguments, strict=True):
        if declared.alias_info is not None and declared.alias_info.is_write:
            results += tree_leaves(value)
    return [result for result in results if isinstance(result, Tensor)]


def run_reference(record: Operator, *args: Any) -> list[Tensor]:
    return results_of(record, record.reference, args)


def run_cpu(isa: str) -> Run:
    def run(record: Operator, *args: Any) -> list[Tensor]:
        before = library.cpu_isa()
        library.set_cpu_isa(isa)
        try:
            return results_of(record, record.overload, args)
        finally:
            library.set_cpu_isa(before)

    return run


def run_gpu(record: Operator, *args: Any) -> list[Tensor]:
    args = tree_map_only(Tensor, lambda t: t.cuda(), args)
    return [result.cpu() for result in results_of(record, record.overload, args)]


_CARRIERS = {torch.bfloat16: torch.uint16, torch.float16: torch.uint16}
_CARRIERS |= {torch.float8_e4m3fn: torch.uint8, torch.float8_e5m2: torch.uint8}


def to_emulator(value: Any, offset: int = 0) -> Any:
    """A torch argument as the emulator takes it; `offset` misaligns a tensor by so many elements."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, (list, tuple)):
        return [to_emulator(item, offset) for item in value]
    if not isinstance(value, Tensor):
        return value
    carrier = _CARRIERS.get(value.dtype, value.dtype)
    name = str(value.dtype).removeprefix("torch.")
    return load_emulator().Tensor(value.detach().contiguous().view(carrier).numpy(), name, offset)


def from_emulator(value: Any) -> Tensor:
    """An emulator tensor as a torch tensor."""
    return torch.from_numpy(value.numpy()).view(getattr(torch, value.dtype))


def run_emulated(record: Operator, *args: Any, offset: int = 0, seed: int = 0) -> list[Tensor]:
    emulator = load_emulator()
    emulator.set_schedule(seed)
    converted = [to_emulator(argument, offset) for argument in args]
    results = tree_leaves(getattr(emulator.ops, record.name)(*converted))
    for value, declared in zip(converted, record.overload._schema.arguments, strict=True):
        if declared.alias_info is not None and declared.alias_info.is_write:
            results += tree_leaves(value)
    return [from_emulator(result) for result in results if result is not None]


REQUIRE_NATIVE = os.environ.get("NARROWGAUGE_REQUIRE_NATIVE") == "1"


def native_backends() -> list[Any]:
    """pytest parameters: each CPU instruction set, the emulated CUDA kernels, and the GPU."""
    isas = library.available_cpu_isas()
    missing = pytest.mark.skipif(
        not isas and not REQUIRE_NATIVE, reason=f"CPU library {library.state.cpu.reason}"
    )
    cpu = [pytest.param(run_cpu(isa), id=f"cpu-{isa}", marks=missing) for isa in isas or ["baseline"]]
    no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    return [
        *cpu,
        pytest.param(run_emulated, id="emulated", marks=pytest.mark.emulator),
        pytest.param(run_gpu, id="gpu", marks=[pytest.mark.gpu, no_gpu]),
    ]


def all_backends() -> list[Any]:
    """`native_backends` and the reference."""
    return [pytest.param(run_reference, id="reference"), *native_backends()]


def in_float64(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with every floating-point tensor and dtype widened: on them a reference computes the truth."""
    leaves, structure = tree_flatten(args)
    wide = []
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            leaf = leaf.double()
        elif isinstance(leaf, torch.dtype):
            leaf = torch.float64
        wide.append(leaf)
    return tree_unflatten(wide, structure)
