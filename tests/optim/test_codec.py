"""How states are stored: recorded codes, every float near a boundary, special blocks, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.backends import all_backends, native_backends
from tests.golden_files import GOLDEN, files, read
from tests.tolerances import assert_same_bits, assert_within_one_code
from torch import Tensor

import narrowgauge as ng
from narrowgauge.optim import codec
from narrowgauge.optim.codec import FORMATS, decode_state, encode_state, state_decode, state_encode

CODED = [name for name, record in FORMATS.items() if record.block_size]
MAPS = ["int8", "int4"]
SIGNS = [pytest.param(True, id="signed"), pytest.param(False, id="unsigned")]


def unpacked(codes: Tensor, state_dtype: str) -> Tensor:
    if FORMATS[state_dtype].codes_per_byte == 1:
        return codes.flatten()
    return torch.stack((codes >> 4, codes & 15), 1).flatten()


def encoded(run: Any, x: Tensor, state_dtype: str, signed: bool) -> tuple[Tensor, Tensor]:
    codes, scale = run(state_encode, x, FORMATS[state_dtype].number, signed)
    return codes, scale


def decoded(
    run: Any, codes: Tensor, scale: Tensor, state_dtype: str, signed: bool, shape: list[int]
) -> Tensor:
    (values,) = run(state_decode, codes, scale, FORMATS[state_dtype].number, signed, shape)
    return values


# --- recorded numbers ---


def test_maps_are_those_of_bitsandbytes_and_torchao() -> None:
    recorded, _ = read(GOLDEN / "bnb8bit/maps.npz")
    for signed, word in ((True, "signed"), (False, "unsigned")):
        assert torch.equal(codec.dynamic_map(signed), recorded[f"qmap_{word}"])
        assert torch.equal(codec.code_map("int8", signed), recorded[f"qmap_dynamic_8bit_{word}_torchao"])
    assert torch.equal(codec.code_map("int4", True), recorded["qmap_dynamic_4bit_signed_torchao"])
    assert torch.equal(codec.code_map("int4", False), recorded["qmap_4bit_unsigned_torchao"])


@pytest.mark.parametrize("path", files("bnb8bit", "quant_*.npz"), ids=lambda path: path.stem)
def test_near_what_bitsandbytes_stores(path: Any) -> None:
    recorded, meta = read(path)
    x, signed, block_size = recorded["in_x"], meta["map"] == "signed", meta["blocksize"]
    if not torch.equal(recorded["code"], codec.dynamic_map(signed)):
        pytest.skip("another map")
    state = encode_state(x, "int8", signed=signed, block_size=block_size)
    assert torch.equal(state["scale"], recorded["out_absmax"])
    values = decode_state(state, "int8", signed=signed, shape=x.shape, block_size=block_size)
    scale = state["scale"].repeat_interleave(block_size)[: x.numel()]
    gaps = codec.dynamic_map(signed).diff()
    gap = torch.maximum(
        gaps[state["codes"].long().clamp(max=254)], gaps[(state["codes"].long() - 1).clamp(min=0)]
    )
    assert ((recorded["out_dequant"] - values).abs() <= (gap + 3.1e-5) * scale * (1 + 1e-6)).all()
    # Ours is the nearest, theirs need not be.
    assert ((values - x).abs() <= (recorded["out_dequant"] - x).abs() + 1e-6 * scale).all()


@pytest.mark.parametrize("path", files("torchao_lowbit", "adam*.npz"), ids=lambda path: path.stem)
def test_stores_the_codes_of_torchao(path: Any) -> None:
    """Each step from the recorded states before it: AdamW's moments in float32, then the codes."""
    recorded, meta = read(path)
    if "state0_exp_avg_codes_step1" not in recorded:
        pytest.skip("too small to be quantized")
    state_dtype = "fp8" if "fp8" in path.stem.lower() else "int4" if "4bit" in path.stem else "int8"
    hyperparameters = meta["hyperparameters"]
    beta1, beta2 = hyperparameters.get("betas", (0.9, 0.999))
    before = [torch.zeros_like(recorded["param0_0"])] * 2
    p = recorded["param0_0"]
    for step in range(1, meta["steps"] + 1):
        g = recorded[f"grad0_step{step}"]
        if "AdamW" not in meta["source"]:  # Adam's weight decay is added to the gradient
            g = g + hyperparameters.get("weight_decay", 0) * p
        moments = [
            before[0] + (1 - beta1) * (g - before[0]),
            before[1] + (1 - beta2) * (g * g - before[1]),
        ]
        for k, name in enumerate(("exp_avg", "exp_avg_sq")):
            state = encode_state(moments[k], state_dtype, signed=k == 0)
            codes = recorded[f"state0_{name}_codes_step{step}"].view(state["codes"].shape)
            scale = recorded[f"state0_{name}_scale_step{step}"]
            assert torch.equal(state["codes"], codes), (step, name)
            torch.testing.assert_close(state["scale"], scale, rtol=2e-7, atol=0)
            theirs = {"codes": codes, "scale": scale}
            before[k] = decode_state(theirs, state_dtype, signed=k == 0, shape=p.shape)
        p = recorded[f"param0_step{step}"]


