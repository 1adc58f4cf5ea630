"""LAMB, LARS, StableAdamW and Adam-mini: recorded runs, and what their reductions are for."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch._dynamo
from tests.optim.golden import replay
from torch import Tensor, nn

import narrowgauge as ng

WIDE = {"dtype": torch.float64}
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-6}
BACKENDS = ["reference", "auto"]
FOREIGN = ("foreach", "kahan_sum", "triton", "verbose")


def own_options(meta: dict[str, Any]) -> dict[str, Any]:
    """Recorded hyperparameters without those that choose an implementation."""
    return {name: value for name, value in meta["hyperparameters"].items() if name not in FOREIGN}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), **WIDE)


def parameter(*shape: int, seed: int = 0) -> nn.Parameter:
    p = nn.Parameter(random(*shape, seed=seed))
    p.grad = random(*shape, seed=seed + 100)
    return p


# --- recorded runs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "name"), [("timm_lamb", "LAMB"), ("lars", "LARS"), ("stableadamw", "StableAdamW")]
)
def test_replays_recorded_runs(pattern: str, name: str) -> None:
    make = getattr(ng.optim, name)
    names = replay(
        "extra_optim", pattern, lambda params, meta: make(params, **own_options(meta)), tolerances=TOLERANCES
    )
    assert names


# --- LAMB ---------------------------------------------------------------------------------------------------


def lamb_truth(p: Tensor, grads: list[Tensor], clips: list[float], **options: Any) -> Tensor:
    o = {
        "lr": 1e-3,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-6,
        "weight_decay": 0.01,
        "averaging": True,
        "trust_clip": False,
        "always": False,
        "decoupled": False,
        "correct": True,
        **options,
    }
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, (g, clip) in enumerate(zip(grads, clips, strict=True), 1):
        g = g / clip
        m = o["beta1"] * m + (1 - o["beta1"] if o["averaging"] else 1) * g
        v = o["beta2"] * v + (1 - o["beta2"]) * g**2
        bc1, bc2 = (1 - o["beta1"] ** t, 1 - o["beta2"] ** t) if o["correct"] else (1, 1)
        u = (m / bc1) / ((v / bc2).sqrt() + o["eps"])
        if o["decoupled"]:
            p = p * (1 - o["lr"] * o["weight_decay"])
        else:
            u = u + o["weight_decay"] * p
        ratio = 1.0
        if (o["weight_decay"] or o["always"]) and p.norm() > 0 and u.norm() > 0:
            ratio = (p.norm() / u.norm()).item()
        p = p - o["lr"] * (min(ratio, 1.0) if o["trust_clip"] else ratio) * u
    return p


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("ours", "truth"),
    [
        ({}, {}),
        ({"grad_averaging": False, "trust_clip": True}, {"averaging": False, "trust_clip": True}),
        ({"weight_decay": 0.0}, {"weight_decay": 0.0}),
        ({"weight_decay": 0.0, "always_adapt": True}, {"weight_decay": 0.0, "always": True}),
        ({"decoupled_decay": True, "bias_correction": False}, {"decoupled": True, "correct": False}),
    ],
)
def test_lamb_is_its_definition(backend: str, ours: dict[str, Any], truth: dict[str, Any]) -> None:
    """Three groups, a zero parameter, a zero gradient; norms above and below the largest that is not clipped."""
    shapes = [(7, 5), (11,), (3, 2, 2), (), (0, 3), (4, 4)]
    params = [nn.Parameter(random(*shape, seed=i)) for i, shape in enumerate(shapes)]
    with torch.no_grad():
        params[5].zero_()
    start = [p.detach().clone() for p in params]
    grads = [
        [random(*shape, seed=10 * t + i) * (0 if i == 3 else 1) * (0.01 if t == 2 else 1) for t in range(3)]
        for i, shape in enumerate(shapes)
    ]
    clips = [max(1.0, sum((own[t] ** 2).sum() for own in grads).sqrt().item()) for t in range(3)]
    assert clips[0] > 1 == clips[2]
    with ng.backend(backend):
        optimizer = ng.optim.LAMB([{"params": params[:2]}, {"params": params[2:]}], **ours)
        for t in range(3):
            for p, own in zip(params, grads, strict=True):
                p.grad = own[t].clone()
            optimizer.step()
    for p, first, own in zip(params, start, grads, strict=True):
        torch.testing.assert_close(p.detach(), lamb_truth(first, own, clips, **truth), rtol=1e-11, atol=1e-13)
        assert p.grad is not None
        assert torch.equal(p.grad, own[2])  # nothing is clipped in place


def test_a_lamb_step_is_as_long_as_the_parameter() -> None:
    p = parameter(30, 40)
    old = p.detach().clone()
    ng.optim.LAMB([p], lr=0.01).step()
    torch.testing.assert_close((p.detach() - old).norm(), 0.01 * old.norm(), rtol=1e-12, atol=0.0)


def test_lamb_clips_after_the_clipping_of_the_step() -> None:
    p, q = parameter(6, 6), parameter(6, 6)
    ng.optim.LAMB([p], max_grad_norm=0.5).step()
    ng.optim.LAMB([q], max_grad_norm=0.5).step(max_grad_norm=2.0)
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


# --- LARS ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "nesterov": True, "dampening": 0.2},
        {"momentum": 0.0, "trust_coefficient": 0.02},
    ],
)
def test_lars_is_its_definition(backend: str, options: dict[str, Any]) -> None:
    params = [parameter(6, 5), parameter(7, seed=1), parameter(2, 3, 4, seed=2), parameter(0, 3), parameter()]
    start = [p.detach().clone() for p in params]
    with ng.backend(backend):
        optimizer = ng.optim.LARS(params, lr=0.1, **options)
        optimizer.step()
        optimizer.step()
    group = optimizer.param_groups[0]
    for p, w in zip(params, start, strict=True):
        assert p.grad is not None
        buffer = torch.zeros_like(w)
        for _ in range(2):
            g = p.grad
            if w.dim() > 1:
                norm, decay = w.norm(), group["weight_decay"]
                ratio = group["trust_coefficient"] * norm / (g.norm() + decay * norm) if w.numel() else 1.0
                g = (g + decay * w) * ratio
            if group["momentum"]:
                buffer = group["momentum"] * buffer + (1 - group["dampening"]) * g
                g = g + group["momentum"] * buffer if group["nesterov"] else buffer
            w = w - 0.1 * g
        torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-14)
    assert ("momentum_buffer" in optimizer.state[params[0]]) == (group["momentum"] > 0)


# --- StableAdamW --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_stable_adamw_is_its_definition(backend: str) -> None:
    """The third gradient is a hundred times larger: the parameter's learning rate falls, the other's does not."""
    params = [parameter(6, 5), parameter(9, seed=1), parameter(0, 3)]
    start = [p.detach().clone() for p in params]
    sizes = [[1.0, 1.0, 100.0], [1.0] * 3, [1.0] * 3]
    with ng.backend(backend):
        optimizer = ng.optim.StableAdamW(params, lr=0.01, weight_decay=0.1)
        for t in range(3):
            for i, p in enumerate(params):
                p.grad = random(*p.shape, seed=10 * t + i) * sizes[i][t]
            optimizer.step()
    rates = []
    for i, (p, w) in enumerate(zip(params, start, strict=True)):
        m, v = torch.zeros_like(w), torch.zeros_like(w)
        for t in range(3):
            g = random(*w.shape, seed=10 * t + i) * sizes[i][t]
            weight1, weight2 = (1 - 0.9) / (1 - 0.9 ** (t + 1)), (1 - 0.99) / (1 - 0.99 ** (t + 1))
            m, v = m + weight1 * (g - m), v + weight2 * (g * g - v)
            ratio = (g * g / v.clamp_min(1e-16)).mean().sqrt() if w.numel() else torch.zeros(())
            lr = 0.01 / max(1.0, ratio.item())
            w = w * (1 - lr * 0.1) - lr * m / (v.sqrt() + 1e-8)
        rates.append(lr)
        torch.testing.assert_close(p.detach(), w, rtol=1e-11, atol=1e-13)
    assert rates[0] < 0.007 < rates[1]


# --- Adam-mini ----------------------------------------------------------------------------------------------


MINI_SHAPES = {
    "tok_embeddings.weight": (10, 8),
    "layers.0.attention.wq.weight": (8, 8),
    "layers.0.attention.wk.weight": (4, 8),
    "layers.0.attention.wv.weight": (4, 8),
    "layers.0.attention.wq.bias": (8,),
    "layers.0.mlp.up.weight": (16, 8),
    "layers.0.norm.weight": (8,),
    "layers.0.mixer.weight": (8, 3, 2),
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_adam_mini_is_its_definition(backend: str) -> None:
    """One second moment per row, head, element or tensor, each from the mean of the squared gradients."""
    views = [(10, 8), (4, 16), (2, 16), (4, 8), (8, 1), (16, 8), (1, 8), (1, 48)]
    params = [
        (name, nn.Parameter(random(*shape, seed=i))) for i, (name, shape) in enumerate(MINI_SHAPES.items())
    ]
    start = [p.detach().clone() for _, p in params]
    with ng.backend(backend):
        optimizer = ng.optim.AdamMini(params, lr=0.01, weight_decay=0.1, dim=8, n_heads=4, n_kv_heads=2)
        for t in range(3):
            for i, (_, p) in enumerate(params):
                p.grad = random(*p.shape, seed=10 * t + i)
            optimizer.step()
    for i, ((name, p), w, view) in enumerate(zip(params, start, views, strict=True)):
        m, v = torch.zeros_like(w), torch.zeros(view[0], 1, **WIDE)
        decay = 0.0 if "norm" in name or "bias" in name else 0.1
        for t in range(1, 4):
            g = random(*w.shape, seed=10 * (t - 1) + i)
            m = 0.9 * m + 0.1 * g
            v = 0.999 * v + 0.001 * (g * g).reshape(view).mean(1, keepdim=True)
            root = (v / (1 - 0.999**t)).sqrt() + 1e-8
            w = w * (1 - 0.01 * decay) - 0.01 * (m.reshape(view) / (1 - 0.9**t) / root).reshape(w.shape)
        torch.testing.assert_close(
            p.detach(), w, rtol=1e-11, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}"
        )
        kept = optimizer.state[p]["v" if "bias" in name else "vmean"]
        torch.testing.assert_close(kept.reshape(view[0], 1), v, rtol=1e-12, atol=0.0)


def test_replays_adam_mini() -> None:
    """Recorded with the authors' class; its states are those of the last step."""

    def make(params: list[nn.Parameter], meta: dict[str, Any]) -> Any:
        return ng.optim.AdamMini(list(zip(meta["names"], params, strict=True)), **own_options(meta))

    assert replay("extra_optim", "adam_mini", make, tolerances=TOLERANCES)


