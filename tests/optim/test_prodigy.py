"""Prodigy: the estimate against its definition, groups, storage, checkpoints."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from tests import golden_files
from tests.optim.golden import replay
from torch import Tensor, nn

import narrowgauge as ng

SHAPES = [(7, 5), (3,), (), (0, 2), (2, 3, 4)]


def parameters(
    dtype: torch.dtype = torch.float64, shapes: list[tuple[int, ...]] = SHAPES
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def gradients(params: list[Tensor], step: int) -> list[Tensor]:
    """Of a noisy bowl, so that the estimate grows."""
    generator = torch.Generator().manual_seed(50 + step)
    return [(p.double() + 0.1 * torch.randn(p.shape, generator=generator) - 3).to(p.dtype) for p in params]


def train(
    params: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: int = 4, first: int = 0
) -> None:
    for step in range(first, first + steps):
        for p, g in zip(params, gradients([p.detach() for p in params], step), strict=True):
            p.grad = g
        optimizer.step()


def estimate(optimizer: torch.optim.Optimizer) -> float:
    return optimizer.param_groups[0]["d"].item()


class Truth:
    """The definition, tensor by tensor."""

    def __init__(self, params: list[Tensor], **options: Any) -> None:
        self.p = [p.clone() for p in params]
        self.p0 = [p.clone() for p in params]
        self.m, self.v, self.s = ([torch.zeros_like(p) for p in params] for _ in range(3))
        self.options = {
            "lr": 1.0, "betas": (0.9, 0.999), "beta3": None, "eps": 1e-8, "weight_decay": 0.0, "decouple": True,
            "use_bias_correction": False, "safeguard_warmup": False, "d0": 1e-6, "d_coef": 1.0,
            "growth_rate": math.inf,
        } | options  # fmt: skip
        self.d = self.d_max = self.options["d0"]
        self.numerator, self.k = 0.0, 0

    def step(self, grads: list[Tensor]) -> None:
        o, d = self.options, self.d
        (b1, b2), d0 = o["betas"], o["d0"]
        b3 = math.sqrt(b2) if o["beta3"] is None else o["beta3"]
        self.k += 1
        rate = d * o["lr"]
        if o["use_bias_correction"]:
            rate *= math.sqrt(1 - b2**self.k) / (1 - b1**self.k)
        if not o["decouple"]:
            grads = [g + o["weight_decay"] * p for g, p in zip(grads, self.p, strict=True)]
        new, norm = 0.0, 0.0
        for i, g in enumerate(grads):
            new += d / d0 * rate * (g * (self.p0[i] - self.p[i])).sum().item()
            self.m[i] = b1 * self.m[i] + d * (1 - b1) * g
            self.v[i] = b2 * self.v[i] + d**2 * (1 - b2) * g**2
            self.s[i] = b3 * self.s[i] + d / d0 * (d if o["safeguard_warmup"] else rate) * g
            norm += self.s[i].abs().sum().item()
        self.numerator = b3 * self.numerator + new
        guess = o["d_coef"] * self.numerator / norm
        if d == d0:
            d = max(d, guess)
        self.d_max = max(self.d_max, guess)
        self.d = min(self.d_max, d * o["growth_rate"])
        for i in range(len(grads)):
            if o["decouple"]:
                self.p[i] = self.p[i] * (1 - rate * o["weight_decay"])
            self.p[i] = self.p[i] - rate * self.m[i] / (self.v[i].sqrt() + self.d * o["eps"])


OPTIONS = [
    {},
    {"weight_decay": 0.1, "betas": (0.8, 0.99)},
    {"weight_decay": 0.1, "decouple": False, "beta3": 0.9},
    {"use_bias_correction": True, "safeguard_warmup": True, "d0": 1e-3, "growth_rate": 1.1},
    {"lr": 0.5, "d_coef": 2.0, "d0": 1e-4, "eps": 1e-3},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_follows_the_definition(options: dict[str, Any], backend: str) -> None:
    params = parameters()
    truth = Truth([p.detach() for p in params], **options)
    with ng.backend(backend):
        optimizer = ng.optim.Prodigy(params, **options)
        for step in range(40):
            truth.step(gradients(truth.p, step))
            train(params, optimizer, 1, step)
            assert estimate(optimizer) == pytest.approx(truth.d, rel=1e-8)
    for i, p in enumerate(params):
        torch.testing.assert_close(p.detach(), truth.p[i], rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(optimizer.state[p]["s"], truth.s[i], rtol=1e-7, atol=1e-7 * 1e6)
    assert truth.d > 5 * truth.options["d0"]  # or nothing was estimated


def test_float32_gives_the_estimate_of_float64() -> None:
    """The first steps move a parameter by a few units in its last place."""
    narrow, wide = parameters(torch.float32), parameters()
    wide = [nn.Parameter(p.detach().double()) for p in narrow]
    optimizers = ng.optim.Prodigy(narrow), ng.optim.Prodigy(wide)
    for params, optimizer in zip((narrow, wide), optimizers, strict=True):
        train(params, optimizer, 12)
    assert estimate(optimizers[0]) == pytest.approx(estimate(optimizers[1]), rel=2e-2)


RECORDED = sorted((golden_files.GOLDEN / "extra_optim").glob("prodigy*.npz"))


@pytest.mark.skipif(not RECORDED, reason="no recorded run of Prodigy is here")
def test_replays_the_authors_runs() -> None:
    def make(params: list[nn.Parameter], meta: dict[str, Any]) -> torch.optim.Optimizer:
        return ng.optim.Prodigy(params, **meta["hyperparameters"])

    replay("extra_optim", "prodigy", make, tolerances={torch.float64: 1e-10, torch.float32: 2e-6})


def test_groups_share_one_estimate() -> None:
    together, apart = parameters(), parameters()
    one = ng.optim.Prodigy(together)
    two = ng.optim.Prodigy([{"params": apart[:2]}, {"params": apart[2:]}])
    train(together, one, 30)
    train(apart, two, 30)
    for p, q in zip(together, apart, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)
    assert two.param_groups[0]["d"] == two.param_groups[1]["d"] > 1e-5


@pytest.mark.parametrize("tensor", [False, True])
def test_a_group_with_rate_zero_is_left_alone(tensor: bool) -> None:
    rate, zero = (torch.tensor(1.0), torch.tensor(0.0)) if tensor else (1.0, 0.0)
    params, alone = parameters(), parameters()
    before = [p.detach().clone() for p in params]
    optimizer = ng.optim.Prodigy([{"params": params[:2], "lr": rate}, {"params": params[2:], "lr": zero}])
    train(params, optimizer, 20)
    alone_optimizer = ng.optim.Prodigy(alone[:2])
    train(alone[:2], alone_optimizer, 20)
    for p, q in zip(params, [*alone[:2], *before[2:]], strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-9, atol=1e-9)
    assert estimate(optimizer) == pytest.approx(estimate(alone_optimizer), rel=1e-9)


def test_groups_with_different_rates_are_refused() -> None:
    params = parameters()
    optimizer = ng.optim.Prodigy([{"params": params[:2], "lr": 1.0}, {"params": params[2:], "lr": 0.5}])
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=r"the same lr, or 0 to be left alone, got \[1.0, 0.5\]"):
        train(params, optimizer, 1)
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_steps_that_are_skipped_leave_the_estimate() -> None:
    params = parameters()
    optimizer = ng.optim.Prodigy(params)
    train(params, optimizer, 15)
    names = ("d", "d_max", "d_numerator", "k")
    before = [optimizer.param_groups[0][name].clone() for name in names]
    values = [p.detach().clone() for p in params]
    optimizer.found_inf = torch.ones(())
    train(params, optimizer, 1)
    assert [optimizer.param_groups[0][name] for name in names] == before
    assert all(torch.equal(p, q) for p, q in zip(params, values, strict=True))


@pytest.mark.parametrize("decouple", [True, False])
def test_gradients_are_not_touched(decouple: bool) -> None:
    params = parameters()
    expected = gradients([p.detach() for p in params], 0)
    train(params, ng.optim.Prodigy(params, weight_decay=0.1, decouple=decouple), 1)
    assert all(torch.equal(p.grad, g) for p, g in zip(params, expected, strict=True))


def test_gradients_of_zero_change_nothing() -> None:
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = ng.optim.Prodigy(params, weight_decay=0.1)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert estimate(optimizer) == 1e-6
    assert optimizer.param_groups[0]["k"] == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_gradients_that_are_not_finite_leave_the_estimate(value: float) -> None:
    params = parameters(torch.float32, [(300,)])
    optimizer = ng.optim.Prodigy(params)
    train(params, optimizer, 3)
    before = estimate(optimizer)
    params[0].grad[7] = value
    optimizer.step()
    assert estimate(optimizer) == before
    assert optimizer.param_groups[0]["d_numerator"].isfinite()
    assert (~params[0].isfinite()).nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("options", [{}, {"state_dtype": "int8", "min_quantized_size": 0}])
def test_resuming_continues_bit_for_bit(options: dict[str, Any]) -> None:
    params = parameters(torch.float32)
    optimizer = ng.optim.Prodigy([{"params": params[:2]}, {"params": params[2:]}], **options)
    train(params, optimizer, 12)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = [nn.Parameter(p.detach().clone()) for p in params]
    other = ng.optim.Prodigy([{"params": resumed[:2]}, {"params": resumed[2:]}], **options)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert estimate(other) == estimate(optimizer) > 1e-5
    train(params, optimizer, 5, 12)
    train(resumed, other, 5, 12)
    assert all(torch.equal(p, q) for p, q in zip(params, resumed, strict=True))
    assert estimate(other) == estimate(optimizer)


def test_loads_the_form_of_prodigyopt() -> None:
    """Its sums are flat, a start at zero is one number, and numbers of groups are Python's."""
    params = [nn.Parameter(torch.zeros(4, 3)), *parameters(torch.float32, [(5, 2)])]
    optimizer = ng.optim.Prodigy(params)
    train(params, optimizer, 10)
    state = {"state": {}, "param_groups": [dict(group) for group in optimizer.state_dict()["param_groups"]]}
    for i, p in enumerate(params):
        entries = dict(optimizer.state[p])
        entries["step"] = 10
        entries["s"] = entries["s"].flatten()
        entries["p0"] = entries["p0"].flatten() if i else torch.tensor(0.0)
        state["state"][i] = entries
    for name in ("d", "d_max", "d_numerator"):
        state["param_groups"][0][name] = optimizer.param_groups[0][name].item()
    state["param_groups"][0]["k"] = 10
    mine = [nn.Parameter(p.detach().clone()) for p in params]
    other = ng.optim.Prodigy(mine)
    other.load_state_dict(state)
    train(params, optimizer, 3, 10)
    train(mine, other, 3, 10)
    assert all(torch.equal(p, q) for p, q in zip(params, mine, strict=True))


