"""AdamP and SGDP: recorded runs of the authors' classes, the projection, what is never projected."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from tests.optim.golden import replay
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import narrowgauge as ng

WIDE = {"dtype": torch.float64}
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-6}
BACKENDS = ["reference", "auto"]


def matrix_with_gradient(
    rows: int, columns: int, *, orthogonal: bool, seed: int = 0, dtype: torch.dtype = torch.float64
) -> nn.Parameter:
    """A matrix whose gradient is orthogonal to it row by row, or points along it."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(rows, columns, generator=generator, **WIDE)
    g = torch.randn(rows, columns, generator=generator, **WIDE)
    g -= p * (g * p).sum(1, keepdim=True) / p.square().sum(1, keepdim=True)
    parameter = nn.Parameter(p.to(dtype))
    parameter.grad = (g if orthogonal else g + p).to(dtype)
    return parameter


# --- recorded runs ------------------------------------------------------------------------------------------


def test_replays_the_authors_adamp() -> None:
    assert replay(
        "adamp",
        "",
        lambda params, meta: ng.optim.AdamP(params, **meta["hyperparameters"]),
        tolerances=TOLERANCES,
    )


def test_replays_the_authors_sgdp() -> None:
    assert replay(
        "sgdp",
        "",
        lambda params, meta: ng.optim.SGDP(params, **meta["hyperparameters"]),
        tolerances=TOLERANCES
        | {torch.float32: 1e-5},  # the projected buffer is a difference, near 0 in places
    )


# --- the algorithm in float64, from the paper and the authors' choices ----------------------------------------


def projected(p: Tensor, g: Tensor, u: Tensor, group: dict[str, Any]) -> tuple[Tensor, float]:
    """The direction after the decision, and the ratio of the weight decay."""
    eps, delta = group["eps"], group["delta"]
    views = [(p.shape[0], -1), (1, -1)] if p.dim() > 1 and p.numel() else []
    for view in views:
        w, d, s = p.reshape(view), g.reshape(view), u.reshape(view)
        cosine = (w * d).sum(1).abs() / (d.norm(dim=1).clamp_min(eps) * w.norm(dim=1).clamp_min(eps))
        if cosine.max() < delta / w.shape[1] ** 0.5:
            unit = w / (w.norm(dim=1, keepdim=True) + eps)
            return (s - unit * (unit * s).sum(1, keepdim=True)).reshape(p.shape), group["wd_ratio"]
    return u, 1.0


def adamp_truth(p: Tensor, grads: list[Tensor], group: dict[str, Any]) -> Tensor:
    (beta1, beta2), lr = group["betas"], group["lr"]
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        top = beta1 * m + (1 - beta1) * g if group["nesterov"] else m
        u, ratio = projected(p, g, top / (v.sqrt() / (1 - beta2**t) ** 0.5 + group["eps"]), group)
        p = p * (1 - lr * group["weight_decay"] * ratio) - lr / (1 - beta1**t) * u
    return p


def sgdp_truth(p: Tensor, grads: list[Tensor], group: dict[str, Any]) -> tuple[Tensor, Tensor]:
    momentum, lr = group["momentum"], group["lr"]
    buffer = torch.zeros_like(p)
    for g in grads:
        buffer = momentum * buffer + (1 - group["dampening"]) * g
        u, ratio = projected(p, g, g + momentum * buffer if group["nesterov"] else buffer, group)
        if group["project_buffer"] and not group["nesterov"]:
            buffer = u
        p = p * (1 - lr * group["weight_decay"] * ratio / (1 - momentum)) - lr * u
    return p, buffer