@pytest.mark.parametrize("path", files("coat_fp8"), ids=lambda path: path.stem)
def test_expanded_states_are_those_recorded(path: Any) -> None:
    recorded, _ = read(path)
    x = recorded["in_x"]
    state = encode_state(x, "fp8_expanded", signed=bool((x < 0).any()))
    assert_within_one_code(state["codes"], recorded["out_codes"])
    assert (state["codes"] == recorded["out_codes"]).double().mean() > 0.99
    scales = torch.stack([recorded[f"out_{name}"] for name in ("scale", "exponent", "center")], 1)
    torch.testing.assert_close(state["scale"], scales, rtol=3e-6, atol=0)
    theirs = {"codes": recorded["out_codes"], "scale": scales}
    values = decode_state(theirs, "fp8_expanded", shape=x.shape)
    torch.testing.assert_close(values.double(), recorded["out_dequant"], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "path",
    [path for path in files("flashoptim") if "split" not in path.stem],
    ids=lambda path: path.stem,
)
def test_companded_states_are_those_recorded(path: Any) -> None:
    recorded, meta = read(path)
    x, signed = recorded["in_x"], meta.get("signed", True)
    state = encode_state(x, "int8_companded", signed=signed)
    assert torch.equal(state["codes"], recorded["out_codes"])
    assert torch.equal(state["scale"], recorded["out_scale_fp16"])
    values = decode_state(state, "int8_companded", signed=signed, shape=x.shape)
    torch.testing.assert_close(values, recorded["out_dequant"].float(), rtol=1e-6, atol=0)


# --- nearest ---


def nearest(x: Tensor, values: Tensor) -> Tensor:
    """The index of the nearest value by exhaustive search in float64, the upper one of two equally near."""
    distance = (x.double()[:, None] - values.double()).abs()
    return (len(values) - 1 - distance.flip(1).argmin(1)).to(torch.uint8)


def hard_values(values: Tensor, block_size: int) -> Tensor:
    """Map entries, midpoints, and the floats around both, in blocks that each contain 1."""
    exact, low = values.double(), -1.0 if values[0] < 0 else 0.0
    corners = torch.cat([exact, (exact[1:] + exact[:-1]) / 2]).float()
    parts = [corners]
    for direction in (-2.0, 2.0):
        shifted = corners
        for _ in range(3):
            shifted = torch.nextafter(shifted, torch.tensor(direction))
            parts.append(shifted)
    parts.append(torch.logspace(-30, 0, 2000) * (torch.randn(2000).sign() if low else 1))
    x = torch.cat(parts).clamp(low, 1)
    x = torch.nn.functional.pad(x, (0, -len(x) % (block_size - 1))).view(-1, block_size - 1)
    return torch.cat([torch.ones(len(x), 1), x], 1).flatten()


@pytest.mark.parametrize("run", all_backends())
@pytest.mark.parametrize("signed", SIGNS)
@pytest.mark.parametrize("state_dtype", MAPS)
def test_maps_give_the_nearest_value(state_dtype: str, signed: bool, run: Any) -> None:
    values = codec.code_map(state_dtype, signed)
    x = hard_values(values, FORMATS[state_dtype].block_size)
    codes, scale = encoded(run, x, state_dtype, signed)
    assert torch.equal(scale, torch.ones_like(scale))
    assert torch.equal(unpacked(codes, state_dtype)[: len(x)], nearest(x, values))


def test_fp8_gives_the_nearest_value() -> None:
    values = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).double()
    values = values[values.isfinite()]
    x = torch.randn(4, 256)
    state = encode_state(x, "fp8")
    scale = x.abs().amax(1, keepdim=True).double() / 448
    gap = (x.double()[..., None] - values * scale[..., None]).abs().amin(-1)
    error = (decode_state(state, "fp8", shape=x.shape).double() - x.double()).abs()
    assert (error <= gap + 2e-7 * x.abs()).all()


