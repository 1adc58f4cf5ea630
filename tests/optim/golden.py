"""Replaying recorded optimizer runs through the public classes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from tests import golden_files
from torch import Tensor, nn

import narrowgauge as ng

Make = Callable[[list[nn.Parameter], dict[str, Any]], torch.optim.Optimizer]


def replay(
    folder: str,
    pattern: str,
    make: Make,
    *,
    tolerances: Mapping[torch.dtype, float],
    state_names: Mapping[str, str] | None = None,
    skip: Collection[str] = (),
) -> list[str]:
    """Replays every file ``tests/golden/<folder>/<pattern>*.npz`` on the reference and on the kernels.

    Parameters and every recorded state that our state has too are compared after each step.

    Args:
        folder: Folder of the files.
        pattern: How their names begin.
        make: ``make(params, meta)`` gives the optimizer.
        tolerances: Relative tolerance by dtype of the parameters. A tenth of it, times the largest element, is
            allowed where an element is near zero.
        state_names: Our names of recorded states that are called otherwise.
        skip: Names of files, without ``.npz``, that are left out.

    Returns:
        Names of the files.
    """
    paths = [path for path in golden_files.files(folder, f"{pattern}*.npz") if path.stem not in skip]
    for path in paths:
        recorded, meta = golden_files.read(path)
        for backend in ("reference", "auto"):
            with ng.backend(backend):
                _replay(f"{path.stem}, {backend}", recorded, meta, make, tolerances, state_names or {})
    return [path.stem for path in paths]


def _replay(
    where: str,
    recorded: dict[str, Tensor],
    meta: dict[str, Any],
    make: Make,
    tolerances: Mapping[torch.dtype, float],
    state_names: Mapping[str, str],
) -> None:
    dtype = getattr(torch, meta["dtype"]) if "dtype" in meta else recorded["param0_0"].dtype
    count = sum(name.startswith("param") and name.endswith("_0") for name in recorded)
    steps = sum(name.startswith("grad0_step") for name in recorded)
    assert count > 0, f"{where}: no parameters"
    assert steps > 0, f"{where}: no steps"
    params = [nn.Parameter(recorded[f"param{i}_0"].to(dtype, copy=True)) for i in range(count)]
    optimizer = make(params, meta)
    for step in range(1, steps + 1):
        for i, p in enumerate(params):
            p.grad = recorded[f"grad{i}_step{step}"].to(dtype, copy=True)
        optimizer.step()
        for i, p in enumerate(params):
            values = {f"param{i}": p.detach()}
            values |= {
                f"state{i}_{name}": value
                for name, value in optimizer.state[p].items()
                if isinstance(value, Tensor)
            }
            renamed = {f"state{i}_{ours}": f"state{i}_{theirs}" for theirs, ours in state_names.items()}
            for name, value in values.items():
                expected = recorded.get(f"{renamed.get(name, name)}_step{step}")
                if expected is not None:
                    _assert_near(value, expected, tolerances[dtype], f"{where}: {name} after step {step}")


def _assert_near(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    expected = expected.double()
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(
        actual.double().reshape(expected.shape),
        expected,
        rtol=tolerance,
        atol=tolerance * 0.1 * largest,
        equal_nan=True,
        msg=lambda text: f"{what}: {text}",
    )
