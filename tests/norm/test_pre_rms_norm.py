"""CRMSNorm and ZeroMeanLinear: recorded numbers, the identities that make them exact, and wrong arguments."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests import golden_files
from tests.tolerances import assert_near, assert_same_bits
from torch import Tensor, nn

import narrowgauge as ng
from narrowgauge.nn import functional as ngf

each_backend = pytest.mark.parametrize("backend", ["reference", "auto"])


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def zero_mean(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def result_and_gradient(function: Any, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


@each_backend
@pytest.mark.parametrize("path", golden_files.files("pre_rmsnorm", "norms_*.npz"), ids=lambda path: path.stem)
def test_recorded_norms(path: Path, backend: Any) -> None:
    case, meta = golden_files.read(path)
    eps, d = meta["eps"], case["in_x"].shape[-1]

    def near(actual: Tensor, name: str) -> None:
        torch.testing.assert_close(actual, case[name], rtol=1e-10, atol=1e-12)

    with ng.backend(backend):
        y, dx = result_and_gradient(lambda x: ngf.layer_norm(x, d, eps=eps), case["in_x"], case["in_grad_y"])
        near(y, "out_ln"), near(dx, "grad_x_ln")
        y, dx = result_and_gradient(lambda x: ngf.rms_norm(x, d, eps=eps), case["in_x"], case["in_grad_y"])
        near(y, "out_rms"), near(dx, "grad_x_rms")
        near(ngf.rms_norm(case["in_x_zero_mean"], d, eps=eps), "out_rms_of_zero_mean")
        near(ngf.rms_norm(case["in_x_zero_mean"], d, eps=eps), "out_ln")
        module = ng.nn.CRMSNorm(d - 1, eps)
        y, dx = result_and_gradient(module, case["in_x_compressed"], case["in_grad_y_compressed"])
        near(y, "out_crms"), near(dx, "grad_x_compressed_crms")


@each_backend
@pytest.mark.parametrize("k", [1, 17, 129, 1028])
def test_crms_norm_is_rms_norm_without_the_last_entry(k: int, backend: Any) -> None:
    x = zero_mean(random(3, 4, k + 1))
    with ng.backend(backend):
        expected = F.rms_norm(x, (k + 1,), eps=1e-3)[..., :-1]
        torch.testing.assert_close(ngf.crms_norm(x[..., :-1], 1e-3), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_and_long_rows(dtype: torch.dtype) -> None:
    """Beyond the registers, and in dtypes whose sums are wider than they are."""
    x, dy = random(2, 16448, dtype=dtype), random(2, 16448, dtype=dtype, seed=1)
    y, dx = result_and_gradient(ngf.crms_norm, x, dy)
    with ng.backend("reference"):
        true_y, true_dx = result_and_gradient(ngf.crms_norm, x.double(), dy.double())
    assert y.dtype == dx.dtype == dtype
    assert_near(y, true_y)
    assert_near(dx, true_dx)


def test_any_layout_and_nothing() -> None:
    x = random(5, 6, dtype=torch.float32)
    assert_same_bits(ngf.crms_norm(x.t()), ngf.crms_norm(x.t().contiguous()))
    assert ngf.crms_norm(x[:0]).shape == (0, 6)
    assert ngf.crms_norm(x[:, :0]).shape == (5, 0)
    x[1, 2] = float("nan")
    y = ngf.crms_norm(x)
    assert y[1].isnan().all()
    assert y[[0, 2, 3, 4]].isfinite().all()


@each_backend
def test_wrong_arguments(backend: Any) -> None:
    x = random(3, 8)
    with ng.backend(backend):
        for wrong, error, message in (
            ({"x": [1.0]}, TypeError, "crms_norm: x must be a tensor, got list"),
            ({"x": x.int()}, TypeError, "crms_norm: x has dtype torch.int32"),
            ({"x": x[0, 0]}, ValueError, "crms_norm: x must have at least one dimension"),
            ({"eps": -1.0}, ValueError, "crms_norm: eps must be a finite number >= 0, got -1.0"),
            ({"eps": "small"}, ValueError, "crms_norm: eps must be a finite number >= 0, got 'small'"),
        ):
            with pytest.raises(error, match=message):
                ngf.crms_norm(**{"x": x, "eps": 1e-5, **wrong})
    with pytest.raises(ValueError, match=r"CRMSNorm: x has shape \(3, 8\), which does not end in .*\(9,\)"):
        ng.nn.CRMSNorm(9)(x)
    with pytest.raises(ValueError, match="CRMSNorm: eps"):
        ng.nn.CRMSNorm(9, -1.0)


def test_module() -> None:
    module = ng.nn.CRMSNorm(8, 1e-3)
    assert repr(module) == "CRMSNorm(8, eps=0.001)"
    assert not module.state_dict()
    x = random(3, 8, dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(x), module(x))


class Branch(nn.Module):
    """Two steps of a Pre-LN stream: a linear layer that writes into it, behind a norm that reads it."""

    def __init__(self, linear: Any, norm: Any, d: int) -> None:
        super().__init__()
        self.embed, self.norm, self.write = linear(5, d), norm, linear(d, d)
        self.last = copy.deepcopy(norm)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.embed(x)
        stream = stream + self.write(self.norm(stream).tanh())
        return self.last(stream)


def test_gradients_with_zero_mean_linear_are_those_of_the_layer_norm_model() -> None:
    d = 24
    theirs = Branch(nn.Linear, nn.LayerNorm(d), d).double()
    ours = Branch(ng.nn.ZeroMeanLinear, ng.nn.RMSNorm(d, 1e-5, bias=True), d).double()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())
    x, dy = random(7, 5), random(7, d, seed=1)
    results = []
    for model in (ours, theirs):
        y = model(x)
        results.append([y, *torch.autograd.grad(y, list(model.parameters()), dy)])
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)
    assert ours.embed(x).mean(-1).abs().max() < 1e-14
    assert theirs.embed(x).mean(-1).abs().max() > 0.1


def test_zero_mean_linear_is_a_linear_layer() -> None:
    layer = ng.nn.ZeroMeanLinear(5, 8, bias=False)
    assert isinstance(layer, nn.Linear)
    assert list(layer.state_dict()) == ["weight"]
    x = random(3, 5, dtype=torch.float32)
    torch.testing.assert_close(layer(x), zero_mean(F.linear(x, layer.weight)))