@pytest.mark.parametrize("signed", SIGNS)
def test_companding_rounds_to_the_nearest_step(signed: bool) -> None:
    x = torch.randn(8, 32).double()
    x = x if signed else x.square()
    state = encode_state(x, "int8_companded", signed=signed)
    if signed:
        n = x / x.abs().amax(1, keepdim=True)
        share, steps = 2 * n / (1 + n.abs()), 127
    else:
        share, steps = (x / x.amax(1, keepdim=True)).sqrt(), 255
    assert ((state["codes"].double() - steps * share).abs() <= 0.5 + 1e-4).all()


@pytest.mark.parametrize("run", all_backends())
@pytest.mark.parametrize("signed", SIGNS)
@pytest.mark.parametrize("state_dtype", [name for name in CODED if name != "fp8_expanded"])
def test_codes_survive_a_round_trip(state_dtype: str, signed: bool, run: Any) -> None:
    """Every code, in blocks that attain their largest magnitude."""
    record = FORMATS[state_dtype]
    if state_dtype in MAPS:
        top = len(codec.code_map(state_dtype, signed)) - 1
        every = torch.arange(top + 1).to(torch.uint8)
    elif state_dtype == "fp8":
        every, top = torch.cat([torch.arange(127), torch.arange(128, 255)]).to(torch.uint8), 126
    else:
        every = torch.arange(-127, 128).to(torch.int8) if signed else torch.arange(256).to(torch.uint8)
        top = 127 if signed else 255
    filled = torch.nn.functional.pad(every, (0, -len(every) % (record.block_size - 1)))
    codes = torch.nn.functional.pad(filled.view(-1, record.block_size - 1), (1, 0), value=top).flatten()
    stored = codes[0::2] << 4 | codes[1::2] if record.codes_per_byte == 2 else codes
    scale = torch.full(record.scale_shape(len(codes)), 0.375, dtype=record.scale)
    x = decoded(run, stored, scale, state_dtype, signed, [len(codes)])
    again, new_scale = encoded(run, x, state_dtype, signed)
    assert torch.equal(new_scale, scale)
    assert torch.equal(again, stored)


# --- special blocks ---


@pytest.mark.parametrize("run", all_backends())
@pytest.mark.parametrize("signed", SIGNS)
@pytest.mark.parametrize("state_dtype", CODED)
def test_blocks_of_zeros_and_blocks_that_are_not_finite(state_dtype: str, signed: bool, run: Any) -> None:
    block = FORMATS[state_dtype].block_size
    x = torch.rand(5 * 256 + 7) + 0.5
    x[3], x[256 + block - 1], x[-1] = torch.nan, torch.inf, torch.nan
    if signed:
        x[256 + block - 1] = -torch.inf
    x[512:768] = 0
    codes, scale = encoded(run, x, state_dtype, signed)
    per_chunk = 256 // block
    not_finite = torch.zeros(len(scale), dtype=torch.bool)
    not_finite[[0, per_chunk, -1]] = True
    assert torch.equal(scale.isnan().view(len(scale), -1).any(1), not_finite)
    assert torch.equal(scale.isnan().view(len(scale), -1).all(1), not_finite)
    assert (scale[2 * per_chunk : 3 * per_chunk] == 0).all()
    elements = not_finite.repeat_interleave(block)[: len(x)]
    assert (unpacked(codes, state_dtype)[: len(x)][elements] == 0).all()
    values = decoded(run, codes, scale, state_dtype, signed, [len(x)])
    assert torch.equal(values.isnan(), elements)
    assert (values[512:768] == 0).all()


@pytest.mark.parametrize("run", all_backends())
@pytest.mark.parametrize("signed", SIGNS)
@pytest.mark.parametrize("state_dtype", CODED)
def test_a_new_state_of_zeros_decodes_to_zero(state_dtype: str, signed: bool, run: Any) -> None:
    record = FORMATS[state_dtype]
    codes = torch.zeros(record.codes_shape((3, 101)), dtype=record.codes_dtype(signed))
    scale = torch.zeros(record.scale_shape(303), dtype=record.scale)
    values = decoded(run, codes, scale, state_dtype, signed, [3, 101])
    assert torch.equal(values, torch.zeros(3, 101))


