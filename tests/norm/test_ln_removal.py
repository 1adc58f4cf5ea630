"""LayerNorm of fixed standard deviation, the schedule of its freezing, and the auxiliary loss."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tests import golden_files
from tests.backends import in_float64, native_backends, run_reference
from tests.tolerances import assert_near, assert_same_bits
from torch import Tensor, nn

import narrowgauge as ng
from narrowgauge.nn import FixedStdLayerNorm, LNRemovalSchedule
from narrowgauge.nn import functional as ngf
from narrowgauge.ops import SampleMaker, registry

each_backend = pytest.mark.parametrize("backend", ["reference", "auto"])


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sigma(x: Tensor, eps: float = 1e-5) -> Tensor:
    return (x.var(-1, unbiased=False) + eps).sqrt()


def layer(d: int = 8, **options: Any) -> FixedStdLayerNorm:
    made = FixedStdLayerNorm(d, dtype=torch.float64, **options)
    with torch.no_grad():
        made.weight.copy_(random(d, seed=11))
        if made.bias is not None:
            made.bias.copy_(random(d, seed=12))
    return made


@each_backend
@pytest.mark.parametrize("path", golden_files.files("ln_removal"), ids=lambda path: path.stem)
def test_recorded_steps(path: Path, backend: Any) -> None:
    case, meta = golden_files.read(path)

    def near(actual: Tensor, name: str) -> None:
        torch.testing.assert_close(
            actual, case[name], rtol=1e-5, atol=1e-5, msg=lambda text: f"{name}: {text}"
        )

    norm = FixedStdLayerNorm(
        meta["d"],
        meta["eps"],
        meta["momentum"],
        meta["initial_average_std"],
        meta["bos_special_treatment"],
        init_first_std=meta["initial_bos_std"],
        exclude_first="EXP_NON_BOS_AVERAGE_STD" in meta["flags"],
    )
    with torch.no_grad():
        norm.weight.copy_(case["param_weight"])
        norm.bias.copy_(case["param_bias"])

    def check_state(name: str) -> None:
        near(norm.running_std, f"state{name}_running_avg_std")
        near(norm.running_first_std, f"state{name}_running_bos_std")
        used = case[f"state{name}_used_std_vector"]
        pair = norm.std if norm.special_first else norm.std.expand(2)
        near(torch.cat([pair[:1], pair[1:].expand(len(used) - 1)]), f"state{name}_used_std_vector")

    check_state("0")
    for step in range(1, meta["steps"] + 1):
        if step == meta["fake_from_step"]:
            norm.freeze()
        norm.zero_grad()
        x = case[f"in_x_step{step}"].clone().requires_grad_()
        with ng.backend(backend):
            y = norm(x)
            y.backward(case[f"in_grad_y_step{step}"])
        near(y, f"out_y_step{step}")
        near(x.grad, f"grad_x_step{step}")
        near(norm.weight.grad, f"grad_weight_step{step}")
        near(norm.bias.grad, f"grad_bias_step{step}")
        check_state(str(step))
    if "state_after_bos_eos_off_used_std_vector" in case:
        norm.drop_special_first()
        check_state("_after_bos_eos_off")


@each_backend
@pytest.mark.parametrize("d", [1, 17, 129])
def test_before_freezing_it_is_layer_norm(d: int, backend: Any) -> None:
    norm, x, dy = layer(d), random(2, 3, d), random(2, 3, d, seed=1)
    results = []
    with ng.backend(backend):
        for function in (norm, lambda x: F.layer_norm(x, (d,), norm.weight, norm.bias)):
            leaf = x.clone().requires_grad_()
            y = function(leaf)
            results.append([y, *torch.autograd.grad(y, [leaf, norm.weight, norm.bias], dy)])
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


@each_backend
@pytest.mark.parametrize("d", [17, 129])
def test_fixed_to_what_all_rows_have_it_is_layer_norm(d: int, backend: Any) -> None:
    x = random(4, 5, d)
    x = (x - x.mean(-1, keepdim=True)) / x.std(-1, unbiased=False, keepdim=True) * 3
    norm = layer(d)
    with ng.backend(backend), torch.no_grad():
        before = norm(x)
        norm.freeze()
        torch.testing.assert_close(norm.std, sigma(x)[0, 0], rtol=1e-12, atol=0)
        torch.testing.assert_close(norm(x), before, rtol=1e-12, atol=1e-12)


@each_backend
@pytest.mark.parametrize("special_first", [False, True])
def test_fixed_it_is_affine_and_gradcheck_passes(special_first: bool, backend: Any) -> None:
    norm = layer(6, special_first=special_first, init_std=1.5, init_first_std=4.0)
    norm.freeze()
    a, b = random(2, 3, 6), 5 * random(2, 3, 6, seed=1)
    with ng.backend(backend):
        total = norm(a) + norm(b) - norm(torch.zeros_like(a))
        torch.testing.assert_close(norm(a + b), total, rtol=1e-12, atol=1e-12)
        deviation = torch.full((3, 1), 1.5, dtype=torch.float64)
        if special_first:
            deviation[0] = 4.0
        expected = (a - a.mean(-1, keepdim=True)) / deviation * norm.weight + norm.bias
        torch.testing.assert_close(norm(a), expected, rtol=1e-12, atol=1e-12)
        assert torch.autograd.gradcheck(
            lambda x, w, c: torch.func.functional_call(norm, {"weight": w, "bias": c}, (x,)),
            (a.requires_grad_(), norm.weight, norm.bias),
        )


@each_backend
def test_running_value(backend: Any) -> None:
    x1, x2 = random(2, 3, 8), 2 * random(2, 3, 8, seed=1)
    norm = layer(decay=0.75)
    with ng.backend(backend):
        norm(x1)
        torch.testing.assert_close(norm.running_std, sigma(x1).mean())
        torch.testing.assert_close(
            norm.running_first_std, sigma(x1).mean()
        )  # without special_first: all positions
        norm.eval()(x2)
    torch.testing.assert_close(norm.std, 0.75 * sigma(x1).mean() + 0.25 * sigma(x2).mean())
    norm.freeze()
    frozen = norm.std
    norm(10 * x1)
    norm.freeze()
    assert_same_bits(norm.std, frozen)
    assert norm.running_std > frozen


def test_the_first_position_apart() -> None:
    x = random(2, 5, 8)
    x[:, 0] *= 20
    apart, counted = layer(special_first=True), layer(special_first=True, exclude_first=False)
    apart(x), counted(x)
    torch.testing.assert_close(apart.std, torch.stack([sigma(x)[:, 0].mean(), sigma(x)[:, 1:].mean()]))
    torch.testing.assert_close(counted.std[1], sigma(x).mean())
    apart.freeze()
    apart.drop_special_first()
    assert apart.std.dim() == 0
    torch.testing.assert_close(apart.std, sigma(x)[:, 1:].mean())


def test_padding_stays_out_of_the_running_value() -> None:
    x, mask = random(2, 5, 8), torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    x[~mask] = float("nan")
    norm = layer()
    norm(x, ~mask)
    torch.testing.assert_close(norm.std, sigma(x[mask]).mean())
    before = norm.running_std.clone()
    norm(x, torch.ones_like(mask))
    assert_same_bits(norm.running_std, before)


def test_over_ranks_it_is_the_mean_of_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sum over the group holds all that is shared; here the other rank's part is added by hand."""
    x, mask = random(5, 3, 8), random(5, 3, seed=1) > -1
    options: dict[str, Any] = {"special_first": True}
    alone, here, there = (
        layer(**options),
        layer(process_group="all", **options),
        layer(process_group="all", **options),
    )
    alone(x, ~mask)
    sums: list[Tensor] = []
    monkeypatch.setattr(dist, "all_reduce", lambda total, group: sums.append(total.clone()))
    there(x[2:], ~mask[2:])
    monkeypatch.setattr(dist, "all_reduce", lambda total, group: total.add_(sums[0]))
    here(x[:2], ~mask[:2])
    torch.testing.assert_close(here.std, alone.std, rtol=1e-12, atol=0)
    assert (there.std - alone.std).abs().max() > 1e-3


