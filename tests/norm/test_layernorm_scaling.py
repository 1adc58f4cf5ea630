"""apply_layernorm_scaling: which norms are scaled, by what, and what is refused."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from tests.tolerances import assert_near, assert_same_bits
from torch import Tensor, nn

import narrowgauge as ng
from narrowgauge.convert import apply_layernorm_scaling


class TheirRMSNorm(nn.Module):
    """As model libraries write it."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(d) + 0.5)
        self.variance_epsilon = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt())


class Layer(nn.Module):
    def __init__(self, norm: Any, names: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")):
        super().__init__()
        for name in names:
            setattr(self, name, norm(8))
        self.self_attn, self.mlp = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nn.Module):
    def __init__(self, norm: Any, count: int = 3, **options: Any) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(Layer(norm, **options) for _ in range(count))
        self.model.norm = norm(8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.model.layers:
            x = layer(x)
        return self.model.norm(x)


NORMS = {
    "theirs": TheirRMSNorm,
    "torch rms": lambda d: nn.RMSNorm(d, 1e-6),
    "torch layer": nn.LayerNorm,
    "ours rms": lambda d: ng.nn.RMSNorm(d, 1e-6),
    "ours layer": ng.nn.LayerNorm,
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_scaling_is_pre_ln_with_smaller_norms(norm: Any) -> None:
    model = Model(norm)
    plain = copy.deepcopy(model)
    keys = list(model.state_dict())
    weights = {name: id(parameter) for name, parameter in model.named_parameters()}
    assert apply_layernorm_scaling(model) is model
    x = torch.randn(4, 8)

    expected = x.double()
    twin = plain.double()
    for i, layer in enumerate(twin.model.layers):
        scale = 1 / math.sqrt(i + 1)
        expected = expected + layer.self_attn(layer.input_layernorm(expected) * scale)
        expected = expected + layer.mlp(layer.post_attention_layernorm(expected) * scale)
    expected = twin.model.norm(expected)  # which is not scaled
    y = model(x)
    assert_near(y.detach(), expected.detach())
    assert list(model.state_dict()) == keys
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == weights

    apply_layernorm_scaling(model)  # a second time changes nothing
    assert_same_bits(model(x).detach(), y.detach())
    assert_same_bits(copy.deepcopy(model)(x).detach(), y.detach())


def test_other_schemes_and_other_factors_are_refused_and_left_alone() -> None:
    post = Model(nn.LayerNorm, names=("post_attention_layernorm", "post_feedforward_layernorm"))
    with pytest.raises(
        ValueError, match=r"model.layers.0 has post_feedforward_layernorm, so it is not a Pre-LN"
    ):
        apply_layernorm_scaling(post)
    with pytest.raises(ValueError, match=r"model.layers.0 lacks input_layernorm or post_attention_layernorm"):
        apply_layernorm_scaling(Model(nn.LayerNorm, names=("input_layernorm",)))
    with pytest.raises(ValueError, match=r"the model has no layers.\{i\}.input_layernorm"):
        apply_layernorm_scaling(nn.Sequential(nn.LayerNorm(8)))
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got dict"):
        apply_layernorm_scaling({})  # type: ignore[arg-type]

    model = Model(NORMS["ours rms"])
    model.model.layers[1].input_layernorm = model.model.layers[0].input_layernorm
    with pytest.raises(ValueError, match=r"layers.1.input_layernorm is the same module as model.layers.0"):
        apply_layernorm_scaling(model)

    model = Model(NORMS["ours rms"])
    model.model.layers[2].input_layernorm.output_scale = 0.5
    with pytest.raises(ValueError, match=r"model.layers.2.input_layernorm is scaled by 0.5 already"):
        apply_layernorm_scaling(model)
    assert model.model.layers[1].input_layernorm.output_scale == 1.0
