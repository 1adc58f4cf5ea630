"""Normalize-and-project: recorded runs, what a projection keeps, the option of every optimizer."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from tests import golden_files
from torch import Tensor, nn
from torch.nn import functional as F

import narrowgauge as ng
from narrowgauge.optim.base import ElementwiseOptimizer

SHAPES = [(7, 5), (3,), (), (0, 2), (2, 3, 4)]


def parameters(
    dtype: torch.dtype = torch.float32, shapes: list[tuple[int, ...]] = SHAPES
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape in shapes
    ]


def train(
    params: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: int = 4, first: int = 0
) -> None:
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(100 + step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def norm(p: Tensor, by_rows: bool = False) -> Tensor:
    x = p.detach().abs().double()
    return x.flatten(1).norm(dim=1) if by_rows and p.dim() > 1 else x.norm()


# --- recorded runs ---


def settings(meta: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Such as ``adam lr=0.02 betas=(0.9,0.999) eps=1e-8``."""
    kind, *words = meta["optimizer"].split()
    options: dict[str, Any] = {}
    for word in words:
        name, value = word.split("=")
        numbers = tuple(float(number) for number in value.strip("()").split(","))
        options[name] = numbers if len(numbers) > 1 else numbers[0]
    return kind, options


def replay(project: Any) -> list[str]:
    """`project(meta, weights, others)` gives what to call once the gradients are there; None leaves a file out."""
    replayed = []
    for path in golden_files.files("nap"):
        recorded, meta = golden_files.read(path)
        names = [name.removeprefix("param0_") for name in recorded if name.startswith("param0_")]
        params = {name: nn.Parameter(recorded[f"param0_{name}"].clone()) for name in names}
        weights = [name.replace(".", "_") for name in meta["initial_norms"]]
        others = [params[name] for name in names if name not in weights]
        step = project(meta, [params[name] for name in weights], others)
        if step is None:
            continue
        count = sum(name.endswith("_in_x") for name in recorded)
        for k in range(1, count + 1):
            for name, p in params.items():
                p.grad = recorded[f"grad{k}_{name}"].clone()
            step()
            for name, p in params.items():
                torch.testing.assert_close(p.detach(), recorded[f"param{k}_{name}"], rtol=1e-5, atol=1e-5)
        replayed.append(path.stem)
    return replayed


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_replays_plasticine_with_the_function(backend: str) -> None:
    def project(meta: dict[str, Any], weights: list[nn.Parameter], others: list[nn.Parameter]) -> Any:
        kind, options = settings(meta)
        optimizer = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[kind]([*weights, *others], **options)
        targets, steps = list(meta["initial_norms"].values()), [0]

        def step() -> None:
            optimizer.step()
            steps[0] += 1
            if steps[0] % meta["project_every"] == 0:
                ng.optim.nap_(weights, targets)

        return step

    with ng.backend(backend):
        assert {"adam_every_2", "sgd_momentum"} <= set(replay(project))


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_replays_plasticine_with_the_option(backend: str) -> None:
    def project(meta: dict[str, Any], weights: list[nn.Parameter], others: list[nn.Parameter]) -> Any:
        kind, options = settings(meta)
        if kind != "adam":
            return None
        groups = [{"params": weights, "project_norm": True}, {"params": others}]
        return ng.optim.Adam(groups, **options, project_every=meta["project_every"]).step

    with ng.backend(backend):
        assert "adam_every_2" in replay(project)


# --- the function ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_scales_to_the_norms(dtype: torch.dtype) -> None:
    params = parameters(dtype)
    before = [p.detach().clone() for p in params]
    targets = [2.5, torch.tensor(0.5), torch.tensor([3.0]), 1.0, torch.tensor([1.5, 0.25])]
    ng.optim.nap_(params, targets)
    for p, old, target in zip(params, before, targets, strict=True):
        by_rows = isinstance(target, Tensor) and target.numel() > 1
        if p.numel():
            torch.testing.assert_close(
                norm(p, by_rows),
                torch.as_tensor(target).double().reshape(norm(p, by_rows).shape),
                rtol=1e-6,
                atol=0,
            )
            shape = (-1, *[1] * (p.dim() - 1)) if by_rows else ()
            factor = (norm(p, by_rows) / norm(old, by_rows)).reshape(shape)
            torch.testing.assert_close(p.detach(), (old * factor).to(dtype), rtol=1e-6, atol=1e-7)
    once = [p.detach().clone() for p in params]
    ng.optim.nap_(params, targets)
    for p, q in zip(params, once, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=3e-7, atol=0)


