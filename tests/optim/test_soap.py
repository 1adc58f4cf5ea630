"""SOAP: recorded runs, the formula in float64, and what it turns into Adam."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import golden_files
from tests.optim.test_adamw import parameters, set_gradients, train
from torch import Tensor, nn

import narrowgauge as ng
from narrowgauge.optim.soap import merged_shape


@pytest.mark.parametrize("path", golden_files.files("extra_optim", "soap*.npz"), ids=lambda path: path.stem)
def test_replays_pytorch_optimizer(path: Path) -> None:
    recorded, meta = golden_files.read(path)
    params = [nn.Parameter(recorded[f"param{i}_0"]) for i in range(len(meta["shapes"]))]
    optimizer = ng.optim.SOAP(params, **meta["hyperparameters"])
    tolerance = 1e-10 if meta["dtype"] == "float64" else 2e-6
    for step in range(1, meta["steps"] + 1):
        for i, p in enumerate(params):
            p.grad = recorded[f"grad{i}_step{step}"]
        optimizer.step()
        for i, p in enumerate(params):
            # A Gram matrix without full rank leaves its eigenvectors to choose.
            shape = meta["shapes"][i]
            determined = all(size <= math.prod(shape) // size for size in shape) or step == 1
            names = ["exp_avg", "exp_avg_sq"] if determined else ["exp_avg"]
            pairs = [(optimizer.state[p][name], recorded[f"state{i}_{name}_step{step}"]) for name in names]
            if determined:
                pairs.append((p.detach(), recorded[f"param{i}_step{step}"]))
            for actual, expected in pairs:
                torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


class Reference:
    """One parameter in float64: Adam on the flattened gradient times the Kronecker product of all bases."""

    def __init__(self, p: Tensor, **options: Any) -> None:
        self.p, self.options, self.calls = p.clone(), options, 0
        self.m, self.v = torch.zeros_like(p).flatten(), torch.zeros_like(p).flatten()
        self.grams = [torch.zeros(n, n, dtype=p.dtype) for n in p.shape]
        self.bases: list[Tensor] = []

    def basis(self) -> Tensor:
        whole = torch.ones(1, 1, dtype=torch.float64)
        for basis in self.bases:
            whole = torch.kron(whole, basis)
        return whole

    def step(self, g: Tensor) -> None:
        get = self.options.get
        lr, eps, (beta1, beta2) = get("lr", 3e-3), get("eps", 1e-8), get("betas", (0.95, 0.95))
        g = -g if get("maximize") else g
        if k := self.calls:
            whole = self.basis()
            self.m = beta1 * self.m + (1 - beta1) * g.flatten()
            self.v = beta2 * self.v + (1 - beta2) * (whole.T @ g.flatten()) ** 2
            update = whole @ ((whole.T @ self.m) / (self.v.sqrt() + eps))
            if get("normalize_gradient"):
                update = update / (update.square().mean().sqrt() + eps)
            if get("correct_bias", True):
                update *= (1 - beta2**k) ** 0.5 / (1 - beta1**k)
            self.p = (self.p - lr * update.reshape(g.shape)) * (1 - lr * get("weight_decay", 0.01))
        beta = get("shampoo_beta", beta2)
        for mode, gram in enumerate(self.grams):
            slices = g.movedim(mode, 0).reshape(g.shape[mode], -1)
            self.grams[mode] = beta * gram + (1 - beta) * slices @ slices.T
        if not self.calls:
            self.bases = [torch.linalg.eigh(gram).eigenvectors.flip(1) for gram in self.grams]
        elif self.calls % get("precondition_frequency", 10) == 0:
            v = self.v.reshape(g.shape)
            for mode, (gram, basis) in enumerate(zip(self.grams, self.bases, strict=True)):
                sizes = [float(column @ gram @ column) for column in basis.T]
                order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
                v = v.index_select(mode, torch.tensor(order))
                self.bases[mode] = torch.linalg.qr(gram @ basis[:, order]).Q
            self.v = v.flatten()
        self.calls += 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precondition_frequency": 2, "shampoo_beta": 0.8, "weight_decay": 0.1, "lr": 0.05},
        {"betas": (0.8, 0.9), "correct_bias": False, "maximize": True, "eps": 1e-3},
        {"precondition_frequency": 1, "normalize_gradient": True},
    ],
)
def test_step_is_the_formula(options: dict[str, Any]) -> None:
    """Shapes whose Gram matrices have full rank; one of them twice, so that batches and single ones are there."""
    params = parameters((5, 5), (2, 3, 3), (5, 5), (2, 2, 3, 1), dtype=torch.float64)
    references = [Reference(p.detach(), **options) for p in params]
    optimizer = ng.optim.SOAP(params, **options)
    for step in range(7):
        set_gradients(params, step)
        optimizer.step()
        for p, reference in zip(params, references, strict=True):
            reference.step(p.grad)
            torch.testing.assert_close(p.detach(), reference.p, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(optimizer.state[p]["exp_avg"].flatten(), reference.m)
            torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"].flatten(), reference.v)


def test_rotations_of_the_gradient_rotate_the_update() -> None:
    """What Adam does not: rows and columns may be mixed, and the trajectory is the same one, mixed."""
    (p,) = parameters((6, 6), dtype=torch.float64)
    left, right = (
        torch.linalg.qr(x.detach()).Q for x in parameters((6, 6), (6, 6), dtype=torch.float64, seed=1)
    )
    q = nn.Parameter(left @ p.detach() @ right)
    options = {"precondition_frequency": 2, "lr": 0.1}
    optimizers = ng.optim.SOAP([p], **options), ng.optim.SOAP([q], **options)
    before = p.detach().clone()
    for step in range(6):
        set_gradients([p], step)
        q.grad = left @ p.grad @ right
        for optimizer in optimizers:
            optimizer.step()
    assert (p - before).abs().max() > 0.1
    torch.testing.assert_close(q.detach(), left @ p.detach() @ right, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("options", [{"max_precondition_dim": 1}, {}])
def test_without_rotation_it_is_adam(options: dict[str, Any]) -> None:
    """One call later: the first only initialises. Parameters with one dimension are not rotated by default."""
    shapes = [(5, 7), (8,), ()] if options else [(8,), (), (0, 3)]
    ours = parameters(*shapes, dtype=torch.float64)
    theirs = copy.deepcopy(ours)
    optimizer = ng.optim.SOAP(ours, lr=0.1, weight_decay=0.0, eps=0.0, betas=(0.9, 0.99), **options)
    train(ours, optimizer, 1)
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)
    for i, p in enumerate(ours):
        expected = {"step", "exp_avg", "exp_avg_sq"}
        assert i == 0 or p.numel() == 0 or set(optimizer.state[p]) == expected
    train(ours, optimizer, 4, first=1)
    train(theirs, torch.optim.Adam(theirs, lr=0.1, eps=0.0, betas=(0.9, 0.99)), 4, first=1)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


def test_vectors_can_be_rotated() -> None:
    (p,) = parameters((4,), dtype=torch.float64)
    optimizer = ng.optim.SOAP([p], precondition_1d=True)
    train([p], optimizer, 1)
    torch.testing.assert_close(optimizer.state[p]["GG_0"], 0.05 * torch.outer(p.grad, p.grad))
    assert optimizer.state[p]["Q_0"].shape == (4, 4)


def test_merged_dimensions() -> None:
    for shape, largest, expected in [
        ((16, 3, 3, 3), 48, (48, 9)),
        ((16, 3, 3, 3), 30, (16, 27)),
        ((2, 3), 6, (6,)),
        ((50, 1, 2), 7, (50, 2)),
        ((), 5, ()),
    ]:
        assert merged_shape(shape, largest) == expected, shape
    filters, matrix = parameters((4, 2, 2, 1), dtype=torch.float64), parameters((4, 4), dtype=torch.float64)
    matrix[0].data = filters[0].data.reshape(4, 4).clone()
    optimizers = (
        ng.optim.SOAP(filters, merge_dims=True, max_precondition_dim=7, precondition_frequency=2),
        ng.optim.SOAP(matrix, precondition_frequency=2),
    )
    for step in range(5):
        set_gradients(filters, step)
        matrix[0].grad = filters[0].grad.reshape(4, 4)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(filters[0].detach().reshape(4, 4), matrix[0].detach())
