"""Cross-entropy, alone and with the last linear layer, beside PyTorch's in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.backends import all_backends
from tests.tolerances import assert_near, assert_same_bits
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import narrowgauge as ng
from narrowgauge.nn import CrossEntropyLoss, LinearCrossEntropyLoss
from narrowgauge.nn.functional import cross_entropy, linear_cross_entropy
from narrowgauge.norm.cross_entropy import cross_entropy_forward_op
from narrowgauge.ops import library

needs_native = pytest.mark.skipif(
    not library.state.cpu.loaded, reason=f"CPU library {library.state.cpu.reason}"
)
each_backend = pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-2},
    "capped": {"softcap": 4.0},
    "weighted": {"weight": True},
    "everything": {"label_smoothing": 0.2, "z_loss": 1e-2, "softcap": 6.0, "weight": True, "ignore_index": 3},
}
each_option = pytest.mark.parametrize("name", OPTIONS)
each_reduction = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])


def data(
    rows: int, classes: int, options: dict[str, Any], shift: float = 0.0
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(rows, classes, generator=generator) * 4 + shift
    target = torch.randint(classes, (rows,), generator=generator)
    options = dict(options)
    target[1] = options.get("ignore_index", -100)
    if options.get("weight"):
        options["weight"] = torch.rand(classes, generator=generator) + 0.1
    return logits, target, options


def truth(logits: Tensor, target: Tensor, options: dict[str, Any], reduction: str) -> Tensor:
    """PyTorch's, with the options that it lacks written out."""
    options = dict(options)
    cap, z_loss = options.pop("softcap", None), options.pop("z_loss", 0.0)
    weight = options.pop("weight", None)
    z = logits if cap is None else cap * torch.tanh(logits / cap)
    w = None if weight is None else weight.to(z.dtype)
    loss = F.cross_entropy(z, target, weight=w, reduction="none", **options)
    counted = target != options.get("ignore_index", -100)
    loss = loss + torch.where(counted, z_loss * z.logsumexp(-1).square(), 0.0)
    if reduction == "none":
        return loss
    count = counted.sum() if w is None else w[target.where(counted, 0)].where(counted, 0.0).sum()
    return loss.sum() if reduction == "sum" else loss.sum() / count


@each_backend
@each_reduction
@each_option
@pytest.mark.parametrize("in_place", [False, True], ids=["fresh", "in place"])
def test_every_option_is_as_in_torch(
    name: str, reduction: Any, in_place: bool, backend: library.Backend
) -> None:
    shapes = [(7, 17)]
    if backend == "native":  # rows whose exponentials are kept, and longer ones
        shapes += [(4, 1000)] if reduction != "mean" else [(4, 1000), (2, 70_001)]
    for rows, classes in shapes:
        logits, target, options = data(rows, classes, OPTIONS[name])
        for dtype in (torch.float64, torch.float32) if classes < 70_000 else (torch.float32,):
            x = logits.to(dtype).requires_grad_()
            twin = x.detach().double().requires_grad_()
            weight = options.get("weight")
            own = options if weight is None else options | {"weight": weight.to(dtype)}
            with ng.backend(backend):
                loss = cross_entropy(x * 1, target, reduction=reduction, inplace_grad=in_place, **own)
                expected = truth(twin, target, own, reduction)
                outer = torch.linspace(0.5, 2, expected.numel(), dtype=torch.float64).view(expected.shape)
                loss.backward(outer.to(dtype))
            expected.backward(outer)
            assert_near(loss.detach(), expected.detach())
            assert x.grad is not None
            assert twin.grad is not None
            # A saturated cap leaves little of a gradient, with the rounding error of the whole one.
            scale = max(twin.grad.abs().max().item(), 1 / rows if "softcap" in own else 0.0)
            assert_near(x.grad / scale, twin.grad / scale)
            if name in ("plain", "smoothed"):
                assert x.grad.sum(-1).abs().max() < (1e-12 if dtype == torch.float64 else 1e-5) * max(
                    1.0, scale
                )


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_give_a_float32_loss(dtype: torch.dtype, backend: library.Backend) -> None:
    logits, target, options = data(6, 1000, OPTIONS["everything"])
    x = logits.to(dtype).requires_grad_()
    twin = x.detach().double().requires_grad_()
    with ng.backend(backend), torch.autocast("cpu", torch.bfloat16):
        loss, lse = cross_entropy(x, target, return_lse=True, **options)
    expected = truth(twin, target, options, "mean")
    loss.backward()
    expected.backward()
    assert loss.dtype == lse.dtype == torch.float32
    assert_near(loss.detach(), expected.detach())
    assert x.grad is not None
    assert twin.grad is not None
    assert x.grad.dtype == dtype
    assert_near(x.grad, twin.grad)