@each_backend
def test_constant_that_follows(backend: Any) -> None:
    norm, x = layer(decay=0.0, follow=True), random(2, 3, 8)
    with ng.backend(backend):
        norm(x)
        norm.freeze()
        y = norm(2 * x)
    assert_same_bits(norm.std, norm.running_std)
    centred = 2 * x - 2 * x.mean(-1, keepdim=True)
    torch.testing.assert_close(y, centred / sigma(2 * x).mean() * norm.weight + norm.bias)


def test_state_dict() -> None:
    norm = layer(special_first=True)
    norm(random(2, 3, 8))
    norm.freeze()
    assert list(norm.state_dict()) == ["weight", "bias", "running_std", "running_first_std", "fixed_std"]
    other = layer(special_first=True)
    other.load_state_dict(norm.state_dict())
    assert other.frozen
    x = random(2, 3, 8, seed=5)
    assert_same_bits(other(x), norm(x))
    twin = copy.deepcopy(norm)
    assert_same_bits(twin(x), norm(x))
    fresh = layer(special_first=True)
    fresh.load_state_dict(layer(special_first=True).state_dict())
    assert not fresh.frozen


@each_backend
def test_narrow_input_and_autocast(backend: Any) -> None:
    x = random(2, 3, 40, dtype=torch.bfloat16)
    norm = FixedStdLayerNorm(40)
    with ng.backend(backend):
        for _ in range(2):
            y = norm(x)
            assert y.dtype == torch.bfloat16
            truth = x.double() - x.double().mean(-1, keepdim=True)
            truth = truth / (norm.std.double() if norm.frozen else sigma(x.double()).unsqueeze(-1))
            assert_near(y.detach(), truth)
            norm.freeze()
    torch.testing.assert_close(norm.std, sigma(x.float()).mean())


