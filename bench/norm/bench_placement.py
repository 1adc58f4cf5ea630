"""The junctions of the residual schemes: what stands between two sub-layers, beside the same in PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import narrowgauge.nn.functional as ng
from bench.harness import Case, Contest, Setting, compare, traffic

EPS = 1e-6


def ours_peri(f: Tensor, x: Tensor, w_out: Tensor, w_in: Tensor) -> tuple[Tensor, Tensor]:
    return ng.peri_add_norm(f, x, w_out, w_in, EPS)


def eager_peri(f: Tensor, x: Tensor, w_out: Tensor, w_in: Tensor) -> tuple[Tensor, Tensor]:
    x_new = x + F.rms_norm(f, w_out.shape, w_out, EPS)
    return F.rms_norm(x_new, w_in.shape, w_in, EPS), x_new


def two_fused_norms(f: Tensor, x: Tensor, w_out: Tensor, w_in: Tensor) -> tuple[Tensor, Tensor]:
    return ng.add_rms_norm(ng.rms_norm(f, w_out.shape[0], w_out, EPS), x, w_in, EPS)


def peri_case(shape: tuple[int, int], dtype: torch.dtype, backward: bool) -> Case:
    def build(setting: Setting) -> Contest:
        sizes = (shape, shape, (shape[1],), (shape[1],))
        inputs = [setting.random(*size, dtype=dtype, requires_grad=backward) for size in sizes]
        f = inputs[0].detach()
        moved = traffic([f] * (10 if backward else 4))
        rivals = {"our two kernels": two_fused_norms}
        return compare(
            setting, ours_peri, eager_peri, inputs, backward=backward, bytes_moved=moved, rivals=rivals
        )

    passes = "fwd+bwd" if backward else "fwd"
    detail = f"{passes} {shape[0]}x{shape[1]} {str(dtype).removeprefix('torch.')}"
    return Case("peri_add_norm", detail, build)


CASES = [
    peri_case(shape, dtype, backward)
    for backward in (False, True)
    for shape in ((4096, 4096), (256, 1024))
    for dtype in (torch.float32, torch.bfloat16)
]


def test_placement(case: Case, contest: Callable[[Case], None]) -> None:
    contest(case)
