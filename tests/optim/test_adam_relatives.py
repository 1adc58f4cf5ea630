"""AdaBelief, ADOPT, Adan, LaProp and MARS: recorded runs, and their mathematics in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.optim.golden import replay
from torch import Tensor, nn

import narrowgauge as ng

TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-6}
BACKENDS = ["reference", "auto"]

RECORDED = {
    "adabelief": "AdaBelief",
    "adopt": "ADOPT",
    "timm_adopt": "ADOPT",
    "adan": "Adan",
    "mars_adamw": "MARS",
}


def options_of(meta: dict[str, Any]) -> dict[str, Any]:
    """Recorded hyperparameters under our names."""
    options = {name: value for name, value in meta["hyperparameters"].items() if name != "foreach"}
    if "weight_decouple" in options:
        options["decoupled_weight_decay"] = options.pop("weight_decouple")
    if meta["source"].startswith("timm"):
        options |= {"clip_exponent": 0.333, "clip_offset": 1}
    return options


@pytest.mark.parametrize("pattern", RECORDED)
def test_replays_recorded_runs(pattern: str) -> None:
    make = getattr(ng.optim, RECORDED[pattern])
    names = replay(
        "extra_optim", pattern, lambda params, meta: make(params, **options_of(meta)), tolerances=TOLERANCES
    )
    assert pattern in names


# --- the mathematics, one parameter at a time: truth(p, gradients, learning rates, options) -> p ------------

Truth = Callable[..., Tensor]


def adabelief(p: Tensor, grads: list[Tensor], rates: list[float], *, weight_decay: float, l2: bool) -> Tensor:
    m, s = torch.zeros_like(p), torch.zeros_like(p)
    for t, (g, lr) in enumerate(zip(grads, rates, strict=True), 1):
        g = g + weight_decay * p if l2 else g
        p = p if l2 else p * (1 - lr * weight_decay)
        m = 0.9 * m + 0.1 * g
        s = 0.999 * s + 0.001 * (g - m) ** 2 + 1e-16
        p = p - lr * (m / (1 - 0.9**t)) / (s / (1 - 0.999**t)).sqrt()
    return p


def adopt(
    p: Tensor,
    grads: list[Tensor],
    rates: list[float],
    *,
    weight_decay: float,
    decoupled: bool,
    clip: Callable[[int], float],
) -> Tensor:
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, (g, lr) in enumerate(zip(grads, rates, strict=True), 1):
        g = g if decoupled else g + weight_decay * p
        p = p * (1 - lr * weight_decay) if decoupled else p
        if t == 1:
            v = g**2
            continue
        m = 0.9 * m + 0.1 * (g / v.sqrt().clamp_min(1e-6)).clamp(-clip(t), clip(t))
        p = p - lr * m
        v = 0.9999 * v + 0.0001 * g**2
    return p


def adan(
    p: Tensor, grads: list[Tensor], rates: list[float], *, weight_decay: float, decoupled: bool
) -> Tensor:
    m, n, v = torch.zeros_like(p), torch.zeros_like(p), torch.zeros_like(p)
    last = grads[0]
    for t, (g, lr) in enumerate(zip(grads, rates, strict=True), 1):
        m = 0.98 * m + 0.02 * g
        n = 0.92 * n + 0.08 * (g - last)
        v = 0.99 * v + 0.01 * (g + 0.92 * (g - last)) ** 2
        u = m / (1 - 0.98**t) + 0.92 * n / (1 - 0.92**t)
        u = u / ((v / (1 - 0.99**t)).sqrt() + 1e-8)
        p = p * (1 - lr * weight_decay) - lr * u if decoupled else (p - lr * u) / (1 + lr * weight_decay)
        last = g
    return p


def laprop(p: Tensor, grads: list[Tensor], rates: list[float], *, weight_decay: float) -> Tensor:
    m, v, average = torch.zeros_like(p), torch.zeros_like(p), 0.0
    for t, (g, lr) in enumerate(zip(grads, rates, strict=True), 1):
        v = 0.999 * v + 0.001 * g**2
        m = 0.9 * m + 0.1 * lr * g / ((v + 1e-15) / (1 - 0.999**t)).sqrt()
        average = 0.9 * average + 0.1 * lr
        p = (p - lr * m / average) * (1 - lr * weight_decay)
    return p


def mars(
    p: Tensor, grads: list[Tensor], rates: list[float], *, weight_decay: float, all_alike: bool, factor: float
) -> Tensor:
    matrix = p.dim() > 1 or all_alike
    beta1, beta2, decay, factor = (0.95, 0.99, weight_decay, 1.0) if matrix else (0.9, 0.95, 0.1, factor)
    m, v, last = torch.zeros_like(p), torch.zeros_like(p), torch.zeros_like(p)
    for t, (g, lr) in enumerate(zip(grads, rates, strict=True), 1):
        c = g + 0.025 * beta1 / (1 - beta1) * (g - last) if matrix else g
        c = c / c.norm().clamp_min(1) if matrix else c
        m = beta1 * m + (1 - beta1) * c
        v = beta2 * v + (1 - beta2) * c**2
        rate = lr * factor
        denominator = ((v + 1e-15).sqrt() + 1e-8) / (1 - beta2**t) ** 0.5
        p = p * (1 - rate * decay) - rate * m / (1 - beta1**t) / denominator
        last = g
    return p


DEFINITIONS: list[tuple[str, dict[str, Any], Truth, dict[str, Any]]] = [
    ("AdaBelief", {}, adabelief, {"l2": False}),
    ("AdaBelief", {"decoupled_weight_decay": False}, adabelief, {"l2": True}),
    ("ADOPT", {}, adopt, {"decoupled": False, "clip": lambda t: t**0.25}),
    ("ADOPT", {"decoupled_weight_decay": True}, adopt, {"decoupled": True, "clip": lambda t: t**0.25}),
    (
        "ADOPT",
        {"clip_exponent": 0.333, "clip_offset": 1},
        adopt,
        {"decoupled": False, "clip": lambda t: (t - 1) ** 0.333},
    ),
    ("Adan", {}, adan, {"decoupled": False}),
    ("Adan", {"decoupled_weight_decay": True}, adan, {"decoupled": True}),
    ("LaProp", {}, laprop, {}),
    ("MARS", {"lr_1d": 0.02}, mars, {"all_alike": False, "factor": 2.0}),
    ("MARS", {"optimize_1d": True}, mars, {"all_alike": True, "factor": 1.0}),
]
SHAPES = [(7, 5), (11,), (3, 2, 2), (), (0, 3), (40, 30)]
RATES = [0.01, 0.01, 0.03, 0.002, 0.02]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "options", "truth", "of_truth"), DEFINITIONS)
def test_is_its_definition(
    name: str, options: dict[str, Any], truth: Truth, of_truth: dict[str, Any], backend: str
) -> None:
    """Gradients of sizes from 0.01 to 3, at several learning rates; the last parameter is a transposed view."""
    start = [random(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    grads = [
        [random(*shape, seed=50 + 10 * t + i) * 3 / 10 ** (t % 3) for t in range(5)]
        for i, shape in enumerate(SHAPES)
    ]
    params = [nn.Parameter(x.clone()) for x in start[:-1]] + [nn.Parameter(start[-1].t().contiguous().t())]
    with ng.backend(backend):
        optimizer = getattr(ng.optim, name)(params, lr=RATES[0], weight_decay=0.05, **options)
        for t, rate in enumerate(RATES):
            optimizer.param_groups[0]["lr"] = rate
            for p, own in zip(params, grads, strict=True):
                p.grad = own[t].clone()
            optimizer.step()
    for p, first, own in zip(params, start, grads, strict=True):
        expected = truth(first, own, RATES, weight_decay=0.05, **of_truth)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-10, atol=1e-12)


# --- what is special ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_adopt_first_step_leaves_parameters_alone(backend: str) -> None:
    p = nn.Parameter(random(9, seed=1))
    start = p.detach().clone()
    with ng.backend(backend):
        optimizer = ng.optim.ADOPT([p], weight_decay=0.1)
        p.grad = random(9, seed=2)
        p.grad[3] = torch.nan
        optimizer.step()
        assert torch.equal(p.detach(), start)
        assert not optimizer.state[p]["exp_avg"].any()
        p.grad = random(9, seed=3)
        optimizer.step()
    assert p.isnan().nonzero().tolist() == [[3]]  # its second moment is not a number


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_skipped_step_leaves_laprop_alone(backend: str) -> None:
    """A gradient scaler's overflow: neither the average rate nor anything else moves."""
    p = nn.Parameter(random(9, seed=1))
    p.grad = random(9, seed=2)
    with ng.backend(backend):
        optimizer = ng.optim.LaProp([p])
        optimizer.step()
        before = {name: value.clone() for name, value in optimizer.state[p].items()}
        optimizer.found_inf = torch.ones(())
        optimizer.step()
    assert before["exp_avg_lr_1"].item() == pytest.approx(0.1 * 4e-4)
    assert all(torch.equal(value, before[name]) for name, value in optimizer.state[p].items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_laprop_at_a_rate_of_zero(backend: str) -> None:
    p = nn.Parameter(random(9, seed=1))
    start = p.detach().clone()
    p.grad = random(9, seed=2)
    with ng.backend(backend):
        ng.optim.LaProp([p], lr=0.0).step()
    assert torch.equal(p.detach(), start)


def test_a_schedule_moves_both_rates_of_mars() -> None:
    p, q = nn.Parameter(random(5, seed=1)), nn.Parameter(random(5, seed=1))
    p.grad = q.grad = random(5, seed=2)
    scheduled = ng.optim.MARS([p], lr=1e-2, lr_1d=4e-2)
    scheduled.param_groups[0]["lr"] = 5e-3
    scheduled.step()
    ng.optim.MARS([q], lr=5e-3, lr_1d=2e-2).step()
    assert torch.equal(p.detach(), q.detach())


def test_mars_clips_each_matrix_by_itself() -> None:
    """The norm of one tensor does not change the step of another; vectors are not clipped."""
    params = [nn.Parameter(torch.zeros(8, 8)), nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(6))]
    for size, p in zip((100.0, 1e-3, 100.0), params, strict=True):
        p.grad = torch.full_like(p, size)
    optimizer = ng.optim.MARS(params)
    optimizer.step()
    norms = [optimizer.state[p]["exp_avg"].norm().item() for p in params]
    assert norms == pytest.approx([0.05, 0.05 * 4e-3 * 1.475, 0.1 * 100 * 6**0.5], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("AdaBelief", {"betas": (0.9, 1.0)}, r"AdaBelief: betas\[1\] must be"),
        ("AdaBelief", {"eps": -1.0}, "AdaBelief: eps must be a finite number >= 0, got -1.0"),
        ("ADOPT", {"clip_exponent": -0.25}, "ADOPT: clip_exponent must be a finite number >= 0, got -0.25"),
        ("ADOPT", {"clip_offset": -1}, "ADOPT: clip_offset must be"),
        ("Adan", {"betas": (0.9, 0.99)}, "betas must be three numbers"),
        ("Adan", {"weight_decay": -1.0}, "Adan: weight_decay must be"),
        ("LaProp", {"weight_decay": -1.0}, "LaProp: weight_decay must be"),
        ("MARS", {"gamma": float("nan")}, "MARS: gamma must be"),
        ("MARS", {"lr_1d": -1.0}, "MARS: lr_1d must be"),
        ("MARS", {"betas_1d": (0.9,)}, "MARS: betas_1d: betas must be two numbers"),
        ("MARS", {"weight_decay_1d": -0.1}, "MARS: weight_decay_1d must be"),
    ],
)
def test_bad_arguments(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(ng.optim, name)([nn.Parameter(torch.zeros(3))], **arguments)
