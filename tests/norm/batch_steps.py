"""Training steps of norms with batch statistics: what their tests share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from narrowgauge.ops import library

each_backend = pytest.mark.parametrize(
    "backend",
    [
        "reference",
        pytest.param(
            "native",
            marks=pytest.mark.skipif(
                not library.state.cpu.loaded, reason=f"CPU library {library.state.cpu.reason}"
            ),
        ),
    ],
)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def assert_close(actual: Tensor | None, expected: Tensor, message: str = "") -> None:
    """1e-12 in float64, 5e-6 in float32; relative to the largest element, or to one."""
    assert actual is not None
    assert actual.shape == expected.shape, message
    tolerance = 1e-12 if actual.dtype == torch.float64 else 5e-6
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(
        actual.detach().double(),
        expected.detach().double(),
        rtol=tolerance,
        atol=tolerance * scale,
        msg=lambda text: f"{message}: {text}",
    )


def replay(norm: nn.Module, case: dict[str, Tensor], steps: int, state: dict[str, str]) -> None:
    """The recorded steps and the evaluation after them; `state` maps recorded names to those of buffers."""

    def values(step: int) -> dict[str, Tensor]:
        buffers = dict(norm.named_buffers())
        return {
            name: case[f"state{step}_{recorded}"].view(buffers[name].shape)
            for recorded, name in state.items()
        }

    parameters = {"weight": case["param_weight"], "bias": case["param_bias"]}
    norm.load_state_dict({**values(0), **parameters}, strict=True)
    for step in range(1, steps + 1):
        x = case[f"in_x_step{step}"].clone().requires_grad_()
        norm.zero_grad()
        y = norm(x, case.get(f"in_pad_mask_step{step}"))
        y.backward(case[f"in_grad_y_step{step}"])
        for name, actual in (
            ("out_y", y),
            ("grad_x", x.grad),
            ("grad_weight", norm.weight.grad),
            ("grad_bias", norm.bias.grad),
        ):
            assert_close(actual, case[f"{name}_step{step}"], f"step {step}, {name}")
        for name, expected in values(step).items():
            assert_close(getattr(norm, name), expected, f"step {step}, {name}")
    norm.eval()
    assert_close(norm(case["in_x_eval"]), case["out_y_eval"], "evaluation")