@each_backend
def test_a_common_shift_of_the_logits_changes_nothing(backend: library.Backend) -> None:
    logits, target, _ = data(5, 200, {})
    logits = logits.mul(1024).round().div(1024)  # so that the shifted logits are exact
    with ng.backend(backend):
        for options in ({}, {"label_smoothing": 0.1}):
            plain, shifted = (cross_entropy(x, target, **options) for x in (logits, logits + 4096))
            assert abs(plain - shifted) < 2e-6


@pytest.mark.parametrize("run", all_backends())
def test_special_rows(run: Any) -> None:
    inf, nan = math.inf, math.nan
    logits = torch.zeros(7, 20)
    logits[0, :5] = -inf  # a mask
    logits[1] = -inf
    logits[2, 3], logits[3, 3], logits[4, 3] = inf, nan, nan
    logits[5] = 1e5
    logits[6, 0] = -inf
    target = torch.tensor([7, 7, 7, 7, -100, 7, 0])
    loss, lse, gradient = run(cross_entropy_forward_op, logits, target, None, None, -100, 0.0, 0.0, 0.0)
    expected = F.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(loss, expected, equal_nan=True)
    assert loss[4] == lse[4] == 0
    assert (gradient[4] == 0).all()  # whatever its logits are
    assert (gradient[0, :5] == 0).all()
    assert gradient[[1, 2, 3]].isnan().all(-1).any()
    torch.testing.assert_close(gradient[5].sum(), torch.tensor(0.0), rtol=0, atol=1e-6)


def test_all_targets_ignored_and_no_rows() -> None:
    x = torch.randn(3, 5, requires_grad=True)
    ignored = torch.full((3,), -100)
    loss = cross_entropy(x, ignored)
    assert loss.isnan()
    assert F.cross_entropy(x, ignored).isnan()
    loss.backward()
    assert x.grad is not None
    assert (x.grad == 0).all()
    assert cross_entropy(x, ignored, reduction="sum") == 0
    empty = torch.empty(0, 5, requires_grad=True)
    none = torch.empty(0, dtype=torch.int64)
    assert cross_entropy(empty, none).isnan()
    assert cross_entropy(empty, none, reduction="none").shape == (0,)
    cross_entropy(empty, none, reduction="sum").backward()
    assert empty.grad is not None


@pytest.mark.parametrize("shape", [(6,), (2, 6, 3), (2, 6, 3, 4)], ids=str)
def test_classes_are_the_second_dimension(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    target = torch.randint(6, (shape[0], *shape[2:]) if len(shape) > 1 else ())
    for reduction in ("mean", "none"):
        loss = cross_entropy(x, target, reduction=reduction)
        expected = F.cross_entropy(twin, target, reduction=reduction)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(
            *(torch.autograd.grad(value.sum(), leaf)[0] for value, leaf in ((loss, x), (expected, twin)))
        )


def test_in_place_writes_over_the_logits_and_says_so() -> None:
    leaf = torch.randn(4, 9, requires_grad=True)
    logits = leaf * 1
    before, version = logits.detach().clone(), logits._version
    loss = cross_entropy(logits, torch.tensor([1, 2, 3, 4]), inplace_grad=True)
    assert logits._version > version
    expected = before.softmax(-1).sub(F.one_hot(torch.tensor([1, 2, 3, 4]), 9)) / 4
    torch.testing.assert_close(logits.detach(), expected)
    loss.backward(torch.tensor(3.0), retain_graph=True)
    torch.testing.assert_close(leaf.grad, 3 * expected)
    with pytest.raises(RuntimeError, match="inplace_grad=True allows one backward"):
        loss.backward()

    # Whoever kept the logits for a backward of their own is told.
    logits = leaf * 1
    other = logits.square().sum()
    cross_entropy(logits, torch.tensor([1, 2, 3, 4]), inplace_grad=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()
    # Without a gradient nothing is written.
    with torch.no_grad():
        logits = leaf * 1
        cross_entropy(logits, torch.tensor([1, 2, 3, 4]), inplace_grad=True)
        assert_same_bits(logits, leaf.detach())


def test_default_allows_several_backwards_but_no_second_derivative() -> None:
    x = torch.randn(4, 9, requires_grad=True)
    loss = cross_entropy(x, torch.tensor([1, 2, 3, 4]))
    (first,) = torch.autograd.grad(loss, x, torch.tensor(2.0), retain_graph=True)
    (again,) = torch.autograd.grad(loss, x, retain_graph=True)
    torch.testing.assert_close(first, 2 * again)
    (graph,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        graph.sum().backward()


def test_functional_transforms() -> None:
    x, target = torch.randn(4, 9, dtype=torch.float64), torch.tensor([1, 2, 3, 4])
    expected = torch.func.grad(lambda x: F.cross_entropy(x, target, label_smoothing=0.1))(x)
    torch.testing.assert_close(
        torch.func.grad(lambda x: cross_entropy(x, target, label_smoothing=0.1))(x), expected
    )


# --- with the last linear layer ------------------------------------------------------------------


@each_backend
@each_option
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_linear_cross_entropy_is_the_two_steps(
    name: str, dtype: torch.dtype, backend: library.Backend
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*s, generator=generator).to(dtype) for s in ((2, 25, 8), (100, 8), (100,)))
    _, target, options = data(50, 100, OPTIONS[name])
    target = target.view(2, 25)
    own = dict(options)
    class_weight = own.pop("weight", None)
    for with_bias, reduction in ((False, "mean"), (True, "sum")):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)[: 2 + with_bias]]
        twins = [t.detach().double().requires_grad_() for t in leaves]
        b = leaves[2] if with_bias else None
        with ng.backend(backend):
            loss, lse = linear_cross_entropy(
                leaves[0], leaves[1], target, bias=b, reduction=reduction, chunk_rows=23, return_lse=True,
                class_weight=None if class_weight is None else class_weight.to(dtype), **own,
            )  # fmt: skip
        logits = F.linear(*twins).flatten(0, 1)
        if class_weight is not None:
            options["weight"] = class_weight.to(dtype).double()
        expected = truth(logits, target.flatten(), options, reduction)
        loss.backward(torch.tensor(0.5, dtype=loss.dtype))
        (0.5 * expected).backward()
        assert lse.shape == target.shape
        tolerance = 0.02 if dtype == torch.bfloat16 else 5e-6 if dtype == torch.float32 else 1e-11
        torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=0)
        for ours, theirs in zip(leaves, twins, strict=True):
            assert ours.grad is not None
            assert theirs.grad is not None
            assert ours.grad.dtype == dtype
            error = (ours.grad.double() - theirs.grad).abs().max() / theirs.grad.abs().max()
            assert error < tolerance


