"""GaLore: projections by themselves, recorded runs, and the optimizer as users call it."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import golden_files
from tests.optim.test_adamw import assert_equal, parameters, set_gradients, train
from tests.optim.test_checkpoint import through_a_file
from torch import Tensor, nn

import narrowgauge as ng
from narrowgauge.optim.projection import PROJ_TYPES, PROJECTIONS, find_bases, project, project_back, sides

NOT_OURS = ("correct_bias", "no_deprecation_warning")


def decaying(m: int, n: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """A random matrix with singular values 1, 1/2, 1/4, ..."""
    generator = torch.Generator().manual_seed(seed)
    k = min(m, n)
    u, v = (
        torch.linalg.qr(torch.randn(size, k, generator=generator, dtype=torch.float64)).Q for size in (m, n)
    )
    return (u * 0.5 ** torch.arange(k, dtype=torch.float64) @ v.T).to(dtype)


# --- recorded runs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", golden_files.files("galore"), ids=lambda path: path.stem)
def test_replays_the_authors(path: Path) -> None:
    recorded, meta = golden_files.read(path)
    options = {name: value for name, value in meta["hyperparameters"].items() if name not in NOT_OURS}
    assert meta["hyperparameters"].get("correct_bias", True)
    tolerance = {"atol": 5e-4 if options.get("proj_type") == "full" else 1e-6, "rtol": 0.0}
    params = [nn.Parameter(recorded[f"param{i}_0"]) for i in range(len(meta["shapes"]))]
    optimizer = ng.optim.GaLoreAdamW(params, **options)
    for step in range(1, meta["steps"] + 1):
        for i, p in enumerate(params):
            p.grad = recorded[f"grad{i}_step{step}"]
        optimizer.step()
        for i, p in enumerate(params):
            torch.testing.assert_close(p.detach(), recorded[f"param{i}_step{step}"], **tolerance)
            if options.get("proj_type") == "full":
                continue  # its moments are those of noise
            state, basis = optimizer.state[p], recorded[f"state{i}_ortho_step{step}"]
            (where,) = sides(p.shape, options.get("proj_type", "std"))
            small = (lambda q: q.T @ q) if where == "right" else (lambda q: q @ q.T)
            torch.testing.assert_close(small(state["projection"]), small(basis), atol=2e-6, rtol=0)
            torch.testing.assert_close(
                project_back(state["exp_avg"], (where,), (state["projection"],)),
                project_back(recorded[f"state{i}_exp_avg_step{step}"], (where,), (basis,)),
                atol=2e-6,
                rtol=0,
            )
            torch.testing.assert_close(
                state["exp_avg_sq"], recorded[f"state{i}_exp_avg_sq_step{step}"], atol=1e-6, rtol=1e-4
            )
            assert state["step"].item() == recorded[f"state{i}_step_step{step}"].item() == step


# --- projections --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6)])
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_bases_of_full_rank_lose_nothing(shape: tuple[int, int], proj_type: str, projection: str) -> None:
    """With a linear rule GaLore is then the rule itself: of gradient descent and of momentum, step by step.

    Unless the longer side alone is projected on fewer dimensions than it has; then only the gradient that gave the
    basis is kept whole.
    """
    where = sides(shape, proj_type)
    grads = [decaying(*shape, seed=seed) for seed in range(3)]
    bases = find_bases(grads[0], min(shape), where, projection, generator=torch.Generator().manual_seed(0))
    whole = all(shape[side == "right"] == min(shape) for side in where)
    low_buffer, buffer = torch.zeros_like(project(grads[0], where, bases)), torch.zeros(shape)
    for g in grads if whole else grads[:1]:
        low_buffer = 0.9 * low_buffer + project(g, where, bases)
        buffer = 0.9 * buffer + g
        torch.testing.assert_close(project_back(low_buffer, where, bases), buffer, rtol=0, atol=1e-12)


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_bases_are_orthonormal_and_dominant(projection: str, side: str) -> None:
    """The part of the gradient that a basis leaves out is nearly as small as it can be: its singular values."""
    g = decaying(40, 25)
    (basis,) = find_bases(g, 6, (side,), projection, generator=torch.Generator().manual_seed(0))
    rows = basis if side == "right" else basis.T
    torch.testing.assert_close(rows @ rows.T, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-12)
    lost = torch.linalg.matrix_norm(g - project_back(project(g, (side,), (basis,)), (side,), (basis,)), 2)
    assert 0.5**6 * (1 - 1e-9) < lost < 0.5**6 * 1.001


def test_a_subspace_follows_the_gradient_and_keeps_its_signs() -> None:
    g = decaying(40, 25)
    (exact,) = find_bases(g, 4, ("right",))
    turned = torch.linalg.qr(exact.T + 0.1 * torch.randn(25, 4, dtype=torch.float64))
    old = (turned.Q * turned.R.diagonal().sign()).T
    (new,) = find_bases(g, 4, ("right",), "subspace", (old,))
    assert ((new * old).sum(1) > 0.5).all()
    distance = [torch.linalg.matrix_norm(exact.T @ exact - q.T @ q, 2) for q in (old, new)]
    assert distance[1] < 0.05 * distance[0]


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_gradients_without_enough_rank_still_give_a_basis(projection: str) -> None:
    for g in (torch.zeros(7, 5), torch.ones(7, 5), torch.full((7, 5), torch.nan)):
        for old in (None, (torch.eye(3, 5),)):
            (basis,) = find_bases(g, 3, ("right",), projection, old, torch.Generator().manual_seed(0))
            torch.testing.assert_close(basis @ basis.T, torch.eye(3), rtol=0, atol=1e-5)


def test_sides_are_those_of_the_original_shape() -> None:
    table = {name: (sides((9, 5), name), sides((5, 9), name), sides((5, 5), name)) for name in PROJ_TYPES}
    left, right = ("left",), ("right",)
    assert table == {
        "std": (right, left, right),
        "reverse_std": (left, right, left),
        "left": (left, left, left),
        "right": (right, right, right),
        "full": (left + right,) * 3,
    }


# --- the optimizer against float64 mathematics ---------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (4, 3, 2, 2)])
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.3, "maximize": True, "rank": 5}])
def test_follows_the_formula(shape: tuple[int, ...], proj_type: str, options: dict[str, Any]) -> None:
    """Also `reverse_std` on a wide matrix with as many dimensions as rows, where the authors' code fails."""
    options = {"rank": 3, "lr": 0.02, "update_proj_gap": 2, "scale": 0.5, "proj_type": proj_type, **options}
    (p,) = parameters(shape, dtype=torch.float64)
    w = p.detach().reshape(shape[0], -1).clone()
    where, (m, n) = sides(w.shape, proj_type), w.shape
    optimizer = ng.optim.GaLoreAdamW([p], **options)
    first = second = None
    for t in range(1, 6):
        set_gradients([p], t)
        g = p.grad.reshape(m, n) * (-1 if options.get("maximize") else 1)
        if t % 2 == 1:
            u, _, vh = torch.linalg.svd(p.grad.reshape(m, n), full_matrices=False)
            rank = options["rank"]
            bases = {"left": u[:, :rank], "right": vh[:rank]}
        low = bases["left"].T @ g if "left" in where else g
        low = low @ bases["right"].T if "right" in where else low
        first = 0.1 * low if first is None else 0.9 * first + 0.1 * low
        second = 0.001 * low**2 if second is None else 0.999 * second + 0.001 * low**2
        update = first / (second.sqrt() + 1e-6) * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t)
        update = bases["left"] @ update if "left" in where else update
        update = update @ bases["right"] if "right" in where else update
        w = (w - 0.02 * 0.5 * update) * (1 - 0.02 * options.get("weight_decay", 0.0))
        optimizer.step()
        torch.testing.assert_close(
            p.detach().reshape(m, n), w, rtol=0, atol=1e-7 if proj_type == "full" else 1e-11
        )
    low_shape = (min(rank, m, n) if "left" in where else m, min(rank, m, n) if "right" in where else n)
    assert optimizer.state[p]["exp_avg"].shape == low_shape


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_updates_lie_in_the_span_of_the_basis(projection: str) -> None:
    p, wide = parameters((20, 12), (12, 20), dtype=torch.float64)
    start = [x.detach().clone() for x in (p, wide)]
    optimizer = ng.optim.GaLoreAdamW([p, wide], rank=3, update_proj_gap=4, projection=projection)
    train([p, wide], optimizer, 4)
    moved = [x.detach() - old for x, old in zip((p, wide), start, strict=True)]
    right, left = (optimizer.state[x]["projection"] for x in (p, wide))
    torch.testing.assert_close(moved[0] @ right.T @ right, moved[0], rtol=0, atol=1e-14)
    torch.testing.assert_close(left @ left.T @ moved[1], moved[1], rtol=0, atol=1e-14)
    assert (
        torch.linalg.matrix_rank(moved[0], atol=1e-12) == torch.linalg.matrix_rank(moved[1], atol=1e-12) == 3
    )
    train([p, wide], optimizer, 1, first=4)  # a new basis
    assert torch.linalg.matrix_rank(p.detach() - start[0], atol=1e-12) > 3


