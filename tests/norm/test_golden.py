"""Replays recorded LayerNorm and RMSNorm through the public functions (tests/golden/{layernorm,rmsnorm}/README.md)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.golden_files import files, read
from tests.tolerances import assert_same_bits
from torch import Tensor

import narrowgauge as ng
from narrowgauge.nn import functional as ngf

NORMS: dict[str, Callable[..., Any]] = {"layernorm": ngf.layer_norm, "rmsnorm": ngf.rms_norm}
ADD_NORMS: dict[str, Callable[..., Any]] = {"layernorm": ngf.add_layer_norm, "rmsnorm": ngf.add_rms_norm}
each_file = pytest.mark.parametrize(
    "path", [path for room in NORMS for path in files(room, "prenorm_*.npz")], ids=lambda path: path.stem
)
each_backend = pytest.mark.parametrize("backend", ["reference", "auto"])


def assert_close(actual: Tensor | None, recorded: Tensor) -> None:
    assert actual is not None
    torch.testing.assert_close(actual, recorded, rtol=1e-12, atol=1e-12)


def options(case: dict[str, Tensor], meta: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments that a file stands for."""
    given: dict[str, Any] = {
        "eps": meta["eps"],
        "weight_offset": float(meta.get("zero_centred_weight", False)),
    }
    names = {"in_rowscale": "rowscale", "in_dropout_keep_mask": "dropout_mask"}
    given |= {names[name]: case[name] for name in names if name in case}
    if meta.get("dropout_p"):
        given["dropout_p"] = meta["dropout_p"]
    return given


@each_file
@each_backend
def test_norm_of_a_sum(path: Path, backend: ng.ops.library.Backend) -> None:
    case, meta = read(path)
    leaves = {
        key: case[name].clone().requires_grad_()
        for key, name in {
            "x": "in_x",
            "residual": "in_residual",
            "weight": "param_weight",
            "bias": "param_bias",
            "x1": "in_x1",
            "weight1": "param_weight1",
            "bias1": "param_bias1",
        }.items()
        if name in case
    }
    given = options(case, meta)
    if "in_dropout_keep_mask1" in case:
        given["dropout_mask"] = (case["in_dropout_keep_mask"], case["in_dropout_keep_mask1"])
    with ng.backend(backend):
        y, *second, stream = ADD_NORMS[path.parent.name](**leaves, **given)
        loss = (y * case["in_grad_y"]).sum() + (stream * case["in_grad_residual_out"]).sum()
        for y1 in second:
            loss = loss + (y1 * case["in_grad_y1"]).sum()
        loss.backward()
    assert_close(y, case["out_y"])
    assert_close(stream, case["out_residual"])
    for y1 in second:
        assert_close(y1, case["out_y1"])
    for key, leaf in leaves.items():
        if f"grad_{key}" in case:
            assert_close(leaf.grad, case[f"grad_{key}"])
    # The post-norm form is the same without the sum.
    with ng.backend(backend), torch.no_grad():
        alone = ADD_NORMS[path.parent.name](**leaves, **given, prenorm=False)
    assert_close(alone[0] if second else alone, case["out_y"])


@each_file
@each_backend
def test_plain_norm_of_the_recorded_sum(path: Path, backend: ng.ops.library.Backend) -> None:
    case, meta = read(path)
    s, weight, bias = case["out_residual"], case["param_weight"], case["param_bias"]
    offset = options(case, meta)["weight_offset"]
    with ng.backend(backend):
        y = NORMS[path.parent.name](s, s.shape[-1], weight, bias=bias, eps=meta["eps"], weight_offset=offset)
    assert_close(y, case["out_y"])


@pytest.mark.parametrize("path", files("rmsnorm", "rms_original_*.npz"), ids=lambda path: path.stem)
def test_partial_norm_of_the_authors(path: Path) -> None:
    """Their eps is outside the root; where it is as small as 1e-8 that makes no difference to eight digits."""
    case, meta = read(path)
    if meta["eps"] > 1e-6:
        pytest.skip("an eps outside the root that can be seen is not offered")
    x, weight, bias = (case[name].clone().requires_grad_() for name in ("in_x", "param_weight", "param_bias"))
    partial = meta["p"] if 0 <= meta["p"] <= 1 else None
    y = ngf.rms_norm(x, x.shape[-1], weight, 0.0, bias=bias, partial=partial)
    (y * case["in_grad_y"]).sum().backward()
    near = {"rtol": 10 * meta["eps"], "atol": 10 * meta["eps"]}
    torch.testing.assert_close(y, case["out_y"], **near)
    for leaf, name in ((x, "grad_x"), (weight, "grad_weight"), (bias, "grad_bias")):
        torch.testing.assert_close(leaf.grad, case[name], **near)


@pytest.mark.parametrize("seed", range(3))
def test_bfloat16_of_a_zero_centred_weight(seed: int) -> None:
    """The recipe of `rms_bf16_offset1_residual_*`: float32 arithmetic on the un-rounded sum, rounded once."""
    generator = torch.Generator().manual_seed(seed)
    x, residual = (torch.randn(4, 65, generator=generator).bfloat16() for _ in range(2))
    weight = torch.randn(65, generator=generator).bfloat16()
    s = x.float() + residual.float()
    expected = s * torch.rsqrt(s.square().mean(-1, keepdim=True) + 1e-6) * (1 + weight.float())
    y, stream = ngf.add_rms_norm(x, residual, weight, 1e-6, weight_offset=1.0)
    assert_same_bits(stream, s.bfloat16())
    ulp = (y.view(torch.int16).int() - expected.bfloat16().view(torch.int16).int()).abs()
    assert ulp.max() <= 1
    assert (ulp > 0).float().mean() < 0.01
