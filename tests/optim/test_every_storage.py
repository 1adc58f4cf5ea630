"""What every optimizer does alike with memory: storage formats, averages, copies, and parameters of any layout."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from tests.optim.every import EVERY, Every, assert_near, assert_same_steps, copies_of, every
from tests.optim.test_adamw import assert_equal, layouts, parameters, set_gradients, train
from tests.tolerances import assert_same_bits
from torch import Tensor, nn

from narrowgauge.optim import bytes_per_element, join_master
from narrowgauge.optim.codec import STATE_DTYPES

SHAPES = [(33, 9), (5,), (12, 6), (8, 3, 2, 2)]
FROM_ZERO = {"min_quantized_size": 0}


STEPS = 6


def start(dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """Values that bfloat16 holds."""
    return nn.Parameter(parameters((24, 40))[0].detach().bfloat16().to(dtype))


def follow(p: nn.Parameter, ours: torch.optim.Optimizer) -> None:
    for step in range(STEPS):
        set_gradients([p], step)
        p.grad = p.grad.bfloat16().to(p.dtype)
        ours.step()


@functools.cache
def exact_end(name: str) -> Tensor:
    p = start()
    follow(p, EVERY[name]([p]))
    return p.detach().double()


def assert_stays_near(optimizer: Every, dtype: torch.dtype, rounding: float, **options: Any) -> None:
    """Near fp32 states and a float32 parameter: in relation to the way it went, and to bfloat16's spacing."""
    if not optimizer.stores(**options):
        return
    p = start(dtype)
    ours = optimizer([p], **options, **FROM_ZERO)
    follow(p, ours)
    end, state = p.detach(), ours.state[p]
    if "param_comp" in state:
        end = end.double() + state["param_comp"].double()
    if "param_low" in state:
        end = join_master(end, state["param_low"])
    way = (exact_end(optimizer.name) - start().detach().double()).norm().item()
    off = (end.double() - exact_end(optimizer.name)).norm().item()
    spacing = 2.0**-8 * max(start().detach().norm().item(), end.norm().item())
    band = WIDER.get((optimizer.cls.__name__, options["state_dtype"]), BANDS[options["state_dtype"]])
    band += 0.002 if dtype is torch.bfloat16 else 0.0
    assert way > 0
    assert off <= band * way + rounding * spacing, f"{off / way:.3f} of the way, {off / spacing:.3f} spacings"


# The share of the way by which results may differ.
BANDS = {"fp32": 1e-6, "bf16": 0.01, "int8": 0.03, "int8_companded": 0.02, "fp8": 0.05, "fp8_expanded": 0.03}
BANDS["int4"] = 0.3
# Of a class, where a small difference of a state becomes a large one of the step.
WIDER = {("ScheduleFreeAdamW", "bf16"): 0.15}  # whose state holds weights
WIDER |= {("Lion", name): 0.1 for name in BANDS if name not in ("fp32", "int4")}  # the sign of a small number


@every(takes="state_dtype")
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_narrow_states_stay_near_fp32(optimizer: Every, state_dtype: str) -> None:
    assert_stays_near(optimizer, torch.float32, 0.0, state_dtype=state_dtype)


@every(takes="param_update")
@pytest.mark.parametrize(
    ("param_update", "state_dtype", "rounding"),
    [
        ("nearest", "fp32", 1.6),
        ("stochastic", "fp32", 2.0),
        ("stochastic", "bf16", 2.0),
        ("stochastic", "int8", 2.0),
        ("kahan", "fp32", 0.2),
        ("kahan", "int4", 0.2),
        ("kahan", "fp8_expanded", 0.2),
        ("split", "fp32", 0.02),
        ("split", "fp8", 0.02),
        ("split", "int8_companded", 0.02),
    ],
)
def test_narrow_parameters_stay_near_float32(
    optimizer: Every, param_update: str, state_dtype: str, rounding: float
) -> None:
    options = {"state_dtype": state_dtype, "param_update": param_update}
    assert_stays_near(optimizer, torch.bfloat16, rounding, **options)


@every(takes="state_dtype")
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_bytes_per_parameter(optimizer: Every, state_dtype: str) -> None:
    """What the documentation says: `bytes_per_element` per state, 2 for Kahan's rest, 4 for the average."""
    if not optimizer.stores(state_dtype):
        return
    p = nn.Parameter(torch.randn(64, 128, dtype=torch.bfloat16))
    options = {"state_dtype": state_dtype, "param_update": "kahan", "ema_decay": 0.9}
    ours = optimizer([p], **options)
    train([p], ours, 1)
    group = ours.param_groups[0]
    own = sum(
        entry.dtype.itemsize * (p.numel() if entry.shape is None else math.prod(entry.shape(p.numel())))
        for entry in ours._own_layout(group, p).values()
    )
    expected = p.numel() * (len(ours._state_names(group)) * bytes_per_element(state_dtype) + 2 + 4) + own
    held = sum(value.nbytes for name, value in ours.state[p].items() if name != "step")
    assert held == expected
    assert ours.state[p].get("step", torch.zeros(())).numel() == 1


