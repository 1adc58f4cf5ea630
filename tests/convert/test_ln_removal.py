"""Frozen norms folded into the linear layers behind them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.convert.models import GPT2LMHeadModel, TimmVisionTransformer, randomize
from torch import nn

import narrowgauge as ng
from narrowgauge.convert import fold_fixed_layernorm
from narrowgauge.nn import FixedStdLayerNorm

TOKENS = torch.arange(14).view(2, 7) % 19
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def frozen(model: nn.Module, data: torch.Tensor) -> nn.Module:
    """The model with every norm at the standard deviation of one batch."""
    ng.swap(model, norm="fixed_std")
    with torch.no_grad():
        model(data)
    for module in model.modules():
        if isinstance(module, FixedStdLayerNorm):
            module.freeze()
    return model


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("kind", ["gpt2", "gpt2 untied", "timm", "timm average"])
def test_the_function_stays(kind: str, backend: Any) -> None:
    data = IMAGES if "timm" in kind else TOKENS
    model: nn.Module = GPT2LMHeadModel(tied=kind == "gpt2")
    if "timm" in kind:
        model = TimmVisionTransformer(average="average" in kind)
    model = frozen(randomize(model), data)
    before = copy.deepcopy(model.state_dict())
    with ng.backend(backend), torch.no_grad():
        expected = model(data)
        folded = fold_fixed_layernorm(model)
        torch.testing.assert_close(folded(data), expected, rtol=1e-10, atol=1e-10)
    assert not any(isinstance(m, FixedStdLayerNorm) for m in folded.modules())
    for name, value in model.state_dict().items():
        if "running" not in name:
            assert torch.equal(value, before[name]), name


def test_a_tied_head_gets_its_own_weight_and_bias() -> None:
    model = frozen(randomize(GPT2LMHeadModel()), TOKENS)
    folded = fold_fixed_layernorm(model)
    assert torch.equal(folded.transformer.wte.weight, model.transformer.wte.weight)
    assert not torch.equal(folded.lm_head.weight, folded.transformer.wte.weight)
    assert folded.lm_head.bias is not None
    assert model.lm_head.bias is None
    assert not folded.config.tie_word_embeddings


def test_with_an_explicit_map_and_in_place() -> None:
    model = nn.Sequential(nn.Linear(5, 8), FixedStdLayerNorm(8, init_std=1.7), nn.Linear(8, 3, bias=False))
    model[1].freeze()
    nn.init.normal_(model[1].bias)
    x = torch.randn(4, 5)
    expected, weight = model(x), model[2].weight
    assert fold_fixed_layernorm(model, {"1": ["2"]}, inplace=True) is model
    assert model[2].weight is weight
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def refuse(model: nn.Module, message: str, readers: Any = None) -> None:
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"fold_fixed_layernorm: {message}"):
        fold_fixed_layernorm(model, readers, inplace=True)
    assert model.state_dict().keys() == before.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num()), name


def test_what_cannot_be_folded() -> None:
    model = nn.Sequential(
        FixedStdLayerNorm(8, init_std=1.0, init_first_std=2.0, special_first=True), nn.GELU(), nn.Linear(8, 8)
    )
    refuse(model, "0: is not frozen: call freeze", {"0": ["2"]})
    model[0].freeze()
    refuse(
        model, r"0: has a constant of its own for position 0: call drop_special_first\(\) first", {"0": ["2"]}
    )
    model[0].drop_special_first()
    refuse(model, "1, which reads 0: a GELU is not a linear layer", {"0": ["1"]})
    refuse(model, "0: it is not known which linear layers read it", {})
    refuse(model, "readers names '2', which is no FixedStdLayerNorm", {"2": ["0"]})
    refuse(model, "Sequential is of no known family")
    refuse(nn.Sequential(nn.Linear(8, 8)), "the model has no FixedStdLayerNorm")
    narrow = nn.Sequential(model[0], nn.Linear(4, 4))
    refuse(narrow, "1, which reads 0: has 4 inputs; the norm has width 8", {"0": ["1"]})
    handle = model[0].register_forward_hook(lambda *_: None)
    refuse(model, "0: has hooks", {"0": ["2"]})
    handle.remove()
    model[0].follow = True
    refuse(model, "0: its constant follows the running value", {"0": ["2"]})


def test_the_last_norm_of_a_model_without_head() -> None:
    model = frozen(randomize(GPT2LMHeadModel()), TOKENS).transformer
    refuse(model, "ln_f: it is not known which linear layers read it, or something else does")
    headed = frozen(randomize(GPT2LMHeadModel()), TOKENS)
    headed.value_head = nn.Linear(12, 1).double()
    refuse(headed, "transformer.ln_f: it is not known")
