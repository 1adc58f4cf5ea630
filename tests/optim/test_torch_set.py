"""SGD, RMSprop, Adagrad, Adadelta, Adamax, NAdam and RAdam: recorded runs, and side by side with torch.optim."""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from tests import golden_files
from tests.optim.golden import replay
from tests.optim.test_adamw import assert_equal, parameters, train
from torch import Tensor, nn

import narrowgauge as ng

NAMES = ("SGD", "RMSprop", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam")
EITHER = (False, True)
OPTIONS: dict[str, dict[str, tuple[Any, ...]]] = {
    "SGD": {
        "momentum": (0.0, 0.9),
        "dampening": (0.0, 0.3),
        "weight_decay": (0.0, 0.1),
        "nesterov": EITHER,
    },
    "RMSprop": {
        "alpha": (0.99, 0.3),
        "momentum": (0.0, 0.9),
        "centered": EITHER,
        "weight_decay": (0.0, 0.1),
    },
    "Adagrad": {
        "lr_decay": (0.0, 0.1),
        "initial_accumulator_value": (0.0, 0.2),
        "weight_decay": (0.0, 0.1),
    },
    "Adadelta": {"rho": (0.9, 0.0, 1.0), "eps": (1e-6, 1e-2), "weight_decay": (0.0, 0.1)},
    "Adamax": {"betas": ((0.9, 0.999), (0.3, 0.5)), "eps": (1e-8, 0.1), "weight_decay": (0.0, 0.1)},
    "NAdam": {
        "betas": ((0.9, 0.999), (0.3, 0.5)),
        "momentum_decay": (4e-3, 0.5),
        "decoupled_weight_decay": EITHER,
        "weight_decay": (0.0, 0.1),
    },
    "RAdam": {
        "betas": ((0.9, 0.999), (0.3, 0.9)),
        "decoupled_weight_decay": EITHER,
        "weight_decay": (0.0, 0.1),
    },
}


def combinations(name: str) -> Iterator[dict[str, Any]]:
    """Every combination of options that torch takes."""
    for values in product(*OPTIONS[name].values()):
        options = dict(zip(OPTIONS[name], values, strict=True))
        if not options.get("nesterov") or (options["momentum"] and not options["dampening"]):
            yield options


def assert_near(actual: list[Any], expected: list[Any], tolerance: float, what: Any) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(
            a.detach(), e.detach(), rtol=tolerance, atol=tolerance, msg=f"{what}: {{}}".format
        )


# --- recorded runs ------------------------------------------------------------------------------------------

TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-6, torch.bfloat16: 2.0**-5}


def class_of(meta: dict[str, Any]) -> str:
    name: str = meta["source"].split("torch.optim.")[1].split(",")[0].split("(")[0].strip()
    return name


RECORDED = [path.stem for path in golden_files.files("torch_optim") if "adafactor" not in path.stem]


@pytest.mark.parametrize("case", RECORDED)
def test_replays_torch(case: str) -> None:
    def make(params: list[nn.Parameter], meta: dict[str, Any]) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = getattr(ng.optim, class_of(meta))(
            params, **meta["hyperparameters"]
        )
        return optimizer

    assert case in replay("torch_optim", case, make, tolerances=TOLERANCES)


# --- side by side -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("name", NAMES)
def test_follows_torch(name: str, dtype: torch.dtype) -> None:
    """Eight steps, so that RAdam begins to adapt; parameters among which a scalar and an empty one."""
    shapes = [(17, 9), (5,), (), (0, 3)]
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    grads = [[torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes] for _ in range(8)]
    for number, options in enumerate(combinations(name)):
        rate = 0.05 if number % 3 else torch.tensor(0.05, dtype=torch.float64)
        options = {"lr": rate, "maximize": number % 2 == 1, **options}
        finals = []
        for module, more in ((ng.optim, {}), (torch.optim, {"foreach": False})):
            params = [nn.Parameter(p.clone()) for p in start]
            optimizer = getattr(module, name)(params, **options, **more)
            for of_step in grads:
                for p, g in zip(params, of_step, strict=True):
                    p.grad = g.clone()
                optimizer.step()
            finals.append(params)
        assert_near(finals[0], finals[1], 1e-11, options)


