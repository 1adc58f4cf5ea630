"""Muon as users call it: recorded runs, the iterations against singular values, groups, storage, checkpoints."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import golden_files
from tests.optim.test_adamw import assert_equal, parameters, set_gradients, train
from tests.optim.test_checkpoint import through_a_file
from tests.tolerances import assert_same_bits
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import narrowgauge as ng
from narrowgauge.optim import matrix, newton_schulz
from narrowgauge.optim import muon as muon_module

DEFAULT = (3.4445, -4.7750, 2.0315)
CONVERGENT = (15 / 8, -10 / 8, 3 / 8)  # fixes 1 to third order
EXACT = {"ns_dtype": torch.float64}


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_singular_values(
    g: Tensor, triples: Any = (DEFAULT,) * 5, eps: float = 1e-7, add: bool = False
) -> Tensor:
    """The iterations as what they do to each singular value."""
    u, s, vh = torch.linalg.svd(g.double(), full_matrices=False)
    norm = s.square().sum(-1, keepdim=True).sqrt()
    s = s / (norm + eps if add else norm.clamp_min(eps))
    for a, b, c in triples:
        s = a * s + b * s**3 + c * s**5
    return (u * s[..., None, :]) @ vh


# --- recorded runs ---


@pytest.mark.parametrize("path", golden_files.files("muon", "[km]*.npz"), ids=lambda path: path.stem)
def test_replays_the_authors(path: Path) -> None:
    recorded, meta = golden_files.read(path)
    params = [nn.Parameter(recorded[f"param{i}_0"]) for i in range(len(meta["shapes"]))]
    options = meta["hyperparameters"]
    optimizer = ng.optim.Muon([{"params": params, **options}])
    is_adam = not options.get("use_muon", True)
    for step in range(1, meta["steps"] + 1):
        for i, p in enumerate(params):
            p.grad = recorded[f"grad{i}_step{step}"]
        optimizer.step()
        for i, p in enumerate(params):
            expected = recorded[f"param{i}_step{step}"]
            if is_adam:
                torch.testing.assert_close(p.detach(), expected, rtol=1e-10, atol=1e-12)
            else:
                factor = math.sqrt(max(1, p.shape[-2] / p.shape[-1]))
                assert (p - expected).abs().max() < 6e-2 * options["lr"] * factor
            tolerance = 1e-10 if p.dtype is torch.float64 else 2e-6
            for name, value in optimizer.state[p].items():
                torch.testing.assert_close(
                    value.double(),
                    recorded[f"state{i}_{name}_step{step}"].double(),
                    rtol=tolerance,
                    atol=tolerance * 1e-2,
                )


@pytest.mark.parametrize("path", golden_files.files("muon", "ns_*.npz"), ids=lambda path: path.stem)
def test_replays_the_iterations(path: Path) -> None:
    recorded, meta = golden_files.read(path)
    arguments = {"steps": meta["ns_steps"], "coefficients": meta["ns_coefficients"], "eps": meta["eps"]}
    g = recorded["in_g"]
    exact = newton_schulz(g, dtype=torch.float64, **arguments)
    torch.testing.assert_close(exact, recorded["out_ns5_float64"], rtol=1e-10, atol=1e-12)
    values = torch.linalg.svdvals(exact)
    torch.testing.assert_close(values, recorded["out_singular_values"], rtol=1e-10, atol=1e-10)
    narrow = newton_schulz(g, **arguments)
    assert narrow.dtype is torch.bfloat16
    assert (narrow.double() - recorded["out_ns5_bfloat16"].double()).abs().max() < 4e-2
    polar = newton_schulz(g, 40, torch.float64, coefficients=CONVERGENT)
    torch.testing.assert_close(polar, recorded["out_polar_svd"], rtol=1e-10, atol=1e-10)


# --- the iterations ---


@pytest.mark.parametrize("shape", [(9, 17), (17, 9), (8, 8), (1, 5), (5, 1), (3, 9, 17), (2, 3, 17, 9)])
def test_iterations_act_on_singular_values(shape: tuple[int, ...]) -> None:
    g = random(*shape)
    triples = [(8.3, -23.6, 17.4), (4.1, -2.9, 0.55), CONVERGENT]
    expected = by_singular_values(g, [*triples, CONVERGENT])
    actual = newton_schulz(g, 4, torch.float64, coefficients=triples)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)
    assert newton_schulz(g, 0, torch.float64).square().sum((-2, -1)).allclose(torch.ones(()).double())


@pytest.mark.parametrize("eps_mode", ["clamp", "add"])
def test_small_norms_are_bounded(eps_mode: str) -> None:
    g = random(5, 7) * 1e-7
    expected = by_singular_values(g, eps=1e-6, add=eps_mode == "add")
    actual = newton_schulz(g, dtype=torch.float64, eps=1e-6, eps_mode=eps_mode)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(newton_schulz(torch.zeros(3, 4)), torch.zeros(3, 4, dtype=torch.bfloat16))
    assert newton_schulz(torch.full((3, 4), 1e4, dtype=torch.float16), dtype=torch.float16).isfinite().all()
    assert newton_schulz(torch.tensor([[1.0, torch.nan]])).isnan().all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_batches_give_what_single_matrices_give(dtype: torch.dtype, tolerance: float) -> None:
    g = random(4, 33, 20, dtype=torch.float32)
    batched = newton_schulz(g, dtype=dtype)
    assert batched.dtype is dtype
    torch.testing.assert_close(
        batched, torch.stack([newton_schulz(x, dtype=dtype) for x in g]), rtol=0, atol=tolerance
    )
    torch.testing.assert_close(batched.double(), by_singular_values(g), rtol=0, atol=tolerance)


def test_bad_arguments_of_newton_schulz() -> None:
    g = torch.zeros(3, 4)
    for arguments, message in [
        ({"g": torch.zeros(3)}, r"g must have at least two dimensions, got shape \(3,\)"),
        ({"steps": 100}, r"steps must be a finite number in \[0, 100\), got 100"),
        ({"steps": 2.5}, "steps must be a whole number"),
        ({"dtype": torch.int8}, "dtype must be one of"),
        ({"coefficients": (1, 2)}, "coefficients must be three numbers"),
        ({"coefficients": [(1, 2, 3), (1, 2)]}, "or a sequence of such triples"),
        ({"coefficients": []}, "coefficients must be"),
        ({"eps": -1}, "eps must be"),
        ({"eps_mode": "max"}, "eps_mode must be one of 'clamp', 'add'"),
    ]:
        with pytest.raises(ValueError, match=message):
            newton_schulz(**{"g": g, **arguments})
    with pytest.raises(TypeError, match=r"g has dtype torch\.int64"):
        newton_schulz(g.long())


# --- the step ---


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        ([(9, 17), (17, 9), (9, 17)], {}),
        ([(9, 17)], {"nesterov": False, "weight_decay": 0.0, "maximize": True, "momentum": 0.5}),
        ([(17, 9), (3, 17, 9)], {"adjust_lr_fn": "match_rms_adamw"}),
        ([(40, 2, 3, 1)], {}),
        ([(40, 2, 3, 1)], {"filter_factor": "matrix", "adjust_lr_fn": "original"}),
        ([(40, 2, 3, 1)], {"adjust_lr_fn": "match_rms_adamw"}),
        ([(40, 2, 3)], {"flatten": True}),
        ([(8, 2, 3, 2, 2), (0, 3), (3, 0)], {}),
        ([(4, 5)], {"ns_steps": 3, "ns_coefficients": [CONVERGENT, DEFAULT], "eps": 0.1, "eps_mode": "add"}),
    ],
)
def test_step_is_the_formula(shapes: list[tuple[int, ...]], options: dict[str, Any]) -> None:
    """In float64 against the same formula with singular values."""
    params = parameters(*shapes, dtype=torch.float64)
    expected = [p.detach().clone() for p in params]
    momenta = [torch.zeros_like(p) for p in expected]
    lr, optimizer = 0.05, ng.optim.Muon(params, lr=0.05, **EXACT, **options)
    triples = options.get("ns_coefficients", [DEFAULT])
    triples = [triples[min(k, len(triples) - 1)] for k in range(options.get("ns_steps", 5))]
    mu, wd = options.get("momentum", 0.95), options.get("weight_decay", 0.1)
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
        for p, q, b in zip(params, expected, momenta, strict=True):
            g = -p.grad if options.get("maximize") else p.grad
            b.copy_(mu * b + (1 - mu) * g)
            u = mu * b + (1 - mu) * g if options.get("nesterov", True) else b
            flat = q.dim() > 3 or options.get("flatten", False)
            u = u.flatten(1) if flat else u
            rows, columns = u.shape[-2:]
            if options.get("adjust_lr_fn") == "match_rms_adamw":
                factor = 0.2 * max(rows, columns) ** 0.5
            else:
                if q.dim() == 4 and "filter_factor" not in options:
                    rows, columns = q.shape[-2:]
                factor = max(1, rows / max(columns, 1)) ** 0.5
            x = by_singular_values(u, triples, options.get("eps", 1e-7), "eps_mode" in options)
            q.copy_(q * (1 - lr * wd) - lr * factor * x.reshape(q.shape))
            torch.testing.assert_close(p.detach(), q, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("adjust", [None, "match_rms_adamw"])
def test_follows_torch(adjust: str | None) -> None:
    shapes = [(40, 24), (24, 40), (40, 24), (32, 32)]
    ours, theirs = parameters(*shapes), parameters(*shapes)
    optimizers = (
        ng.optim.Muon(ours, lr=0.02, adjust_lr_fn=adjust),
        torch.optim.Muon(theirs, lr=0.02, adjust_lr_fn=adjust),
    )
    for step in range(1, 5):
        for params, optimizer in zip((ours, theirs), optimizers, strict=True):
            set_gradients(params, step)
            optimizer.step()
        for p, q in zip(ours, theirs, strict=True):
            factor = 0.2 * max(p.shape) ** 0.5 if adjust else max(1, p.shape[0] / p.shape[1]) ** 0.5
            assert (p - q).abs().max() < 6e-2 * 0.02 * factor * step**0.5
            assert optimizers[0].state[p].keys() == optimizers[1].state[q].keys()
            torch.testing.assert_close(
                optimizers[0].state[p]["momentum_buffer"], optimizers[1].state[q]["momentum_buffer"]
            )


def test_experts_are_matrices_of_their_own() -> None:
    (experts,) = parameters((4, 20, 12), dtype=torch.float64)
    alone = [nn.Parameter(x.clone()) for x in experts.detach()]
    together, each = ng.optim.Muon([experts], **EXACT), ng.optim.Muon(alone, **EXACT)
    for step in range(3):
        set_gradients([experts], step)
        for p, g in zip(alone, experts.grad, strict=True):
            p.grad = g
        together.step()
        each.step()
    torch.testing.assert_close(experts.detach(), torch.stack([p.detach() for p in alone]))


def test_small_batches_give_what_one_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(12, 20)] * 5 + [(20, 12)] * 2
    whole, cut = parameters(*shapes, dtype=torch.float64), parameters(*shapes, dtype=torch.float64)
    train(whole, ng.optim.Muon(whole, **EXACT), 2)
    monkeypatch.setattr(matrix, "BATCH_ELEMENTS", 2 * 12 * 20)
    calls = []
    monkeypatch.setattr(
        muon_module,
        "newton_schulz",
        lambda g, *args, **kw: calls.append(len(g)) or newton_schulz(g, *args, **kw),
    )
    train(cut, ng.optim.Muon(cut, **EXACT), 2)
    assert calls == [2, 2, 1, 2] * 2
    for p, q in zip(whole, cut, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_parameters_keep_wide_momentum(dtype: torch.dtype) -> None:
    narrow, wide = parameters((16, 24), dtype=dtype), parameters((16, 24), dtype=dtype)
    wide = [nn.Parameter(p.detach().float()) for p in wide]
    optimizers = ng.optim.Muon(narrow, lr=0.5), ng.optim.Muon(wide, lr=0.5)
    set_gradients(narrow, 0)
    wide[0].grad = narrow[0].grad.float()
    for optimizer in optimizers:
        optimizer.step()
    assert optimizers[0].state[narrow[0]]["momentum_buffer"].dtype is torch.float32
    assert_same_bits(narrow[0].detach(), wide[0].detach().to(dtype))


def test_layouts() -> None:
    (plain,) = parameters((8, 6, 5, 3))
    strided = nn.Parameter(plain.detach().to(memory_format=torch.channels_last))
    gaps = nn.Parameter(torch.stack([plain.detach(), plain.detach()], -1)[..., 0])
    for p in (plain, strided, gaps):
        train([p], ng.optim.Muon([p]), 2)
    for p in (strided, gaps):
        torch.testing.assert_close(p, plain, rtol=0, atol=4e-3 * 1e-3)
    assert strided.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_gradients_that_are_not_finite_show(value: float) -> None:
    params = parameters((4, 6), (4, 6))
    set_gradients(params, 0)
    params[0].grad[1, 2] = value
    ng.optim.Muon(params).step()
    assert params[0].isnan().all()
    assert params[1].isfinite().all()


def test_a_step_leaves_gradients_and_absent_ones_alone() -> None:
    params = parameters((12, 20), (12, 20))
    set_gradients(params, 0)
    params[1].grad = None
    before, version = params[0].grad.clone(), params[0].grad._version
    absent, moved = params[1].detach().clone(), params[0]._version
    optimizer = ng.optim.Muon(params, maximize=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    optimizer.step()
    assert torch.equal(params[0].grad, before)
    assert params[0].grad._version == version
    assert params[0]._version > moved
    assert torch.equal(params[1], absent)
    assert params[1] not in optimizer.state


def mixed(params: list[nn.Parameter], **options: Any) -> ng.optim.Muon:
    return ng.optim.Muon(
        [{"params": params[:2]}, {"params": params[2:], "use_muon": False, "lr": 0.01}], lr=0.02, **options
    )


MIXED = [(12, 20), (20, 12), (30, 5), (7,), ()]


def test_grad_scaler() -> None:
    scaled, plain = parameters(*MIXED), parameters(*MIXED)
    optimizer, expected = mixed(scaled), mixed(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(2):
        set_gradients(plain, step)
        expected.step()
        for p, q in zip(scaled, plain, strict=True):
            p.grad = q.grad * 1024
        scaler.scale(torch.zeros(()))
        scaler.step(optimizer)
        scaler.update()
    assert_equal(scaled, plain)

    for broken in (0, 3):
        state = copy.deepcopy(optimizer.state_dict())
        scaled[broken].grad.view(-1)[2] = torch.inf
        scaler.scale(torch.zeros(()))
        scaler.step(optimizer)
        scaler.update()
        assert_equal(scaled, plain)
        for i, p in enumerate(scaled):
            for name, value in optimizer.state[p].items():
                assert torch.equal(value, state["state"][i][name]), name
        scaled[broken].grad.zero_()


def test_no_step_waits_for_the_device() -> None:
    """Fake tensors have no values: whatever reads one raises."""
    with FakeTensorMode():
        params = [nn.Parameter(torch.zeros(shape)) for shape in [(4, 6), (4, 6), (6, 4, 3, 3)]]
        optimizer = ng.optim.Muon(params, lr=torch.tensor(0.1))
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.grad_scale, optimizer.found_inf = torch.empty(()), torch.empty(())
        optimizer.step()
        with pytest.raises(Exception, match="_local_scalar_dense"):
            optimizer.found_inf.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensor_lr_closure_hooks_and_schedulers(dtype: torch.dtype) -> None:
    tensors, numbers = parameters(*MIXED, dtype=dtype), parameters(*MIXED, dtype=dtype)
    optimizers = (
        mixed(numbers, ns_dtype=dtype),
        mixed(tensors, ns_dtype=dtype),
    )
    for group in optimizers[1].param_groups:
        group["lr"] = torch.tensor([group["lr"]], dtype=torch.float64)
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5) for optimizer in optimizers]
    calls = []
    optimizers[0].register_step_post_hook(lambda *args: calls.append("post"))

    for params, optimizer, scheduler in zip((numbers, tensors), optimizers, schedulers, strict=True):

        def closure(params: list[nn.Parameter] = params) -> Tensor:
            set_gradients(params, 0)
            return torch.tensor(3.0)

        for _ in range(3):
            assert optimizer.step(closure).item() == 3.0
            scheduler.step()
    assert calls == ["post"] * 3
    for p, q in zip(tensors, numbers, strict=True):
        torch.testing.assert_close(p, q)


def test_compiled_step() -> None:
    eager, compiled = parameters(*MIXED), parameters(*MIXED)
    train(eager, mixed(eager), 2)
    optimizer = mixed(compiled)
    torch._dynamo.reset()
    step = torch.compile(optimizer.step, backend="eager")
    for number in range(2):
        set_gradients(compiled, number)
        step()
    for p, q in zip(eager, compiled, strict=True):
        torch.testing.assert_close(p, q)


# --- groups ---


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.3},
        {"amsgrad": True, "maximize": True},
        {"state_dtype": "int8", "min_quantized_size": 0},
    ],
)
def test_other_groups_are_adamw_bit_for_bit(options: dict[str, Any]) -> None:
    shapes = [(33, 65), (5,), (), (300,)]
    ours, theirs = parameters(*shapes), parameters(*shapes)
    matrices = parameters((4, 6), seed=1)
    optimizer = ng.optim.Muon(
        [{"params": ours, "use_muon": False, **options}, {"params": matrices}], lr=0.02, weight_decay=0.2
    )
    defaults = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.0}
    train([*ours, *matrices], optimizer, 3)
    train(theirs, ng.optim.AdamW(theirs, **{**defaults, **options}), 3)
    assert_equal(ours, theirs)
    assert optimizer.state[matrices[0]].keys() == {"momentum_buffer"}


def test_whole_optimizer_without_muon_takes_the_constructor_s_arguments() -> None:
    ours, theirs = parameters((33,), (4, 5)), parameters((33,), (4, 5))
    options = {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.3}
    train(ours, ng.optim.Muon(ours, use_muon=False, **options))
    train(theirs, ng.optim.AdamW(theirs, **options))
    assert_equal(ours, theirs)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(11, 8)
        self.pos_embedding = nn.Parameter(torch.zeros(1, 5, 8))
        self.conv1d = nn.Conv1d(8, 8, 3)
        self.conv2d = nn.Conv2d(8, 4, 3, bias=False)
        self.block = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8))
        self.gate = nn.Linear(8, 2)
        self.experts = nn.Parameter(torch.zeros(2, 8, 8))
        self.frozen = nn.Parameter(torch.zeros(8, 8), requires_grad=False)
        self.lm_head = nn.Linear(8, 11)
        self.lm_head.weight = self.wte.weight


def test_groups_of_a_model() -> None:
    model = Net()
    names = {id(p): name for name, p in model.named_parameters()}
    groups = ng.optim.muon_groups(model, exclude=["gate.*"], adamw={"lr": 0.01}, lr=0.1)
    matrices, filters, rest = [{names[id(p)] for p in group.pop("params")} for group in groups]
    assert matrices == {"experts", "conv2d.weight", "block.0.weight", "block.2.weight"}
    assert filters == {"conv1d.weight"}
    assert rest == set(names.values()) - matrices - filters - {"frozen"}
    assert {"wte.weight", "lm_head.bias", "gate.weight", "pos_embedding", "block.1.weight"} <= rest
    assert groups == [
        {"use_muon": True, "lr": 0.1},
        {"use_muon": True, "lr": 0.1, "flatten": True},
        {"use_muon": False, "lr": 0.01},
    ]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = ng.optim.Muon(ng.optim.muon_groups(model))
    train(trained, optimizer, 2)
    assert set(optimizer.state) == set(trained)
    linear = nn.Linear(3, 4)
    assert [len(group["params"]) for group in ng.optim.muon_groups(nn.ModuleDict({"head": linear}))] == [2]


def test_add_param_group() -> None:
    params = parameters((4, 6), (7,))
    optimizer = ng.optim.Muon(params[:1])
    optimizer.add_param_group({"params": params[1], "use_muon": False})
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": params[1:], "use_muon": False})
    before = params[1].detach().clone()
    train(params, copy.copy(optimizer), 1)
    assert (params[1] - before).abs().max() > 1e-4


def test_copies_and_named_parameters() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5))
    named = list(model.named_parameters())
    optimizer = ng.optim.Muon([{"params": named[:1]}, {"params": named[1:], "use_muon": False}])
    train(list(model.parameters()), optimizer, 1)
    assert optimizer.state_dict()["param_groups"][1]["param_names"] == ["0.bias", "1.weight", "1.bias"]
    twin, before = copy.deepcopy(optimizer), model[0].bias.detach().clone()
    copied = [p for group in twin.param_groups for p in group["params"]]
    for params, each in ((list(model.parameters()), optimizer), (copied, twin)):
        each.param_groups[1]["lr"] = 0.5
        train(params, each, 1, first=1)
    assert_equal(copied, list(model.parameters()))
    assert (copied[1] - before).abs().max() > 0.1, "the new rate did not reach AdamW"


BAD_ARGUMENTS = [
    ({"lr": -1.0}, "Muon: lr must be a finite number >= 0, got -1.0"),
    ({"lr": torch.zeros(2)}, "a tensor lr must be one floating-point number"),
    ({"weight_decay": float("nan")}, "weight_decay must be"),
    ({"momentum": 1.0}, r"momentum must be a finite number in \[0, 1\), got 1.0"),
    ({"nesterov": 1}, "nesterov must be True or False, got 1"),
    ({"ns_coefficients": (1.0, 2.0)}, "ns_coefficients must be three numbers"),
    ({"eps": -1e-7}, "eps must be"),
    ({"ns_steps": 100}, r"ns_steps must be a finite number in \[0, 100\)"),
    ({"adjust_lr_fn": "none"}, "adjust_lr_fn must be one of None, 'original', 'match_rms_adamw'"),
    ({"ns_dtype": torch.int8}, "ns_dtype must be one of"),
    ({"eps_mode": "max"}, "eps_mode must be one of"),
    ({"flatten": "yes"}, "flatten must be one of None, False, True"),
    ({"filter_factor": 1}, "filter_factor must be one of"),
    ({"maximize": None}, "maximize must be True or False"),
    ({"use_muon": "no"}, "use_muon must be True or False"),
    ({"betas": (0.9, 1.0)}, r"betas\[1\]"),
    ({"use_muon": False, "state_dtype": "int7"}, "state_dtype must be one of"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    p = nn.Parameter(torch.zeros(3, 4))
    if "state_dtype" not in arguments:
        with pytest.raises(ValueError, match=message):
            ng.optim.Muon([p], **arguments)
    optimizer = ng.optim.Muon([nn.Parameter(torch.zeros(2, 2))])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [p], **arguments})
    assert len(optimizer.param_groups) == 1


def test_parameters_it_cannot_take() -> None:
    for p, options, message in [
        (torch.zeros(3), {}, r"shape \(3,\), which is no matrix; put it into a group with use_muon=False"),
        (torch.zeros(3, 3, dtype=torch.complex64), {}, "dtype torch.complex64; accepted are torch.float32"),
        (torch.zeros(2, 2, 2, 2), {"flatten": False}, "flatten=False is for matrices"),
    ]:
        with pytest.raises(ValueError, match=message):
            ng.optim.Muon([nn.Parameter(p)], **options)
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = ng.optim.Muon(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()


# --- checkpoints ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumes_with_the_same_bits(dtype: torch.dtype) -> None:
    whole, first = parameters(*MIXED, dtype=dtype), parameters(*MIXED, dtype=dtype)
    options = {"ns_dtype": torch.float32, "ns_coefficients": [DEFAULT, CONVERGENT], "flatten": False}
    train(whole, mixed(whole, **options), 6)
    optimizer = mixed(first, **options)
    train(first, optimizer, 3)
    for copied in (
        lambda fresh: fresh.load_state_dict(through_a_file(optimizer.state_dict())),
        lambda fresh: fresh.__setstate__(pickle.loads(pickle.dumps(optimizer.__getstate__()))),
    ):
        resumed = [nn.Parameter(p.detach().clone()) for p in first]
        fresh = mixed(resumed)
        copied(fresh)
        if fresh.param_groups[0]["params"][0] is not resumed[0]:  # pickled with its own parameters
            resumed = [p for group in fresh.param_groups for p in group["params"]]
        train(resumed, fresh, 3, first=3)
        assert_equal(resumed, whole)


def test_exchanges_state_dicts_with_torch() -> None:
    shapes = [(12, 20), (20, 12)]
    for source_class, target_class in (
        (ng.optim.Muon, torch.optim.Muon),
        (torch.optim.Muon, ng.optim.Muon),
    ):
        source = parameters(*shapes)
        optimizer = source_class(source, lr=0.02, weight_decay=0.3)
        train(source, optimizer, 3)
        moved = [nn.Parameter(p.detach().clone()) for p in source]
        target = target_class(moved)
        target.load_state_dict(through_a_file(optimizer.state_dict()))
        assert target.param_groups[0]["weight_decay"] == 0.3
        train(source, optimizer, 1, first=3)
        train(moved, target, 1, first=3)
        for p, q in zip(source, moved, strict=True):
            assert (p - q).abs().max() < 6e-2 * 0.02 * (20 / 12) ** 0.5
            torch.testing.assert_close(
                optimizer.state[p]["momentum_buffer"], target.state[q]["momentum_buffer"]
            )


def test_coded_states_of_adamw_are_decoded() -> None:
    params, plain = parameters((8, 8), (300,)), parameters((300,))
    options = {"state_dtype": "int8", "min_quantized_size": 0, "lr": 0.01}
    optimizer = ng.optim.Muon([{"params": params[1:], "use_muon": False, **options}, {"params": params[:1]}])
    adamw = ng.optim.AdamW(plain, **options, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0)
    plain[0].data.copy_(params[1].data)
    for step in range(2):
        set_gradients(params, step)
        plain[0].grad = params[1].grad
        optimizer.step()
        adamw.step()
    decoded, expected = optimizer.dequantized_state_dict(), adamw.dequantized_state_dict()
    torch.testing.assert_close(decoded["state"][0], expected["state"][0], rtol=0, atol=0)
    assert decoded["state"][1].keys() == {"momentum_buffer"}
    wide = {"use_muon": False, "min_quantized_size": 0}
    fresh = ng.optim.Muon([{"params": params[1:], **wide}, {"params": params[:1]}])
    fresh.load_state_dict(decoded)
    assert fresh.state[params[1]]["exp_avg"].shape == (300,)


BUFFER = ("state", 1, "momentum_buffer")
BAD_STATE_DICTS = [
    (("state",), None, "has the keys 'state' and 'param_groups'"),
    (("param_groups",), [], r"its groups have \[\] parameters, this optimizer's have \[2, 3\]"),
    (("param_groups", 0, "momentum"), None, "group 0 has no momentum: it is of another optimizer"),
    (("param_groups", 0, "lr"), -1.0, "lr must be"),
    (("param_groups", 0, "flatten"), "yes", "flatten must be"),
    (
        ("param_groups", 0, "use_muon"),
        False,
        "group 0 was saved with use_muon=False, this optimizer has True",
    ),
    (
        ("state", 1),
        {"exp_avg": torch.zeros(20, 12)},
        r"the keys \['exp_avg'\], expected \['momentum_buffer'\]",
    ),
    (
        BUFFER,
        torch.zeros(3),
        r"the state of parameter 1: momentum_buffer has shape \(3,\), expected \(20, 12\)",
    ),
    (BUFFER, 3, "momentum_buffer must be a floating-point tensor, got int"),
    (("state", 3, "exp_avg"), torch.zeros(3), "AdamW.load_state_dict"),
    (("state", 9), {}, r"states of unknown parameters: \[9\]"),
]


@pytest.mark.parametrize(("path", "value", "message"), BAD_STATE_DICTS)
def test_state_dicts_that_do_not_fit_change_nothing(path: tuple[Any, ...], value: Any, message: str) -> None:
    params = parameters(*MIXED)
    optimizer = mixed(params)
    train(params, optimizer, 1)
    before = copy.deepcopy(optimizer.state_dict())
    inner = bad = copy.deepcopy(before)
    for key in path[:-1]:
        inner = inner[key]
    if value is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    with pytest.raises(ValueError, match=message + ".*; nothing was loaded"):
        optimizer.load_state_dict(bad)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    torch.testing.assert_close(after["state"], before["state"], rtol=0, atol=0)
    train(params, optimizer, 1)
