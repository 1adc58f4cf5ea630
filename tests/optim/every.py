"""Every optimizer of `narrowgauge.optim`, as the tests of their common mechanics make them."""

from __future__ import annotations

import copy
import inspect
import io
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tests.tolerances import assert_same_bits
from torch import Tensor, nn

import narrowgauge as ng
from narrowgauge.optim.base import ElementwiseOptimizer

# Wrappers and others that do not take parameters like an optimizer; they have tests of their own.
NOT_ALONE = {"SAM", "ASAM"}

# What a class needs beside its parameters, or needs to do something in a few steps.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "LARS": {"momentum": 0.9, "trust_coefficient": 0.1},
    "Muon": {"ns_dtype": torch.float32},
    "NormalizedSGD": {"momentum": 0.9},
    "Prodigy": {"d0": 1e-2},
    "SOAP": {"precondition_frequency": 2},
}
# A learning rate that trains a small network in 60 steps; 0.01 where none is given.
RATES = {
    "Adadelta": 5.0,
    "Adagrad": 0.1,
    "Adafactor": 0.1,
    "LARS": 0.1,
    "Lion": 3e-3,
    "NormalizedSGD": 0.02,
    "Prodigy": 1.0,
    "ScheduleFreeSGD": 0.5,
    "SGD": 0.1,
    "SGDP": 0.1,
    "Shampoo": 0.1,
    "LAMB": 0.02,
}
# Options that change the arithmetic, tested like a class of their own.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW amsgrad": ("AdamW", {"amsgrad": True}),
    "Adam l2": ("Adam", {"weight_decay": 0.1}),
    "GaLoreAdamW rank": ("GaLoreAdamW", {"rank": 4, "update_proj_gap": 2}),
    "NormalizedSGD row": ("NormalizedSGD", {"norm": "row"}),
    "NormalizedSGD tensor": ("NormalizedSGD", {"norm": "tensor"}),
    "GradNormLoRP rank": ("GradNormLoRP", {"rank": 4, "update_proj_gap": 2}),
}
# Options that only groups of matrices take; the other parameters get a group without them.
OF_MATRICES = {
    "Muon": {"use_muon": False},
    "GaLoreAdamW rank": {"rank": None},
    "GradNormLoRP rank": {"rank": None},
}


# What classes refuse of the storage options, where not all are offered.
FORMATS = {
    "Adafactor": ("fp32",),
    "ScheduleFreeAdamW": ("fp32", "bf16"),
    "ScheduleFreeSGD": ("fp32", "bf16"),
}
UPDATES = {"Adafactor": ("nearest", "stochastic", "kahan")}


@dataclass(frozen=True)
class Every:
    """One class, or one variant of it."""

    name: str
    cls: type
    arguments: dict[str, Any] = field(default_factory=dict)

    def __call__(self, params: list[nn.Parameter], **options: Any) -> Any:
        """The optimizer of parameters; they are in one group unless the class needs several."""
        options = {"lr": RATES.get(self.cls.__name__, 0.01), **self.arguments, **options}
        groups: Any = params
        if self.name in OF_MATRICES:
            others = [p for p in params if p.dim() < 2]
            groups = [{"params": [p for p in params if p.dim() >= 2]}]
            groups += [{"params": others, **OF_MATRICES[self.name]}] if others else []
        if self.takes("named_parameters"):
            groups = [(f"layers.{i}.weight", p) for i, p in enumerate(params)]
        optimizer = self.cls(groups, **options)
        if hasattr(optimizer, "train"):
            optimizer.train()
        return optimizer

    def takes(self, option: str) -> bool:
        """Whether the constructor has the argument."""
        names = inspect.signature(self.cls.__init__).parameters
        return option in names or ("common" in names and option in ng.optim.base.COMMON_DEFAULTS)

    def stores(self, state_dtype: str = "fp32", param_update: str = "nearest") -> bool:
        """Whether the class offers the format; where it does not, checks that it says so."""
        name = self.cls.__name__
        if state_dtype in FORMATS.get(name, (state_dtype,)) and param_update in UPDATES.get(
            name, (param_update,)
        ):
            return True
        params = [nn.Parameter(torch.zeros(4, 4, dtype=torch.bfloat16))]
        with pytest.raises(ValueError, match=r"(state_dtype|param_update)"):
            self(params, state_dtype=state_dtype, param_update=param_update)
        return False

    def steps_with(self, option: str) -> bool:
        """Whether `step` has the argument."""
        return option in inspect.signature(self.cls.step).parameters

    def has_sums(self) -> bool:
        """Whether a step depends on sums over a tensor, whose order of addition rounds differently."""
        if not issubclass(self.cls, ElementwiseOptimizer) or "rank" in self.name:
            return True
        optimizer = self([nn.Parameter(torch.zeros(2, 2))])
        rule, variant = optimizer._rule, optimizer._variant(optimizer.param_groups[0])
        return rule.sums_of(variant) > 0 or rule.rows or rule.given_of(variant) > 0

    def is_exact(self) -> bool:
        """Whether reference and kernels promise the same bits."""
        return issubclass(self.cls, ElementwiseOptimizer) and self.cls._rule.exact and not self.has_sums()


