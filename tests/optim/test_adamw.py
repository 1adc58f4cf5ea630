"""AdamW as users call it: recorded runs, drop-in behaviour, storage options."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from tests.backends import all_backends, native_backends, run_emulated, run_reference
from tests.tolerances import assert_same_bits
from torch import Tensor, nn

import narrowgauge as ng
from narrowgauge.ops import library
from narrowgauge.optim.adamw import adamw_rule
from narrowgauge.optim.elementwise import stream_seed

GOLDEN = Path(__file__).parents[1] / "golden"
INT8 = {"state_dtype": "int8", "min_quantized_size": 0}


def parameters(
    *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape in shapes
    ]


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def train(
    params: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: int = 4, first: int = 0
) -> None:
    for step in range(first, first + steps):
        set_gradients(params, step)
        optimizer.step()


def assert_equal(actual: list[nn.Parameter], expected: list[nn.Parameter]) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_same_bits(a.detach(), e.detach(), f"parameter {i}")


# --- recorded runs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "tolerance"),
    [("adamw_amsgrad_maximize", 1e-10), ("adamw_fused_cpu_fp32", 2e-6)],
)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_replays_torch(case: str, tolerance: float, backend: str) -> None:
    recorded = np.load(GOLDEN / f"torch_optim/{case}.npz")
    meta = json.loads(str(recorded["meta"]))
    params = [nn.Parameter(torch.tensor(recorded[f"param{i}_0"])) for i in range(len(meta["shapes"]))]
    with ng.backend(backend):
        optimizer = ng.optim.AdamW(params, **meta["hyperparameters"])
        for step in range(1, meta["steps"] + 1):
            for i, p in enumerate(params):
                p.grad = torch.tensor(recorded[f"grad{i}_step{step}"])
            optimizer.step()
            for i, p in enumerate(params):
                np.testing.assert_allclose(
                    p.detach().numpy(),
                    recorded[f"param{i}_step{step}"],
                    rtol=tolerance,
                    atol=tolerance * 1e-2,
                )
                for name, value in optimizer.state[p].items():
                    np.testing.assert_allclose(
                        value.numpy(),
                        recorded[f"state{i}_{name}_step{step}"],
                        rtol=tolerance,
                        atol=tolerance * 1e-2,
                    )


# --- the bits -----------------------------------------------------------------------------------------------


def call(
    params: list[Tensor], grads: list[Tensor], *, steps: list[float], stochastic: bool = False
) -> tuple[Any, ...]:
    """Arguments of the operator with fresh fp32 states."""
    count = len(params)
    states = [torch.zeros_like(p, dtype=torch.float32) for p in params for _ in range(2)]
    indices, firsts = (list(range(count)), [0] * count) if stochastic else ([], [])
    counters = [torch.tensor(step) for step in steps]
    return (
        *(
            params,
            grads,
            states,
            [],
            counters,
            [],
            [],
            [],
            None,
            None,
            None,
            1e-2,
            [0.9, 0.999, 1e-2, 1e-8],
            0,
            0,
        ),
        *(int(stochastic), False, False, 0.0, [], 0, indices, firsts, None, None, None),
    )


@pytest.mark.parametrize("run", native_backends())
def test_many_parameters_with_their_own_steps(run: Any) -> None:
    """More than one launch holds, some empty; a block meets several parameters, each with its own scalars."""
    sizes = [(7 * i) % 13 for i in range(700)] + [20_000, 0, 8192, 1]
    params = [torch.randn(size) for size in sizes]
    args = call(
        params, [torch.randn(size) for size in sizes], steps=[float(i % 5) for i in range(len(sizes))]
    )
    for actual, expected in zip(
        run(adamw_rule.step, *args), run_reference(adamw_rule.step, *args), strict=True
    ):
        assert_same_bits(actual, expected)


@pytest.mark.emulator
@pytest.mark.parametrize("int8", [False, True])
def test_emulated_schedules_with_several_parameters_per_block(int8: bool) -> None:
    params = [torch.randn(n) for n in (9000, 3, 300, 17_000, 256, 1, 5000)]
    args = list(call(params, [torch.randn_like(p) for p in params], steps=[float(10 * i) for i in range(7)]))
    if int8:
        args[3] = [torch.zeros(-(-p.numel() // 256)) for p in params for _ in range(2)]
        args[2] = [state.to(torch.uint8) for state in args[2]]
        args[14] = 2
    expected = run_reference(adamw_rule.step, *args)
    for seed in range(8):
        for a, e in zip(run_emulated(adamw_rule.step, *args, seed=seed), expected, strict=True):
            assert_same_bits(a, e, f"schedule {seed}")


def test_one_call_gives_the_bits_of_a_call_per_parameter() -> None:
    together, alone = parameters((33, 65), (5,), (300,)), parameters((33, 65), (5,), (300,))
    train(together, ng.optim.AdamW(together))
    for step in range(4):
        set_gradients(alone, step)
        if step == 0:
            optimizers = [ng.optim.AdamW([p]) for p in alone]
        for optimizer in optimizers:
            optimizer.step()
    assert_equal(together, alone)


@pytest.mark.parametrize("run", all_backends())
def test_stochastic_rounding_is_unbiased(run: Any) -> None:
    """The mean over many elements is the float32 result; nearest rounding would not move at all."""
    p, g = torch.ones(100_000, dtype=torch.bfloat16), torch.ones(100_000, dtype=torch.bfloat16)
    args = list(call([p], [g], steps=[0.0], stochastic=True))
    args[11], args[12] = (
        2.0**-11,
        [0.9, 0.999, 0.0, 1e-8],
    )  # an eighth of the distance to the next bfloat16 below 1
    moved = 1 - run(adamw_rule.step, *args)[0].double()
    assert set(moved.unique().tolist()) == {0.0, 2.0**-8}
    deviation = 2.0**-8 * (1 / 8 * 7 / 8 / 100_000) ** 0.5
    assert abs(moved.mean().item() - 2.0**-11) < 4 * deviation


def test_stochastic_rounding_keeps_small_updates() -> None:
    """10,000 steps of 2^-12 add up to 2.44 although each is below half a unit in the last place.

    One step's variance is at most 2^-5 * 2^-12, so the mean's standard deviation is below 0.0044.
    """
    finals = {}
    for update in ("nearest", "stochastic"):
        p = nn.Parameter(torch.full((4096,), 8.0, dtype=torch.bfloat16))
        optimizer = ng.optim.AdamW([p], lr=2.0**-12, weight_decay=0.0, eps=0.0, param_update=update)
        p.grad = torch.ones_like(p)
        for _ in range(10_000):
            optimizer.step()
        finals[update] = p.detach().double().mean().item()
    assert finals["nearest"] == 8.0
    assert finals["stochastic"] == pytest.approx(8 - 10_000 * 2.0**-12, abs=0.02)


def test_parameters_draw_from_streams_of_their_own() -> None:
    params = [nn.Parameter(torch.full((1000,), 1.0, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = ng.optim.AdamW([{"params": [p]} for p in params], lr=3e-4, param_update="stochastic")
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not torch.equal(*params)
    assert len({stream_seed(seed, index) for seed in range(-3, 50) for index in range(50)}) == 53 * 50


@pytest.mark.parametrize("options", [{}, INT8])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_gradients_that_are_not_finite_show(options: dict[str, Any], value: float) -> None:
    (p,) = parameters((1024,))
    optimizer = ng.optim.AdamW([p], **options)
    set_gradients([p], 0)
    p.grad[300] = value
    optimizer.step()
    assert p.isfinite().sum() == 1023
    set_gradients([p], 1)
    optimizer.step()
    broken = range(256, 512) if options else [300]
    assert (~p.isfinite()).nonzero().flatten().tolist() == list(broken)


# --- drop-in for torch.optim.AdamW --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize(
    "options", [{}, {"amsgrad": True, "maximize": True}, {"betas": (0.3, 0.5), "weight_decay": 0.0}]
)
def test_follows_torch(dtype: torch.dtype, options: dict[str, Any]) -> None:
    shapes = [(17, 9), (5,), (), (0, 3), (2, 3, 4, 5)]
    generator = torch.Generator().manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]
    theirs = copy.deepcopy(ours)
    optimizers = ng.optim.AdamW(ours, **options), torch.optim.AdamW(theirs, foreach=False, **options)
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator, dtype=dtype)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    tolerance = 1e-12 if dtype is torch.float64 else 2e-6
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


def layouts() -> list[Any]:
    def channels_last(x: Tensor) -> Tensor:
        return x.to(memory_format=torch.channels_last)

    def transposed(x: Tensor) -> Tensor:
        return x.transpose(0, 2).contiguous().transpose(0, 2)

    def with_gaps(x: Tensor) -> Tensor:
        return torch.stack([x, x], -1)[..., 0]

    def misaligned(x: Tensor) -> Tensor:
        return torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x)

    return [
        pytest.param(layout, id=layout.__name__)
        for layout in (channels_last, transposed, with_gaps, misaligned)
    ]


@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("same_grad", [True, False])
def test_layouts(layout: Any, same_grad: bool) -> None:
    (plain,) = parameters((8, 16, 5, 7))
    strided = nn.Parameter(layout(plain.detach()))
    strides = strided.stride()
    optimizers = ng.optim.AdamW([plain]), ng.optim.AdamW([strided])
    for step in range(3):
        set_gradients([plain], step)
        strided.grad = layout(plain.grad) if same_grad else plain.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert strided.stride() == strides
    assert torch.equal(plain, strided)


def test_int8_states_follow_the_memory_of_channels_last() -> None:
    (plain,) = parameters((8, 5, 7, 16))
    strided = nn.Parameter(plain.detach().permute(0, 3, 1, 2))
    optimizers = ng.optim.AdamW([plain], **INT8), ng.optim.AdamW([strided], **INT8)
    for step in range(3):
        set_gradients([plain], step)
        strided.grad = plain.grad.permute(0, 3, 1, 2)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(plain.permute(0, 3, 1, 2), strided)


def test_narrow_gradients_give_the_bits_of_wide_ones() -> None:
    from torch.utils._pytree import tree_map

    values = torch.randn(3, 300, dtype=torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        params = [torch.randn(300).to(dtype) for _ in range(3)]
        args = call(params, list(values.float()), steps=[0.0, 1.0, 2.0])
        narrow = call(params, list(values), steps=[0.0, 1.0, 2.0])
        for a, b in zip(*tree_map(lambda x: x, (run_op(args), run_op(narrow))), strict=True):
            assert_same_bits(a, b)


def run_op(args: tuple[Any, ...]) -> list[Tensor]:
    args = tuple(
        [x.clone() for x in a] if isinstance(a, list) and a and isinstance(a[0], Tensor) else a for a in args
    )
    adamw_rule.step(*args)
    return [*args[0], *args[2]]


def test_bfloat16_keeps_fp32_states() -> None:
    (p,) = parameters((300,), dtype=torch.bfloat16)
    optimizer = ng.optim.AdamW([p])
    train([p], optimizer, 2)
    assert optimizer.state[p]["exp_avg"].dtype is torch.float32


def test_small_parameters_keep_fp32_states() -> None:
    small, large = parameters((4095,), (4096,))
    optimizer = ng.optim.AdamW([small, large], state_dtype="int8")
    train([small, large], optimizer, 1)
    assert set(optimizer.state[small]) == {"step", "exp_avg", "exp_avg_sq"}
    assert optimizer.state[large]["exp_avg.codes"].shape == large.shape
    assert optimizer.state[large]["exp_avg_sq.scale"].shape == (16,)


def test_int8_states_stay_near_fp32() -> None:
    narrow, wide = parameters((64, 256)), parameters((64, 256))
    train(narrow, ng.optim.AdamW(narrow, state_dtype="int8", lr=1e-2), 20)
    train(wide, ng.optim.AdamW(wide, lr=1e-2), 20)
    moved = (wide[0] - parameters((64, 256))[0]).norm()
    assert 0 < (narrow[0] - wide[0]).norm() < 0.05 * moved


def test_parameters_without_gradient_are_left_alone() -> None:
    params = parameters((5,), (7,))
    before = params[1].detach().clone()
    optimizer = ng.optim.AdamW(params)
    set_gradients(params, 0)
    params[1].grad = None
    optimizer.step()
    assert torch.equal(params[1], before)
    assert params[1] not in optimizer.state


def test_groups_have_their_own_options() -> None:
    params, expected = parameters((40,), (40,)), parameters((40,), (40,))
    optimizer = ng.optim.AdamW(
        [{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.0, "lr": 0.1}]
    )
    train(params, optimizer)
    train(expected[:1], ng.optim.AdamW(expected[:1]))
    other = ng.optim.AdamW(expected[1:], weight_decay=0.0, lr=0.1)
    for step in range(4):
        set_gradients(expected, step)
        other.step()
    assert_equal(params, expected)


def test_gradients_are_not_modified() -> None:
    params = parameters((300,))
    set_gradients(params, 0)
    before, version = params[0].grad.clone(), params[0].grad._version
    optimizer = ng.optim.AdamW(params, maximize=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    optimizer.step()
    assert torch.equal(params[0].grad, before)
    assert params[0].grad._version == version


def test_closure_hooks_and_schedulers() -> None:
    params = parameters((4,))
    optimizer = ng.optim.AdamW(params, lr=torch.tensor(0.1))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    calls = []
    optimizer.register_step_pre_hook(lambda *args: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *args: calls.append("post"))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = params[0].square().sum()
        loss.backward()
        return loss

    before = params[0].square().sum().item()
    assert optimizer.step(closure).item() == pytest.approx(before)
    scheduler.step()
    assert calls == ["pre", "post"]
    assert optimizer.param_groups[0]["lr"].item() == pytest.approx(0.05)


def test_tensor_lr_gives_the_bits_of_a_number() -> None:
    numbers, tensors = parameters((300,)), parameters((300,))
    train(numbers, ng.optim.AdamW(numbers, lr=0.125))
    train(tensors, ng.optim.AdamW(tensors, lr=torch.tensor(0.125)))
    assert_equal(tensors, numbers)


def test_step_counts_as_a_modification() -> None:
    (p,) = parameters((3,))
    loss = (p * p).sum()
    version = p._version
    p.grad = torch.ones_like(p)
    ng.optim.AdamW([p]).step()
    assert p._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_grad_scaler() -> None:
    scaled, plain = parameters((300,)), parameters((300,))
    optimizer, expected = ng.optim.AdamW(scaled), ng.optim.AdamW(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        set_gradients(plain, step)
        expected.step()
        scaled[0].grad = plain[0].grad * 1024
        scaler.scale(torch.zeros(()))
        scaler.step(optimizer)
        scaler.update()
    assert_equal(scaled, plain)

    state = copy.deepcopy(optimizer.state_dict())
    scaled[0].grad[7] = torch.inf
    scaler.scale(torch.zeros(()))
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert_equal(scaled, plain)
    for name, value in optimizer.state[scaled[0]].items():
        assert torch.equal(value, state["state"][0][name]), name


@pytest.mark.parametrize("run", all_backends())
@pytest.mark.parametrize("int8", [False, True])
def test_nothing_changes_when_a_gradient_overflowed(run: Any, int8: bool) -> None:
    for sample in adamw_rule.step.sample_calls(torch.bfloat16):
        if bool(sample.args[3]) == int8:
            args = (*sample.args[:-1], torch.ones(()))
            before = [t for tensors in args[:8] for t in tensors]
            for a, e in zip(run(adamw_rule.step, *args), before, strict=True):
                assert_same_bits(a, e, sample.why)


@pytest.mark.parametrize("options", [{}, {"param_update": "stochastic"}, INT8])
def test_compiled_step_gives_the_bits_of_an_eager_one(options: dict[str, Any]) -> None:
    """One graph, and no recompilation when the learning rate is a tensor and changes."""
    dtype = torch.bfloat16 if options else torch.float32
    eager, compiled = (
        parameters((33, 9), (400,), (), dtype=dtype),
        parameters((33, 9), (400,), (), dtype=dtype),
    )
    rates = torch.tensor(0.01), torch.tensor(0.01)
    optimizers = (
        ng.optim.AdamW(eager, lr=rates[0], **options),
        ng.optim.AdamW(compiled, lr=rates[1], **options),
    )
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(optimizers[1].step, fullgraph=True, backend=counter)
    for number in range(4):
        for params in (eager, compiled):
            set_gradients(params, number)
        optimizers[0].step()
        step()
        for rate in rates:
            rate.mul_(0.5)
    assert_equal(compiled, eager)
    assert counter.frame_count <= 2


def test_threads_do_not_matter() -> None:
    threads = torch.get_num_threads()
    finals = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            params = parameters((300, 401), (5,), (40_000,), dtype=torch.bfloat16)
            train(params, ng.optim.AdamW(params, param_update="stochastic", **INT8), 3)
            finals.append(params)
    finally:
        torch.set_num_threads(threads)
    assert_equal(finals[1], finals[0])
    assert_equal(finals[2], finals[0])


def test_kernel_is_in_use() -> None:
    if not library.state.cpu.loaded:
        pytest.skip(f"CPU library {library.state.cpu.reason}")
    assert torch._C._dispatch_has_kernel_for_dispatch_key("narrowgauge::adamw_", "CPU")
