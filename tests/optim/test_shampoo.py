"""Shampoo: recorded runs, and the formula in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests import golden_files
from tests.optim.test_adamw import parameters, set_gradients, train
from torch import Tensor, nn

import narrowgauge as ng


@pytest.mark.parametrize(
    "path", golden_files.files("extra_optim", "shampoo*.npz"), ids=lambda path: path.stem
)
def test_replays_pytorch_optimizer(path: Path) -> None:
    recorded, meta = golden_files.read(path)
    params = [nn.Parameter(recorded[f"param{i}_0"]) for i in range(len(meta["shapes"]))]
    optimizer = ng.optim.Shampoo(params, **meta["hyperparameters"])
    tolerance = 1e-10 if meta["dtype"] == "float64" else 2e-6
    for step in range(1, meta["steps"] + 1):
        for i, p in enumerate(params):
            p.grad = recorded[f"grad{i}_step{step}"]
        optimizer.step()
        for i, p in enumerate(params):
            torch.testing.assert_close(
                p.detach(), recorded[f"param{i}_step{step}"], rtol=tolerance, atol=tolerance * 0.1
            )


def power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values**exponent) @ vectors.T


def preconditioned(g: Tensor, sums: list[Tensor]) -> Tensor:
    """One matrix, the Kronecker product of all roots, times the flattened gradient."""
    whole = torch.ones(1, 1, dtype=torch.float64)
    for matrix in sums:
        whole = torch.kron(whole, power(matrix, -1 / (2 * g.dim())))
    return (whole @ g.flatten()).reshape(g.shape)


@pytest.mark.parametrize("method", ["svd", "eigh"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1, "maximize": True},
        {"weight_decay": 0.1, "weight_decouple": True},
        {"weight_decay": 0.1, "weight_decouple": True, "fixed_decay": True},
        {"momentum": 0.6, "weight_decay": 0.1},
        {"preconditioning_compute_steps": 2},
    ],
)
def test_step_is_the_formula(method: str, options: dict[str, Any]) -> None:
    """Every second shape twice, so that batches and single parameters are both there."""
    params = parameters((4, 6), (3,), (4, 6), (2, 3, 4), (2, 2, 1, 3), (0, 3), dtype=torch.float64)
    expected = [p.detach().clone() for p in params]
    sums = [[1e-3 * torch.eye(n, dtype=torch.float64) for n in p.shape] for p in params]
    roots: list[Any] = [None] * len(params)
    previous: list[Any] = [None] * len(params)
    lr, wd, mu = 0.05, options.get("weight_decay", 0.0), options.get("momentum", 0.0)
    optimizer = ng.optim.Shampoo(params, lr=lr, matrix_eps=1e-3, root_method=method, **options)
    for step in range(1, 5):
        set_gradients(params, step)
        optimizer.step()
        for i, (p, q) in enumerate(zip(params, expected, strict=True)):
            if not q.numel():
                continue
            g = -p.grad if options.get("maximize") else p.grad
            if mu and step > 1:
                g = (1 - mu) * g + mu * previous[i]
            if not options.get("weight_decouple"):
                g = g + wd * q
            else:
                q *= 1 - wd * (1 if options.get("fixed_decay") else lr)
            for mode in range(q.dim()):
                slices = g.movedim(mode, 0).flatten(1) if q.dim() > 1 else g[:, None]
                sums[i][mode] = sums[i][mode] + slices @ slices.T
            if step == 1 or step % options.get("preconditioning_compute_steps", 1) == 0:
                roots[i] = list(sums[i])
            previous[i] = preconditioned(g, roots[i])
            q -= lr * previous[i]
            torch.testing.assert_close(p.detach(), q, rtol=1e-9, atol=1e-10)


def test_first_step_is_the_polar_factor() -> None:
    """With L = G Gᵀ and R = Gᵀ G the two roots take every singular value to 1."""
    (p,) = parameters((6, 6), dtype=torch.float64)
    before = p.detach().clone()
    set_gradients([p], 0)
    u, _, vh = torch.linalg.svd(p.grad)
    ng.optim.Shampoo([p], lr=1.0, matrix_eps=0.0).step()
    torch.testing.assert_close(before - p.detach(), u @ vh, rtol=1e-8, atol=1e-8)


def test_large_dimensions_and_none() -> None:
    """Without preconditioners, as for a parameter without dimensions, the step is that of gradient descent."""
    params = parameters((4, 6), (), (7,))
    optimizer = ng.optim.Shampoo(params, lr=0.1, max_precondition_dim=4)
    expected = [p.detach().clone() for p in params]
    train(params, optimizer, 1)
    torch.testing.assert_close(params[1].detach(), expected[1] - 0.1 * params[1].grad)
    torch.testing.assert_close(params[2].detach(), expected[2] - 0.1 * params[2].grad)
    assert set(optimizer.state[params[0]]) == {"step", "pre_cond_0", "inv_pre_cond_0"}
    root = power(1e-6 * torch.eye(4) + params[0].grad @ params[0].grad.T, -1 / 4)
    torch.testing.assert_close(
        params[0].detach(), expected[0] - 0.1 * root @ params[0].grad, rtol=1e-5, atol=1e-5
    )