def test_a_basis_is_found_anew_every_gap_steps() -> None:
    (p,) = parameters((20, 12))
    optimizer = ng.optim.GaLoreAdamW([p], rank=3, update_proj_gap=3)
    seen = []
    for step in range(7):
        train([p], optimizer, 1, first=step)
        seen.append(optimizer.state[p]["projection"].clone())
    changes = [not torch.equal(a, b) for a, b in itertools.pairwise(seen)]
    assert changes == [False, False, True, False, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_without_rank_are_adamw_bit_for_bit(dtype: torch.dtype) -> None:
    shapes = [(20, 12), (7,), (), (0, 3), (5000,)]
    options = {"state_dtype": "int8", "lr": 0.01}
    ours, expected = parameters(*shapes, dtype=dtype), parameters(*shapes, dtype=dtype)
    groups = [{"params": ours[:1], "rank": 4}, {"params": ours[1:]}]
    optimizer, other = ng.optim.GaLoreAdamW(groups, **options), ng.optim.AdamW(expected[1:], **options)
    for step in range(4):
        set_gradients(ours, step)
        for p, q in zip(ours, expected, strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
        other.step()
    assert_equal(ours[1:], expected[1:])
    assert not torch.equal(ours[0], expected[0])
    assert list(optimizer.state_dict()["state"]) == [0, 1, 2, 3, 4]


def test_parameters_of_several_dtypes_share_a_group() -> None:
    dtypes = torch.float32, torch.bfloat16, torch.float64, torch.float16
    together = [parameters((20, 12), dtype=dtype)[0] for dtype in dtypes]
    alone = [parameters((20, 12), dtype=dtype)[0] for dtype in dtypes]
    train(together, ng.optim.GaLoreAdamW(together, rank=4, lr=0.1))
    optimizers = [ng.optim.GaLoreAdamW([p], rank=4, lr=0.1) for p in alone]
    for step in range(4):
        set_gradients(alone, step)
        for optimizer in optimizers:
            optimizer.step()
    assert_equal(together, alone)


def test_defaults_are_those_of_the_rule_of_the_group() -> None:
    optimizer = ng.optim.GaLoreAdamW(
        [{"params": parameters((3, 3)), "rank": 2}, {"params": parameters((3,))}]
    )
    projected, plain = optimizer.param_groups
    assert (projected["eps"], projected["weight_decay"], projected["scale"]) == (1e-6, 0.0, 0.25)
    assert (plain["eps"], plain["weight_decay"], plain["rank"]) == (1e-8, 0.01, None)
    optimizer = ng.optim.GaLoreAdamW(parameters((3, 3)), eps=1e-3, weight_decay=0.5, rank=1)
    assert (optimizer.param_groups[0]["eps"], optimizer.param_groups[0]["weight_decay"]) == (1e-3, 0.5)


# --- storage ------------------------------------------------------------------------------------------------


def state_bytes(optimizer: torch.optim.Optimizer, p: Tensor) -> int:
    return sum(value.nbytes for name, value in optimizer.state[p].items() if name != "step")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
def test_state_bytes(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    (p,), rank = parameters(shape, dtype=dtype), 8
    optimizer = ng.optim.GaLoreAdamW([p], rank=rank)
    train([p], optimizer, 1)
    assert state_bytes(optimizer, p) == 4 * (2 * rank * 96 + rank * 64)
    optimizer = ng.optim.GaLoreAdamW([p], rank=rank, state_dtype="int8")
    train([p], optimizer, 1)
    assert optimizer.state[p]["exp_avg.codes"].dtype is torch.uint8
    assert state_bytes(optimizer, p) == 2 * (rank * 96 + 4 * rank * 96 // 256) + 4 * rank * 64


@pytest.mark.parametrize("state_dtype", ["bf16", "int8", "int4", "fp8", "fp8_expanded", "int8_companded"])
def test_narrow_states(state_dtype: str) -> None:
    """They take the bytes of their format, and training stays near that with float32 ones."""
    narrow, wide, rank = parameters((96, 64)), parameters((96, 64)), 16
    optimizer = ng.optim.GaLoreAdamW(narrow, rank=rank, state_dtype=state_dtype, update_proj_gap=5)
    train(narrow, optimizer, 12)
    train(wide, ng.optim.GaLoreAdamW(wide, rank=rank, update_proj_gap=5), 12)
    moved = (wide[0] - parameters((96, 64))[0]).norm()
    assert 0 < (narrow[0] - wide[0]).norm() < (0.4 if state_dtype == "int4" else 0.1) * moved
    moments = 2 * rank * 96 * ng.optim.bytes_per_element(state_dtype)
    assert state_bytes(optimizer, narrow[0]) == moments + 4 * rank * 64

    decoded = optimizer.dequantized_state_dict()
    plain = ng.optim.GaLoreAdamW(parameters((96, 64)), rank=rank)
    if state_dtype != "bf16":
        plain.load_state_dict(decoded)
        (state,) = plain.state.values()
        assert state["exp_avg"].shape == (96, rank)
        assert (state["exp_avg_sq"] >= 0).all()


def test_bfloat16_is_rounded_once() -> None:
    narrow, wide = parameters((20, 12), dtype=torch.bfloat16), parameters((20, 12), dtype=torch.bfloat16)
    wide = [nn.Parameter(wide[0].detach().float())]
    options = {"rank": 4, "lr": 0.1, "weight_decay": 0.1}
    set_gradients(narrow, 0)
    wide[0].grad = narrow[0].grad.float()
    for params in (narrow, wide):
        ng.optim.GaLoreAdamW(params, **options).step()
    difference = (narrow[0].float() - wide[0]).abs()
    assert (difference <= wide[0].abs() * 2.0**-8 * 1.0001).all()


@pytest.mark.parametrize("how", ["nearest", "stochastic", "kahan", "split"])
@pytest.mark.parametrize("shape", [(64, 48), (16, 3, 4, 4)])
def test_small_updates_of_bfloat16_parameters(how: str, shape: tuple[int, ...]) -> None:
    """Each is far below the distance to the next bfloat16: rounded to nearest, nothing ever moves."""
    narrow = nn.Parameter(torch.full(shape, 8.0, dtype=torch.bfloat16))
    wide = nn.Parameter(torch.full(shape, 8.0))
    options = {"rank": 1, "lr": 2.0**-6, "scale": 1.0, "eps": 0.0}
    for p in (narrow, wide):
        optimizer = ng.optim.GaLoreAdamW([p], param_update=how, **options)
        p.grad = torch.ones_like(p)
        for _ in range(64):
            optimizer.step()
    target = wide.detach().mean().item() - 8
    assert target < -0.1
    moved = narrow.detach().double().mean().item() - 8
    assert moved == 0 if how == "nearest" else abs(moved - target) <= 2.0**-6  # half the distance


@pytest.mark.parametrize("name", ["GaLoreAdamW", "GradNormLoRP"])
def test_bfloat16_states_grow_by_chance(name: str) -> None:
    """Rounded to nearest, the second moment of a constant gradient gets stuck at a quarter of its limit."""
    means = []
    for how in ("nearest", "stochastic"):
        p = nn.Parameter(torch.eye(24).bfloat16())
        p.grad = torch.roll(p.detach(), 1, 0)  # orthogonal to every row
        optimizer = getattr(ng.optim, name)([p], lr=0.0, rank=24, state_dtype="bf16", param_update=how)
        for _ in range(600):
            optimizer.step()
        assert optimizer.state[p]["exp_avg_sq"].dtype is torch.bfloat16
        means.append(optimizer.state[p]["exp_avg_sq"].float().sum().item() / 24)
    assert means[0] == pytest.approx(0.25, rel=0.01)
    assert means[1] == pytest.approx(1 - 0.999**600, rel=0.1)


def test_averages_copies_clipping_and_zeroed_gradients() -> None:
    """What every optimizer offers, over groups with and without a rank together."""
    shapes = [(20, 12), (7,), (4, 3, 2)]
    ours, theirs = parameters(*shapes), parameters(*shapes)

    def new(params: list[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
        groups = [{"params": [params[0], params[2]], "rank": 2}, {"params": params[1:2]}]
        return ng.optim.GaLoreAdamW(groups, lr=0.1, weight_decay=0.1, **options)

    optimizer, expected = new(ours, ema_decay=0.75), new(theirs)
    copies = {p: torch.zeros_like(p, dtype=torch.bfloat16) for p in ours}
    optimizer.attach_copies(copies)
    averages = [p.detach().clone() for p in theirs]
    for step in range(3):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        expected.step()
        optimizer.step(max_grad_norm=0.5, zero_grad=True)
        torch.testing.assert_close(optimizer.last_grad_norm, norm)
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            assert (p.grad == 0).all()
            torch.testing.assert_close(p, q, rtol=0, atol=1e-5)
            averages[i] = 0.75 * averages[i] + 0.25 * p.detach()
            torch.testing.assert_close(optimizer.state[p]["ema"], averages[i])
            assert torch.equal(copies[p], p.detach().bfloat16())


def test_a_norm_that_is_not_finite_skips_the_step() -> None:
    params = parameters((20, 12), (7,))
    before = [p.detach().clone() for p in params]
    optimizer = ng.optim.GaLoreAdamW([{"params": params[:1], "rank": 3}, {"params": params[1:]}])
    set_gradients(params, 0)
    params[1].grad[2] = torch.nan
    optimizer.step(max_grad_norm=1.0)
    assert_equal(params, before)
    assert optimizer.state[params[0]]["step"] == optimizer.state[params[1]]["step"] == 0


def layouts() -> list[Any]:
    return [
        pytest.param(
            lambda x: x.permute(1, 0, *range(2, x.dim())).contiguous().permute(1, 0, *range(2, x.dim()))
        ),
        pytest.param(lambda x: torch.stack([x, x], -1)[..., 0]),
        pytest.param(lambda x: x.to(memory_format=torch.channels_last) if x.dim() == 4 else x),
    ]


@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("shape", [(8, 6), (8, 3, 2, 2)])
def test_layouts(layout: Any, shape: tuple[int, ...]) -> None:
    (plain,) = parameters(shape, dtype=torch.float64)
    strided = nn.Parameter(layout(plain.detach()))
    strides = strided.stride()
    optimizers = [ng.optim.GaLoreAdamW([p], rank=3, weight_decay=0.1) for p in (plain, strided)]
    for step in range(3):
        set_gradients([plain], step)
        strided.grad = layout(plain.grad)
        for optimizer in optimizers:
            optimizer.step()
    assert strided.stride() == strides
    torch.testing.assert_close(strided, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1), (1, 5)])
def test_small_and_empty_matrices(shape: tuple[int, int]) -> None:
    (p,) = parameters(shape)
    before = p.detach().clone()
    optimizer = ng.optim.GaLoreAdamW([p], rank=4, lr=0.5)
    train([p], optimizer, 2)
    assert optimizer.state[p]["step"] == 2
    assert torch.equal(p, before) == (p.numel() == 0)


# --- scalers, infinities, skipped steps -----------------------------------------------------------------------


@pytest.mark.parametrize("lr", [0.125, torch.tensor(0.125)])
def test_tensor_lr_and_unmodified_gradients(lr: Any) -> None:
    ours, expected = parameters((20, 12)), parameters((20, 12))
    train(expected, ng.optim.GaLoreAdamW(expected, lr=0.125, rank=4, weight_decay=0.1, maximize=True))
    optimizer = ng.optim.GaLoreAdamW(ours, lr=lr, rank=4, weight_decay=0.1, maximize=True)
    for step in range(4):
        set_gradients(ours, step)
        before, version = ours[0].grad.clone(), ours[0].grad._version
        optimizer.step()
        assert torch.equal(ours[0].grad, before)
        assert ours[0].grad._version == version
    torch.testing.assert_close(ours[0], expected[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("state_dtype", ["fp32", "int8"])
def test_skipped_steps_count_for_nothing(state_dtype: str) -> None:
    """A scaler skips steps, the first among them; bases are found at the same steps as without."""
    options = {
        "rank": 4, "update_proj_gap": 2, "lr": 0.01, "weight_decay": 0.1, "state_dtype": state_dtype,
        "min_quantized_size": 0,
    }  # fmt: skip
    scaled, plain = parameters((20, 12)), parameters((20, 12))
    optimizer, expected = ng.optim.GaLoreAdamW(scaled, **options), ng.optim.GaLoreAdamW(plain, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for overflow in (True, False, True, False, False, True, True, False, False):
        scaler.scale(torch.zeros(()))
        if overflow:
            before = copy.deepcopy((scaled[0].detach(), optimizer.state[scaled[0]]))
            scaled[0].grad = torch.full((20, 12), torch.inf)
        else:
            set_gradients(plain, int(expected.state[plain[0]].get("step", torch.zeros(())).item()))
            expected.step()
            scaled[0].grad = plain[0].grad * scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if overflow:
            assert torch.equal(scaled[0], before[0])
            assert all(
                torch.equal(value, optimizer.state[scaled[0]][name]) for name, value in before[1].items()
            )
        else:
            torch.testing.assert_close(scaled[0], plain[0], rtol=0, atol=1e-6)
    assert optimizer.state[scaled[0]]["step"] == expected.state[plain[0]]["step"] == 5


def test_the_host_rarely_looks_at_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    (p,) = parameters((20, 12))
    optimizer = ng.optim.GaLoreAdamW([p], rank=4, update_proj_gap=4, lr=torch.tensor(0.1), weight_decay=0.1)
    looks = []

    def watched(original: Any) -> Any:
        return lambda x: looks.append(step) or original(x)

    for name in ("item", "__bool__", "__float__", "__int__", "tolist"):
        monkeypatch.setattr(Tensor, name, watched(getattr(Tensor, name)))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    for step in range(9):
        set_gradients([p], step)
        optimizer.step()
    assert sorted(set(looks)) == [0, 4, 8]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_gradients_that_are_not_finite_show(value: float) -> None:
    (p,) = parameters((20, 12))
    optimizer = ng.optim.GaLoreAdamW([p], rank=4)
    set_gradients([p], 0)
    p.grad[7, 3] = value
    optimizer.step()
    assert (~p.isfinite()).any(1).nonzero().flatten().tolist() == [7]
    assert optimizer.state[p]["projection"].isfinite().all()


def test_closures_hooks_and_versions() -> None:
    (p,) = parameters((4, 3))
    optimizer = ng.optim.GaLoreAdamW([p], rank=2, lr=torch.tensor(0.1))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    calls = []
    optimizer.register_step_post_hook(lambda *args: calls.append("post"))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    before, version = p.square().sum().item(), p._version
    assert optimizer.step(closure).item() == pytest.approx(before)
    scheduler.step()
    assert calls == ["post"]
    assert p._version > version
    assert p.square().sum().item() < before


# --- checkpoints --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize(
    "options", [{}, {"state_dtype": "int8", "min_quantized_size": 0}, {"proj_type": "full"}]
)
def test_resumes_with_the_same_bits(projection: str, options: dict[str, Any]) -> None:
    options = {"rank": 3, "update_proj_gap": 2, "projection": projection, "seed": 5, **options}

    def new(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        groups = [{"params": params[:2]}, {"params": params[2:], "rank": None}]
        return ng.optim.GaLoreAdamW(groups, **options)

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
    copied = copy.deepcopy(fresh)
    train(resumed, fresh, 2, first=6)
    mine = [p for group in copied.param_groups for p in group["params"]]
    train(mine, copied, 2, first=6)
    assert_equal(mine, resumed)


def saved(**options: Any) -> dict[str, Any]:
    params = parameters((20, 12))
    optimizer = ng.optim.GaLoreAdamW(params, **{"rank": 3, **options})
    train(params, optimizer, 1)
    return copy.deepcopy(optimizer.state_dict())


def changed(key: str, value: Any) -> dict[str, Any]:
    state = saved()
    state["state"][0][key] = value
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            lambda: changed("exp_avg", torch.zeros(20, 12)),
            r"exp_avg has shape \(20, 12\), expected \(20, 3\)",
        ),
        (lambda: changed("projection", "svd"), "projection must be a tensor, got str"),
        (
            lambda: changed("projection", torch.zeros(3, 12, dtype=torch.int64)),
            "projection has dtype torch.int64",
        ),
        (lambda: changed("step", 0.5), "step must be a whole number, got 0.5"),
        (lambda: changed("more", torch.zeros(())), "has the keys"),
        (lambda: saved(state_dtype="int8", min_quantized_size=0), "saved with state_dtype='int8'"),
        (lambda: torch.optim.SGD(parameters((20, 12)), lr=0.1).state_dict(), "of another optimizer"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(state: Any, message: str) -> None:
    params = parameters((20, 12))
    optimizer = ng.optim.GaLoreAdamW(params, rank=3)
    train(params, optimizer, 1)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state())
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    for name, value in optimizer.state[params[0]].items():
        assert torch.equal(value, before["state"][0][name])


def test_states_without_rank_are_exchanged_with_torch() -> None:
    theirs, ours = parameters((20, 12)), parameters((20, 12))
    their_optimizer, optimizer = torch.optim.AdamW(theirs, lr=0.01), ng.optim.GaLoreAdamW(ours)
    train(theirs, their_optimizer, 2)
    train(ours, ng.optim.AdamW(ours, lr=0.01), 2)
    optimizer.load_state_dict(through_a_file(their_optimizer.state_dict()))
    train(theirs, their_optimizer, 2, first=2)
    train(ours, optimizer, 2, first=2)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.filterwarnings("ignore:.*TypedStorage is deprecated:UserWarning")
@pytest.mark.parametrize("name", ["GaLoreAdamW", "GradNormLoRP"])
def test_distributed_checkpoints_hold_the_states(name: str, tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def new() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(12, 20)
        groups = [{"params": [model.weight], "rank": 3}, {"params": [model.bias]}]
        return model, getattr(ng.optim, name)(groups, lr=0.01)

    (model, optimizer), (other, fresh) = new(), new()
    train(list(model.parameters()), optimizer, 3)
    weights, states = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=tmp_path, no_dist=True)
    weights, states = get_state_dict(other, fresh)
    loaded = {"model": weights, "optimizer": states}
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(other, fresh, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    for each, its_optimizer in ((model, optimizer), (other, fresh)):
        train(list(each.parameters()), its_optimizer, 2, first=3)
    assert_equal(list(other.parameters()), list(model.parameters()))


def test_compiled_step_gives_the_bits_of_an_eager_one() -> None:
    """Groups with a rank run eagerly inside of it."""
    shapes = [(20, 12), (7,)]
    eager, compiled = parameters(*shapes), parameters(*shapes)
    optimizers = [
        ng.optim.GaLoreAdamW(
            [{"params": params[:1], "rank": 3}, {"params": params[1:]}], lr=torch.tensor(0.01)
        )
        for params in (eager, compiled)
    ]
    torch._dynamo.reset()
    step = torch.compile(optimizers[1].step, backend="eager")
    for number in range(3):
        for params in (eager, compiled):
            set_gradients(params, number)
        optimizers[0].step()
        step()
    assert_equal(compiled, eager)


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "GaLoreAdamW: rank must be an integer >= 1 or None, got 0"),
        ({"rank": 2.0}, "rank must be an integer"),
        ({"rank": 2, "update_proj_gap": 0}, "update_proj_gap must be an integer >= 1, got 0"),
        ({"rank": 2, "scale": -1.0}, "scale must be a finite number >= 0, got -1.0"),
        ({"rank": 2, "proj_type": "both"}, "proj_type must be one of 'std', .*; got 'both'"),
        ({"rank": 2, "projection": "qr"}, "projection must be one of 'svd', .*; got 'qr'"),
        ({"rank": 2, "amsgrad": True}, "amsgrad must be False in a group with low-rank states"),
        ({"rank": 2, "cautious": True}, "cautious must be False in a group with low-rank states"),
        ({"rank": 2, "lr": -1.0}, "lr must be"),
        ({"eps": -1.0}, "eps must be"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ng.optim.GaLoreAdamW(parameters((3, 3)), **options)
    optimizer = ng.optim.GaLoreAdamW(parameters((3, 3)))
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": parameters((3, 3)), **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("p", "message"),
    [
        (torch.zeros(3), r"a parameter of shape \(3,\) is no matrix; put it into a group with rank=None"),
        (torch.zeros(()), r"shape \(\) is no matrix"),
        (
            torch.zeros(3, 3, dtype=torch.complex64),
            "dtype torch.complex64; low-rank states are for real ones",
        ),
    ],
)
def test_parameters_that_cannot_be_projected(p: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ng.optim.GaLoreAdamW([p], rank=2)
    ng.optim.GaLoreAdamW([p])


def test_sparse_gradients() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = ng.optim.GaLoreAdamW(embedding.parameters(), rank=2)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="GaLoreAdamW does not support sparse gradients"):
        optimizer.step()


# --- training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_trains_a_matrix_factorization(projection: str) -> None:
    """The target has rank 4, and so has the gradient: a basis of 4 of 20 dimensions is enough to reach it."""
    target = decaying(30, 4, torch.float32) @ decaying(4, 20, torch.float32, seed=1) * 10
    p = nn.Parameter(torch.zeros(30, 20))
    optimizer = ng.optim.GaLoreAdamW(
        [p], lr=0.05, rank=4, scale=1.0, update_proj_gap=10, projection=projection
    )
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, 100)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = (p - target).square().sum()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
