"""The 8-bit codec of optimizer states: its maps, and every float near a midpoint on every backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.backends import all_backends, native_backends
from tests.tolerances import assert_same_bits
from torch import Tensor

from narrowgauge.optim import codec
from narrowgauge.optim.adamw import adamw_op

GOLDEN = Path(__file__).parents[1] / "golden"


def nearest(x: Tensor, signed: bool) -> Tensor:
    """The code of the nearest entry by exhaustive search in float64, the upper one of two equally near."""
    distance = (x.double()[:, None] - codec.dynamic_map(signed).double()).abs()
    return (255 - distance.flip(1).argmin(1)).to(torch.uint8)


def hard_values(signed: bool) -> Tensor:
    """Map entries, midpoints, and the floats around both, in blocks that each contain 1."""
    exact = codec.dynamic_map(signed).double()
    corners = torch.cat([exact, (exact[1:] + exact[:-1]) / 2]).float()
    values = [corners]
    for direction in (-2.0, 2.0):
        shifted = corners
        for _ in range(3):
            shifted = torch.nextafter(shifted, torch.tensor(direction))
            values.append(shifted)
    values.append(torch.logspace(-30, 0, 5000) * (torch.randn(5000).sign() if signed else 1))
    x = torch.cat(values).clamp(-1 if signed else 0, 1)
    x = torch.nn.functional.pad(x, (0, -len(x) % 255)).view(-1, 255)
    return torch.cat([torch.ones(len(x), 1), x], 1).flatten()


@pytest.mark.parametrize("signed", [True, False])
def test_maps_are_those_of_bitsandbytes_and_torchao(signed: bool) -> None:
    recorded = np.load(GOLDEN / "bnb8bit/dynamic_maps.npz")
    word = "signed" if signed else "unsigned"
    ours = codec.dynamic_map(signed).numpy()
    np.testing.assert_array_equal(ours, recorded[f"qmap_{word}"])
    np.testing.assert_array_equal(ours, recorded[f"qmap_dynamic_8bit_{word}_torchao"])


@pytest.mark.parametrize("signed", [True, False])
def test_reference_takes_the_nearest_entry(signed: bool) -> None:
    x = hard_values(signed)
    codes, scale = codec.encode_state(x, signed=signed)
    assert torch.equal(scale, torch.ones_like(scale))
    assert torch.equal(codes, nearest(x, signed))


@pytest.mark.parametrize("signed", [True, False])
def test_codes_survive_a_round_trip(signed: bool) -> None:
    codes = torch.arange(256).to(torch.uint8)
    x = codec.decode_state(codes, torch.tensor([3.7]), signed=signed)
    again, scale = codec.encode_state(x, signed=signed)
    assert torch.equal(again, codes)
    assert scale.item() == pytest.approx(3.7)


def test_special_blocks() -> None:
    zero, tiny, nan, inf = torch.zeros(256), torch.full((256,), 1e-15), torch.ones(256), torch.ones(256)
    nan[3], inf[255] = torch.nan, -torch.inf
    codes, scale = codec.encode_state(torch.cat([zero, tiny, nan, inf]), signed=True)
    assert scale[0] == 0
    assert scale[1] == torch.tensor(1e-15)
    assert scale[2:].isnan().all()
    assert (codes[512:] == 0).all()
    decoded = codec.decode_state(codes, scale, signed=True)
    assert (decoded[:256] == 0).all()
    assert decoded[512:].isnan().all()


def test_strided_tensors_are_coded_in_the_order_of_memory() -> None:
    x = torch.randn(8, 3, 16, 16).to(memory_format=torch.channels_last)
    codes, scale = codec.encode_state(x, signed=True)
    expected, expected_scale = codec.encode_state(x.permute(0, 2, 3, 1).reshape(-1), signed=True)
    assert codes.stride() == x.stride()
    assert torch.equal(codes.permute(0, 2, 3, 1).reshape(-1), expected)
    assert torch.equal(scale, expected_scale)


def step_of(grad: Tensor) -> tuple[Any, ...]:
    """Arguments under which AdamW stores the gradient as first moment and its square as second."""
    codes, scale = torch.zeros_like(grad, dtype=torch.uint8), torch.zeros(codec.block_count(grad.numel()))
    lists = (
        [torch.zeros_like(grad)],
        [grad],
        [codes, codes.clone()],
        [scale, scale.clone()],
        [torch.zeros(())],
    )
    options = 0.0, 0.0, 0.0, 0.0, 1e-8, False
    return (*lists, None, *options, False, False, 0, [], [], None, None)


@pytest.mark.parametrize("run", native_backends())
def test_kernels_take_the_nearest_entry(run: Any) -> None:
    signed, square = hard_values(True), hard_values(False).sqrt()
    roots = [square]
    for direction in (-2.0, 2.0):
        roots.append(torch.nextafter(square, torch.tensor(direction)).clamp(0, 1))
    for grad in (signed, *roots):
        grad.view(-1, 256)[:, 0] = 1
        *_, first, second, first_scale, second_scale, _ = run(adamw_op, *step_of(grad))
        assert torch.equal(first.flatten(), nearest(grad, True))
        assert torch.equal(second.flatten(), nearest(grad * grad, False))
        assert torch.equal(first_scale, torch.ones_like(first_scale))
        assert torch.equal(second_scale, torch.ones_like(second_scale))


@pytest.mark.parametrize("run", all_backends())
def test_blocks_that_are_not_finite(run: Any) -> None:
    grad = torch.randn(5 * 256 + 7)
    grad[3], grad[256 + 255], grad[512], grad[-1] = torch.nan, torch.inf, -torch.inf, torch.nan
    grad[768 : 768 + 256] = 0
    *_, first, second, first_scale, second_scale, _ = run(adamw_op, *step_of(grad))
    for codes, scale in ((first, first_scale), (second, second_scale)):
        assert scale.isnan().tolist() == [True, True, True, False, False, True]
        assert scale[3] == 0
        assert (codes.flatten()[: 3 * 256] == 0).all()
        assert (codes.flatten()[5 * 256 :] == 0).all()
    assert_same_bits(first_scale[4], grad[1024:1280].abs().max())


def test_unknown_state_dtype() -> None:
    with pytest.raises(ValueError, match="state_dtype must be one of 'int8'"):
        codec.encode_state(torch.zeros(3), "int3", signed=True)
