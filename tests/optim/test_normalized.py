"""Steps of normalized length: the optimizer, and logistic regression up to separation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import golden_files
from tests.optim.test_adamw import assert_equal, parameters, set_gradients, train
from tests.optim.test_checkpoint import through_a_file
from torch import Tensor, nn

import narrowgauge as ng
from narrowgauge.optim import normalized_logistic_step_

# --- logistic regression ------------------------------------------------------------------------------------


def worst_case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The paper's data: one sample of class +1 beside 999 of class -1."""
    a = torch.tensor([[0.5, -1.0]] + [[-0.5, -1.0]] * 999, dtype=dtype)
    return a, torch.tensor([1.0] + [-1.0] * 999, dtype=dtype)


def steps_to_separate(a: Tensor, y: Tensor, gamma: float, limit: int = 10_000) -> tuple[int, list[Tensor]]:
    theta = torch.zeros(a.shape[1], dtype=a.dtype)
    iterates = [theta.clone()]
    while len(iterates) <= limit:
        normalized_logistic_step_(theta, a, y, gamma)
        iterates.append(theta.clone())
        if (y * (a @ theta) > 0).all():
            return len(iterates) - 1, iterates
    raise AssertionError("not separated")


@pytest.mark.parametrize("path", golden_files.files("normalized_gd"), ids=lambda path: path.stem)
def test_replays_recorded_iterates(path: Path) -> None:
    recorded, meta = golden_files.read(path)
    if not meta.get("normalized", True):
        count, iterates = plain_descent(*worst_case(), meta["gamma"])
        assert count == recorded["iterations"]
        torch.testing.assert_close(torch.stack(iterates), recorded["theta"], rtol=1e-10, atol=1e-10)
        return
    if "counts" in recorded:
        a, y = (recorded[f"unique_{name}"].repeat_interleave(recorded["counts"], 0) for name in ("a", "y"))
    else:
        a, y = recorded["a"], recorded["y"]
    theta = recorded["theta"][0].clone()
    for expected in recorded["theta"][1:]:
        normalized_logistic_step_(theta, a, y, meta["gamma"])
        torch.testing.assert_close(theta, expected, rtol=1e-10, atol=1e-12)
    if "counts" in recorded:
        assert steps_to_separate(a, y, meta["gamma"])[0] == recorded["iterations"]


def plain_descent(a: Tensor, y: Tensor, gamma: float) -> tuple[int, list[Tensor]]:
    """Gradient descent on the mean logistic loss, written down from its derivative."""
    theta = torch.zeros(a.shape[1], dtype=a.dtype)
    iterates = [theta]
    while not (y * (a @ theta) > 0).all():
        errors = 1 / (1 + torch.exp(y * (a @ theta)))
        theta = theta + gamma * (errors * y) @ a / len(y)
        iterates.append(theta)
    return len(iterates) - 1, iterates


@pytest.mark.parametrize(("gamma", "expected"), [(100.0, 2), (10.0, 2), (1.0, 16), (0.1, 157)])
def test_separates_in_as_many_steps_as_the_paper_says(gamma: float, expected: int) -> None:
    assert steps_to_separate(*worst_case(), gamma)[0] == expected


def test_plain_descent_needs_308() -> None:
    assert plain_descent(*worst_case(), 100.0)[0] == 308