@pytest.mark.parametrize("name", NAMES)
def test_takes_the_arguments_of_torch(name: str) -> None:
    """The same names and defaults, and whatever torch takes by position at the same position."""
    theirs = inspect.signature(getattr(torch.optim, name).__init__).parameters
    ours = inspect.signature(getattr(ng.optim, name).__init__).parameters
    by_position = [
        p.name for p in theirs.values() if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "params"
    ]
    assert [p for p in ours if ours[p].kind is ours[p].POSITIONAL_OR_KEYWORD][2:] == by_position[1:]
    defaults = getattr(ng.optim, name)([nn.Parameter(torch.zeros(1))]).defaults
    for argument in theirs.values():
        if argument.name not in ("self", "params"):
            assert defaults[argument.name] == argument.default, argument.name


@pytest.mark.parametrize("direction", ["to torch", "from torch"])
@pytest.mark.parametrize("name", NAMES)
def test_state_dicts_are_exchanged(name: str, direction: str) -> None:
    """Through a file; momentum and centered, so that there are all states."""
    options = {
        key: value for key, value in (("momentum", 0.9), ("centered", True)) if key in OPTIONS[name]
    } | {"lr": 0.05}
    make = getattr(ng.optim, name), getattr(torch.optim, name)
    if direction == "from torch":
        make = make[1], make[0]
    params = parameters((17, 9), (5,), ())
    first = make[0](params, **options)
    train(params, first, 3)
    others = copy.deepcopy(params)
    second = make[1](others, **{**options, "lr": 1.0})
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    train(params, first, 3, first=3)
    train(others, second, 3, first=3)
    assert_near(others, params, 2e-6, name)
    for p, q in zip(params, others, strict=True):
        shared = first.state[p].keys() & second.state[q].keys()
        for key in shared - ({"step"} if name == "SGD" else set()):  # of which torch counts none
            torch.testing.assert_close(second.state[q][key], first.state[p][key], rtol=2e-6, atol=1e-6)
    assert len(first.state[params[0]].keys() ^ second.state[others[0]].keys()) == (
        name == "SGD" and direction == "from torch"
    )


@pytest.mark.parametrize("name", NAMES)
def test_reference_and_kernel_give_the_same_bits(name: str) -> None:
    for number, options in enumerate(combinations(name)):
        if number % 3:
            continue
        finals = []
        for backend in ("reference", "auto"):
            with ng.backend(backend):
                params = parameters((33, 9), (5,), dtype=torch.float32)
                train(params, getattr(ng.optim, name)(params, lr=0.05, **options), 7)
                finals.append(params)
        assert_equal(finals[0], finals[1])


# --- each by itself -----------------------------------------------------------------------------------------


def test_sgd_keeps_nothing_without_momentum() -> None:
    params = parameters((6, 5))
    plain, heavy = ng.optim.SGD(params), ng.optim.SGD(params, momentum=0.5, dampening=0.25)
    train(params, plain, 1)
    train(params, heavy, 1)
    assert set(plain.state[params[0]]) == {"step"}
    assert torch.equal(heavy.state[params[0]]["momentum_buffer"], params[0].grad)  # the first is not damped
    first = params[0].grad.clone()
    train(params, heavy, 1, first=1)
    torch.testing.assert_close(heavy.state[params[0]]["momentum_buffer"], 0.5 * first + 0.75 * params[0].grad)


@pytest.mark.parametrize("state_dtype", ["fp32", "bf16", "int8", "int4", "fp8"])
def test_adagrad_begins_with_its_sums(state_dtype: str) -> None:
    (p,) = parameters((700,))
    optimizer = ng.optim.Adagrad(
        [p], lr=0.5, initial_accumulator_value=4.0, state_dtype=state_dtype, min_quantized_size=0
    )
    before = p.detach().clone()
    p.grad = torch.full_like(p, 2.0)
    optimizer.step()
    torch.testing.assert_close(p.detach(), before - 0.5 * 2 / 8**0.5)
    total = optimizer.dequantized_state_dict()["state"][0]["sum"].float()
    torch.testing.assert_close(total, torch.full_like(total, 8.0), rtol=1e-2, atol=0)


def test_nadam_counts_no_skipped_step() -> None:
    (p,) = parameters((5,))
    optimizer = ng.optim.NAdam([p])
    train([p], optimizer, 2)
    product_before = optimizer.state[p]["mu_product"].clone()
    momenta = [0.9 * (1 - 0.5 * 0.96 ** (t * 4e-3)) for t in (1, 2)]
    assert product_before.item() == pytest.approx(momenta[0] * momenta[1], rel=1e-6)
    optimizer.found_inf = torch.ones(())
    before = p.detach().clone()
    train([p], optimizer, 1)
    assert torch.equal(p, before)
    assert torch.equal(optimizer.state[p]["mu_product"], product_before)