@pytest.mark.parametrize("frozen", [False, True])
def test_compiles_whole(frozen: bool) -> None:
    norm, x = layer(special_first=True), random(2, 3, 8).requires_grad_()
    norm(x)
    if frozen:
        norm.freeze()
    other = copy.deepcopy(norm)
    torch._dynamo.reset()
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    results = [(y := f(x), torch.autograd.grad(y.square().sum(), x)[0]) for f in (compiled, other)]
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norm.running_std, other.running_std)


def test_wrong_arguments_leave_the_buffers() -> None:
    norm, x = layer(init_std=2.0), random(2, 3, 8)
    before = copy.deepcopy(norm.state_dict())
    for args, error, message in (
        (
            (x[..., :7],),
            ValueError,
            r"x has shape \(2, 3, 7\), which does not end in normalized_shape \(8,\)",
        ),
        ((x.float(),), TypeError, "weight has dtype torch.float64 beside x of torch.float32"),
        ((x, torch.ones(2, 3)), TypeError, "pad_mask must be a boolean tensor, got torch.float32"),
        ((x, torch.ones(3, dtype=torch.bool)), ValueError, r"pad_mask has shape \(3,\); expected .*\(2, 3\)"),
    ):
        with pytest.raises(error, match=f"FixedStdLayerNorm: {message}"):
            norm(*args)
    for name, value in norm.state_dict().items():
        assert value.equal(before[name]) or value.isnan().any(), name
    for options, message in (
        ({"decay": 1.5}, "decay must be between 0 and 1, got 1.5"),
        ({"init_std": 0.0}, "init_std must be a finite number > 0, got 0.0"),
        ({"eps": -1.0}, "eps must be a finite number >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            FixedStdLayerNorm(8, **options)
    with pytest.raises(ValueError, match="with special_first x needs a dimension of positions"):
        layer(special_first=True, init_std=1.0, init_first_std=1.0)(x[0, 0])
    with pytest.raises(RuntimeError, match=r"the running value is nan; run a batch first, or give init_std"):
        layer().freeze()


def test_second_derivative_is_refused() -> None:
    norm, x = layer(), random(2, 3, 8).requires_grad_()
    (dx,) = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        dx.sum().backward()


def test_swap_puts_it_in_place_of_layer_norm() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8, 1e-3))
    weight = model[1].weight
    ng.swap(model, norm="fixed_std")
    assert isinstance(model[1], FixedStdLayerNorm)
    assert model[1].weight is weight
    assert model[1].eps == 1e-3


@pytest.mark.parametrize("run", native_backends())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_beyond_the_registers(run: Any, dtype: torch.dtype) -> None:
    make = SampleMaker(dtype)
    x, weight = make(3, 16448), make(16448)
    scale = make(3, dtype=torch.float32)
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("scaled_layer_norm", (x, scale, weight, weight, 1e-5)),
        ("scaled_layer_norm_backward", (make(3, 16448), x, x.float().mean(-1), scale, weight, weight, True)),
        ("row_statistics", (x, 1e-5)),
        ("crms_norm_forward", (x, 1e-5)),
        ("crms_norm_backward", (make(3, 16448), x, scale)),
    ]
    for name, args in calls:
        record = registry[name]
        for a, e in zip(run(record, *args), run_reference(record, *in_float64(args)), strict=True):
            assert_near(a, e, name)


# --- the schedule ---


def blocks() -> nn.Module:
    model = nn.Module()
    model.h = nn.ModuleList(
        nn.ModuleDict({n: layer(init_std=1.0) for n in ("ln_1", "ln_2")}) for _ in range(2)
    )
    model.ln_f = layer(special_first=True, init_std=1.0, init_first_std=3.0)
    return model


ORDER = (["h.0.ln_2", "h.1.ln_2"], ["h.0.ln_1", "h.1.ln_1"], ["ln_f"], "special_first")


def test_schedule() -> None:
    model = blocks()
    schedule = LNRemovalSchedule(model, 3, (2, 3, 4, 1), ORDER)
    changed = {step: names for step in range(1, 25) if (names := schedule.step())}
    layers = [name for name, m in model.named_modules() if isinstance(m, FixedStdLayerNorm)]
    assert changed == {
        3: ["h.0.ln_2"],
        5: ["h.1.ln_2"],
        7: ["h.0.ln_1"],
        10: ["h.1.ln_1"],
        13: ["ln_f"],
        17: layers,
    }
    assert schedule.done
    assert all(m.frozen and not m.special_first for m in model.modules() if isinstance(m, FixedStdLayerNorm))


