"""The normalization of TokenFormer's scores."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import narrowgauge.nn.functional as ng
from bench.harness import Case, Contest, Setting, compare

SHAPES = ((4096, 3072), (256, 768))  # tokens of an MLP and of a projection of the smallest model
DTYPES = (torch.float32, torch.bfloat16)


def eager_l2_gelu(s: Tensor) -> Tensor:
    return F.gelu(s * (math.sqrt(s.shape[-1]) / s.norm(dim=-1, keepdim=True)))


def eager_gelu_l2(s: Tensor) -> Tensor:
    e = F.gelu(s)
    return e * (math.sqrt(s.shape[-1]) / e.norm(dim=-1, keepdim=True))


CONTESTANTS = {"l2_gelu": (ng.l2_norm_gelu, eager_l2_gelu), "gelu_l2": (ng.gelu_l2_norm, eager_gelu_l2)}


def norm_case(name: str, shape: tuple[int, int], dtype: torch.dtype, backward: bool) -> Case:
    def build(setting: Setting) -> Contest:
        s = setting.random(*shape, dtype=dtype, requires_grad=backward)
        passes = 5 if backward else 2  # s, a; and da, s, ds
        return compare(setting, *CONTESTANTS[name], (s,), backward=backward, bytes_moved=passes * s.nbytes)

    passes = "fwd+bwd" if backward else "fwd"
    return Case("norm_gelu", f"{name} {passes} {shape[0]}x{shape[1]} {str(dtype)[6:]}", build)


CASES = [
    *(
        norm_case("l2_gelu", shape, dtype, backward)
        for backward in (False, True)
        for shape in SHAPES
        for dtype in DTYPES
    ),
    *(norm_case("gelu_l2", SHAPES[0], torch.float32, backward) for backward in (False, True)),
]


def test_tokenformer(case: Case, contest: Callable[[Case], None]) -> None:
    contest(case)