def _discovered() -> dict[str, Every]:
    members = {name: getattr(ng.optim, name) for name in ng.optim.__all__}
    classes = {
        name: member
        for name, member in members.items()
        if isinstance(member, type) and issubclass(member, torch.optim.Optimizer) and name not in NOT_ALONE
    }
    found = {name: Every(name, cls, ARGUMENTS.get(name, {})) for name, cls in classes.items()}
    for name, (cls, options) in VARIANTS.items():
        if cls in classes:
            found[name] = Every(name, classes[cls], {**ARGUMENTS.get(cls, {}), **options})
    for name in classes:
        if found[name].takes("cautious"):
            found[f"{name} cautious"] = Every(
                f"{name} cautious", classes[name], {**ARGUMENTS.get(name, {}), "cautious": True}
            )
    return found


EVERY = _discovered()


def every(*, takes: str = "", steps_with: str = "") -> Any:
    """Parametrizes a test with `optimizer`: those whose constructor, or whose step, has an argument."""
    chosen = [
        pytest.param(one, id=name)
        for name, one in EVERY.items()
        if (not takes or one.takes(takes)) and (not steps_with or one.steps_with(steps_with))
    ]
    return pytest.mark.parametrize("optimizer", chosen)


def flat_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Everything a step may change beside the parameters: states, and numbers kept in groups."""
    saved = copy.deepcopy(optimizer.state_dict())
    result = {
        f"state {i} {name}": value for i, state in saved["state"].items() for name, value in state.items()
    }
    for number, group in enumerate(saved["param_groups"]):
        group.pop("differentiable", None)  # which torch adds when it loads
        result |= {f"group {number} {name}": value for name, value in group.items()}
    return result


def assert_same_state(optimizer: torch.optim.Optimizer, expected: dict[str, Any]) -> None:
    found = flat_state(optimizer)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert_same_bits(found[name], value, name)
        else:
            assert found[name] == value, name


def assert_near(actual: list[Any], expected: list[Any], tolerance: float) -> None:
    """Parameters, each relative to its largest element."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        scale = e.detach().abs().max().item() if e.numel() else 0.0
        torch.testing.assert_close(
            a.detach(), e.detach(), rtol=tolerance, atol=tolerance * scale, msg=f"parameter {i}: {{}}".format
        )


def assert_same_steps(optimizer: Every, actual: list[Any], expected: list[Any]) -> None:
    """The same bits; but a step that is made of PyTorch's operators may take them differently."""
    if issubclass(optimizer.cls, ElementwiseOptimizer) and "rank" not in optimizer.name:
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            assert_same_bits(a.detach(), e.detach(), f"parameter {i}")
    else:
        assert_near(actual, expected, 1e-5)


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def copies_of(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]