def test_schedule_continues() -> None:
    model, other = blocks(), blocks()
    schedule = LNRemovalSchedule(model, 3, (2, 3, 4, 1), ORDER)
    for _ in range(8):
        schedule.step()
    assert not schedule.done
    again = LNRemovalSchedule(other, 3, (2, 3, 4, 1), ORDER)
    other.load_state_dict(model.state_dict())
    again.load_state_dict(schedule.state_dict())
    assert [again.step() for _ in range(3)] == [schedule.step() for _ in range(3)] == [[], ["h.1.ln_1"], []]
    assert [m.frozen for m in other.modules() if isinstance(m, FixedStdLayerNorm)] == [True] * 4 + [False]


def test_schedule_freezes_several_at_once() -> None:
    model = blocks()
    schedule = LNRemovalSchedule(model, 1, (1,), [[("h.0.ln_1", "h.1.ln_1"), "ln_f"]])
    assert [schedule.step() for _ in range(3)] == [["h.0.ln_1", "h.1.ln_1"], ["ln_f"], []]


@pytest.mark.parametrize(
    ("start", "gaps", "order", "message"),
    [
        (3, (1,), ORDER, "one number >= 0 for each of the 4 groups"),
        (0, (1, 1, 1, 1), ORDER, "start must be >= 1"),
        (1, (1,), [["h.0.ln_3"]], "order names 'h.0.ln_3', which is no FixedStdLayerNorm"),
        (1, (1,), ["ln_f"], "a group is a list of names or 'special_first', got 'ln_f'"),
    ],
)
def test_schedule_refuses(start: int, gaps: Any, order: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LNRemovalSchedule(blocks(), start, gaps, order)


# --- the auxiliary loss ---


@each_backend
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_loss_and_its_gradient(masked: bool, padded: bool, backend: Any) -> None:
    x = random(2, 5, 17)
    mask = valid = None
    kept = torch.ones(2, 5, dtype=torch.bool)
    if masked:
        mask = kept.clone()
        mask[:, 0] = False
    if padded:
        valid = kept.clone()
        valid[1, 3:] = False
    counted = kept if valid is None else valid
    entering = counted if mask is None else counted & mask

    def written_out(x: Tensor) -> Tensor:
        deviations = sigma(x)
        target = deviations[entering].mean().detach()
        return 0.3 * (deviations[counted] - target).square().mean()

    results = []
    with ng.backend(backend):
        for function in (
            lambda x: ngf.residual_std_loss(x, mask, 0.3, pad_mask=None if valid is None else ~valid),
            written_out,
        ):
            leaf = x.clone().requires_grad_()
            loss = function(leaf)
            results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-13)
    assert results[0][1].abs().max() > 1e-4


def test_gradcheck_of_the_loss_around_a_constant_target() -> None:
    x = random(6, 9)
    mask = torch.tensor([True, False, False, False, False, False])
    x = x.requires_grad_()
    # The target depends on row 0 alone, which does not move here.
    assert torch.autograd.gradcheck(
        lambda rest: ngf.residual_std_loss(torch.cat([x[:1].detach(), rest]), mask), x[1:]
    )


def test_loss_of_alike_rows_is_zero_and_narrow_inputs_are_summed_in_float32() -> None:
    row = random(1, 33)
    assert ngf.residual_std_loss(row.repeat(5, 1)) == 0
    loss = ngf.residual_std_loss(random(5, 33, dtype=torch.bfloat16))
    assert loss.dtype == torch.float32
    truth = random(5, 33, dtype=torch.bfloat16).double()
    torch.testing.assert_close(loss.double(), ngf.residual_std_loss(truth), rtol=1e-5, atol=0)


def test_loss_refuses() -> None:
    x = random(2, 5, 8)
    for args, error, message in (
        ((x.int(),), TypeError, "x has dtype torch.int32"),
        ((x, torch.ones(2, 5)), TypeError, "mask must be a boolean tensor, got torch.float32"),
        (
            (x, torch.ones(5, dtype=torch.bool)),
            ValueError,
            r"mask has shape \(5,\); expected one entry per token",
        ),
        ((x, None, 0.1, -1.0), ValueError, "eps must be a finite number >= 0"),
    ):
        with pytest.raises(error, match=f"residual_std_loss: {message}"):
            ngf.residual_std_loss(*args)
    with pytest.raises(ValueError, match="residual_std_loss: pad_mask has shape"):
        ngf.residual_std_loss(x, pad_mask=torch.ones(5, dtype=torch.bool))
