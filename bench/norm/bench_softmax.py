"""Softmax beside PyTorch's and its own other forms: short rows, rows in the cache, rows out of it, one long row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import narrowgauge.nn.functional as ng
from bench.harness import Case, Contest, Setting, compare
from narrowgauge.ops import registry

FORMS = ("two_pass", "online", "three_pass")


def _bytes(x: Tensor, backward: bool) -> int:
    """x read and y written; with the gradient also y and dy read and dx written."""
    return registry["softmax"].bytes_moved(x, None, False, False, "auto", None) + (
        3 * x.nbytes if backward else 0
    )


def _build(
    shape: tuple[int, ...], dtype: torch.dtype, backward: bool = False, forms: bool = False, log: bool = False
) -> Callable[[Setting], Contest]:
    def build(setting: Setting) -> Contest:
        x = setting.random(*shape, dtype=dtype, requires_grad=backward)
        rivals = {
            f"narrowgauge {form}": (lambda x, form=form: ng.softmax(x, algorithm=form))
            for form in FORMS
            if forms
        }
        return compare(
            setting,
            ng.log_softmax if log else ng.softmax,
            lambda x: torch.log_softmax(x, -1) if log else torch.softmax(x, -1),
            [x],
            backward=backward,
            bytes_moved=_bytes(x, backward),
            rivals=rivals,
        )

    return build


SHAPES = ((16384, 64), (256, 4096), (4096, 4096), (8, 4194304), (1, 16777216))
CASES = (
    [
        Case("softmax", f"{'x'.join(map(str, shape))} {str(dtype)[6:]}", _build(shape, dtype, False, True))
        for shape in SHAPES
        for dtype in (torch.float32, torch.bfloat16)
    ]
    + [
        Case(
            "softmax",
            f"{'x'.join(map(str, shape))} {str(dtype)[6:]} backward",
            _build(shape, dtype, True, False),
        )
        for shape in ((256, 4096), (4096, 4096))
        for dtype in (torch.float32, torch.bfloat16)
    ]
    + [
        Case("log_softmax", f"{rows}x{columns} {str(dtype)[6:]}", _build((rows, columns), dtype, log=True))
        for rows, columns in ((16384, 64), (1024, 1024), (4096, 4096))
        for dtype in (torch.float32, torch.bfloat16)
    ]
)