# --- the average and the copies -----------------------------------------------------------------------------


@every(takes="ema_decay")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_moving_average_follows_its_formula(optimizer: Every, dtype: torch.dtype) -> None:
    params, plain = parameters(*SHAPES, dtype=dtype), parameters(*SHAPES, dtype=dtype)
    ours, theirs = optimizer(params, ema_decay=0.75), optimizer(plain)
    averages = [p.detach().double() for p in params]
    for step in range(4):
        train(params, ours, 1, first=step)
        train(plain, theirs, 1, first=step)
        averages = [e + 0.25 * (p.detach().double() - e) for e, p in zip(averages, params, strict=True)]
    assert_same_steps(optimizer, params, plain)
    for p, e in zip(params, averages, strict=True):
        assert ours.state[p]["ema"].dtype is torch.float32
        torch.testing.assert_close(ours.state[p]["ema"].double(), e, rtol=1e-6, atol=1e-6)

    before, versions = copies_of(params), [p._version for p in params]

    def fails_inside() -> None:
        with ours.swap_ema():
            for p in params:
                assert_same_bits(p.detach(), ours.state[p]["ema"].to(dtype))
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fails_inside()
    assert_equal(params, before)
    assert all(p._version > version for p, version in zip(params, versions, strict=True))


@every(steps_with="max_grad_norm")
def test_copies_are_written_with_the_step(optimizer: Every) -> None:
    params, plain = parameters(*SHAPES), parameters(*SHAPES)
    ours, theirs = optimizer(params), optimizer(plain)
    copied = {p: torch.zeros_like(p, dtype=torch.bfloat16) for p in params[1:]}
    ours.attach_copies(copied)
    train(params, ours, 3)
    train(plain, theirs, 3)
    assert_same_steps(optimizer, params, plain)
    for p, copy in copied.items():
        assert_same_bits(copy, p.detach().bfloat16())
    ours.attach_copies({})
    train(params, ours, 1, first=3)
    assert not torch.equal(copied[params[1]], params[1].bfloat16())


# --- parameters of any layout -------------------------------------------------------------------------------


@every()
@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("same_grad", [True, False])
def test_layouts(optimizer: Every, layout: Any, same_grad: bool) -> None:
    (plain,) = parameters((4, 6, 3, 5))
    strided = nn.Parameter(layout(plain.detach()))
    strides = strided.stride()
    ours, theirs = optimizer([strided]), optimizer([plain])
    for step in range(3):
        set_gradients([plain], step)
        strided.grad = layout(plain.grad) if same_grad else plain.grad.clone()
        ours.step()
        theirs.step()
    assert strided.stride() == strides
    if optimizer.has_sums():
        assert_near([strided], [plain], 1e-5)
    else:
        assert torch.equal(strided, plain)


@every()
def test_scalars_empty_and_odd_parameters_beside_others(optimizer: Every) -> None:
    """Each as if it were alone, as far as the method treats parameters on their own."""
    shapes = [(), (0,), (0, 3), (1,), (1, 1), (7, 5), (2, 3, 5), (129,)]
    together = parameters(*shapes)
    ours = optimizer(together)
    start = copies_of(together)
    train(together, ours, 3)
    for p, before in zip(together, start, strict=True):
        assert p.isfinite().all()
        assert p.numel() == 0 or not torch.equal(p, before), tuple(p.shape)
    if optimizer.cls.__name__ in ALL_TOGETHER:
        return
    alone = copies_of(start)
    optimizers = [optimizer([p]) for p in alone]
    for step in range(3):
        set_gradients(alone, step)
        for one in optimizers:
            one.step()
    assert_equal(together, alone)


# Classes whose step depends on all parameters at once.
ALL_TOGETHER = {"Prodigy", "NormalizedSGD", "LAMB"}
# Classes that refuse complex parameters, as the ones they stand for do.
REAL_ONLY = {"Muon", "Shampoo", "SOAP", "Adafactor", "GradNormLoRP"}


@every()
def test_complex_parameters_are_pairs_of_real_ones(optimizer: Every) -> None:
    (real,) = parameters((6, 4, 2))
    paired = nn.Parameter(torch.view_as_complex(real.detach().clone()))
    if optimizer.cls.__name__ in REAL_ONLY or optimizer.name.endswith((" rank", " row")):
        with pytest.raises(ValueError, match="complex"):
            optimizer([paired])
        return
    ours, theirs = optimizer([paired]), optimizer([real])
    for step in range(3):
        set_gradients([real], step)
        paired.grad = torch.view_as_complex(real.grad.clone())
        ours.step()
        theirs.step()
    if optimizer.has_sums():
        assert_near([torch.view_as_real(paired.detach())], [real], 1e-5)
    else:
        assert torch.equal(torch.view_as_real(paired), real)