def many() -> tuple[list[nn.Parameter], list[list[Tensor]]]:
    """Parameters of which some project by rows, some as a whole, some not; and gradients of four steps."""
    generator = torch.Generator().manual_seed(3)
    params, grads = [], []
    for shape, kind in [
        ((6, 3, 3, 3), "rows"),
        ((9,), "none"),
        ((40, 50), "whole"),
        ((), "none"),
        ((0, 4), "none"),
        ((7, 300), "none"),
        ((1, 33), "rows"),
        ((5, 8), "zero"),
    ]:
        p = torch.randn(shape, generator=generator, **WIDE)
        steps = []
        for _ in range(4):
            g = torch.randn(shape, generator=generator, **WIDE)
            if kind in ("rows", "whole"):
                view = p.reshape((shape[0], -1) if kind == "rows" else (1, -1))
                along = (g.reshape(view.shape) * view).sum(1, keepdim=True) / view.square().sum(
                    1, keepdim=True
                )
                g = g - (along * view).reshape(shape)
            elif kind == "none":
                g = g + p
            steps.append(g * 0 if kind == "zero" else g)
        params.append(nn.Parameter(p))
        grads.append(steps)
    return params, grads


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("nesterov", [False, True])
def test_adamp_is_the_paper_for_many_shapes_at_once(backend: str, nesterov: bool) -> None:
    params, grads = many()
    start = [p.detach().clone() for p in params]
    with ng.backend(backend):
        optimizer = ng.optim.AdamP(params, lr=1e-3, weight_decay=0.1, nesterov=nesterov)
        for step in range(4):
            for p, own in zip(params, grads, strict=True):
                p.grad = own[step].clone()
            optimizer.step()
    for p, first, own in zip(params, start, grads, strict=True):
        truth = adamp_truth(first, own, optimizer.param_groups[0])
        torch.testing.assert_close(p.detach(), truth, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("nesterov", "project_buffer"), [(False, True), (False, False), (True, True)])