def test_the_chunk_decides_rounding_only() -> None:
    x, weight = torch.randn(50, 16, dtype=torch.float64), torch.randn(30, 16, dtype=torch.float64)
    target = torch.randint(30, (50,))
    losses = [linear_cross_entropy(x, weight, target, chunk_rows=c) for c in (1, 7, 50, 1000, None)]
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-13, atol=0)
    rows = linear_cross_entropy(x, weight, target, reduction="none", chunk_rows=7)
    torch.testing.assert_close(rows, F.cross_entropy(x @ weight.T, target, reduction="none"))
    assert linear_cross_entropy(x[:0], weight, target[:0], reduction="sum") == 0


def test_only_the_gradients_that_are_wanted() -> None:
    x, weight, target = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4), torch.arange(6)
    linear_cross_entropy(x, weight, target).backward()
    expected = torch.autograd.grad(F.cross_entropy(F.linear(x, weight), target), x)[0]
    torch.testing.assert_close(x.grad, expected)


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made inside it held at once; resident memory would depend on the allocator."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        self._alive = {key: kept for key, kept in self._alive.items() if not kept[0].expired()}
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = tensor.untyped_storage()
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return results


def test_peak_memory_at_a_large_vocabulary_is_below_a_quarter_of_the_unfused_form() -> None:
    rows, classes = 256, 131072
    x, weight = torch.randn(rows, 16, requires_grad=True), torch.randn(classes, 16, requires_grad=True)
    target = torch.randint(classes, (rows,))

    def peak(call: Callable[[], Tensor]) -> int:
        with PeakBytes() as counted:
            call().backward()
        return counted.peak

    fused = peak(lambda: linear_cross_entropy(x, weight, target, chunk_rows=16))
    unfused = peak(lambda: F.cross_entropy(F.linear(x, weight), target))
    assert unfused >= 2 * rows * classes * 4, "the logits, and at least their logarithms"
    assert fused >= weight.nbytes, "at least the gradient of weight"
    assert fused < unfused / 4


# --- modules, compile, errors --------------------------------------------------------------------


def test_modules() -> None:
    logits, target, options = data(6, 30, OPTIONS["everything"])
    module = CrossEntropyLoss(**options)
    assert_same_bits(module(logits, target), cross_entropy(logits, target, **options))
    other = CrossEntropyLoss(torch.zeros(30))
    other.load_state_dict(module.state_dict())
    assert_same_bits(other.weight, options["weight"])

    torch.manual_seed(0)
    linear = torch.nn.Linear(8, 30)
    torch.manual_seed(0)
    fused = LinearCrossEntropyLoss(8, 30, bias=True)
    assert_same_bits(fused.weight.detach(), linear.weight.detach())
    fused.load_state_dict(linear.state_dict())
    x = torch.randn(6, 8)
    assert_near(fused(x, target).detach(), F.cross_entropy(linear(x).double(), target).detach())
    assert "num_classes=30" in repr(fused)