@pytest.mark.parametrize("state_dtype", CODED)
def test_tiny_blocks_keep_their_scale(state_dtype: str) -> None:
    scale = encode_state(torch.full((256,), 1e-15), state_dtype)["scale"].float()
    expected = {"fp8": 1e-15 / 448, "int8_companded": 0.0}.get(state_dtype, 1e-15)
    actual = (
        scale[:, 2] if state_dtype == "fp8_expanded" else scale
    )  # the center of equal numbers is that number
    torch.testing.assert_close(actual, torch.full_like(actual, expected), rtol=1e-6, atol=0)


def test_a_scale_beyond_float16_is_not_stored_as_a_number() -> None:
    for signed, largest in ((True, 65519.99), (False, 65519.99**2)):
        x = torch.tensor(
            [largest, torch.nextafter(torch.tensor(largest), torch.tensor(torch.inf)) * 1.000001]
        )
        state = encode_state(x.repeat_interleave(32), "int8_companded", signed=signed)
        assert state["scale"][0] == 65504
        assert state["scale"][1].isnan()


# --- powers ---


def expanded_in_float64(x: Tensor) -> tuple[Tensor, Tensor]:
    """Exponents and codes of groups of 128, straight from the formulas; the range is rounded to float32."""
    groups = x.view(-1, 128).abs()
    high = groups.amax(1) + 1e-30
    low = torch.where(groups == 0, torch.inf, groups).amin(1) + 1e-30
    steps = 16 * torch.log2(torch.tensor(448.0**2 / 2).double()) / (high / low).double().log2()
    groups, high, low = groups.double(), high.double(), low.double()
    k = (steps.floor().clamp(1, 256) / 16)[:, None]
    center = (high.sqrt() * low.sqrt())[:, None]
    scale = (high[:, None] / center) ** k / 448
    y = (groups / center) ** k / scale * x.double().view(-1, 128).sign()
    codes = y.float().clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    return k.flatten().float(), codes.flatten()


@pytest.mark.parametrize("run", all_backends())
def test_expanded_codes_are_those_of_float64(run: Any) -> None:
    torch.manual_seed(0)
    groups = 800
    spread = torch.linspace(0.001, 12, groups)[:, None]
    x = (torch.randn(groups, 128).sign() * (spread * torch.randn(groups, 128)).exp() * 1e-4).flatten()
    x[::17] = 0
    codes, scales = encoded(run, x, "fp8_expanded", True)
    exponents, expected = expanded_in_float64(x)
    assert torch.equal(scales[:, 1], exponents)
    assert_within_one_code(codes, expected)
    assert (codes != expected).sum() <= 1  # of 102400
    values = decoded(run, codes, scales, "fp8_expanded", True, [len(x)])
    scale, exponent, center = scales.double().repeat_interleave(128, 0).unbind(1)
    y = codes.view(torch.float8_e4m3fn).double() * scale
    truth = y.sign() * y.abs() ** (1 / exponent) * center
    torch.testing.assert_close(values.double(), truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize("run", native_backends())
def test_expanded_exponents_where_they_change(run: Any) -> None:
    """Groups whose range lies beside the one that belongs to a whole number of sixteenths."""
    steps = torch.arange(3, 257).double()
    edges = ((448.0**2 / 2) ** (16 / steps)).float()
    edges = edges[edges.isfinite() & (edges < 1e30)]
    tops = torch.cat([edges, edges.nextafter(torch.tensor(0.0)), edges.nextafter(torch.tensor(torch.inf))])
    x = torch.ones(len(tops), 128)
    x[:, 5] = tops
    _, scales = encoded(run, x, "fp8_expanded", False)
    exponents, _ = expanded_in_float64(x)
    assert torch.equal(scales[:, 1], exponents)


@pytest.mark.parametrize("run", all_backends())
def test_expanded_groups_that_are_hard(run: Any) -> None:
    equal, single, mostly_zero = torch.full((128,), -3e-5), torch.tensor([7e-9]), torch.zeros(128)
    mostly_zero[77] = 2.5
    x = torch.cat([equal, mostly_zero, single])
    codes, scales = encoded(run, x, "fp8_expanded", True)
    assert (scales[:, 1] == 16).all()
    values = decoded(run, codes, scales, "fp8_expanded", True, [len(x)])
    torch.testing.assert_close(values, x, rtol=1e-6, atol=0)


# --- the public functions ---


@pytest.mark.parametrize("state_dtype", list(FORMATS))
def test_any_layout_and_dtype(state_dtype: str) -> None:
    x = torch.randn(4, 3, 16, 6).to(memory_format=torch.channels_last)
    state = encode_state(x, state_dtype)
    expected = encode_state(x.permute(0, 2, 3, 1).reshape(-1), state_dtype)
    values = decode_state(state, state_dtype, shape=x.shape)
    flat_values = decode_state(expected, state_dtype, shape=[x.numel()])
    if state_dtype == "int4":
        assert torch.equal(state["codes"], expected["codes"])
        assert torch.equal(values.flatten(), flat_values)
    else:
        assert next(iter(state.values())).stride() == values.stride() == x.stride()
        assert torch.equal(values.permute(0, 2, 3, 1).reshape(-1), flat_values)
    assert state.get("scale") is None or torch.equal(state["scale"], expected["scale"])
    with_gaps = torch.randn(300, 2)[:, 0]
    for a, b in zip(
        encode_state(with_gaps, state_dtype).values(),
        encode_state(with_gaps.clone(), state_dtype).values(),
        strict=True,
    ):
        assert_same_bits(a, b)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        narrow = torch.randn(300).to(dtype)
        for a, b in zip(
            encode_state(narrow, state_dtype).values(),
            encode_state(narrow.float(), state_dtype).values(),
            strict=True,
        ):
            assert_same_bits(a, b)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (7, 3)])
