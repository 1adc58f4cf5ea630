"""Calls of the operators of update rules that are worth testing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from narrowgauge.ops import Sample, SampleMaker
from narrowgauge.optim import codec, master

if TYPE_CHECKING:
    from narrowgauge.optim.elementwise import Rule

PARAM_UPDATES = ("nearest", "stochastic", "kahan", "split")


def row_count(p: Tensor, row_length: int) -> int:
    """How many rows a parameter has; one without elements has one."""
    return p.numel() // row_length if row_length else 1


class _Arguments:
    """Random arguments of one rule in one dtype."""

    def __init__(self, rule: Rule, make: SampleMaker, variant: int) -> None:
        self.rule, self.make, self.variant = rule, make, variant
        self.wide = torch.float64 if make.dtype is torch.float64 else torch.float32
        self.options = list(rule.sample_options)

    def lists(
        self, shapes: list[tuple[int, ...]], state_dtype: str, grad_dtype: torch.dtype | None
    ) -> list[Any]:
        make = self.make
        params = [make(*shape) for shape in shapes]
        grads = [make(*shape, dtype=grad_dtype) for shape in shapes]
        states: list[Tensor] = []
        scales: list[Tensor] = []
        for p in params:
            for signed in self.rule.signed[self.variant]:
                value = make(*p.shape, dtype=self.wide)
                value = value if signed else value.square()
                if state_dtype == "fp32":
                    states.append(value)
                    continue
                codes, scale = codec.encode(value.flatten(), state_dtype, signed)
                record = codec.FORMATS[state_dtype]
                states.append(codes.view(record.codes_shape(p.shape)))
                scales += [scale] if record.block_size else []
        steps = [make(dtype=torch.float32, scale=0.0) + i + 1 for i in range(len(params))]
        return [params, grads, states, scales, steps]

    def given(self, count: int) -> Tensor | None:
        columns = self.rule.given_of(self.variant)
        return self.make(count, columns, dtype=torch.float64).abs() + 0.5 if columns else None

    def scalar(self, value: float | None) -> Tensor | None:
        return None if value is None else self.make(dtype=torch.float32, scale=0.0) + value

    def step(
        self,
        shapes: list[tuple[int, ...]],
        *,
        state_dtype: str = "fp32",
        grad_dtype: torch.dtype | None = None,
        how: str = "nearest",
        split: torch.dtype = torch.int8,
        followed: bool = False,
        maximize: bool = False,
        lr: float | None = None,
        grad_scale: float | None = None,
        clip: float | None = None,
        found_inf: float | None = None,
    ) -> tuple[Any, ...]:
        lists = self.lists(shapes, state_dtype, grad_dtype)
        params = lists[0]
        rests: list[Tensor] = []
        if how == "kahan":
            rests = [self.make(*p.shape) * 1e-3 for p in params]
        if how == "split":
            rests = [
                master.split_master(self.make(*p.shape, dtype=torch.float32), split.itemsize * 8)[1]
                for p in params
            ]
        emas = [self.make(*p.shape, dtype=torch.float32) for p in params] if followed else []
        narrow = torch.bfloat16 if self.make.dtype is torch.float32 else torch.float32
        copies = (
            [torch.zeros_like(p, dtype=narrow) for p in params]
            if followed and self.wide is torch.float32
            else []
        )
        row_lengths = (
            [p.numel() // p.shape[0] if p.dim() and p.shape[0] else p.numel() for p in params]
            if self.rule.rows
            else []
        )
        rows = None
        if self.rule.rows:
            count = sum(row_count(p, length) for p, length in zip(params, row_lengths, strict=True))
            rows = self.make(count, dtype=self.wide).abs() + 0.5
        stochastic = how == "stochastic"
        indices, firsts = (
            (list(range(len(params))), [3 * i for i in range(len(params))]) if stochastic else ([], [])
        )
        return (
            *(
                *lists,
                rests,
                emas,
                copies,
                self.given(len(params)),
                rows,
                self.scalar(lr),
                1e-2,
                self.options,
            ),
            *(
                self.variant,
                codec.STATE_DTYPES.index(state_dtype),
                PARAM_UPDATES.index(how),
                maximize,
                followed,
                0.9,
            ),
            *(
                row_lengths,
                7,
                indices,
                firsts,
                self.scalar(grad_scale),
                self.scalar(clip),
                self.scalar(found_inf),
            ),
        )

    def sums(
        self,
        shapes: list[tuple[int, ...]],
        *,
        state_dtype: str = "fp32",
        by_rows: bool = False,
        clip: float | None = None,
    ) -> tuple[Any, ...]:
        lists = self.lists(shapes, state_dtype, None)
        lengths = [p.numel() // p.shape[0] for p in lists[0]] if by_rows else []
        return (
            *(*lists, self.given(len(shapes)), None, 1e-2, self.options, self.variant),
            *(
                codec.STATE_DTYPES.index(state_dtype),
                0,
                [],
                False,
                lengths,
                self.scalar(clip),
                self.scalar(clip),
            ),
        )


def step_samples(rule: Rule, make: SampleMaker) -> Iterator[Sample]:
    """Few for most rules: what the skeleton does is tested once, with AdamW (`tests/optim/test_skeleton.py`)."""
    main = _Arguments(rule, make, 0)
    yield Sample(
        main.step([(17, 9), (5,), (), (0, 3), (1,)]), "several shapes, among them a scalar and an empty one"
    )
    for variant in range(1, len(rule.signed)):
        yield Sample(_Arguments(rule, make, variant).step([(33, 9), (3,)]), f"variant {variant}")
    if make.dtype is not torch.float64 and rule.signed[0]:
        yield Sample(main.step([(300,), (5,)], state_dtype="int8"), "8-bit states")
    if rule.name != "adamw":
        return
    yield from _skeleton_samples(rule, make)


def _skeleton_samples(rule: Rule, make: SampleMaker) -> Iterator[Sample]:
    main = _Arguments(rule, make, 0)
    step = main.step
    yield Sample(
        step([(255,), (256,), (257,), (1023,), (1025,), (8193,)]), "around block and chunk boundaries"
    )
    yield Sample(step([(300,), (7,)], lr=0.03, grad_scale=3.0, clip=0.7, maximize=True), "scalars as tensors")
    yield Sample(step([(300,)], found_inf=1.0), "skipped because a gradient overflowed")
    yield Sample(step([(300,), (9,)], followed=True), "moving average, narrow copy and zeroed gradient")
    if make.dtype is torch.float64:
        return
    for state_dtype in ("bf16", "int8", "int4", "fp8", "int8_companded"):
        yield Sample(step([(257,), (33, 64), (3,)], state_dtype=state_dtype), f"{state_dtype} states")
    yield Sample(_Arguments(rule, make, 1).step([(700,)], state_dtype="int8"), "8-bit states with amsgrad")
    yield Sample(step([(300,), (5,)], grad_dtype=torch.bfloat16), "bfloat16 gradients")
    yield Sample(step([(300,), (5,)], grad_dtype=torch.float32), "float32 gradients")
    if make.dtype is not torch.float32:
        yield Sample(step([(258,), (20,)], how="kahan", followed=True), "Kahan's compensation")
    if make.dtype is torch.bfloat16:
        yield Sample(step([(258,), (2049,)], how="stochastic"), "stochastic rounding")
        yield Sample(
            step([(258,), (20,)], how="stochastic", state_dtype="int8"),
            "stochastic rounding with 8-bit states",
        )
        yield Sample(
            step([(258,), (20,)], how="stochastic", state_dtype="bf16"), "stochastic rounding of states too"
        )
        yield Sample(step([(258,), (20,)], how="split", followed=True), "a master split into 16 and 8 bits")
        yield Sample(step([(258,)], how="split", split=torch.int16), "a master split into 16 and 16 bits")


def sums_samples(rule: Rule, make: SampleMaker) -> Iterator[Sample]:
    variants = [variant for variant in range(len(rule.signed)) if rule.sums_of(variant)]
    main = _Arguments(rule, make, variants[0])
    yield Sample(
        main.sums([(17, 9), (5,), (0, 3), (2100,)]), "several shapes, an empty one, more than one piece"
    )
    yield Sample(main.sums([(3, 300), (40, 5), (1, 1)], by_rows=True, clip=0.7), "sums of rows")
    for variant in variants[1:]:
        yield Sample(_Arguments(rule, make, variant).sums([(33, 9)]), f"variant {variant}")
    if make.dtype is not torch.float64 and rule.signed[variants[0]]:
        yield Sample(main.sums([(3, 300)], state_dtype="int8", by_rows=True), "8-bit states")