def separable(seed: int, n: int = 60, d: int = 4) -> tuple[Tensor, Tensor, float, float]:
    """Random data, with a margin and the largest norm."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.nn.functional.normalize(torch.randn(d, generator=generator, dtype=torch.float64), dim=0)
    a = torch.randn(n, d, generator=generator, dtype=torch.float64)
    a = a[(a @ direction).abs() > 0.2]
    y = (a @ direction).sign()
    return a, y, (y * (a @ direction)).min().item(), a.norm(dim=1).max().item()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("gamma", [0.3, 3.0, 300.0])
def test_the_bound_on_steps_holds(seed: int, gamma: float) -> None:
    a, y, margin, radius = separable(seed)
    bound = radius**2 / margin**2 + 2 * math.log(2 * len(y) - 1) / (gamma * margin**2)
    assert steps_to_separate(a, y, gamma)[0] <= bound


def test_duplicated_data_change_nothing() -> None:
    a, y, *_ = separable(0)
    once, thrice = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for _ in range(20):
        normalized_logistic_step_(once, a, y, 2.0)
        normalized_logistic_step_(thrice, a.repeat(3, 1), y.repeat(3), 2.0)
    torch.testing.assert_close(once, thrice, rtol=1e-12, atol=0)


def test_large_steps_are_those_of_the_batch_perceptron() -> None:
    """theta / gamma moves by the mean of y a over the samples on the wrong side, once gamma is large."""
    a, y, *_ = separable(2)
    gamma = 1e9
    theta = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * gamma
    wrong = y * (a @ theta) < 0
    assert 0 < wrong.sum() < len(y)
    expected = theta / gamma + (y[:, None] * a)[wrong].mean(0)
    normalized_logistic_step_(theta, a, y, gamma)
    torch.testing.assert_close(theta / gamma, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_errors_that_underflow_keep_their_ratios(dtype: torch.dtype) -> None:
    """Margins of 1e4 and 1e4 + log 3: exp(-1e4) is 0, but the weights are still 3/4 and 1/4."""
    theta = torch.tensor([1.0, 1.0], dtype=dtype)
    a = torch.tensor([[1e4, 0.0], [0.0, 1e4 + math.log(3)]], dtype=dtype)
    y = torch.ones(2)
    normalized_logistic_step_(theta, a, y, 1.0)
    expected = torch.tensor([1 + 0.75e4, 1 + 0.25 * (1e4 + math.log(3))], dtype=dtype)
    torch.testing.assert_close(theta, expected, rtol=1e-3 if dtype is torch.float32 else 1e-11, atol=0)


def test_step_writes_in_place_with_any_labels_and_gamma() -> None:
    a, y, *_ = separable(0)
    theta = torch.zeros(4, dtype=torch.float64)
    assert normalized_logistic_step_(theta, a, y.to(torch.int8), torch.tensor([2.0])) is theta
    other = normalized_logistic_step_(torch.zeros(4, dtype=torch.float64), a, y, 2.0)
    assert torch.equal(theta, other)
    parameter = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    assert torch.equal(normalized_logistic_step_(parameter, a, y, 2.0), other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"theta": torch.zeros(3, 1)},
            r"theta must be a float32 or float64 vector, got torch.float32 of shape",
        ),
        ({"theta": torch.zeros(3).half()}, "theta must be a float32 or float64 vector, got torch.float16"),
        ({"A": torch.ones(5, 2)}, r"A must be torch.float32 of shape \(n, 3\) with n >= 1, got .* \(5, 2\)"),
        ({"A": torch.ones(0, 3)}, "with n >= 1"),
        ({"A": torch.ones(5, 3).double()}, "got torch.float64"),
        ({"y": torch.ones(4)}, r"y must have shape \(5,\), got \(4,\)"),
        ({"y": torch.tensor([0.0, 1, 1, 1, 1])}, r"y must hold -1 and \+1 only; .* give 2 \* y - 1"),
        ({"gamma": -1.0}, "gamma must be a finite number >= 0, got -1.0"),
        ({"gamma": torch.ones(2)}, "a tensor gamma must have one element, got 2"),
    ],
)
def test_bad_arguments_of_the_step(changes: dict[str, Any], message: str) -> None:
    arguments = {"theta": torch.zeros(3), "A": torch.ones(5, 3), "y": torch.ones(5), "gamma": 1.0, **changes}
    before = arguments["theta"].clone()
    with pytest.raises(ValueError, match=message):
        normalized_logistic_step_(**arguments)
    assert torch.equal(arguments["theta"], before)


# --- NormalizedSGD ------------------------------------------------------------------------------------------

SHAPES = [(6, 5), (7,), (), (0, 3), (2, 3, 4)]


def norms(grads: list[Tensor], norm: str) -> list[Tensor]:
    """What each gradient is divided by, spelled out in float64."""
    if norm == "global":
        return [torch.cat([g.abs().flatten() for g in grads]).square().sum().sqrt()] * len(grads)
    if norm == "tensor":
        return [g.abs().square().sum().sqrt() for g in grads]
    return [
        g.abs().square().sum().sqrt()
        if g.dim() < 2
        else g.abs().square().sum(tuple(range(1, g.dim())), True).sqrt()
        for g in grads
    ]


@pytest.mark.parametrize("norm", ["global", "tensor", "row"])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.7, "maximize": True}])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2.0**-8), (torch.complex64, 2e-6)],
)
def test_follows_the_formula(
    norm: str, options: dict[str, Any], dtype: torch.dtype, tolerance: float
) -> None:
    wide = torch.complex128 if dtype.is_complex else torch.float64
    if dtype.is_complex and norm == "row":
        pytest.skip("rows are of real parameters")
    params = [nn.Parameter(p.detach().to(dtype)) for p in parameters(*SHAPES, dtype=torch.float64)]
    expected = [p.detach().to(wide, copy=True) for p in params]
    buffers = [torch.zeros_like(p) for p in expected]
    optimizer = ng.optim.NormalizedSGD(params, 0.3, norm=norm, eps=0.01, **options)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=wide).to(dtype)
        grads = [p.grad.to(wide) for p in params]
        optimizer.step()
        for i, (g, size) in enumerate(zip(grads, norms(grads, norm), strict=True)):
            direction = g / (size + 0.01) * (-1 if options else 1)
            buffers[i] = options.get("momentum", 0) * buffers[i] + direction
            expected[i] = (expected[i] - 0.3 * buffers[i]).to(dtype).to(wide)
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach().to(wide), e, rtol=tolerance, atol=tolerance)


def test_the_length_of_a_step_is_the_learning_rate() -> None:
    params = parameters(*SHAPES, dtype=torch.float64)
    before = [p.detach().clone() for p in params]
    for scale in (1e-6, 1e6):
        optimizer = ng.optim.NormalizedSGD(params, lr=torch.tensor(0.25), eps=0.0)
        set_gradients(params, 0)
        for p in params:
            p.grad *= scale
        optimizer.step()
        moved = torch.cat([(p - old).detach().flatten() for p, old in zip(params, before, strict=True)])
        assert moved.norm().item() == pytest.approx(0.25, rel=1e-9)
        before = [p.detach().clone() for p in params]


def test_the_global_norm_spans_groups() -> None:
    one, two = parameters((6, 5), (7,)), parameters((6, 5), (7,))
    train(one, ng.optim.NormalizedSGD(one, lr=0.1))
    train(two, ng.optim.NormalizedSGD([{"params": two[:1]}, {"params": two[1:]}], lr=0.1))
    assert_equal(two, one)


def test_zero_and_missing_gradients_move_nothing() -> None:
    params = parameters((6, 5), (7,))
    before = [p.detach().clone() for p in params]
    optimizer = ng.optim.NormalizedSGD(params, lr=0.1, eps=0.0, norm="row")
    optimizer.step()
    params[0].grad = torch.zeros(6, 5)
    params[0].grad[2] = 1.0
    optimizer.step()
    assert (params[0] != before[0]).any(1).nonzero().flatten().tolist() == [2]
    assert torch.equal(params[1], before[1])


@pytest.mark.parametrize("norm", ["global", "tensor", "row"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_gradients_and_skipped_steps(norm: str, momentum: float, dtype: torch.dtype) -> None:
    scaled, plain = parameters((6, 5), (7,), dtype=dtype), parameters((6, 5), (7,), dtype=dtype)
    options = {"lr": 0.1, "momentum": momentum, "norm": norm, "eps": 0.5}
    optimizer, expected = ng.optim.NormalizedSGD(scaled, **options), ng.optim.NormalizedSGD(plain, **options)
    for step, overflow in enumerate((True, False, False, True, False)):
        set_gradients(plain, step)
        for p, q in zip(scaled, plain, strict=True):
            p.grad = q.grad * 8
        if overflow:
            scaled[0].grad[1, 2] = torch.nan
        else:
            expected.step()
        before, version = scaled[0].grad.clone(), scaled[0].grad._version
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(float(overflow))
        optimizer.step()
        assert scaled[0].grad._version == version
        torch.testing.assert_close(scaled[0].grad, before, rtol=0, atol=0, equal_nan=True)
        for p, q in zip(scaled, plain, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6 if dtype is torch.float32 else 2.0**-7, atol=1e-6)
    if momentum:
        assert optimizer.state[scaled[0]]["step"] == 3


def test_step_never_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters((6, 5), (7,))
    set_gradients(params, 0)
    optimizer = ng.optim.NormalizedSGD(params, lr=torch.tensor(0.1), momentum=0.9)

    def refuse(*args: Any) -> None:
        raise AssertionError("a host sync")

    for name in ("item", "__bool__", "__float__", "tolist"):
        monkeypatch.setattr(Tensor, name, refuse)
    optimizer.step()


def test_compiled_step_gives_the_bits_of_an_eager_one() -> None:
    eager, compiled = parameters((33, 9), (7,)), parameters((33, 9), (7,))
    optimizers = [
        ng.optim.NormalizedSGD(params, lr=torch.tensor(0.1), momentum=0.9) for params in (eager, compiled)
    ]
    torch._dynamo.reset()
    step = torch.compile(optimizers[1].step, fullgraph=True, backend="eager")
    for number in range(3):
        for params in (eager, compiled):
            set_gradients(params, number)
        optimizers[0].step()
        step()
    assert_equal(compiled, eager)


def test_gradients_that_are_not_finite_show() -> None:
    params = parameters((6, 5), (7,))
    set_gradients(params, 0)
    params[0].grad[2, 3] = torch.inf
    ng.optim.NormalizedSGD(params, lr=0.1, norm="row").step()
    assert (~params[0].isfinite()).any(1).nonzero().flatten().tolist() == [2]
    assert params[1].isfinite().all()


def test_layouts() -> None:
    (plain,) = parameters((8, 6, 5, 4))
    strided = nn.Parameter(torch.stack([plain.detach(), plain.detach()], -1)[..., 0])
    strides = strided.stride()
    optimizers = [ng.optim.NormalizedSGD([p], lr=0.1, momentum=0.5, norm="row") for p in (plain, strided)]
    for step in range(3):
        set_gradients([plain], step)
        strided.grad = plain.grad.to(memory_format=torch.channels_last)
        for optimizer in optimizers:
            optimizer.step()
    assert strided.stride() == strides
    torch.testing.assert_close(strided, plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumes_with_the_same_bits(dtype: torch.dtype) -> None:
    whole, first = parameters(*SHAPES, dtype=dtype), parameters(*SHAPES, dtype=dtype)
    options = {"lr": 0.1, "momentum": 0.9}
    train(whole, ng.optim.NormalizedSGD(whole, **options), 6)
    optimizer = ng.optim.NormalizedSGD(first, **options)
    train(first, optimizer, 3)
    resumed = [nn.Parameter(p.detach().clone()) for p in first]
    fresh = ng.optim.NormalizedSGD(resumed, **options)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    assert fresh.state[resumed[0]]["momentum_buffer"].dtype is torch.float32
    train(resumed, fresh, 3, first=3)
    assert_equal(resumed, whole)


def test_closure_and_version() -> None:
    (p,) = parameters((3,))
    optimizer = ng.optim.NormalizedSGD([p], lr=0.1)
    version = p._version

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    before = p.square().sum().item()
    assert optimizer.step(closure).item() == pytest.approx(before)
    assert p._version > version
    assert p.square().sum().item() < before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "NormalizedSGD: lr must be a finite number >= 0, got -0.1"),
        ({"lr": 0.1, "momentum": -1}, "momentum must be"),
        ({"lr": 0.1, "eps": math.nan}, "eps must be"),
        ({"lr": 0.1, "state_dtype": "int9"}, "state_dtype must be one of"),
        ({"lr": 0.1, "norm": "layer"}, "norm must be one of 'global', 'tensor', 'row'; got 'layer'"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ng.optim.NormalizedSGD(parameters((3,)), **options)


def test_rows_are_of_real_parameters() -> None:
    with pytest.raises(
        ValueError, match=r"norm='row' takes real parameters .* of torch.complex64; use norm='tensor'"
    ):
        ng.optim.NormalizedSGD([torch.zeros(3, 3, dtype=torch.complex64)], lr=0.1, norm="row")


def test_sparse_gradients_change_nothing() -> None:
    embedding, other = nn.Embedding(5, 3, sparse=True), nn.Parameter(torch.ones(3))
    optimizer = ng.optim.NormalizedSGD([other, embedding.weight], lr=0.1)
    embedding(torch.tensor([1])).sum().backward()
    other.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="NormalizedSGD does not support sparse gradients"):
        optimizer.step()
    assert torch.equal(other, torch.ones(3))
