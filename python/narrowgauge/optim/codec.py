"""How optimizer states are stored in fewer bytes: the formats, and the functions that define them.

A state is cut into blocks of consecutive elements. Every element becomes a code of 8 or 4 bits, and every block keeps
a scale. Elements are consecutive in memory, whatever the strides. `encode` and `decode` are the definition; the kernels
in csrc/optim/state_codec* give the same bits, except for the powers of ``"fp8_expanded"``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from narrowgauge.ops import Sample, SampleMaker, checks, library, operator, system
from narrowgauge.ops.operator import FLOATING

BLOCK_SIZE = 256


@dataclass(frozen=True)
class StateFormat:
    """What is stored for a state.

    Attributes:
        name: The value of ``state_dtype``.
        number: The value of StateFormat in csrc/optim/state_format.h.
        codes: dtypes of the codes of a signed and of an unsigned state; the state's own dtype when it has no codes.
        block_size: How many consecutive elements share a scale; 0 when there is none.
        scale: dtype of the scales.
        scale_columns: Numbers per block. With more than one, `scale` has the shape (blocks, scale_columns).
        codes_per_byte: With 2, codes are packed into one dimension, the first element in the high half of a byte.
    """

    name: str
    number: int
    codes: tuple[torch.dtype, torch.dtype]
    block_size: int = 0
    scale: torch.dtype = torch.float32
    scale_columns: int = 1
    codes_per_byte: int = 1

    def codes_dtype(self, signed: bool) -> torch.dtype:
        return self.codes[0 if signed else 1]

    def codes_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the codes of a state of `shape`."""
        if self.codes_per_byte == 1:
            return tuple(shape)
        return (block_count(math.prod(shape), self.codes_per_byte),)

    def scale_shape(self, numel: int, block_size: int | None = None) -> tuple[int, ...]:
        """The shape of the scales of a state of `numel` elements."""
        if self.block_size == 0:
            return (0,)
        blocks = block_count(numel, block_size or self.block_size)
        return (blocks,) if self.scale_columns == 1 else (blocks, self.scale_columns)


_BYTES, _INTEGERS = (torch.uint8, torch.uint8), (torch.int8, torch.uint8)
FORMATS = {
    record.name: record
    for record in (
        StateFormat("fp32", 0, (torch.float32, torch.float32)),
        StateFormat("bf16", 1, (torch.bfloat16, torch.bfloat16)),
        StateFormat("int8", 2, _BYTES, BLOCK_SIZE),
        StateFormat("int4", 3, _BYTES, 128, codes_per_byte=2),
        StateFormat("fp8", 4, _BYTES, BLOCK_SIZE),
        StateFormat("fp8_expanded", 5, _BYTES, 128, scale_columns=3),
        StateFormat("int8_companded", 6, _INTEGERS, 32, torch.float16),
    )
}
STATE_DTYPES = tuple(FORMATS)
_NAMES = {record.number: name for name, record in FORMATS.items()}


def bytes_per_element(state_dtype: str) -> float:
    """What one element of a long state takes, its share of the scales included."""
    checks.check_choice("bytes_per_element", "state_dtype", state_dtype, STATE_DTYPES)
    record = FORMATS[state_dtype]
    size = record.codes[0].itemsize / record.codes_per_byte
    if record.block_size:
        size += record.scale_columns * record.scale.itemsize / record.block_size
    return size


# --- maps ---