def test_leaves_what_has_no_norm() -> None:
    zero, no_target, overflowed, nan = (
        torch.zeros(3, 2),
        torch.ones(3),
        torch.tensor([1.0, torch.inf]),
        torch.ones(3),
    )
    nan[1] = torch.nan
    before = [x.clone() for x in (zero, no_target, overflowed, nan)]
    ng.optim.nap_([zero, no_target, overflowed, nan], [2.0, 0.0, 2.0, torch.tensor(2.0)])
    for x, y in zip((zero, no_target, overflowed, nan), before, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def test_layouts() -> None:
    plain = torch.randn(4, 3, 5, 6)
    spread = torch.empty(4, 3, 5, 12)[..., ::2].copy_(plain)
    for target in (2.0, torch.tensor([1.0, 2.0, 3.0, 4.0])):
        tensors = [
            plain.clone(),
            plain.to(memory_format=torch.channels_last),
            spread.clone().copy_(plain),
            spread,
        ]
        strides = [x.stride() for x in tensors]
        ng.optim.nap_(tensors, [target] * 4)
        assert [x.stride() for x in tensors] == strides
        for x in tensors:
            torch.testing.assert_close(x, tensors[0], rtol=3e-7, atol=0)
            torch.testing.assert_close(
                norm(x, isinstance(target, Tensor)), torch.as_tensor(target).double(), rtol=1e-6, atol=0
            )


def test_a_normalized_layer_does_not_see_it() -> None:
    weight, x = torch.randn(16, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    before = F.layer_norm(x @ weight.T, (16,), eps=1e-12)
    ng.optim.nap_(weight, 0.3)
    torch.testing.assert_close(F.layer_norm(x @ weight.T, (16,), eps=1e-12), before, rtol=1e-9, atol=1e-9)


def test_refuses() -> None:
    params = parameters()
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match="rho must hold one norm per tensor, got 1 for 5 tensors"):
        ng.optim.nap_(params, 1.0)
    with pytest.raises(
        ValueError, match=r"rho\[0\] must be one norm, or one per row of a tensor of shape \(7, 5\)"
    ):
        ng.optim.nap_(params[:1], torch.ones(5))
    with pytest.raises(TypeError, match=r"params\[1\] is torch.int64"):
        ng.optim.nap_([params[0], torch.ones(3, dtype=torch.int64)], [1.0, 1.0])
    for options, message in (
        (
            {"project_norm": "column"},
            "project_norm must be one of False, True, 'tensor', 'row'; got 'column'",
        ),
        ({"project_every": 0}, "project_every must be a whole number >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ng.optim.AdamW(params, **options)
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


# --- beside any optimizer ---


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(3, 4, 2, dtype=torch.float64), nn.LayerNorm(4, dtype=torch.float64)
        self.head = nn.Linear(4, 2, dtype=torch.float64)
        with torch.no_grad():
            self.norm.bias.fill_(0.5)


@pytest.mark.parametrize("affine", ["none", "joint", "decay", "free"])
@pytest.mark.parametrize("exclude_output", [True, False])
def test_projector_of_a_module(affine: str, exclude_output: bool) -> None:
    net = Net()
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    projector = ng.optim.NormProjector(net, 2, exclude_output, affine, affine_decay=0.25)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.5)
    moved = {name: p.detach().clone() for name, p in net.named_parameters()}
    projector.project_()
    assert all(torch.equal(p, moved[name]) for name, p in net.named_parameters())
    projector.project_()
    kept = {"conv.weight", *([] if exclude_output else ["head.weight"])}
    kept |= {"norm.weight", "norm.bias"} if affine == "joint" else set()
    for name, p in net.named_parameters():
        expected = start[name] if name in kept else moved[name]
        if affine == "decay" and name.startswith("norm"):
            expected = moved[name] + 0.25 * (start[name] - moved[name])
        torch.testing.assert_close(p.detach(), expected, rtol=1e-7, atol=1e-7)


def test_projector_resumes_and_takes_what_it_is_given() -> None:
    bias = nn.Parameter(torch.tensor([3.0, 4.0]))
    projector = ng.optim.NormProjector([bias], every=2)
    projector.project_()
    with torch.no_grad():
        bias.mul_(2)
    other = ng.optim.NormProjector([bias], every=2)
    other.load_state_dict(projector.state_dict())
    other.project_()
    torch.testing.assert_close(bias.detach(), torch.tensor([3.0, 4.0]))
    two = ng.optim.NormProjector([bias, bias])
    with pytest.raises(
        ValueError, match="has 1 weights and 0 normalization layers, this projector has 2 and 0"
    ):
        two.load_state_dict(projector.state_dict())
    with pytest.raises(ValueError, match="has no weights to project"):
        ng.optim.NormProjector(nn.LayerNorm(3))
    with pytest.raises(ValueError, match="affine must be one of"):
        ng.optim.NormProjector([bias], affine="both")
    with pytest.raises(ValueError, match="every must be a whole number"):
        ng.optim.NormProjector([bias], every=0)


# --- the option ---


def assert_same_bits(actual: list[nn.Parameter], expected: list[nn.Parameter]) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a, e), f"parameter {i}"


@pytest.mark.parametrize("how", [True, "tensor", "row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_every_step_keeps_norms_and_the_first_its_direction(how: bool | str, dtype: torch.dtype) -> None:
    params, free, by_rows = parameters(dtype), parameters(dtype), how == "row"
    start = [norm(p, by_rows) for p in params]
    optimizer = ng.optim.AdamW(params, lr=0.1, project_norm=how)
    train(params, optimizer, 1)
    train(free, ng.optim.AdamW(free, lr=0.1), 1)
    for p, q, target in zip(params, free, start, strict=True):
        torch.testing.assert_close(norm(p, by_rows), target, rtol=1e-6, atol=0)
        shape = (-1, *[1] * (p.dim() - 1)) if by_rows and p.dim() > 1 else ()
        if p.numel():
            factor = (target / norm(q, by_rows)).reshape(shape)
            torch.testing.assert_close(p.detach(), (q.detach() * factor).to(dtype), rtol=1e-6, atol=1e-7)
    for step in range(1, 4):
        train(params, optimizer, 1, step)
        for p, target in zip(params, start, strict=True):
            torch.testing.assert_close(norm(p, by_rows), target, rtol=1e-6, atol=0)


def test_states_are_not_touched_and_gradients_neither() -> None:
    params, free = parameters(), parameters()
    optimizers = ng.optim.AdamW(params, lr=0.1, project_norm=True), ng.optim.AdamW(free, lr=0.1)
    for p, optimizer in zip((params, free), optimizers, strict=True):
        train(p, optimizer, 1)
    for p, q in zip(params, free, strict=True):
        assert torch.equal(p.grad, q.grad)
        for name in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizers[0].state[p][name], optimizers[1].state[q][name])


@pytest.mark.parametrize("how", ["tensor", "row"])
def test_the_option_is_the_function_after_the_step(how: str) -> None:
    params, others = parameters(), parameters()
    optimizers = ng.optim.AdamW(params, lr=0.1, project_norm=how), ng.optim.AdamW(others, lr=0.1)
    targets = [norm(p, how == "row").float() for p in others]
    for step in range(3):
        train(params, optimizers[0], 1, step)
        train(others, optimizers[1], 1, step)
        ng.optim.nap_(others, targets)
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_decay_is_a_larger_rate() -> None:
    """The projected direction of p (1 - lr decay) - lr u is that of p - lr / (1 - lr decay) u."""
    rate, decay = 0.2, 0.5
    decayed, plain = parameters(torch.float64), parameters(torch.float64)
    train(decayed, ng.optim.AdamW(decayed, lr=rate, weight_decay=decay, project_norm=True), 5)
    train(plain, ng.optim.AdamW(plain, lr=rate / (1 - rate * decay), weight_decay=0.0, project_norm=True), 5)
    for p, q in zip(decayed, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


def test_the_step_stays_in_proportion_on_a_scale_invariant_loss() -> None:
    """Without projection the norm grows and the effective rate falls."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(64, 16, generator=generator) for _ in range(2))
    norms = {}
    for projected in (False, True):
        weight = nn.Parameter(torch.randn(16, 16, generator=torch.Generator().manual_seed(1)))
        start = norm(weight)
        optimizer = ng.optim.AdamW([weight], lr=0.1, weight_decay=0.0, project_norm=projected)
        for _ in range(15):
            optimizer.zero_grad()
            F.mse_loss(F.layer_norm(x @ weight, (16,)), y).backward()
            optimizer.step()
        norms[projected] = (norm(weight) / start).item()
    assert norms[False] > 1.1
    assert norms[True] == pytest.approx(1, rel=1e-6)


def test_every_so_many_steps() -> None:
    params, free = parameters(), parameters()
    targets = [norm(p) for p in params]
    optimizers = (
        ng.optim.AdamW(params, lr=0.1, project_norm=True, project_every=3),
        ng.optim.AdamW(free, lr=0.1),
    )
    for p, optimizer in zip((params, free), optimizers, strict=True):
        train(p, optimizer, 2)
    assert_same_bits(params, free)
    train(params, optimizers[0], 1, 2)
    for p, target in zip(params, targets, strict=True):
        torch.testing.assert_close(norm(p), target, rtol=1e-6, atol=0)


def test_parameters_with_different_steps_have_their_own_turns() -> None:
    early, late = parameters(shapes=[(5, 4), (5, 4)])
    targets = norm(early), norm(late)
    optimizer = ng.optim.AdamW([early, late], lr=0.1, project_norm=True, project_every=2)
    early.grad = torch.ones(5, 4)
    optimizer.step()
    late.grad = torch.ones(5, 4)
    optimizer.step()
    torch.testing.assert_close(norm(early), targets[0], rtol=1e-6, atol=0)
    assert abs(norm(late) / targets[1] - 1) > 1e-3


def test_what_begins_at_zero_is_free_and_decays() -> None:
    weight, other = nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(4, 4))
    optimizers = [
        ng.optim.AdamW([weight], lr=0.1, weight_decay=0.3, project_norm=True),
        ng.optim.AdamW([other], lr=0.1, weight_decay=0.3),
    ]
    train([weight], optimizers[0])
    train([other], optimizers[1])
    assert torch.equal(weight, other)
    assert optimizers[0].state[weight]["rho"] == 0


@pytest.mark.parametrize("how", [True, "row"])
def test_resuming_keeps_the_norms(how: bool | str) -> None:
    params = parameters(torch.bfloat16)
    optimizer = ng.optim.AdamW(params, lr=0.1, project_norm=how, project_every=2, param_update="stochastic")
    train(params, optimizer, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = [nn.Parameter(p.detach().clone()) for p in params]
    other = ng.optim.AdamW(resumed, lr=0.1, project_norm=how, project_every=2, param_update="stochastic")
    other.load_state_dict(torch.load(file, weights_only=True))
    train(params, optimizer, 3, 3)
    train(resumed, other, 3, 3)
    assert_same_bits(resumed, params)
    assert optimizer.state[params[0]]["rho"].dtype is torch.float32
    plain = ng.optim.AdamW(parameters(torch.bfloat16), param_update="stochastic")
    train(plain.param_groups[0]["params"], plain, 1)
    state = plain.state_dict()
    state["param_groups"][0]["project_norm"] = how
    with pytest.raises(ValueError, match=r"expected .*'rho'.* nothing was loaded"):
        other.load_state_dict(state)


def test_a_skipped_step_projects_nothing() -> None:
    params = parameters()
    optimizer = ng.optim.AdamW(params, lr=0.1, project_norm=True, project_every=2)
    train(params, optimizer, 1)
    before = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer.found_inf = torch.ones(())
    train(params, optimizer, 1, 1)
    assert_same_bits(params, before)


@pytest.mark.parametrize("bits", [8, 16])
def test_split_masters_are_projected_whole(bits: int) -> None:
    (p,) = parameters(torch.bfloat16, [(40, 30)])
    target = norm(p)
    optimizer = ng.optim.AdamW([p], lr=0.1, project_norm=True, param_update="split", split_bits=bits)
    train([p], optimizer, 3)
    master = ng.optim.join_master(p.detach(), optimizer.state[p]["param_low"])
    torch.testing.assert_close(norm(master), target, rtol=1e-5 if bits == 8 else 1e-6, atol=0)


def test_rounding_to_nearest_loses_the_projection_of_bfloat16() -> None:
    """The norm grows by far less than half a unit in the last place in a step."""
    ratios = {}
    for how in ("nearest", "stochastic", "kahan"):
        generator = torch.Generator().manual_seed(0)
        p = nn.Parameter(torch.randn(128, 128, generator=generator).bfloat16())
        target = norm(p)
        optimizer = ng.optim.AdamW(
            [p], lr=0.02, betas=(0.0, 0.0), eps=1e-3, weight_decay=0.0, project_norm=True, param_update=how
        )
        for _ in range(20):
            p.grad = torch.randn(128, 128, generator=generator).bfloat16()
            optimizer.step()
        ratios[how] = (norm(p) / target).item()
    assert ratios["nearest"] > 1 + 1e-3
    assert ratios["stochastic"] == pytest.approx(1, abs=1e-4)
    assert ratios["kahan"] == pytest.approx(1, abs=1e-4)


def test_averages_are_projected_when_they_are_used_and_copies_always() -> None:
    params = parameters()
    targets = [norm(p) for p in params]
    optimizer = ng.optim.AdamW(params, lr=0.3, project_norm=True, ema_decay=0.5)
    copies = {p: torch.zeros_like(p, dtype=torch.bfloat16) for p in params}
    optimizer.attach_copies(copies)
    train(params, optimizer, 4)
    for p, copy in copies.items():
        assert torch.equal(copy, p.to(torch.bfloat16))
    assert abs(norm(optimizer.state[params[0]]["ema"]) / targets[0] - 1) > 1e-3  # of values before projection
    before = [nn.Parameter(p.detach().clone()) for p in params]
    with optimizer.swap_ema():
        for p, target in zip(params, targets, strict=True):
            torch.testing.assert_close(norm(p), target, rtol=1e-6, atol=0)
    assert_same_bits(params, before)


@pytest.mark.parametrize("how", [True, "row"])
def test_layouts_of_parameters(how: bool | str) -> None:
    plain = nn.Parameter(torch.randn(4, 3, 5, 6))
    last = nn.Parameter(plain.detach().to(memory_format=torch.channels_last))
    gaps = nn.Parameter(torch.empty(4, 3, 5, 12)[..., ::2].copy_(plain.detach()))
    optimizers = [ng.optim.AdamW([p], lr=0.1, project_norm=how) for p in (plain, last, gaps)]
    for step in range(3):
        for p, optimizer in zip((plain, last, gaps), optimizers, strict=True):
            train([p], optimizer, 1, step)
    for p in (last, gaps):
        torch.testing.assert_close(p, plain, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("how", [True, "row"])
def test_a_compiled_step_gives_the_bits_of_an_eager_one(how: bool | str) -> None:
    eager, compiled = parameters(), parameters()
    optimizers = [
        ng.optim.AdamW(params, lr=torch.tensor(0.1), project_norm=how, project_every=2)
        for params in (eager, compiled)
    ]
    step = torch.compile(optimizers[1].step, fullgraph=True, backend="aot_eager")
    for number in range(4):
        for params in (eager, compiled):
            generator = torch.Generator().manual_seed(number)
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
        optimizers[0].step()
        step()
    assert_same_bits(compiled, eager)


ELEMENTWISE = [
    name
    for name in ng.optim.__all__
    if isinstance(kind := getattr(ng.optim, name), type) and issubclass(kind, ElementwiseOptimizer)
]


@pytest.mark.parametrize("kind", ELEMENTWISE)
def test_every_elementwise_optimizer_takes_it(kind: str) -> None:
    params = parameters(shapes=[(12, 8), (5,), (2, 3, 4, 4)])
    targets = [norm(p) for p in params]
    named, heads = [(f"{i}", p) for i, p in enumerate(params)], {"dim": 8, "n_heads": 2}
    given, options = (named, heads) if kind == "AdamMini" else (params, {})
    optimizer = getattr(ng.optim, kind)(given, lr=0.1, project_norm=True, **options)
    train(params, optimizer, 3)
    for p, target in zip(params, targets, strict=True):
        torch.testing.assert_close(norm(p), target, rtol=1e-6, atol=0)
