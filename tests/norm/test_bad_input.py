"""Wrong arguments: an error that names them, before anything is computed, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import narrowgauge as ng
from narrowgauge.nn import functional as ngf


def arguments(residual: bool) -> dict[str, Any]:
    """A good call over rows of 8."""
    generator = torch.Generator().manual_seed(0)
    good: dict[str, Any] = {
        "x": torch.randn(3, 8, generator=generator),
        "weight": torch.randn(8, generator=generator),
        "bias": torch.randn(8, generator=generator),
        "eps": 1e-5,
    }
    if residual:
        good["residual"] = torch.randn(3, 8, generator=generator)
    else:
        good["normalized_shape"] = 8
    return good


# What is wrong, the argument with its wrong value, the error, and what it must say besides the function's name.
PLAIN: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("x is a list", {"x": [1.0, 2.0]}, TypeError, "x must be a tensor, got list"),
    ("x is None", {"x": None}, TypeError, "x must be a tensor, got NoneType"),
    ("integer x", {"x": torch.ones(3, 8, dtype=torch.int32)}, TypeError, "x has dtype torch.int32"),
    ("complex x", {"x": torch.ones(3, 8, dtype=torch.complex64)}, TypeError, "x has dtype torch.complex64"),
    ("boolean x", {"x": torch.ones(3, 8, dtype=torch.bool)}, TypeError, "x has dtype torch.bool"),
    (
        "float8 x",
        {"x": torch.ones(3, 8).to(torch.float8_e4m3fn)},
        TypeError,
        "x has dtype torch.float8_e4m3fn",
    ),
    ("scalar x", {"x": torch.tensor(1.0)}, ValueError, "x "),
    ("weight size", {"weight": torch.ones(7)}, ValueError, r"weight has shape \(7,\).*\(8,\)"),
    ("weight of one", {"weight": torch.ones(1)}, ValueError, r"weight has shape \(1,\)"),
    ("weight with rows", {"weight": torch.ones(3, 8)}, ValueError, r"weight has shape \(3, 8\)"),
    (
        "weight dtype",
        {"weight": torch.ones(8, dtype=torch.float64)},
        TypeError,
        "weight has dtype torch.float64",
    ),
    (
        "narrow weight",
        {"weight": torch.ones(8).bfloat16()},
        TypeError,
        "weight has dtype torch.bfloat16 beside x",
    ),
    (
        "integer weight",
        {"weight": torch.ones(8, dtype=torch.int64)},
        TypeError,
        "weight has dtype torch.int64",
    ),
    ("weight is a number", {"weight": 1.0}, TypeError, "weight must be a tensor, got float"),
    ("bias size", {"bias": torch.ones(9)}, ValueError, r"bias has shape \(9,\)"),
    ("bias dtype", {"bias": torch.ones(8).half()}, TypeError, "bias has dtype torch.float16"),
    ("negative eps", {"eps": -1e-6}, ValueError, "eps must be a finite number >= 0, got -1e-06"),
    ("eps NaN", {"eps": float("nan")}, ValueError, "eps must be a finite number >= 0, got nan"),
    ("eps infinite", {"eps": float("inf")}, ValueError, "eps must be a finite number >= 0, got inf"),
    ("eps a string", {"eps": "small"}, ValueError, "eps must be a finite number >= 0, got 'small'"),
    (
        "out_dtype narrower",
        {"out_dtype": torch.bfloat16},
        TypeError,
        "out_dtype is torch.bfloat16 for x of torch.float32",
    ),
    ("out_dtype wider", {"out_dtype": torch.float64}, TypeError, "out_dtype is torch.float64"),
    ("out_dtype integer", {"out_dtype": torch.int8}, TypeError, "out_dtype is torch.int8"),
    ("out_dtype a string", {"out_dtype": "float32"}, TypeError, "out_dtype is float32"),
    (
        "weight elsewhere",
        {"weight": torch.ones(8, device="meta")},
        ValueError,
        "weight is on meta but x is on cpu",
    ),
    ("bias elsewhere", {"bias": torch.ones(8, device="meta")}, ValueError, "bias is on meta but x is on cpu"),
    ("x elsewhere", {"x": torch.ones(3, 8, device="meta")}, ValueError, "weight is on cpu but x is on meta"),
]
SHAPE: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    (
        "normalized_shape",
        {"normalized_shape": 7},
        ValueError,
        r"x has shape \(3, 8\), which does not end in.*\(7,\)",
    ),
    ("too many sizes", {"normalized_shape": (2, 3, 8)}, ValueError, r"which does not end in.*\(2, 3, 8\)"),
    ("no sizes", {"normalized_shape": ()}, ValueError, r"does not end in normalized_shape \(\)"),
    (
        "weight not flat",
        {"normalized_shape": (3, 8)},
        ValueError,
        r"weight has shape \(8,\); expected.*\(3, 8\)",
    ),
]
RESIDUAL: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("residual is a number", {"residual": 1.0}, TypeError, "residual must be a tensor, got float"),
    ("residual shape", {"residual": torch.ones(3, 7)}, ValueError, r"residual has shape \(3, 7\).*\(3, 8\)"),
    ("residual to broadcast", {"residual": torch.ones(1, 8)}, ValueError, r"residual has shape \(1, 8\)"),
    (
        "residual dtype",
        {"residual": torch.ones(3, 8).bfloat16()},
        TypeError,
        "residual has dtype torch.bfloat16",
    ),
    (
        "integer residual",
        {"residual": torch.ones(3, 8, dtype=torch.int64)},
        TypeError,
        "residual has dtype torch.int64",
    ),
    (
        "integer residual to convert",
        {"residual": torch.ones(3, 8, dtype=torch.int64), "residual_dtype": torch.float32},
        TypeError,
        "residual has dtype torch.int64",
    ),
    ("residual elsewhere", {"residual": torch.ones(3, 8, device="meta")}, ValueError, "residual is on meta"),
    (
        "residual_dtype",
        {"residual_dtype": torch.bfloat16},
        TypeError,
        "residual_dtype is torch.bfloat16 for x of torch.f",
    ),
    ("residual_dtype wider", {"residual_dtype": torch.float64}, TypeError, "residual_dtype is torch.float64"),
    ("residual_dtype a string", {"residual_dtype": "float32"}, TypeError, "residual_dtype is float32"),
]
FUNCTIONS = {"layer_norm": SHAPE, "rms_norm": SHAPE, "add_layer_norm": RESIDUAL, "add_rms_norm": RESIDUAL}
CASES = [
    pytest.param(name, *case[1:], id=f"{name}-{case[0]}")
    for name, own in FUNCTIONS.items()
    for case in [*PLAIN, *own]
]


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(("name", "wrong", "error", "message"), CASES)
def test_wrong_arguments_are_named(
    name: str, wrong: dict[str, Any], error: type[Exception], message: str, backend: Any
) -> None:
    call = arguments(residual=name.startswith("add"))
    untouched = {key: value.clone() for key, value in call.items() if isinstance(value, Tensor)}
    for requires_grad in (False, True):
        for value in call.values():
            if isinstance(value, Tensor):
                value.requires_grad_(requires_grad)
        with ng.backend(backend), pytest.raises(error, match=f"{name}: .*{message}"):
            getattr(ngf, name)(**{**call, **wrong})
    for key, value in untouched.items():
        assert torch.equal(call[key], value), key


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_call_that_is_changed_above_is_good(name: str) -> None:
    result = getattr(ngf, name)(**arguments(residual=name.startswith("add")))
    assert all(tensor.isfinite().all() for tensor in (result if isinstance(result, tuple) else (result,)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_float64_goes_with_float64_only(name: str) -> None:
    call = arguments(residual=name.startswith("add"))
    call["x"] = call["x"].double()
    with pytest.raises(TypeError, match=f"{name}: weight has dtype torch.float32 beside x of torch.float64"):
        getattr(ngf, name)(**call)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_wrong_arguments_are_named_inside_a_compiled_function(name: str) -> None:
    call = arguments(residual=name.startswith("add"))
    call["weight"] = torch.ones(7)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"weight has shape \(7,\)"):
        torch.compile(getattr(ngf, name), backend="eager", fullgraph=False)(**call)


def test_modules_name_the_function() -> None:
    with pytest.raises(ValueError, match=r"layer_norm: x has shape \(3, 7\), which does not end in"):
        ng.nn.LayerNorm(8)(torch.ones(3, 7))
    with pytest.raises(
        TypeError, match=r"rms_norm: weight has dtype torch.bfloat16 beside x of torch.float32"
    ):
        ng.nn.RMSNorm(8, dtype=torch.bfloat16)(torch.ones(3, 8))