def test_radam_waits_until_the_variance_is_known() -> None:
    """With beta2 0.999 the first five steps are momentum steps, whose length follows that of the gradient."""
    moved: dict[float, list[float]] = {}
    for size in (1.0, 10.0):
        p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        optimizer = ng.optim.RAdam([p], lr=0.1)
        p.grad = torch.full_like(p, size)
        moved[size] = []
        for _ in range(6):
            before = p.detach().clone()
            optimizer.step()
            moved[size].append((before - p.detach())[0].item())
    ratios = [large / small for small, large in zip(moved[1.0], moved[10.0], strict=True)]
    assert ratios == pytest.approx([10.0] * 5 + [1.0])


def test_centered_rmsprop_divides_by_the_deviation() -> None:
    """After many gradients of mean 3 and variance 0.25 it steps by 3 / 0.5, not by 3 / sqrt(9.25)."""
    p = nn.Parameter(torch.zeros(20_000, dtype=torch.float64))
    optimizer = ng.optim.RMSprop([p], lr=1.0, alpha=0.9, centered=True)
    generator = torch.Generator().manual_seed(0)
    steps: list[Tensor] = []
    for _ in range(200):
        before = p.detach().clone()
        p.grad = 3 + 0.5 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
        steps.append(p.grad / (before - p.detach()))
    # The weights 0.1 * 0.9^k add up their squares to 1/19: the variance is low by as much.
    assert (steps[-1] ** 2).mean().item() == pytest.approx(0.25 * 18 / 19, rel=0.02)


BAD = [
    ("SGD", {"momentum": -0.1}, "SGD: momentum must be a finite number >= 0, got -0.1"),
    ("SGD", {"dampening": float("nan")}, "SGD: dampening must be"),
    ("SGD", {"nesterov": True}, "nesterov=True needs a momentum above 0 and dampening=0, got momentum=0"),
    (
        "SGD",
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
        "needs a momentum above 0 and dampening=0",
    ),
    ("RMSprop", {"alpha": -1.0}, "RMSprop: alpha must be"),
    ("RMSprop", {"eps": "small"}, "RMSprop: eps must be a finite number >= 0, got 'small'"),
    ("Adagrad", {"lr_decay": -1.0}, "Adagrad: lr_decay must be"),
    ("Adagrad", {"initial_accumulator_value": -1.0}, "Adagrad: initial_accumulator_value must be"),
    ("Adadelta", {"rho": 1.1}, r"Adadelta: rho must be a number in \[0, 1\], got 1.1"),
    ("Adadelta", {"rho": -0.1}, "Adadelta: rho must be"),
    ("Adamax", {"betas": (0.9, 1.0)}, r"Adamax: betas\[1\] must be"),
    ("NAdam", {"momentum_decay": -1.0}, "NAdam: momentum_decay must be"),
    ("NAdam", {"betas": (1.0, 0.9)}, r"NAdam: betas\[0\] must be"),
    ("RAdam", {"weight_decay": float("inf")}, "RAdam: weight_decay must be"),
    ("RAdam", {"eps": -1.0}, "RAdam: eps must be"),
]


@pytest.mark.parametrize(("name", "arguments", "message"), BAD)
def test_bad_arguments(name: str, arguments: dict[str, Any], message: str) -> None:
    optimizer = getattr(ng.optim, name)(parameters((3,)))
    with pytest.raises(ValueError, match=message):
        getattr(ng.optim, name)(parameters((3,)), **arguments)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": parameters((2,)), **arguments})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(("name", "other"), [("SGD", "RMSprop"), ("NAdam", "RAdam"), ("Adagrad", "Adadelta")])
def test_states_of_another_optimizer_are_refused(name: str, other: str) -> None:
    params = parameters((3,))
    optimizer = getattr(ng.optim, name)(params)
    train(params, optimizer, 1)
    before = copy.deepcopy(optimizer.state_dict())
    theirs = getattr(torch.optim, other)(params)
    train(params, theirs, 1)
    with pytest.raises(ValueError, match="nothing was loaded"):
        optimizer.load_state_dict(theirs.state_dict())
    assert str(optimizer.state_dict()) == str(before)


def test_codes_of_the_largest_magnitude_stay_near() -> None:
    """Adamax divides by a state without eps: a code of 0 would be a division by zero."""
    narrow, wide = parameters((4096,)), parameters((4096,))
    train(narrow, ng.optim.Adamax(narrow, state_dtype="int8"), 10)
    train(wide, ng.optim.Adamax(wide), 10)
    assert narrow[0].isfinite().all()
    moved = (wide[0] - parameters((4096,))[0]).norm()
    assert (narrow[0] - wide[0]).norm() < 0.05 * moved