def test_sgdp_is_the_paper_for_many_shapes_at_once(
    backend: str, nesterov: bool, project_buffer: bool
) -> None:
    params, grads = many()
    start = [p.detach().clone() for p in params]
    with ng.backend(backend):
        optimizer = ng.optim.SGDP(
            params,
            lr=1e-3,
            momentum=0.9,
            dampening=0.1,
            weight_decay=0.1,
            nesterov=nesterov,
            project_buffer=project_buffer,
        )
        for step in range(4):
            for p, own in zip(params, grads, strict=True):
                p.grad = own[step].clone()
            optimizer.step()
    for p, first, own in zip(params, start, grads, strict=True):
        truth, buffer = sgdp_truth(first, own, optimizer.param_groups[0])
        torch.testing.assert_close(p.detach(), truth, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(optimizer.state[p]["momentum"], buffer, rtol=1e-11, atol=1e-12)


def test_many_parameters_are_each_their_own_step() -> None:
    params, grads = many()
    alone, _ = many()
    together = ng.optim.AdamP(params, weight_decay=0.1)
    each = [ng.optim.AdamP([p], weight_decay=0.1) for p in alone]
    for step in range(4):
        for p, q, own in zip(params, alone, grads, strict=True):
            p.grad, q.grad = own[step].clone(), own[step].clone()
        together.step()
        for optimizer in each:
            optimizer.step()
    for p, q in zip(params, alone, strict=True):
        assert torch.equal(p, q)


# --- the projection -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("nesterov", [False, True])
def test_a_projected_step_is_orthogonal_to_the_weights(backend: str, nesterov: bool) -> None:
    p = matrix_with_gradient(17, 40, orthogonal=True)
    old = p.detach().clone()
    with ng.backend(backend):
        ng.optim.AdamP([p], nesterov=nesterov).step()
    step = p.detach() - old
    assert (step * old).sum(1).abs().max() < 1e-9  # eps keeps it from being 0
    grown = old.square().sum(1) + step.square().sum(1)
    torch.testing.assert_close(p.detach().square().sum(1), grown, rtol=1e-9, atol=0.0)


def test_scale_of_the_weights_does_not_matter_for_the_decision() -> None:
    for orthogonal in (True, False):
        decay = []
        for scale in (1e-3, 1.0, 1e3):
            p = matrix_with_gradient(17, 40, orthogonal=orthogonal)
            with torch.no_grad():
                p.mul_(scale)
            optimizer = ng.optim.AdamP([p], lr=1e-3, weight_decay=0.5)
            given, _ = optimizer._given(optimizer._calls()[0])
            assert given is not None
            decay.append(given.item())
        assert decay == [0.1 if orthogonal else 1.0] * 3


def test_without_delta_it_is_adamw() -> None:
    p, q = (matrix_with_gradient(17, 40, orthogonal=True) for _ in range(2))
    ours, torchs = (
        ng.optim.AdamP([p], weight_decay=0.1, delta=0.0),
        torch.optim.AdamW([q], weight_decay=0.1),
    )
    for _ in range(3):
        ours.step()
        torchs.step()
    torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("shape", [(), (9,)])
def test_vectors_and_scalars_are_never_projected(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(shape, **WIDE))
    q = nn.Parameter(p.detach().clone())
    ours = ng.optim.AdamP([p], weight_decay=0.1, scale_invariant=True)
    torchs = torch.optim.AdamW([q], weight_decay=0.1)
    for _ in range(3):
        p.grad = torch.randn(shape, **WIDE)
        q.grad = p.grad.clone()
        ours.step()
        torchs.step()
    torch.testing.assert_close(p, q, rtol=1e-15, atol=1e-15)


def test_scale_invariance_can_be_declared() -> None:
    """True projects also where the gradient is not orthogonal, False not even where it is."""
    p, q, r = (matrix_with_gradient(17, 40, orthogonal=kind) for kind in (False, True, True))
    old = p.detach().clone()
    optimizer = ng.optim.AdamP(
        [
            {"params": [p], "scale_invariant": True},
            {"params": [q], "scale_invariant": False},
        ],
        lr=1e-3,
    )
    torchs = torch.optim.AdamW([r], lr=1e-3, weight_decay=0.0)
    optimizer.step()
    torchs.step()
    assert ((p.detach() - old) * old).sum(1).abs().max() < 1e-9
    torch.testing.assert_close(q, r, rtol=1e-13, atol=1e-15)


def test_the_buffer_of_sgdp_loses_its_radial_part() -> None:
    for project_buffer in (True, False):
        p = matrix_with_gradient(17, 40, orthogonal=True)
        optimizer = ng.optim.SGDP([p], lr=0.1, momentum=0.9, project_buffer=project_buffer)
        optimizer.step()
        old = p.detach().clone()
        p.grad = matrix_with_gradient(17, 40, orthogonal=True, seed=0).grad
        p.grad = p.grad - old * (p.grad * old).sum(1, keepdim=True) / old.square().sum(1, keepdim=True)
        optimizer.step()
        radial = (optimizer.state[p]["momentum"] * old).sum(1).abs().max()
        assert (radial < 1e-6) == project_buffer


def test_weights_in_front_of_a_normalization_grow_less() -> None:
    """The paper's mechanism: momentum lengthens weights whose length does not matter."""

    def final_norm(make: Any) -> float:
        generator = torch.Generator().manual_seed(1)
        p = nn.Parameter(torch.randn(8, 32, generator=generator))
        x = torch.randn(64, 32, generator=generator)
        y = torch.randn(64, 8, generator=generator)
        optimizer = make([p])
        for _ in range(60):
            optimizer.zero_grad()
            hidden = nn.functional.batch_norm(x @ p.t(), None, None, training=True)
            (hidden - y).square().mean().backward()
            optimizer.step()
        return p.detach().norm().item()

    plain = final_norm(lambda params: torch.optim.SGD(params, lr=1.0, momentum=0.9))
    projected_norm = final_norm(lambda params: ng.optim.SGDP(params, lr=1.0, momentum=0.9))
    assert projected_norm < 0.9 * plain


# --- behaviour as an optimizer ------------------------------------------------------------------------------


def test_non_finite_gradients_stay_where_they_are() -> None:
    """A NaN stops its own parameter alone from being projected, and reaches no other."""
    p, q = (matrix_with_gradient(17, 40, orthogonal=True, seed=seed) for seed in (0, 1))
    expected = matrix_with_gradient(17, 40, orthogonal=True, seed=1)
    assert p.grad is not None
    p.grad[3, 5] = float("nan")
    ng.optim.AdamP([p, q], lr=1e-3).step()
    ng.optim.AdamP([expected], lr=1e-3).step()
    assert p.isnan().sum() == 1
    assert torch.equal(q, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delta": -0.1}, "delta must be"),
        ({"wd_ratio": -1.0}, "wd_ratio must be"),
        ({"scale_invariant": "yes"}, "scale_invariant must be True, False or \"auto\", got 'yes'"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] must be"),
        ({"eps": float("nan")}, "eps must be"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"AdamP: {message}"):
        ng.optim.AdamP([nn.Parameter(torch.zeros(2))], **options)


def test_sgdp_checks_its_momentum() -> None:
    with pytest.raises(ValueError, match=r"SGDP: momentum must be a finite number in \[0, 1\)"):
        ng.optim.SGDP([nn.Parameter(torch.zeros(2))], lr=0.1, momentum=1.0)


@pytest.mark.parametrize("name", ["AdamP", "SGDP"])
def test_a_resumed_run_continues(name: str) -> None:
    def make(p: nn.Parameter) -> Any:
        return getattr(ng.optim, name)([p], lr=0.01, weight_decay=0.1)

    def step(optimizer: Any, p: nn.Parameter, seed: int) -> None:
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
        optimizer.step()

    p = matrix_with_gradient(12, 5, orthogonal=True, dtype=torch.float32)
    first = make(p)
    step(first, p, 0)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    q = nn.Parameter(p.detach().clone())
    second = make(q)
    second.load_state_dict(torch.load(file, weights_only=True))
    for seed in (1, 2):
        step(first, p, seed)
        step(second, q, seed)
    assert torch.equal(p, q)


def test_layouts_and_dtypes() -> None:
    """Non-contiguous parameters have the rows that one sees; narrow ones and complex ones step."""
    p = matrix_with_gradient(6, 9, orthogonal=True)
    q = nn.Parameter(p.detach().t().contiguous().t())
    assert p.grad is not None
    q.grad = p.grad.t().contiguous().t()
    assert not q.is_contiguous()
    ng.optim.AdamP([p]).step()
    ng.optim.AdamP([q]).step()
    assert torch.equal(p, q)
    for dtype in (torch.bfloat16, torch.complex64):
        r = nn.Parameter(torch.ones(6, 9, dtype=dtype))
        r.grad = torch.ones_like(r)
        ng.optim.AdamP(
            [r], lr=0.125, param_update="stochastic" if dtype is torch.bfloat16 else "nearest"
        ).step()
        assert (r.detach().real - 0.875).abs().max() < 0.01


def test_eight_bit_states_and_a_skipped_step() -> None:
    p = matrix_with_gradient(16, 64, orthogonal=True, dtype=torch.float32)
    q = matrix_with_gradient(16, 64, orthogonal=True, dtype=torch.float32)
    narrow = ng.optim.AdamP([p], state_dtype="int8", min_quantized_size=0)
    ng.optim.AdamP([q]).step()
    narrow.step()
    assert "exp_avg.codes" in narrow.state[p]
    assert torch.equal(p, q)  # the first step starts from zeros, which are exact
    narrow.found_inf = torch.ones(())
    before = p.detach().clone()
    narrow.step()
    assert torch.equal(p, before)


def test_no_value_is_read_on_the_host() -> None:
    """The decision stays on the device."""
    optimizer = ng.optim.AdamP([nn.Parameter(torch.zeros(4, 3))])
    p = optimizer.param_groups[0]["params"][0]
    p.grad = torch.ones_like(p)
    reads: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function in (
                torch.ops.aten._local_scalar_dense.default,
                torch.ops.aten.nonzero.default,
                torch.ops.aten.is_nonzero.default,
            ):
                reads.append(str(function))
            return function(*args, **(kwargs or {}))

    optimizer.step()  # makes the states
    with Watch():
        optimizer.step()
    assert reads == []