def test_the_start_is_never_coded() -> None:
    params = parameters(torch.bfloat16, [(64, 32)])
    optimizer = ng.optim.Prodigy(params, state_dtype="int8", min_quantized_size=0)
    start = params[0].detach().float()
    train(params, optimizer, 2)
    state = optimizer.state[params[0]]
    assert torch.equal(state["p0"], start)
    assert {"exp_avg.codes", "exp_avg_sq.codes", "s.codes", "p0", "step"} <= set(state)


def test_coded_states_stay_near() -> None:
    narrow, wide = parameters(torch.float32, [(40, 30)]), parameters(torch.float32, [(40, 30)])
    start = wide[0].detach().clone()
    optimizers = (
        ng.optim.Prodigy(narrow, state_dtype="int8", min_quantized_size=0, d0=1e-3),
        ng.optim.Prodigy(wide, d0=1e-3),
    )
    train(narrow, optimizers[0], 40)
    train(wide, optimizers[1], 40)
    assert estimate(optimizers[0]) == pytest.approx(estimate(optimizers[1]), rel=0.1)
    assert (narrow[0] - wide[0]).norm() < 0.1 * (wide[0] - start).norm()


def test_layouts_and_complex_numbers() -> None:
    generator = torch.Generator().manual_seed(3)
    plain = nn.Parameter(torch.randn(4, 3, 5, 2, generator=generator))
    last = nn.Parameter(plain.detach().to(memory_format=torch.channels_last))
    gaps = nn.Parameter(torch.stack([plain.detach()] * 2, -1)[..., 0])
    turned = nn.Parameter(torch.view_as_complex(plain.detach().clone()))
    optimizers = [ng.optim.Prodigy([p], d0=1e-2) for p in (plain, last, gaps, turned)]
    for _ in range(5):
        g = torch.randn(4, 3, 5, 2, generator=generator)
        for p in (plain, last, gaps):
            p.grad = g.clone()
        turned.grad = torch.view_as_complex(g.clone())
        for optimizer in optimizers:
            optimizer.step()
    for p in (last, gaps, torch.view_as_real(turned)):
        torch.testing.assert_close(p, plain, rtol=1e-5, atol=1e-6)


