"""Swapped models inside the machinery that training code puts around a model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import narrowgauge as ng

WIDTH = 48


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.second = nn.RMSNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x + self.down(F.gelu(self.up(self.first(x)))))


def model(linear: str | None = None) -> nn.Module:
    torch.manual_seed(0)
    return ng.swap(nn.Sequential(Block(), Block()), linear=linear).model


def batch(seed: int = 1) -> Tensor:
    return torch.randn(6, 5, WIDTH, generator=torch.Generator().manual_seed(seed))


def loss_of(y: Tensor) -> Tensor:
    # A plain sum of squares would not do: after a norm it is constant.
    return (y.float() * batch(9)[: y.shape[0]]).mean()


def gradients(run: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and the gradients of the input and of every parameter."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    y = run(x)
    loss_of(y).backward()
    return [y.detach(), x.grad, *(p.grad for p in module.parameters())]


def assert_close(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        atol = tolerance * theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=atol)


@pytest.mark.parametrize("linear", [None, "int8-row"])
def test_compiled_whole(linear: str | None) -> None:
    module = model(linear)
    expected = gradients(module, module, batch())
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_close(gradients(compiled, module, batch()), expected, 1e-6)
    with torch.no_grad():
        assert_close([compiled(batch(2))], [module(batch(2))], 1e-6)


@pytest.mark.slow
def test_compiled_by_inductor() -> None:
    module = model()
    compiled = torch.compile(module, fullgraph=True)
    assert_close(gradients(compiled, module, batch()), gradients(module, module, batch()), 1e-5)


def test_compiled_with_a_dynamic_batch_size() -> None:
    module = model()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (6, 3, 5):
        assert_close(
            gradients(compiled, module, batch()[:rows]), gradients(module, module, batch()[:rows]), 1e-6
        )


def test_swapping_after_compiling_takes_effect() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(Block())
    compiled = torch.compile(module, backend="aot_eager")
    before = compiled(batch())
    ng.swap(compiled)
    assert isinstance(module[0].first, ng.nn.LayerNorm)
    assert_close([compiled(batch())], [before], 1e-5)


@pytest.mark.parametrize("linear", [None, "int8-row"])
def test_exported(linear: str | None) -> None:
    module = model(linear).eval()
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(module, (batch(),), dynamic_shapes=({0: rows},), strict=False)
    called = " ".join(str(node.target) for node in program.graph.nodes)
    assert "narrowgauge.layer_norm" in called
    assert "narrowgauge.rms_norm" in called
    assert_close([program.module()(batch(2)[:3])], [module(batch(2)[:3])], 1e-6)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("linear", [None, "int8-row"])
def test_gradient_checkpointing_gives_the_same_bits(linear: str | None, use_reentrant: bool) -> None:
    module = model(linear)

    def run(x: Tensor) -> Tensor:
        for block in module:
            x = checkpoint(block, x, use_reentrant=use_reentrant)
        return x

    for ours, theirs in zip(gradients(run, module, batch()), gradients(module, module, batch()), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("linear", [None, "int8-row"])
def test_autocast(linear: str | None) -> None:
    """Norms hand on the dtype they get; float32 parameters get float32 gradients."""
    module = model(linear)
    exact = gradients(module, module, batch())
    with torch.autocast("cpu", torch.bfloat16):
        assert module[0].first(batch()).dtype == torch.float32
        assert module[0].first(batch().bfloat16()).dtype == torch.bfloat16
        assert module[0].up(batch()).dtype == torch.bfloat16
        got = gradients(module, module, batch())
    for ours, theirs in zip(got[1:], exact[1:], strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() < 0.05 * theirs.norm()


def test_per_sample_gradients() -> None:
    module = model()
    parameters = dict(module.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor, direction: Tensor) -> Tensor:
        return (torch.func.functional_call(module, parameters, (x,)) * direction).mean()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, batch(), batch(9))
    _, _, *expected = gradients(module, module, batch())
    for got, gradient in zip(each.values(), expected, strict=True):
        torch.testing.assert_close(got.mean(0), gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("linear", [None, "int8-row"])
def test_training_follows_the_stock_model(linear: str | None) -> None:
    """Thirty steps on one small task: both learn it, and the losses stay together."""
    losses = []
    for swapped in (False, True):
        torch.manual_seed(0)
        module: nn.Module = nn.Sequential(Block(), Block(), nn.Linear(WIDTH, WIDTH))
        if swapped:
            ng.swap(module, linear=linear)
            optimizer: torch.optim.Optimizer = ng.optim.AdamW(module.parameters(), lr=3e-3)
        else:
            optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
        curve = []
        for step in range(30):
            x = batch(step)
            loss = F.mse_loss(module(x), x.flip(-1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        losses.append(curve)
    stock, ours = losses
    assert ours[-1] < 0.8 * ours[0]
    tolerance = 1e-3 if linear is None else 3e-2
    assert max(abs(a - b) / a for a, b in zip(stock, ours, strict=True)) < tolerance