def test_compiled_whole() -> None:
    target = torch.tensor([1, 2, -100, 4])

    def function(x: Tensor, weight: Tensor) -> Tensor:
        loss, lse = cross_entropy(x @ weight.T, target, softcap=5.0, inplace_grad=True, return_lse=True)
        return loss + linear_cross_entropy(x, weight, target, chunk_rows=3) + lse.detach().sum()

    arguments, twins = (
        [torch.randn(4, 8).requires_grad_(), torch.randn(9, 8).requires_grad_()] for _ in range(2)
    )
    for ours, theirs in zip(arguments, twins, strict=True):
        theirs.data.copy_(ours.data)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), function(*twins))
    compiled(*arguments).backward()
    function(*twins).backward()
    for ours, theirs in zip(arguments, twins, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


X, T, W = torch.randn(3, 6), torch.tensor([0, 1, 5]), torch.randn(6, 4)
Y = torch.randn(3, 4)
BAD_CALLS: dict[str, tuple[Any, type[Exception], str]] = {
    "probabilities": (
        lambda: cross_entropy(X, X.softmax(-1)),
        TypeError,
        "class probabilities are not supported",
    ),
    "too large": (
        lambda: cross_entropy(X, T + 1),
        ValueError,
        "target contains 6; expected classes from 0 to 5",
    ),
    "negative": (lambda: cross_entropy(X, T - 1), ValueError, "target contains -1"),
    "target shape": (lambda: cross_entropy(X, T[:2]), ValueError, "target has shape .2,.; expected .3,."),
    "target type": (lambda: cross_entropy(X, [0, 1, 2]), TypeError, "target must be a tensor, got list"),
    "bool target": (lambda: cross_entropy(X, T > 0), TypeError, "target has dtype torch.bool"),
    "logits": (lambda: cross_entropy(X.long(), T), TypeError, "logits has dtype torch.int64"),
    "scalar": (lambda: cross_entropy(X.sum(), T), ValueError, "logits must have at least one dimension"),
    "weight": (lambda: cross_entropy(X, T, weight=torch.ones(5)), ValueError, r"weight has shape \(5,\)"),
    "smoothing": (
        lambda: cross_entropy(X, T, label_smoothing=1.5),
        ValueError,
        "label_smoothing must be from 0 to 1",
    ),
    "z_loss": (lambda: cross_entropy(X, T, z_loss=-1.0), ValueError, "z_loss must be a finite number >= 0"),
    "softcap": (lambda: cross_entropy(X, T, softcap=0.0), ValueError, "softcap must be positive, got 0"),
    "reduction": (
        lambda: cross_entropy(X, T, reduction="avg"),
        ValueError,
        "reduction must be one of 'none'",
    ),
    "ignore_index": (
        lambda: cross_entropy(X, T, ignore_index=0.5),
        TypeError,
        "ignore_index must be an integer",
    ),
    "linear weight": (
        lambda: linear_cross_entropy(X, W, T),
        ValueError,
        r"weight has shape \(6, 4\) beside x",
    ),
    "linear bias": (lambda: linear_cross_entropy(Y, W, T, bias=Y[0]), ValueError, "bias has shape"),
    "linear dtype": (
        lambda: linear_cross_entropy(Y.double(), W, T),
        TypeError,
        "weight has dtype torch.float32",
    ),
    "chunk": (
        lambda: linear_cross_entropy(Y, W, T, chunk_rows=0),
        ValueError,
        "chunk_rows must be a positive",
    ),
    "no sum": (
        lambda: linear_cross_entropy(Y.clone().requires_grad_(), W, T, reduction="none"),
        ValueError,
        'reduction="none" has no gradient here',
    ),
    "module": (
        lambda: CrossEntropyLoss(reduction="avg"),
        ValueError,
        "CrossEntropyLoss: reduction must be one of",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_name_the_argument_and_change_nothing(case: str) -> None:
    call, error, message = BAD_CALLS[case]
    before = X.clone()
    with pytest.raises(error, match=message):
        call()
    assert_same_bits(X, before)


@needs_native
def test_the_kernel_itself_refuses_a_target_that_is_no_class() -> None:
    logits = X.clone()
    arguments = (None, None, -100, 0.0, 0.0, 0.0)
    with pytest.raises(RuntimeError, match=r"target\[2\] is 6; expected a class from 0 to 5"):
        torch.ops.narrowgauge.cross_entropy_forward_(logits, torch.tensor([0, 1, 6]), *arguments)
    assert_same_bits(logits, X)
