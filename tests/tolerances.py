"""How far results may be from the float64 truth: written once, by dtype."""

from __future__ import annotations

import torch
from torch import Tensor

# About two units in the last place of the result's dtype; float32 and float64 leave room for sums over rows.
RELATIVE = {torch.float64: 1e-11, torch.float32: 4e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}


def assert_near(actual: Tensor, truth: Tensor, message: str = "") -> None:
    """Every element within the dtype's tolerance of the truth, relative to it, to the largest element, or to one.

    One, because samples are of that size: a result near zero is the difference of terms that are not.
    """
    assert actual.shape == truth.shape, (
        f"{message}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    )
    if not actual.is_floating_point() and actual.dtype.itemsize > 1:
        assert_same_bits(actual, truth, message)  # counters and decisions
        return
    if actual.dtype.itemsize == 1:
        assert_within_one_code(actual, truth, message)
        return
    tolerance = RELATIVE[actual.dtype]
    scale = max(1.0, truth[truth.isfinite()].abs().max().item()) if truth.isfinite().any() else 1.0
    torch.testing.assert_close(
        actual.double().cpu(),
        truth.double().cpu(),
        rtol=tolerance,
        atol=tolerance * scale,
        equal_nan=True,
        msg=lambda text: f"{message}: {text}",
    )


def assert_within_one_code(actual: Tensor, expected: Tensor, message: str = "") -> None:
    """Codes of a quantizer (int8 or float8) at most one step apart."""

    def ordinal(codes: Tensor) -> Tensor:
        if codes.dtype == torch.int8:
            return codes.int()
        bits = codes.view(torch.uint8).int()
        return torch.where(bits < 128, bits, 128 - bits)  # sign and magnitude

    distance = (ordinal(actual.cpu()) - ordinal(expected.cpu())).abs()
    assert distance.numel() == 0 or distance.max() <= 1, f"{message}: codes differ by {distance.max()} steps"


def assert_same_bits(actual: Tensor, expected: Tensor, message: str = "") -> None:
    """Equal dtype, shape and bits; every NaN counts as the same."""
    assert actual.dtype == expected.dtype, f"{message}: dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, (
        f"{message}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    )
    actual, expected = actual.cpu(), expected.cpu()
    if actual.is_floating_point():
        a, b = actual.double(), expected.double()
        same = (a == b) & (a.signbit() == b.signbit()) | (a.isnan() & b.isnan())
    else:
        same = actual == expected
    count = int((~same).sum())
    first = (~same).flatten().nonzero()[:1].flatten().tolist()
    assert count == 0, f"{message}: {count} of {same.numel()} elements differ, the first at {first}"