@functools.cache
def dynamic_map(signed: bool, bits: int = 8) -> Tensor:
    """The sorted float32 values of a code (Dettmers et al., arXiv 2110.02861).

    With 8 bits seven decades, with 4 bits three; per decade twice as many as in the decade below, plus 0 and 1.
    """
    decades = {8: 7, 4: 3}[bits]
    values = [torch.zeros(1), torch.ones(1)]
    for decade in range(decades):
        bins = (1 if signed else 2) << decade
        # The edges of equal bins of [0.1, 1], rounded like those of a fused float32 linspace.
        tenth = torch.tensor(0.1)
        width = ((1 - tenth) / bins).double()
        bin_number = torch.arange(bins + 1, dtype=torch.float64)
        from_below, from_above = tenth.double() + width * bin_number, 1 - width * (bins - bin_number)
        edges = torch.where(bin_number < (bins + 1) // 2, from_below, from_above).float()
        centres = torch.tensor(10.0 ** (decade + 1 - decades)) * ((edges[:-1] + edges[1:]) / 2)
        values += [centres, -centres] if signed else [centres]
    return torch.cat(values).sort().values


@functools.cache
def code_map(state_dtype: str, signed: bool) -> Tensor:
    """The sorted values of the codes of ``"int8"`` and ``"int4"``; 4-bit unsigned states take k/16, k = 1 to 16."""
    if state_dtype == "int4":
        return dynamic_map(True, 4) if signed else torch.arange(1, 17) / 16
    return dynamic_map(signed)


@functools.cache
def _boundaries(state_dtype: str, signed: bool) -> Tensor:
    """Where the next code begins: the smallest floats that are not below the midpoints of neighbouring values."""
    exact = code_map(state_dtype, signed).double()
    middle = (exact[1:] + exact[:-1]) / 2
    rounded = middle.float()
    above = torch.nextafter(rounded, torch.tensor(torch.inf))
    return torch.where(rounded.double() < middle, above, rounded)


# --- blocks ---


def flat(x: Tensor) -> Tensor:
    """The elements of a dense tensor in the order of memory, as a view."""
    return x if x.dim() == 1 and x.stride(0) == 1 else x.as_strided((x.numel(),), (1,))


def block_count(numel: int, block_size: int = BLOCK_SIZE) -> int:
    """How many scales a state of `numel` elements has; the last block may be short."""
    return -(-numel // block_size)


def _blocks(x: Tensor, block_size: int) -> Tensor:
    padding = block_count(x.numel(), block_size) * block_size - x.numel()
    return torch.nn.functional.pad(x, (0, padding)).view(-1, block_size)


def _square_root(x: Tensor) -> Tensor:
    """The correctly rounded float32 square root."""
    return x.double().sqrt().float()


def _to_e4m3(x: Tensor) -> Tensor:
    """Bytes of E4M3, rounded half to even."""
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)


# --- the formats: from blocks and the largest magnitude of each to codes and scales, and back ---


def _encode_map(state_dtype: str, signed: bool, blocks: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    boundaries = _boundaries(state_dtype, signed).to(blocks.device)
    return torch.bucketize(blocks / largest.clamp_min(1e-12)[:, None], boundaries, right=True), largest


def _decode_map(state_dtype: str, signed: bool, codes: Tensor, scale: Tensor) -> Tensor:
    return code_map(state_dtype, signed).to(codes.device)[codes.long()] * scale[:, None]


def _encode_fp8(blocks: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    return _to_e4m3(blocks / (largest.clamp_min(1e-12) / 448)[:, None]), largest / 448


def _decode_fp8(codes: Tensor, scale: Tensor) -> Tensor:
    return codes.view(torch.float8_e4m3fn).float() * scale[:, None]


def _encode_expanded(blocks: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    magnitude = blocks.abs()
    smallest = torch.where(magnitude == 0, torch.inf, magnitude).amin(1)
    high = largest + 1e-30
    low = torch.minimum(smallest, largest) + 1e-30  # infinite where all are zero
    center = _square_root(high) * _square_root(low)
    fills_e4m3 = 16 * math.log2(448**2 / 2)
    exponent = (fills_e4m3 / (high / low).double().log2()).floor().clamp(1, 256) / 16
    scale = ((high / center).double().pow(exponent) / 448).float()
    y = (magnitude / center[:, None]).double().pow(exponent[:, None]).float() / scale[:, None]
    codes = torch.where(magnitude == 0, 0, _to_e4m3(torch.where(blocks < 0, -y, y)))
    scales = torch.stack((scale, exponent.float(), center), 1)
    return codes, torch.where(largest[:, None] == 0, 0, scales)


def _decode_expanded(codes: Tensor, scales: Tensor) -> Tensor:
    scale, exponent, center = scales.unsqueeze(1).unbind(2)
    y = codes.view(torch.float8_e4m3fn).float() * scale
    magnitude = (y.abs().double().pow(1 / exponent.double()) * center.double()).float()
    return torch.where(y == 0, 0, torch.where(y < 0, -magnitude, magnitude))


def _encode_companded(signed: bool, blocks: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    if not signed:
        root = _square_root(largest)
        y = 255 * (_square_root(blocks.clamp_min(0)) / root.clamp_min(1e-12)[:, None])
        return (y + 0.5).floor(), root.half()
    n = blocks / largest.clamp_min(1e-12)[:, None]
    return (127 * (2 * n / (1 + n.abs())) + 0.5).floor(), largest.half()


def _decode_companded(signed: bool, codes: Tensor, scale: Tensor) -> Tensor:
    code, scale = codes.float(), scale.float()[:, None]
    if not signed:
        root = code / 255 * scale
        return root * root
    return code / (254 - code.abs()) * scale


_ENCODE: dict[str, Callable[[bool, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "int8": functools.partial(_encode_map, "int8"),
    "int4": functools.partial(_encode_map, "int4"),
    "fp8": lambda _, blocks, largest: _encode_fp8(blocks, largest),
    "fp8_expanded": lambda _, blocks, largest: _encode_expanded(blocks, largest),
    "int8_companded": _encode_companded,
}
_DECODE: dict[str, Callable[[bool, Tensor, Tensor], Tensor]] = {
    "int8": functools.partial(_decode_map, "int8"),
    "int4": functools.partial(_decode_map, "int4"),
    "fp8": lambda _, codes, scale: _decode_fp8(codes, scale),
    "fp8_expanded": lambda _, codes, scale: _decode_expanded(codes, scale),
    "int8_companded": _decode_companded,
}


def encode(x: Tensor, state_dtype: str, signed: bool, block_size: int | None = None) -> tuple[Tensor, Tensor]:
    """The definition: codes and scales of the elements of a one-dimensional tensor."""
    record = FORMATS[state_dtype]
    if record.block_size == 0:
        return x.to(record.codes[0], copy=True), x.new_empty(0, dtype=record.scale)
    blocks = _blocks(x.float(), block_size or record.block_size)
    largest = blocks.abs().amax(1)
    codes, scale = _ENCODE[state_dtype](signed, blocks, largest)
    # A NaN or an infinity, or a scale beyond the range of its dtype: all of the block decodes to NaN.
    finite = largest.isfinite() & scale.view(-1, record.scale_columns).isfinite().all(1)
    codes = torch.where(finite[:, None], codes, 0).to(record.codes_dtype(signed)).flatten()[: x.numel()]
    if record.codes_per_byte == 2:
        high, low = torch.nn.functional.pad(codes, (0, x.numel() % 2)).view(-1, 2).unbind(1)
        codes = high << 4 | low
    scale = torch.where(finite if scale.dim() == 1 else finite[:, None], scale, torch.nan)
    return codes.contiguous(), scale


def decode(
    codes: Tensor, scale: Tensor, state_dtype: str, signed: bool, numel: int, block_size: int | None = None
) -> Tensor:
    """The definition: the float32 numbers that codes and scales stand for, in one dimension."""
    record = FORMATS[state_dtype]
    codes = codes.reshape(-1)
    if record.block_size == 0:
        return codes.to(torch.float32, copy=True)
    if record.codes_per_byte == 2:
        codes = torch.stack((codes >> 4, codes & 15), 1).flatten()[:numel]
    blocks = _blocks(codes, block_size or record.block_size)
    return _DECODE[state_dtype](signed, blocks, scale).flatten()[:numel].contiguous()


# --- operators: the same with kernels, for the block sizes above ---


def _samples(make: SampleMaker, formats: tuple[str, ...]) -> Iterator[tuple[Tensor, str, bool, str]]:
    for name in formats:
        for signed in (True, False):
            kind = f"{name}, {'signed' if signed else 'unsigned'}"
            shapes: list[tuple[tuple[int, ...], str]] = [((1023,), "an odd number of elements")]
            if signed:
                shapes += [((0,), "empty"), ((), "a scalar"), ((255,), "one short of a block")]
                shapes += [((5, 257), "longer than some blocks")]
            for size, why in shapes:
                x = make(*size)
                yield x if signed else x.square(), name, signed, f"{kind}: {why}"
            x = make(16, 64)
            x[0, 3], x[2, 63] = torch.nan, torch.inf
            x[4:12] = 0
            yield (
                x if signed else x.abs(),
                name,
                signed,
                f"{kind}: blocks of zeros and blocks that are not finite",
            )
            yield make(300, scale=1e-17), name, signed, f"{kind}: magnitudes below the smallest divisor"
            yield make(300, scale=1e5), name, signed, f"{kind}: large and negative numbers"


EXACT = ("bf16", "int8", "int4", "fp8", "int8_companded")


def _encode_samples(make: SampleMaker) -> Iterator[Sample]:
    for x, name, signed, why in _samples(make, EXACT):
        yield Sample((x, FORMATS[name].number, signed), why)


def _decode_samples(make: SampleMaker) -> Iterator[Sample]:
    for x, name, signed, why in _samples(make, EXACT):
        codes, scale = encode(x.flatten(), name, signed)
        codes = codes.view(FORMATS[name].codes_shape(x.shape))
        yield Sample((codes, scale, FORMATS[name].number, signed, list(x.shape)), why)
    for name in EXACT:
        if FORMATS[name].codes_per_byte == 1 and FORMATS[name].block_size:
            codes = torch.arange(256, device=make.device).to(torch.uint8).view(FORMATS[name].codes[0])
            scale = make(*FORMATS[name].scale_shape(256), dtype=FORMATS[name].scale)
            yield Sample((codes, scale, FORMATS[name].number, True, [256]), f"{name}: every code")


@operator(
    "state_encode(Tensor x, int format, bool is_signed) -> (Tensor codes, Tensor scale)",
    samples=_encode_samples,
    dtypes=FLOATING,
    tolerance="exact",
)
def state_encode(x: Tensor, format: int, is_signed: bool) -> tuple[Tensor, Tensor]:
    codes, scale = encode(x.flatten(), _NAMES[format], is_signed)
    return codes.view(FORMATS[_NAMES[format]].codes_shape(x.shape)), scale


@operator(
    "state_decode(Tensor codes, Tensor scale, int format, bool is_signed, int[] shape) -> Tensor",
    samples=_decode_samples,
    dtypes=(torch.float32,),
    tolerance="exact",
)
def state_decode(codes: Tensor, scale: Tensor, format: int, is_signed: bool, shape: Sequence[int]) -> Tensor:
    return decode(codes, scale, _NAMES[format], is_signed, math.prod(shape)).view(list(shape))


def _fake_encode(x: Tensor, format: int, is_signed: bool) -> tuple[Tensor, Tensor]:
    record = FORMATS[_NAMES[format]]
    return (
        x.new_empty(record.codes_shape(x.shape), dtype=record.codes_dtype(is_signed)),
        x.new_empty(record.scale_shape(x.numel()), dtype=record.scale),
    )


torch.library.register_fake("narrowgauge::state_encode", _fake_encode, lib=library._library)
torch.library.register_fake(
    "narrowgauge::state_decode",
    lambda codes, scale, format, is_signed, shape: codes.new_empty(list(shape), dtype=torch.float32),
    lib=library._library,
)


# --- the public functions ---


def _check_format(function: str, state_dtype: str, block_size: int | None) -> StateFormat:
    checks.check_choice(function, "state_dtype", state_dtype, STATE_DTYPES)
    record = FORMATS[state_dtype]
    if block_size is not None:
        if record.block_size == 0:
            raise ValueError(
                f"{function}: {state_dtype!r} has no blocks; leave block_size out, got {block_size!r}"
            )
        if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
            raise ValueError(f"{function}: block_size must be a positive integer, got {block_size!r}")
    return record


@torch.no_grad()
def encode_state(
    x: Tensor, state_dtype: str, *, signed: bool = True, block_size: int | None = None
) -> dict[str, Tensor]:
    """Stores a state in fewer bytes.

    A block that holds a NaN or an infinity gets the scale NaN and codes 0, so all of it decodes to NaN.

    Args:
        x: The state: floating point, any shape and layout. Blocks follow each other in the order of memory.
        state_dtype: ``"fp32"``, ``"bf16"``, ``"int8"``, ``"int4"``, ``"fp8"``, ``"fp8_expanded"`` or
            ``"int8_companded"``.
        signed: Whether the state has negative numbers, like a first moment. A second moment has none.
        block_size: Elements per scale; by default 256, 128 for ``"int4"`` and ``"fp8_expanded"``, 32 for
            ``"int8_companded"``. Other sizes run in PyTorch.

    Returns:
        ``{"value": ...}`` for ``"fp32"`` and ``"bf16"``. Otherwise ``"codes"``, shaped and laid out like `x`
        (``"int4"``: one dimension of uint8, two codes per byte, the first in the high half), and ``"scale"``, one
        number per block (``"fp8_expanded"``: three, the columns scale, exponent and center; ``"int8_companded"``:
        float16).

    Raises:
        TypeError: `x` is not a floating-point tensor.
        ValueError: Unknown `state_dtype`, or a `block_size` that is not a positive integer.
    """
    record = _check_format("encode_state", state_dtype, block_size)
    checks.check_floating("encode_state", x=x)
    x = x.detach()
    if record.block_size == 0:
        return {"value": x.to(record.codes[0], copy=True)}
    if not x.is_contiguous():
        x = torch.empty_like(x).copy_(x)  # dense, in the same order where x was dense
    if block_size in (None, record.block_size):
        codes, scale = state_encode(flat(x), record.number, signed)
    else:
        codes, scale = encode(flat(x), state_dtype, signed, block_size)
    return {
        "codes": codes if record.codes_per_byte == 2 else codes.as_strided(x.shape, x.stride()),
        "scale": scale,
    }


def _check_part(encoded: Mapping[str, Any], name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    part = encoded.get(name)
    if not isinstance(part, Tensor):
        raise ValueError(f"decode_state: encoded must have a tensor {name!r}, got the keys {sorted(encoded)}")
    if tuple(part.shape) != shape or part.dtype is not dtype:
        raise ValueError(
            f"decode_state: {name} must be {dtype} of shape {shape}, got {part.dtype} of shape {tuple(part.shape)}"
        )
    return part


@torch.no_grad()
def decode_state(
    encoded: Mapping[str, Tensor],
    state_dtype: str,
    *,
    signed: bool = True,
    shape: Sequence[int],
    block_size: int | None = None,
) -> Tensor:
    """The float32 state that `encode_state` stored.

    Args:
        encoded: What `encode_state` returned.
        state_dtype, signed, block_size: As given to `encode_state`.
        shape: Shape of the state.

    Returns:
        A float32 tensor of `shape`, laid out like the codes (``"int4"``: contiguous).

    Raises:
        ValueError: A tensor is missing, or its shape or dtype does not fit the others.
    """
    record = _check_format("decode_state", state_dtype, block_size)
    shape, numel = tuple(shape), math.prod(shape)
    if record.block_size == 0:
        return _check_part(encoded, "value", shape, record.codes[0]).to(torch.float32, copy=True)
    codes = _check_part(encoded, "codes", record.codes_shape(shape), record.codes_dtype(signed))
    scale = _check_part(encoded, "scale", record.scale_shape(numel, block_size), record.scale).contiguous()
    checks.check_same_device("decode_state", "codes", codes, scale=scale)
    if not codes.is_contiguous():
        codes = torch.empty_like(codes).copy_(codes)
    if block_size in (None, record.block_size):
        values = state_decode(flat(codes), scale, record.number, signed, [numel])
    else:
        values = decode(flat(codes), scale, state_dtype, signed, numel, block_size)
    return values.view(shape) if record.codes_per_byte == 2 else values.as_strided(shape, codes.stride())


system(
    "state_formats",
    title="Narrow states and parameters",
    source="arXiv 2110.02861, 2410.19313, 2602.23349",
    page="optim/state_formats.md",
    functions=(
        "optim.encode_state",
        "optim.decode_state",
        "optim.split_master",
        "optim.join_master",
        "optim.kahan_add",
        "optim.bf16_stochastic_round",
        "optim.import_bitsandbytes_state",
        "optim.import_torchao_state",
    ),
    operators=("state_encode", "state_decode"),
    golden=("bnb8bit", "torchao_lowbit", "coat_fp8", "flashoptim", "bf16_stochastic_rounding"),
    bench=("state_encode", "state_decode"),
    reasons={"module": "functions: the optimizers take the format by name"},
)
