"""GradNormLoRP: the released behaviour as recorded, and the corrected rule against float64 mathematics."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import golden_files
from tests.optim.test_adamw import assert_equal, parameters, set_gradients, train
from tests.optim.test_checkpoint import through_a_file
from tests.optim.test_galore import NOT_OURS, state_bytes
from torch import Tensor, nn

import narrowgauge as ng
from narrowgauge.optim.projection import project_back, sides

# --- compat="reference" -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", golden_files.files("gradnormlorp"), ids=lambda path: path.stem)
def test_replays_the_released_optimizer(path: Path) -> None:
    recorded, meta = golden_files.read(path)
    options = {name: value for name, value in meta["hyperparameters"].items() if name not in NOT_OURS}
    assert meta["hyperparameters"].get("correct_bias", True)
    tolerance = 1e-12 if meta["dtype"] == "float64" else 5e-6
    near = {"rtol": tolerance, "atol": tolerance}
    params = [nn.Parameter(recorded[f"param{i}_0"]) for i in range(len(meta["shapes"]))]
    optimizer = ng.optim.GradNormLoRP(params, **options, compat="reference")
    for step in range(1, meta["steps"] + 1):
        for i, p in enumerate(params):
            p.grad = recorded[f"grad{i}_step{step}"]
        optimizer.step()
        for i, p in enumerate(params):
            state = optimizer.state[p]
            torch.testing.assert_close(p.detach(), recorded[f"param{i}_step{step}"], **near)
            for name in ("v", "g", "exp_avg_g", "exp_avg_sq_g", "exp_avg_v", "exp_avg_sq_v"):
                expected = recorded[f"state{i}_{name}_step{step}"]
                actual = state[name]
                if name == "exp_avg_v" and options.get("rank"):  # either sign of a singular vector is right
                    where = sides(p.shape, options.get("proj_type", "std"))
                    actual = project_back(actual, where, [state["projection"]])
                    expected = project_back(expected, where, [recorded[f"state{i}_ortho_step{step}"]])
                torch.testing.assert_close(actual.reshape(expected.shape), expected, **near, msg=name)


@pytest.mark.parametrize("rank", [None, 3])
def test_the_released_directions_are_those_of_galore(rank: int | None) -> None:
    """Why it is no weight normalization: `v` moves as without gains, and a gain lasts one step."""
    ours, galore = parameters((9, 5), dtype=torch.float64), parameters((9, 5), dtype=torch.float64)
    options = {"lr": 0.01, "rank": rank, "scale": 1.0, "weight_decay": 0.0, "eps": 1e-6 if rank else 0.0}
    optimizer = ng.optim.GradNormLoRP(ours, **options, compat="reference")
    other = ng.optim.GaLoreAdamW(galore, **options)  # without a rank, AdamW
    for step in range(4):
        set_gradients(ours, step)
        galore[0].grad = ours[0].grad
        optimizer.step()
        other.step()
    v = optimizer.state[ours[0]]["v"]
    torch.testing.assert_close(v, galore[0].detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        ours[0].detach(), optimizer.state[ours[0]]["g"] * v / v.norm(dim=1, keepdim=True), rtol=1e-12, atol=0
    )


# --- the corrected rule -------------------------------------------------------------------------------------


def adam(g: Tensor, moments: list[Tensor], t: int) -> Tensor:
    """The textbook, in float64: an update to be multiplied by the learning rate."""
    moments[0] = 0.9 * moments[0] + 0.1 * g
    moments[1] = 0.999 * moments[1] + 0.001 * g**2
    return moments[0] / (moments[1].sqrt() + 1e-6) * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t)


def zeros() -> list[Tensor]:
    return [torch.zeros(()), torch.zeros(())]


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (4, 3, 2)])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "full"])
@pytest.mark.parametrize("rank", [None, 3])
def test_follows_the_formula(shape: tuple[int, ...], proj_type: str, rank: int | None) -> None:
    (p,) = parameters(shape, dtype=torch.float64)
    w = p.detach().reshape(shape[0], -1).clone()
    options = {"lr": 0.02, "weight_decay": 0.3, "scale": 0.5, "update_proj_gap": 2, "proj_type": proj_type}
    optimizer = ng.optim.GradNormLoRP([p], rank=rank, **options)
    where, moments, gain_moments = sides(w.shape, proj_type) if rank else (), zeros(), zeros()
    for t in range(1, 6):
        set_gradients([p], t)
        g = p.grad.reshape(w.shape)
        gain = w.norm(dim=1)
        d = w / gain[:, None]
        along = (g * d).sum(1)
        across = g - along[:, None] * d
        if t % 2 == 1:
            u, _, vh = torch.linalg.svd(across, full_matrices=False)
            left, right = u[:, :rank], vh[:rank]
        low = left.T @ across if "left" in where else across
        low = low @ right.T if "right" in where else low
        update = adam(low, moments, t)
        update = left @ update if "left" in where else update
        update = update @ right if "right" in where else update
        v = w - 0.02 * (0.5 if rank else 1.0) * update
        gain = (gain - 0.02 * adam(along, gain_moments, t)) * (1 - 0.02 * 0.3)
        w = gain[:, None] * v / v.norm(dim=1, keepdim=True)
        optimizer.step()
        atol = 1e-7 if proj_type == "full" and rank else 1e-11
        torch.testing.assert_close(p.detach().reshape(w.shape), w, rtol=0, atol=atol)
        torch.testing.assert_close(p.detach().reshape(w.shape).norm(dim=1), gain.abs(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("rank", [None, 3])
def test_frozen_gains_keep_the_norms_of_rows(rank: int | None) -> None:
    params = parameters((9, 5), (5, 9), dtype=torch.float64)
    before = [p.detach().clone() for p in params]
    train(params, ng.optim.GradNormLoRP(params, lr=0.1, rank=rank, lr_gain=0.0), 10)
    for p, old in zip(params, before, strict=True):
        torch.testing.assert_close(p.norm(dim=1).detach(), old.norm(dim=1), rtol=1e-12, atol=0)
        assert (p - old).norm() > 0.1 * old.norm()


def test_frozen_gains_without_rank_are_adamw_on_the_tangent_gradient() -> None:
    """AdamW of torch, fed with the gradient across the rows, and rows brought back to their norms after every step."""
    ours, theirs = parameters((9, 5), dtype=torch.float64), parameters((9, 5), dtype=torch.float64)
    norms = theirs[0].detach().norm(dim=1, keepdim=True)
    optimizer = ng.optim.GradNormLoRP(ours, lr=0.02, lr_gain=0.0, eps=0.0)
    other = torch.optim.AdamW(theirs, lr=0.02, weight_decay=0.0, eps=0.0)
    for step in range(6):
        set_gradients(ours, step)
        d, g = theirs[0].detach() / norms, ours[0].grad
        theirs[0].grad = g - (g * d).sum(1, keepdim=True) * d
        optimizer.step()
        other.step()
        with torch.no_grad():
            theirs[0].mul_(norms / theirs[0].norm(dim=1, keepdim=True))
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-10, atol=1e-12)


def test_the_gradient_splits_into_gain_and_direction() -> None:
    """The two parts are the derivatives of the loss by the gain and the direction, as autograd gives them."""
    from narrowgauge.optim.gradnormlorp import tangent

    w, target = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    v = w.clone().requires_grad_()
    gain = w.norm(dim=1, keepdim=True).requires_grad_()
    ((gain * v / v.norm(dim=1, keepdim=True) - target) ** 4).sum().backward()
    plain = w.clone().requires_grad_()
    ((plain - target) ** 4).sum().backward()
    norms, rows, along, across = tangent(w, plain.grad)
    torch.testing.assert_close(norms, gain.detach(), rtol=1e-14, atol=0)
    assert torch.equal(rows, w)
    torch.testing.assert_close(along, gain.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(across, v.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options", [{}, {"compat": "reference"}, {"proj_type": "full"}, {"state_dtype": "int8"}]
)
def test_training_changes_the_parameter(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    target, p = torch.randn(80, 52), nn.Parameter(torch.randn(80, 52))
    optimizer = ng.optim.GradNormLoRP([p], lr=0.02, rank=20, update_proj_gap=20, **options)
    losses = []
    for _ in range(120):
        optimizer.zero_grad()
        loss = (p - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_rows_of_zeros_move() -> None:
    """A bias often starts at zero; its first step is `lr` long, downhill. Rows without gradient stay."""
    bias, weight = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(3, 4))
    optimizer = ng.optim.GradNormLoRP([{"params": [bias]}, {"params": [weight], "rank": 2}], lr=0.1)
    bias.grad, weight.grad = torch.tensor([3.0, 0.0, 4.0, 0.0, 0.0]), torch.zeros(3, 4)
    weight.grad[1, 2] = 5.0
    optimizer.step()
    torch.testing.assert_close(bias.detach(), -0.1 * bias.grad / 5, rtol=1e-4, atol=0)
    torch.testing.assert_close(weight.detach(), -0.1 * weight.grad / 5, rtol=1e-4, atol=0)
    train([bias, weight], optimizer, 3)
    assert bias.isfinite().all()
    assert weight.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_length_zero_changes_no_bit(dtype: torch.dtype) -> None:
    """Checkpoints of torch.distributed create the states by such a step."""
    params = parameters((20, 12), (7,), (), (0, 3), (5, 4, 3), dtype=dtype)
    before = [p.detach().clone() for p in params]
    train(params, ng.optim.GradNormLoRP(params, lr=0.0), 1)
    assert_equal(params, before)


# --- storage, and what is shared with GaLore ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
def test_state_bytes(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    (p,), rank, m = parameters(shape, dtype=dtype), 8, shape[0]
    for state_dtype, moment_bytes in (
        ("fp32", 8 * rank * 96),
        ("int8", 2 * (rank * 96 + 4 * rank * 96 // 256)),
    ):
        optimizer = ng.optim.GradNormLoRP([p], rank=rank, state_dtype=state_dtype)
        train([p], optimizer, 1)
        assert state_bytes(optimizer, p) == moment_bytes + 4 * (rank * 64 + 2 * m)
        assert all(isinstance(value, Tensor) for value in optimizer.state[p].values())


def test_int8_states_stay_near_fp32() -> None:
    narrow, wide = parameters((96, 64)), parameters((96, 64))
    train(narrow, ng.optim.GradNormLoRP(narrow, rank=16, state_dtype="int8", update_proj_gap=5), 12)
    train(wide, ng.optim.GradNormLoRP(wide, rank=16, update_proj_gap=5), 12)
    moved = (wide[0] - parameters((96, 64))[0]).norm()
    assert 0 < (narrow[0] - wide[0]).norm() < 0.05 * moved


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"state_dtype": "int8", "min_quantized_size": 0},
        {"compat": "reference"},
        {"projection": "subspace"},
    ],
)
def test_resumes_with_the_same_bits(options: dict[str, Any]) -> None:
    def new(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        groups = [{"params": params[:2], "rank": 3}, {"params": params[2:]}]
        return ng.optim.GradNormLoRP(groups, update_proj_gap=2, weight_decay=0.1, **options)

    shapes = [(20, 12), (12, 20), (7,)]
    whole, first = parameters(*shapes), parameters(*shapes)
    train(whole, new(whole), 6)
    optimizer = new(first)
    train(first, optimizer, 3)
    resumed = [nn.Parameter(p.detach().clone()) for p in first]
    fresh = new(resumed)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    train(first, optimizer, 1, first=3)  # the loaded states are copies
    train(resumed, fresh, 3, first=3)
    assert_equal(resumed, whole)


def test_a_state_of_another_kind_is_refused() -> None:
    params, others = parameters((9, 5)), parameters((9, 5))
    optimizer, other = ng.optim.GradNormLoRP(params, rank=3), ng.optim.GaLoreAdamW(others, rank=3)
    train(others, other, 1)
    with pytest.raises(ValueError, match="of another optimizer"):
        optimizer.load_state_dict(other.state_dict())
    assert not optimizer.state


@pytest.mark.parametrize(
    "options", [{}, {"compat": "reference"}, {"state_dtype": "int8", "min_quantized_size": 0}]
)
def test_scaled_gradients_and_skipped_steps(options: dict[str, Any]) -> None:
    options = {"rank": 4, "update_proj_gap": 2, "lr": 0.01, "weight_decay": 0.1, "maximize": True, **options}
    scaled, plain = parameters((20, 12)), parameters((20, 12))
    optimizer = ng.optim.GradNormLoRP(scaled, **{**options, "lr": torch.tensor(0.01)})
    expected = ng.optim.GradNormLoRP(plain, **options)
    for step, overflow in enumerate((True, False, False, True, False)):
        set_gradients(scaled, step)
        plain[0].grad = scaled[0].grad.clone()
        scaled[0].grad *= 8.0
        if overflow:
            scaled[0].grad[3, 4] = torch.inf
        before = copy.deepcopy((scaled[0].detach(), scaled[0].grad, dict(optimizer.state[scaled[0]])))
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(float(overflow))
        optimizer.step()
        assert torch.equal(scaled[0].grad, before[1])
        if overflow:
            assert torch.equal(scaled[0], before[0])
            assert all(
                torch.equal(value, optimizer.state[scaled[0]][name]) for name, value in before[2].items()
            )
        else:
            expected.step()
            torch.testing.assert_close(scaled[0], plain[0], rtol=0, atol=1e-6)
    assert optimizer.state[scaled[0]]["step"] == 3


@pytest.mark.parametrize("how", ["nearest", "stochastic", "kahan", "split"])
def test_small_updates_of_bfloat16_parameters(how: str) -> None:
    narrow, wide = (
        nn.Parameter(torch.full((64, 48), 8.0, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32)
    )
    for p in (narrow, wide):
        optimizer = ng.optim.GradNormLoRP([p], rank=2, lr=0.02, eps=1e-3, param_update=how)
        p.grad = torch.ones_like(p)
        for _ in range(64):
            optimizer.step()
    target = wide.detach().mean().item() - 8
    assert abs(target) > 2.0**-6
    moved = narrow.detach().double().mean().item() - 8
    assert moved == 0 if how == "nearest" else abs(moved - target) < 0.2 * abs(target)


def test_clipping_averages_and_zeroed_gradients() -> None:
    ours, theirs = parameters((20, 12), (7,)), parameters((20, 12), (7,))
    optimizers = []
    for params, options in ((ours, {"ema_decay": 0.5}), (theirs, {})):
        groups = [{"params": params[:1], "rank": 3}, {"params": params[1:]}]
        optimizers.append(ng.optim.GradNormLoRP(groups, lr=0.1, eps=1e-3, **options))
    average = ours[0].detach().clone()
    for step in range(3):
        for params in (ours, theirs):
            set_gradients(params, step)
        torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        optimizers[1].step()
        optimizers[0].step(max_grad_norm=0.5, zero_grad=True)
        average = 0.5 * average + 0.5 * ours[0].detach()
        for p, q in zip(ours, theirs, strict=True):
            assert (p.grad == 0).all()
            torch.testing.assert_close(p, q, rtol=0, atol=1e-5)
    torch.testing.assert_close(optimizers[0].state[ours[0]]["ema"], average)


@pytest.mark.parametrize("compat", [None, "reference"])
def test_gradients_that_are_not_finite_show(compat: str | None) -> None:
    (p,) = parameters((20, 12))
    set_gradients([p], 0)
    p.grad[7, 3] = torch.nan
    ng.optim.GradNormLoRP([p], rank=4, compat=compat).step()
    assert (~p.isfinite()).any(1).nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("shape", [(8, 6), (8, 3, 2, 2)])
def test_layouts(shape: tuple[int, ...]) -> None:
    (plain,) = parameters(shape, dtype=torch.float64)
    strided = nn.Parameter(plain.detach().transpose(0, 1).contiguous().transpose(0, 1))
    strides = strided.stride()
    optimizers = [ng.optim.GradNormLoRP([p], rank=3) for p in (plain, strided)]
    for step in range(3):
        set_gradients([plain], step)
        strided.grad = plain.grad.transpose(0, 1).contiguous().transpose(0, 1)
        for optimizer in optimizers:
            optimizer.step()
    assert strided.stride() == strides
    torch.testing.assert_close(strided, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((3, 3), {"compat": "paper"}, "compat must be one of 'reference'; got 'paper'"),
        ((3, 3), {"compat": "reference", "state_dtype": "int8"}, "state_dtype must be 'fp32' with compat"),
        (
            (3, 3),
            {"compat": "reference", "lr_gain": 0.0},
            "lr_gain must be 1 with compat='reference', got 0.0",
        ),
        (
            (3, 3, 3),
            {"compat": "reference"},
            r"takes vectors and matrices, got a parameter of shape \(3, 3, 3\)",
        ),
        ((3,), {"rank": 2}, r"GradNormLoRP: a parameter of shape \(3,\) is no matrix"),
        ((3, 3), {"lr_gain": -1.0}, "GradNormLoRP: lr_gain must be a finite number >= 0, got -1.0"),
        ((3, 3), {"rank": -2}, "GradNormLoRP: rank must be an integer >= 1 or None, got -2"),
        ((3, 3), {"state_dtype": "int3"}, "state_dtype must be one of"),
    ],
)
def test_bad_arguments(shape: tuple[int, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ng.optim.GradNormLoRP(parameters(shape), **options)
    with pytest.raises(ValueError, match=message):
        ng.optim.GradNormLoRP([{"params": parameters(shape), **options}])


def test_complex_parameters_and_sparse_gradients() -> None:
    with pytest.raises(ValueError, match=r"dtype torch.complex64; low-rank states are for real ones"):
        ng.optim.GradNormLoRP([torch.zeros(3, dtype=torch.complex64)])
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = ng.optim.GradNormLoRP(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="GradNormLoRP does not support sparse gradients"):
        optimizer.step()
