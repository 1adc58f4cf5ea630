"""Recorded steps with narrow states: torchao's codes come out the same, bitsandbytes' states are read and continued."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests import golden_files
from torch import Tensor, nn

import narrowgauge as ng

# torchao's class: ours, and how it stores states.
TORCHAO: dict[str, tuple[Any, str]] = {
    f"{name}{suffix}": (getattr(ng.optim, name), state_dtype)
    for name in ("Adam", "AdamW")
    for suffix, state_dtype in (("8bit", "int8"), ("4bit", "int4"), ("Fp8", "fp8"))
}


def replayed(tensors: dict[str, Tensor], meta: dict[str, Any]) -> list[nn.Parameter]:
    dtype = getattr(torch, meta["dtype"])
    return [nn.Parameter(tensors[f"param{i}_0"].to(dtype)) for i in range(len(meta["shapes"]))]


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("path", golden_files.files("torchao_lowbit"), ids=lambda path: path.stem)
def test_replays_torchao(path: Path, backend: str) -> None:
    tensors, meta = golden_files.read(path)
    kind, state_dtype = TORCHAO[meta["source"].split("torchao.optim.")[1].split(",")[0]]
    params = replayed(tensors, meta)
    hyperparameters = dict(meta["hyperparameters"])
    if hyperparameters.pop("bf16_stochastic_round", False):
        pytest.skip("its random bits are not recorded")
    with ng.backend(backend):
        optimizer = kind(params, state_dtype=state_dtype, **hyperparameters)
        for step in range(1, meta["steps"] + 1):
            for i, p in enumerate(params):
                p.grad = tensors[f"grad{i}_step{step}"].to(p.dtype)
            optimizer.step()
            for i, p in enumerate(params):
                expected = tensors[f"param{i}_step{step}"]
                torch.testing.assert_close(p.detach().float(), expected, rtol=0, atol=4e-7)
                state = optimizer.state[p]
                for name in ("exp_avg", "exp_avg_sq"):
                    recorded = f"state{i}_{name}"
                    if f"{recorded}_codes_step{step}" in tensors:
                        codes = tensors[f"{recorded}_codes_step{step}"]
                        assert torch.equal(state[f"{name}.codes"].flatten(), codes.flatten()), name
                        scale = tensors[f"{recorded}_scale_step{step}"]
                        torch.testing.assert_close(state[f"{name}.scale"], scale, rtol=2e-7, atol=0)
                    else:
                        plain = tensors[f"{recorded}_step{step}"]
                        torch.testing.assert_close(state[name], plain.float(), rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("path", golden_files.files("bnb8bit", "adam*8bit*.npz"), ids=lambda path: path.stem)
def test_continues_from_the_states_of_bitsandbytes(path: Path, backend: str) -> None:
    """From each recorded state the next step of ours is theirs: their decay is decoupled in both classes, and the step
    uses the moments before they are rounded. Their CPU code is not the nearest one, so each step starts anew."""
    tensors, meta = golden_files.read(path)
    hyperparameters = {k: v for k, v in meta["hyperparameters"].items() if k != "min_8bit_size"}
    signed, unsigned = (ng.optim.codec.dynamic_map(is_signed) for is_signed in (True, False))
    for step in range(1, meta["steps"]):
        p = nn.Parameter(tensors[f"param0_step{step}"].clone())
        optimizer = ng.optim.AdamW([p], state_dtype="int8", min_quantized_size=0, **hyperparameters)
        theirs = {
            name: tensors[f"state0_{name}_step{step}"] for name in ("state1", "state2", "absmax1", "absmax2")
        }
        imported = ng.optim.import_bitsandbytes_state(
            {**theirs, "step": step, "qmap1": signed, "qmap2": unsigned}
        )
        state = optimizer.state_dict()
        optimizer.load_state_dict({"state": {0: imported}, "param_groups": state["param_groups"]})
        p.grad = tensors[f"grad0_step{step + 1}"].clone()
        with ng.backend(backend):
            optimizer.step()
        torch.testing.assert_close(p.detach(), tensors[f"param0_step{step + 1}"], rtol=0, atol=3e-7)
        for number, name in enumerate(("exp_avg", "exp_avg_sq"), 1):
            absmax = tensors[f"state0_absmax{number}_step{step + 1}"]
            torch.testing.assert_close(optimizer.state[p][f"{name}.scale"], absmax, rtol=2e-6, atol=0)
