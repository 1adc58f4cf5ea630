"""AdamW and Adam: 16 million parameters in 16 and in 1,000 tensors, and tiny tensors where only the call costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import narrowgauge as ng
from bench.harness import Case
from bench.optim.cases import TINY, cases, step_case, stock

STORAGE = ("bf16", "int8", "int4", "fp8", "fp8_expanded", "int8_companded")


def adamw(**options: Any) -> Any:
    return lambda params: ng.optim.AdamW(params, **options)


def bitsandbytes(params: list[torch.Tensor]) -> Any:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(params)


def torchao(params: list[torch.Tensor]) -> Any:
    from torchao.optim import AdamW8bit

    return AdamW8bit(params)


CASES = [
    *cases("adamw", adamw(), stock("AdamW")),
    *cases("adam", ng.optim.Adam, stock("Adam")),
    step_case("adamw", "1000 tensors of 64 float32", adamw(), stock("AdamW"), shapes=TINY),
    *(
        step_case(
            "adamw",
            f"16M in 16 tensors float32, {state_dtype} states",
            adamw(state_dtype=state_dtype),
            {
                **stock("AdamW"),
                **({"torchao 8-bit": torchao, "bitsandbytes": bitsandbytes} if state_dtype == "int8" else {}),
            },
            requires={"torchao 8-bit": "torchao", "bitsandbytes": "bitsandbytes"},
        )
        for state_dtype in STORAGE
    ),
    *(
        step_case(
            "adamw",
            f"16M in 16 tensors bfloat16, {how}",
            adamw(param_update=how),
            stock("AdamW"),
            dtype=torch.bfloat16,
        )
        for how in ("nearest", "stochastic", "kahan", "split")
    ),
    step_case("adamw", "16M in 16 tensors float32, cautious", adamw(cautious=True), {"AdamW": adamw()}),
]


def test_adamw(case: Case, contest: Callable[[Case], None]) -> None:
    contest(case)
