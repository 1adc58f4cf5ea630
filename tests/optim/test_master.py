"""Parameters in two bytes: recorded numbers, and the errors that the formulas promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.golden_files import files, read
from torch import Tensor

from narrowgauge.optim import bf16_stochastic_round, join_master, kahan_add, split_master


@pytest.mark.parametrize("path", files("bf16_stochastic_rounding"), ids=lambda path: path.stem)
def test_rounds_by_the_recorded_bits(path: Any) -> None:
    recorded, _ = read(path)
    rounded = bf16_stochastic_round(recorded["in_x"], random16=recorded["in_random16"])
    assert torch.equal(rounded.view(torch.int16), recorded["out_bf16_bits"].view(torch.int16))


def test_the_mean_of_many_draws_is_the_number() -> None:
    x = torch.tensor([1.0, -1.003, 3.14159, 1e-39, -7e30, 1.00390625 + 2.0**-20])
    draws = 100_000
    generator = torch.Generator().manual_seed(1)
    rounded = bf16_stochastic_round(x.repeat(draws, 1), generator).double()
    lower, upper = rounded.amin(0), rounded.amax(0)
    error = (rounded.mean(0) - x.double()).abs()
    chance = (x.double() - lower) / (upper - lower).clamp_min(1e-300)
    deviation = (upper - lower) * (chance * (1 - chance) / draws).sqrt()
    assert (error <= 4 * deviation).all()
    assert upper[0] == lower[0] == 1  # exact in bfloat16
    again = bf16_stochastic_round(x.repeat(draws, 1), torch.Generator().manual_seed(1))
    assert torch.equal(again.double(), rounded)


def test_special_numbers_are_not_rounded() -> None:
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0])
    rounded = bf16_stochastic_round(x, random16=torch.zeros(5, dtype=torch.int32))
    assert rounded[:2].tolist() == [torch.inf, -torch.inf]
    assert rounded[2].isnan()
    assert rounded[3:].signbit().tolist() == [False, True]


def test_rounding_refuses_wrong_arguments() -> None:
    x, bits = torch.zeros(3), torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match="generator or random16, not both"):
        bf16_stochastic_round(x, torch.Generator(), bits)
    with pytest.raises(ValueError, match=r"random16 has shape \(2,\), expected \(3,\)"):
        bf16_stochastic_round(x, random16=bits[:2])
    with pytest.raises(TypeError, match=r"random16 must hold integers, got torch\.float32"):
        bf16_stochastic_round(x, random16=x)
    with pytest.raises(TypeError, match=r"x has dtype torch\.int32"):
        bf16_stochastic_round(bits)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("path", files("flashoptim", "split_master_*.npz"), ids=lambda path: path.stem)
def test_splits_as_recorded(path: Any, bits: int) -> None:
    recorded, _ = read(path)
    narrow, rest = split_master(recorded["in_p"], bits)
    assert torch.equal(narrow.float(), recorded["out_narrow_bf16_as_float32"])
    assert torch.equal(rest, recorded[f"out_correction_int{bits}"])
    joined = join_master(narrow, rest).double()
    torch.testing.assert_close(joined, recorded[f"out_reconstructed_{bits}"].double(), rtol=1.2e-7, atol=0)


def spacing(x: Tensor) -> Tensor:
    """The distance to the next larger magnitude."""
    infinity = torch.tensor(torch.inf, dtype=x.dtype)
    return torch.nextafter(x.abs(), infinity).double() - x.abs().double()


@pytest.mark.parametrize("bits", [8, 16])
def test_the_joined_number_is_near_and_stays(bits: int) -> None:
    exponents = torch.arange(-149, 127).double()
    p = (torch.rand(200, 276, dtype=torch.float64) + 1).mul(2.0**exponents).float().flatten()
    p[::2] *= -1
    narrow, rest = split_master(p, bits)
    joined = join_master(narrow, rest)
    step = spacing(narrow) / 2 / {8: 127, 16: 32767}[bits]
    assert ((joined.double() - p.double()).abs() <= step / 2 + spacing(p)).all()
    # Without an update nothing drifts, but for one step where a power of two has another grid on its other side.
    again = join_master(*split_master(joined, bits))
    assert ((again.double() - joined.double()).abs() <= step + spacing(p)).all()
    assert torch.equal(join_master(*split_master(again, bits)), again)


def test_what_bfloat16_cannot_store_stays_visible() -> None:
    p = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.4e38])
    narrow, rest = split_master(p)
    assert rest.tolist() == [0, 0, 0, 0]
    joined = join_master(narrow, rest)
    assert joined[[0, 1, 3]].tolist() == [torch.inf, -torch.inf, torch.inf]
    assert joined[2].isnan()


def test_splitting_refuses_wrong_arguments() -> None:
    p = torch.zeros(3)
    with pytest.raises(ValueError, match="bits must be one of 8, 16; got 4"):
        split_master(p, 4)
    with pytest.raises(TypeError, match=r"p must be float32, got torch\.bfloat16"):
        split_master(p.bfloat16())
    narrow, rest = split_master(p)
    with pytest.raises(TypeError, match=r"got torch\.float32 and torch\.int8"):
        join_master(p, rest)
    with pytest.raises(ValueError, match=r"narrow has shape \(3,\) but rest has shape \(2,\)"):
        join_master(narrow, rest[:2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kahan_follows_updates_that_rounding_loses(dtype: torch.dtype) -> None:
    p = torch.linspace(0.5, 2, 301).to(dtype)
    start, plain, comp = p.clone(), p.clone(), torch.zeros_like(p)
    update = torch.full((301,), 2.0**-14)  # what is dropped has few enough bits to be kept exactly
    for _ in range(400):
        p, comp = kahan_add(p, comp, update)
        plain = (plain.float() + update).to(dtype)
    assert torch.equal(plain, start)
    assert torch.equal(
        p.double() + comp.double() - start.double(), torch.full((301,), 400 * 2.0**-14).double()
    )
    assert p.dtype is comp.dtype is dtype


def test_kahan_is_four_rounded_sums() -> None:
    p, update = torch.randn(1000).bfloat16(), torch.randn(1000) * 1e-3
    comp = (torch.randn(1000) * 1e-3).bfloat16()

    def rounded(x: Tensor) -> Tensor:
        return x.float().bfloat16().double()  # float32 first: the sum of two floats is rounded twice

    c = rounded(comp.double() + update.double())
    new = rounded(p.double() + c)
    expected = rounded(c + rounded(p.double() - new))
    actual, actual_comp = kahan_add(p, comp, update)
    assert torch.equal(actual.double(), new)
    assert torch.equal(actual_comp.double(), expected)


def test_kahan_refuses_wrong_dtypes() -> None:
    x = torch.zeros(3)
    with pytest.raises(TypeError, match=r"got torch\.float32 and torch\.float32"):
        kahan_add(x, x, x)
    with pytest.raises(TypeError, match=r"got torch\.bfloat16 and torch\.float16"):
        kahan_add(x.bfloat16(), x.half(), x)