def test_adam_mini_keeps_half_of_the_states() -> None:
    p = nn.Parameter(torch.randn(64, 128))
    p.grad = torch.randn(64, 128)
    optimizer = ng.optim.AdamMini([("mlp.weight", p)])
    optimizer.step()
    assert sum(value.nbytes for name, value in optimizer.state[p].items() if name != "step") == 4 * (
        64 * 128 + 64
    )


def test_adam_mini_skips_a_step_as_a_whole() -> None:
    p = parameter(4, 8)
    optimizer = ng.optim.AdamMini([("mlp.weight", p)])
    optimizer.step()
    before = {name: value.clone() for name, value in optimizer.state[p].items()}
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    for name, value in optimizer.state[p].items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n_heads": 3}, ValueError, "n_heads must divide dim"),
        ({"dim": 8, "n_heads": 4, "n_kv_heads": 3}, ValueError, "n_kv_heads must divide n_heads=4, got 3"),
        ({"dim": 16, "n_heads": 1}, ValueError, "wq.weight is a query or key by its name"),
    ],
)
def test_adam_mini_checks_its_heads(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ng.optim.AdamMini([("wq.weight", parameter(8, 8))], **arguments)


def test_adam_mini_wants_names() -> None:
    with pytest.raises(TypeError, match=r"named_parameters must be names and parameters.*got Parameter"):
        ng.optim.AdamMini([parameter(8, 8)])  # type: ignore[list-item]


# --- all of them --------------------------------------------------------------------------------------------


def made(name: str, p: nn.Parameter, **options: Any) -> Any:
    return getattr(ng.optim, name)([("mlp.weight", p)] if name == "AdamMini" else [p], lr=0.01, **options)


NAMES = ["LAMB", "LARS", "StableAdamW", "AdamMini"]


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_continues(name: str) -> None:
    def step(optimizer: Any, p: nn.Parameter, seed: int) -> None:
        p.grad = random(*p.shape, seed=seed)
        optimizer.step()

    p = parameter(12, 5)
    first = made(name, p)
    step(first, p, 0)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    q = nn.Parameter(p.detach().clone())
    second = made(name, q)
    second.load_state_dict(torch.load(file, weights_only=True))
    for seed in (1, 2):
        step(first, p, seed)
        step(second, q, seed)
    assert torch.equal(p, q)


@pytest.mark.parametrize("name", [*NAMES, "AdamP", "Adafactor"])
def test_compiled_step_gives_the_bits_of_an_eager_one(name: str) -> None:
    """One graph, from the first step on, also with several groups."""

    def make() -> tuple[list[nn.Parameter], Any]:
        params = [parameter(8, 5), parameter(6, 4, seed=1), parameter(7, seed=2)]
        if name == "AdamMini":
            return params, ng.optim.AdamMini([("mlp.a", params[0]), ("a", params[1]), ("a.bias", params[2])])
        groups = [{"params": params[:1]}, {"params": params[1:]}]
        return params, getattr(ng.optim, name)(groups, lr=0.01)

    torch._dynamo.reset()
    (eager, optimizer), (compiled, other) = make(), make()
    step = torch.compile(other.step, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        for p, q in zip(eager, compiled, strict=True):
            p.grad = random(*p.shape, seed=seed)
            q.grad = p.grad.clone()
        optimizer.step()
        step()
    for p, q in zip(eager, compiled, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", NAMES)
def test_layouts_dtypes_and_other_values(name: str) -> None:
    """Transposed parameters step as they look, complex ones as pairs; a NaN stays in its own parameter."""
    p, other = parameter(6, 9), parameter(6, 9)
    q = nn.Parameter(p.detach().t().contiguous().t())
    assert p.grad is not None
    q.grad = p.grad.t().contiguous().t()
    made(name, p).step()
    made(name, q).step()
    torch.testing.assert_close(p, q, rtol=1e-14, atol=1e-15)

    z = nn.Parameter(torch.ones(6, 4, dtype=torch.complex64))
    z.grad = torch.ones_like(z)
    made(name, z).step()
    assert (z.detach().real < 1).all()
    assert torch.equal(z.detach().imag, torch.zeros(6, 4))

    broken = parameter(3, 4)
    broken.grad = broken.grad * float("nan") if broken.grad is not None else None
    options = {"max_grad_norm": None} if name == "LAMB" else {}
    pair = [("mlp.a", other), ("mlp.b", broken)] if name == "AdamMini" else [other, broken]
    getattr(ng.optim, name)(pair, lr=0.01, **options).step()
    assert broken.isnan().all()
    assert not other.isnan().any()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("LAMB", {"max_grad_norm": 0.0}, "LAMB: max_grad_norm must be above 0"),
        ("LAMB", {"weight_decay": -1.0}, "LAMB: weight_decay must be"),
        ("LARS", {"trust_coefficient": -1.0}, "LARS: trust_coefficient must be"),
        ("LARS", {"nesterov": True, "momentum": 0.0}, "LARS: nesterov=True needs a momentum"),
        ("StableAdamW", {"eps": -1.0}, "StableAdamW: eps must be"),
        ("StableAdamW", {"betas": (0.9,)}, "StableAdamW: betas must be two numbers"),
        ("AdamMini", {"eps": -1.0}, "AdamMini: eps must be"),
    ],
)
def test_bad_arguments(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(name, parameter(2, 2), **options)