def test_clipping_and_the_scale_of_amp_reach_both_sums() -> None:
    plain, scaled = parameters(), parameters()
    optimizers = ng.optim.Prodigy(plain), ng.optim.Prodigy(scaled)
    optimizers[1].grad_scale = torch.tensor(8.0)
    for step in range(15):
        for p, q, g in zip(plain, scaled, gradients([p.detach() for p in plain], step), strict=True):
            p.grad, q.grad = g.clone(), g * 8
        norm = torch.nn.utils.clip_grad_norm_(plain, 2.0)
        optimizers[0].step()
        optimizers[1].step(max_grad_norm=2.0)
        torch.testing.assert_close(optimizers[1].last_grad_norm.double(), norm, rtol=1e-6, atol=0)
    assert estimate(optimizers[1]) == pytest.approx(estimate(optimizers[0]), rel=1e-4)


def test_a_compiled_step_gives_the_bits_of_an_eager_one() -> None:
    eager, compiled = parameters(torch.float32), parameters(torch.float32)
    optimizers = ng.optim.Prodigy(eager, d0=1e-3), ng.optim.Prodigy(compiled, d0=1e-3)
    step = torch.compile(optimizers[1].step, fullgraph=True, backend="aot_eager")
    for number in range(4):
        for params in (eager, compiled):
            for p, g in zip(params, gradients([p.detach() for p in params], number), strict=True):
                p.grad = g
        optimizers[0].step()
        step()
    assert all(torch.equal(p, q) for p, q in zip(eager, compiled, strict=True))
    assert estimate(optimizers[1]) == estimate(optimizers[0]) > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] must be"),
        ({"beta3": 1.0}, "beta3 must be"),
        ({"eps": -1.0}, "eps must be"),
        ({"weight_decay": -1.0}, "weight_decay must be"),
        ({"d0": 0.0}, "d0 must be greater than 0"),
        ({"d_coef": -1.0}, "d_coef must be"),
        ({"growth_rate": 0.9}, "growth_rate must be at least 1, got 0.9"),
        ({"slice_p": 11}, "slice_p must be 1, got 11; to save memory use"),
    ],
)
def test_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ng.optim.Prodigy(parameters(), **options)
