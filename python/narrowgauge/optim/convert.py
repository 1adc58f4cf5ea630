"""Quantized states of other libraries in this one's keys: the codes are the same, so nothing is rounded again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from narrowgauge.optim import codec

MOMENTS = ("exp_avg", "exp_avg_sq")


def _step(step: Any) -> Tensor:
    return torch.as_tensor(step).detach().to(torch.float32).reshape(()).clone()


def _check_map(function: str, where: str, qmap: Tensor, state_dtype: str, signed: bool) -> None:
    ours = codec.code_map(state_dtype, signed)
    if qmap.shape != ours.shape or not torch.equal(qmap.detach().float().cpu(), ours):
        raise ValueError(
            f"{function}: {where} is not the {'signed' if signed else 'unsigned'} map of state_dtype={state_dtype!r}; "
            "decode the state with the library it came from and use encode_state"
        )


def _check_blocks(
    function: str, where: str, codes: Tensor, scale: Tensor, shape: Sequence[int], state_dtype: str
) -> None:
    record = codec.FORMATS[state_dtype]
    numel = torch.Size(shape).numel()
    found = (tuple(codes.shape), codes.dtype, tuple(scale.shape))
    expected = (record.codes_shape(shape), torch.uint8, record.scale_shape(numel))
    if found != expected:
        raise ValueError(
            f"{function}: {where} has codes of shape {found[0]} ({found[1]}) and scales of shape {found[2]}; "
            f"expected {expected[0]} ({expected[1]}) and {expected[2]}, one scale per {record.block_size} elements"
        )


def import_bitsandbytes_state(state: Mapping[str, Any], names: Sequence[str] = MOMENTS) -> dict[str, Tensor]:
    """The state of one parameter of a bitsandbytes optimizer, ready for ``state_dict_to_load["state"][i]``.

    Args:
        state: A value of ``state_dict()["state"]``: ``step``, ``state1``, ``state2`` and, where they are 8-bit,
            ``absmax1``, ``qmap1``, ``absmax2``, ``qmap2``. Scales of older releases, one per 2048 elements, are
            repeated for blocks of 256.
        names: What `state1` and `state2` are called here. One name for optimizers with one state.

    Returns:
        ``step``, and ``exp_avg.codes`` and ``exp_avg.scale`` (or ``exp_avg`` when the state is float32), ...

    Raises:
        ValueError: A tensor is missing, the map is not the dynamic one, or the number of scales fits no block size.
    """
    function = "import_bitsandbytes_state"
    result = {"step": _step(state.get("step", 0))}
    for number, name in enumerate(names, 1):
        codes = state.get(f"state{number}")
        if not isinstance(codes, Tensor):
            raise ValueError(f"{function}: state has no tensor 'state{number}', its keys are {sorted(state)}")
        absmax, qmap = state.get(f"absmax{number}"), state.get(f"qmap{number}")
        if codes.is_floating_point():
            result[name] = codes.detach().float().clone()
            continue
        if not isinstance(absmax, Tensor) or not isinstance(qmap, Tensor):
            raise ValueError(
                f"{function}: state{number} is 8-bit, so absmax{number} and qmap{number} are needed"
            )
        _check_map(function, f"qmap{number}", qmap, "int8", signed=number == 1)
        scale = absmax.detach().float().clone()
        blocks = codec.block_count(codes.numel())
        if len(scale) != blocks and len(scale) == codec.block_count(codes.numel(), 2048):
            scale = scale.repeat_interleave(8)[:blocks].clone()
        _check_blocks(function, f"state{number}", codes, scale, codes.shape, "int8")
        result |= {f"{name}.codes": codes.detach().clone(), f"{name}.scale": scale}
    return result


def import_torchao_state(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state of one parameter of a torchao low-bit optimizer, ready for ``state_dict_to_load["state"][i]``.

    Args:
        state: A value of ``state_dict()["state"]``. Quantized moments are torchao's tensor subclasses, or anything with
            their attributes: ``codes``, ``scale``, and ``qmap`` and ``signed`` unless the codes are E4M3.

    Returns:
        ``step``, and ``exp_avg.codes`` and ``exp_avg.scale`` (or ``exp_avg`` when the moment is a plain tensor), ...
        256 entries in `qmap` make it ``state_dtype="int8"``, 16 ``"int4"``, none ``"fp8"``.

    Raises:
        ValueError: The map is another one, or the number of scales does not fit the block size.
    """
    function = "import_torchao_state"
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        if name == "step":
            result[name] = _step(value)
            continue
        codes, scale, qmap = (getattr(value, part, None) for part in ("codes", "scale", "qmap"))
        if not isinstance(codes, Tensor) or not isinstance(scale, Tensor):
            if not isinstance(value, Tensor):
                raise ValueError(f"{function}: {name} must be a tensor, got {type(value).__name__}")
            result[name] = value.detach().float().clone()
            continue
        state_dtype = "fp8" if qmap is None else "int4" if qmap.numel() == 16 else "int8"
        if qmap is not None:
            _check_map(function, f"{name}.qmap", qmap, state_dtype, bool(value.signed))
        elif codes.dtype is torch.float8_e4m3fn:
            codes = codes.view(torch.uint8)
        scale = scale.detach().float().clone()
        _check_blocks(function, name, codes, scale, value.shape, state_dtype)
        result |= {f"{name}.codes": codes.detach().clone(), f"{name}.scale": scale}
    return result
