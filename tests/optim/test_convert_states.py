"""States of bitsandbytes and torchao in this library's keys: neither is installed, so their objects are stand-ins."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.golden_files import GOLDEN, read
from torch import Tensor

import narrowgauge as ng
from narrowgauge.optim import (
    codec,
    decode_state,
    encode_state,
    import_bitsandbytes_state,
    import_torchao_state,
)


def bitsandbytes_state() -> dict[str, Any]:
    recorded, _ = read(GOLDEN / "bnb8bit/adam8bit_wd_is_decoupled.npz")
    maps, _ = read(GOLDEN / "bnb8bit/maps.npz")
    state = {name: recorded[f"state0_{name}_step2"] for name in ("state1", "state2", "absmax1", "absmax2")}
    return {"step": 2, **state, "qmap1": maps["qmap_signed"], "qmap2": maps["qmap_unsigned"]}


def looked_up(codes: Tensor, scale: Tensor, qmap: Tensor, block_size: int) -> Tensor:
    return (qmap[codes.long()].flatten() * scale.repeat_interleave(block_size)[: codes.numel()]).view(
        codes.shape
    )


def test_bitsandbytes_states_keep_their_codes() -> None:
    state = bitsandbytes_state()
    ours = import_bitsandbytes_state(state)
    assert ours["step"].dtype is torch.float32
    assert ours["step"].item() == 2
    for number, name in enumerate(("exp_avg", "exp_avg_sq"), 1):
        assert torch.equal(ours[f"{name}.codes"], state[f"state{number}"])
        encoded = {"codes": ours[f"{name}.codes"], "scale": ours[f"{name}.scale"]}
        values = decode_state(encoded, "int8", signed=number == 1, shape=state["state1"].shape)
        theirs = looked_up(state[f"state{number}"], state[f"absmax{number}"], state[f"qmap{number}"], 256)
        assert torch.equal(values, theirs)


def test_bitsandbytes_states_load_into_the_optimizer() -> None:
    p = torch.nn.Parameter(torch.randn(9, 57))
    optimizer = ng.optim.AdamW([p], state_dtype="int8", min_quantized_size=256)
    loaded = optimizer.state_dict()
    loaded["state"] = {0: import_bitsandbytes_state(bitsandbytes_state())}
    optimizer.load_state_dict(loaded)
    assert torch.equal(optimizer.state[p]["exp_avg.codes"], bitsandbytes_state()["state1"])
    p.grad = torch.randn_like(p)
    optimizer.step()
    assert optimizer.state[p]["step"].item() == 3


def test_scales_of_2048_elements_are_repeated() -> None:
    codes = torch.randint(0, 256, (5000,)).to(torch.uint8)
    absmax = torch.tensor([1.0, 2.0, 3.0])
    state = {"step": 1, "state1": codes, "absmax1": absmax, "qmap1": codec.dynamic_map(True)}
    ours = import_bitsandbytes_state(state, names=("momentum",))
    encoded = {"codes": ours["momentum.codes"], "scale": ours["momentum.scale"]}
    values = decode_state(encoded, "int8", shape=[5000])
    assert torch.equal(values, looked_up(codes, absmax, codec.dynamic_map(True), 2048))


def test_float32_states_pass() -> None:
    state = {"step": 5, "state1": torch.randn(7), "state2": torch.rand(7)}
    ours = import_bitsandbytes_state(state)
    assert torch.equal(ours["exp_avg"], state["state1"])
    assert torch.equal(ours["exp_avg_sq"], state["state2"])
    assert ours["exp_avg"] is not state["state1"]


@pytest.mark.parametrize("state_dtype", ["int8", "int4", "fp8"])
def test_torchao_states_keep_their_codes(state_dtype: str) -> None:
    shape, block_size = (32, 136), codec.FORMATS[state_dtype].block_size
    state: dict[str, Any] = {"step": torch.tensor(3.0)}
    expected = {}
    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        x = torch.randn(shape) if signed else torch.rand(shape)
        encoded = encode_state(x, state_dtype, signed=signed)
        expected[name] = encoded
        value = SimpleNamespace(codes=encoded["codes"], scale=encoded["scale"], shape=shape)
        if state_dtype == "fp8":
            value.codes = value.codes.view(torch.float8_e4m3fn)
        else:
            value.qmap, value.signed = codec.code_map(state_dtype, signed), signed
        state[name] = value
    ours = import_torchao_state(state)
    assert set(ours) == {"step", "exp_avg.codes", "exp_avg.scale", "exp_avg_sq.codes", "exp_avg_sq.scale"}
    assert len(ours["exp_avg.scale"]) == 32 * 136 // block_size
    for name, encoded in expected.items():
        assert torch.equal(ours[f"{name}.codes"], encoded["codes"])
        assert torch.equal(ours[f"{name}.scale"], encoded["scale"])


def test_recorded_torchao_codes_decode_as_their_map_says() -> None:
    recorded, _ = read(GOLDEN / "torchao_lowbit/adamw8bit.npz")
    maps, _ = read(GOLDEN / "bnb8bit/maps.npz")
    codes, scale = recorded["state0_exp_avg_codes_step1"], recorded["state0_exp_avg_scale_step1"]
    qmap = maps["qmap_dynamic_8bit_signed_torchao"]
    value = SimpleNamespace(codes=codes, scale=scale, qmap=qmap, signed=True, shape=codes.shape)
    ours = import_torchao_state({"step": 1, "exp_avg": value, "exp_avg_sq": torch.rand(3)})
    encoded = {"codes": ours["exp_avg.codes"], "scale": ours["exp_avg.scale"]}
    assert torch.equal(decode_state(encoded, "int8", shape=codes.shape), looked_up(codes, scale, qmap, 256))
    assert ours["exp_avg_sq"].shape == (3,)


def test_what_cannot_be_converted_is_refused() -> None:
    state = bitsandbytes_state()
    with pytest.raises(ValueError, match="qmap1 is not the signed map"):
        import_bitsandbytes_state({**state, "qmap1": state["qmap2"]})
    with pytest.raises(ValueError, match="state has no tensor 'state2'"):
        import_bitsandbytes_state({"step": 1, "state1": torch.zeros(3)})
    with pytest.raises(ValueError, match="absmax2 and qmap2 are needed"):
        import_bitsandbytes_state({key: value for key, value in state.items() if key != "absmax2"})
    with pytest.raises(ValueError, match=r"scales of shape \(2,\)"):
        import_bitsandbytes_state({**state, "absmax1": state["absmax1"][:2]})
    value = SimpleNamespace(
        codes=torch.zeros(512, dtype=torch.uint8),
        scale=torch.zeros(1),
        qmap=codec.dynamic_map(True),
        signed=True,
        shape=(512,),
    )
    with pytest.raises(ValueError, match="one scale per 256 elements"):
        import_torchao_state({"step": 1, "exp_avg": value})
    with pytest.raises(ValueError, match="exp_avg must be a tensor, got int"):
        import_torchao_state({"exp_avg": 3})