@pytest.mark.parametrize("state_dtype", list(FORMATS))
def test_small_shapes(state_dtype: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    state = encode_state(x, state_dtype)
    values = decode_state(state, state_dtype, shape=shape)
    assert values.shape == x.shape
    assert values.dtype is torch.float32
    tolerance = {"fp32": 0.0, "bf16": 0.01, "int4": 0.2}.get(state_dtype, 0.07)
    assert x.numel() == 0 or (values - x).abs().max() <= tolerance * x.abs().max()


@pytest.mark.parametrize("state_dtype", list(FORMATS))
def test_bytes(state_dtype: str) -> None:
    x = torch.randn(256 * 64)
    for signed in (True, False):
        state = encode_state(x.abs(), state_dtype, signed=signed)
        assert sum(part.nbytes for part in state.values()) == codec.bytes_per_element(state_dtype) * x.numel()


@pytest.mark.parametrize("state_dtype", CODED)
def test_other_block_sizes(state_dtype: str) -> None:
    x = torch.randn(100) * torch.logspace(-4, 0, 100)
    state = encode_state(x, state_dtype, block_size=10)
    assert len(state["scale"]) == 10
    values = decode_state(state, state_dtype, shape=[100], block_size=10)
    for begin in range(0, 100, 10):
        part = x[begin : begin + 10]
        alone = decode_state(encode_state(part, state_dtype), state_dtype, shape=[10])
        torch.testing.assert_close(values[begin : begin + 10], alone, rtol=1e-5, atol=0)


def test_wrong_arguments() -> None:
    x = torch.zeros(300)
    with pytest.raises(ValueError, match="state_dtype must be one of 'fp32', 'bf16', 'int8'"):
        encode_state(x, "int3")
    with pytest.raises(TypeError, match=r"x has dtype torch\.int64"):
        encode_state(x.long(), "int8")
    with pytest.raises(ValueError, match="block_size must be a positive integer, got 0"):
        encode_state(x, "int8", block_size=0)
    with pytest.raises(ValueError, match="'bf16' has no blocks"):
        encode_state(x, "bf16", block_size=64)
    state = encode_state(x, "int8")
    with pytest.raises(ValueError, match=r"codes must be torch\.uint8 of shape \(299,\), got"):
        decode_state(state, "int8", shape=[299])
    with pytest.raises(ValueError, match=r"scale must be torch\.float32 of shape \(3,\)"):
        decode_state(state, "int8", shape=[300], block_size=128)
    with pytest.raises(ValueError, match="encoded must have a tensor 'scale'"):
        decode_state({"codes": state["codes"]}, "int8", shape=[300])
    with pytest.raises(ValueError, match=r"codes must be torch\.int8"):
        decode_state(state, "int8_companded", shape=[300])


def test_the_operators_refuse_wrong_tensors() -> None:
    if not ng.ops.library.state.cpu.loaded:
        pytest.skip("the reference does not check")
    x = torch.zeros(300)
    with pytest.raises(RuntimeError, match="format must be 1 to 6"):
        torch.ops.narrowgauge.state_encode(x, 7, True)
    codes, scale = torch.ops.narrowgauge.state_encode(x, 2, True)
    with pytest.raises(RuntimeError, match="codes must be uint8"):
        torch.ops.narrowgauge.state_decode(codes, scale, 2, True, [301])
    with pytest.raises(RuntimeError, match="scale must be float32"):
        torch.ops.narrowgauge.state_decode(codes, scale[:1], 2, True, [300])
