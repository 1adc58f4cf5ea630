"""Replays LayerNorm and RMSNorm behind a residual add, recorded from flash-attention (tests/golden/*/README.md)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.golden_files import files, read
from torch import Tensor

import narrowgauge as ng
from narrowgauge.nn import functional as ngf

NORMS: dict[str, Callable[..., Tensor]] = {"layernorm": ngf.layer_norm, "rmsnorm": ngf.rms_norm}
ADD_NORMS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "layernorm": ngf.add_layer_norm,
    "rmsnorm": ngf.add_rms_norm,
}
FILES = [path for folder in NORMS for path in files(folder, "prenorm_*.npz")]
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def assert_close(actual: Tensor | None, recorded: Tensor) -> None:
    assert actual is not None
    torch.testing.assert_close(actual, recorded, rtol=1e-12, atol=1e-12)


def test_every_case_is_there() -> None:
    assert len(FILES) == 4


@each_file
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_norm_of_a_sum(path: Path, backend: ng.ops.library.Backend) -> None:
    case, meta = read(path)
    x, residual, weight, bias = (
        case[name].clone().requires_grad_() for name in ("in_x", "in_residual", "param_weight", "param_bias")
    )
    branch = x
    if "in_rowscale" in case:
        branch = branch * case["in_rowscale"].unsqueeze(-1)
        branch = branch * case["in_dropout_keep_mask"] / (1 - meta["dropout_p"])
    with ng.backend(backend):
        y, stream = ADD_NORMS[path.parent.name](branch, residual, weight, bias=bias, eps=meta["eps"])
        (y * case["in_grad_y"] + stream * case["in_grad_residual_out"]).sum().backward()
    assert_close(y, case["out_y"])
    assert_close(stream, case["out_residual"])
    assert_close(x.grad, case["grad_x"])
    assert_close(residual.grad, case["grad_residual"])
    assert_close(weight.grad, case["grad_weight"])
    assert_close(bias.grad, case["grad_bias"])


@each_file
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_plain_norm_of_the_recorded_sum(path: Path, backend: ng.ops.library.Backend) -> None:
    case, meta = read(path)
    s, weight, bias = case["out_residual"], case["param_weight"], case["param_bias"]
    with ng.backend(backend):
        y = NORMS[path.parent.name](s, s.shape[-1], weight, bias=bias, eps=meta["eps"])
    assert_close(y, case["out_y"])
