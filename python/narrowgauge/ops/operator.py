"""The operator record: one call declares a schema, its reference, and everything tests and benchmarks need of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from narrowgauge.ops import library

Tolerance = Literal["exact", "rounding"]

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

registry: dict[str, Operator] = {}


@dataclass(frozen=True)
class Sample:
    """One call worth testing: positional arguments, and why this shape or layout is here."""

    args: tuple[Any, ...]
    why: str


class SampleMaker:
    """Makes the tensors of samples: random, reproducible, of one dtype on one device."""

    def __init__(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> None:
        self.dtype = dtype
        self.device = torch.device(device)
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        """A tensor of `shape`, normally distributed with standard deviation `scale`."""
        values = torch.randn(shape, generator=self._generator, dtype=torch.float64) * scale
        return values.to(self.device, dtype or self.dtype)


class Operator:
    """A declared operator; calling it runs the fastest implementation there is for the arguments' device.

    Attributes:
        name: Name in ``torch.ops.narrowgauge``.
        reference: The pure-PyTorch function that defines the operator. It runs wherever there is no kernel.
        samples: Function of a `SampleMaker` that yields the calls worth testing.
        dtypes: Main dtypes the operator takes.
        tolerance: ``"exact"`` when all backends give the same bits, ``"rounding"`` when they agree to rounding.
    """

    def __init__(
        self,
        schema: str,
        reference: Callable[..., Any],
        samples: Callable[[SampleMaker], Iterable[Sample]],
        dtypes: tuple[torch.dtype, ...],
        tolerance: Tolerance,
        bytes_moved: Callable[..., int] | None,
    ) -> None:
        self.name = schema[: schema.index("(")]
        self.reference = reference
        self.samples = samples
        self.dtypes = dtypes
        self.tolerance = tolerance
        self._bytes_moved = bytes_moved
        self.__doc__ = reference.__doc__
        library.define(schema, reference)
        self.overload: torch._ops.OpOverload = getattr(torch.ops.narrowgauge, self.name).default

    def __call__(self, *args: Any) -> Any:
        if library.state.use_reference:
            return self.reference(*args)
        return self.overload(*args)

    def __repr__(self) -> str:
        return f"<operator {self.overload._schema}>"

    def sample_calls(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Iterator[Sample]:
        """The samples in one dtype on one device."""
        yield from self.samples(SampleMaker(dtype, device))

    def bytes_moved(self, *args: Any) -> int:
        """Bytes that must cross the memory bus: every argument read once, every result written once.

        A mutated argument counts twice. Operators for which this is not the minimum declare their own formula.
        """
        if self._bytes_moved is not None:
            return self._bytes_moved(*args)
        meta = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to("meta"), args)
        results = self.reference(*meta)
        total = sum(_bytes(tensor) for tensor in torch.utils._pytree.tree_leaves((args, results)))
        for value, declared in zip(args, self.overload._schema.arguments, strict=False):
            if declared.alias_info is not None and declared.alias_info.is_write:
                total += sum(_bytes(tensor) for tensor in torch.utils._pytree.tree_leaves(value))
        return total


def _bytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def operator(
    schema: str,
    *,
    samples: Callable[[SampleMaker], Iterable[Sample]],
    dtypes: tuple[torch.dtype, ...] = FLOATING,
    tolerance: Tolerance = "rounding",
    bytes_moved: Callable[..., int] | None = None,
) -> Callable[[Callable[..., Any]], Operator]:
    """Declares the decorated pure-PyTorch function as an operator.

    The function becomes the implementation on every device and dtype without a kernel, the shape function (it runs on
    meta tensors), and the truth that kernels are tested against. It must return fresh contiguous tensors.

    Args:
        schema: Name and signature in PyTorch's schema language, ``"name(Tensor x, float eps) -> Tensor"``.
        samples: Yields `Sample` objects from a `SampleMaker`.
        dtypes: Main dtypes to test.
        tolerance: See `Operator`.
        bytes_moved: Minimum memory traffic of a call; by default every argument and result once.
    """

    def declare(reference: Callable[..., Any]) -> Operator:
        record = Operator(schema, reference, samples, dtypes, tolerance, bytes_moved)
        registry[record.name] = record
        return record

    return declare
