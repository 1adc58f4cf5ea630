"""The states of optimizers: what there is per parameter, and checkpoints that load as a whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from narrowgauge.optim import codec, nap, tensors

# Options that describe how this optimizer stores things; a checkpoint may not change them.
STORAGE_OPTIONS = ("state_dtype", "min_quantized_size", "param_update", "split_bits", "use_muon")


@dataclass(frozen=True)
class Entry:
    """One tensor of a parameter's state.

    Attributes:
        dtype: Its dtype.
        shape: Its shape for a shard of so many elements, or None when it is shaped like the parameter.
    """

    dtype: torch.dtype
    shape: Callable[[int], tuple[int, ...]] | None = None


class Checkpoints(torch.optim.Optimizer):
    """The part of an elementwise optimizer that knows its states."""

    # Whether the optimizer of PyTorch with the same states counts no steps.
    _counts_no_steps: ClassVar[bool] = False

    _check_group: Callable[[dict[str, Any]], None]

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Names of the rule's states, in its order."""
        raise NotImplementedError

    def _signed(self, group: dict[str, Any]) -> tuple[bool, ...]:
        """Whether each of them takes negative values."""
        raise NotImplementedError

    def _own_layout(self, group: dict[str, Any], p: Tensor) -> dict[str, Entry]:
        """Further entries of a parameter's state that the rule does not see."""
        return {}

    def _init_own(self, group: dict[str, Any], p: Tensor, state: dict[str, Any]) -> None:
        """Gives them their first values, where those are not zero."""

    # --- what a state consists of ---

    def _is_coded(self, group: dict[str, Any], p: Tensor) -> bool:
        return (
            codec.FORMATS[group["state_dtype"]].block_size > 0
            and p.dtype in (torch.float32, torch.bfloat16, torch.float16)
            and p.numel() >= group["min_quantized_size"]
        )

    def _rest_name(self, group: dict[str, Any]) -> str | None:
        return {"kahan": "param_comp", "split": "param_low"}.get(group["param_update"])

    def _state_layout(self, group: dict[str, Any], p: Tensor) -> dict[str, Entry]:
        """The entries of a parameter's state, without `step`."""
        names, signed = self._state_names(group), self._signed(group)
        record = codec.FORMATS[group["state_dtype"]]
        narrow = p.dtype in (torch.bfloat16, torch.float16)
        layout: dict[str, Entry] = {}
        if self._is_coded(group, p):
            packed = record.codes_per_byte > 1
            for name, is_signed in zip(names, signed, strict=True):
                shape = (lambda numel: record.codes_shape((numel,))) if packed else None
                layout[f"{name}.codes"] = Entry(record.codes_dtype(is_signed), shape)
            for name in names:
                layout[f"{name}.scale"] = Entry(record.scale, record.scale_shape)
        else:
            small = record.name == "bf16" and (narrow or p.dtype is torch.float32)
            dtype = torch.bfloat16 if small else torch.float32 if narrow else p.dtype
            layout |= dict.fromkeys(names, Entry(dtype))
        if group["param_update"] == "kahan" and narrow:
            layout["param_comp"] = Entry(p.dtype)
        if group["param_update"] == "split" and p.dtype is torch.bfloat16:
            layout["param_low"] = Entry(torch.int8 if group["split_bits"] == 8 else torch.int16)
        if group["ema_decay"] is not None:
            layout["ema"] = Entry(p.dtype if p.is_complex() else torch.float32)
        if group["project_norm"]:
            wide = p.dtype in (torch.float64, torch.complex128)
            norms = nap.norms_shape(group["project_norm"], p)
            layout["rho"] = Entry(torch.float64 if wide else torch.float32, norms)
        return layout | self._own_layout(group, p)

    def _new_state(self, p: Tensor, entry: Entry) -> Tensor:
        if entry.shape is None:
            return torch.zeros_like(
                p, dtype=entry.dtype, memory_format=torch.preserve_format, requires_grad=False
            )
        shape = entry.shape(p.numel())
        if tensors.is_dtensor(p) and shape:
            return tensors.new_sharded(p, entry.shape, entry.dtype)
        return torch.zeros(shape, dtype=entry.dtype, device=p.device)

    def _init_state(self, group: dict[str, Any], p: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[p]
        state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        for name, entry in self._state_layout(group, p).items():
            state[name] = self._new_state(p, entry)
        if "ema" in state:
            state["ema"].copy_(p.detach())
        if "rho" in state:
            nap.write_norms(group["project_norm"], p, state["rho"])
        self._init_own(group, p, state)
        return state

    # --- checkpoints ---

    def dequantized_state_dict(self) -> dict[str, Any]:
        """A state dict with every coded state decoded, as the same optimizer has it with ``state_dtype="fp32"``.

        Of sharded parameters each process decodes its shard; such a dict is not for ``torch.distributed.checkpoint``.
        """
        result = self.state_dict()
        states = {identifier: dict(state) for identifier, state in result["state"].items()}
        for group, saved in zip(self.param_groups, result["param_groups"], strict=True):
            saved["state_dtype"] = "fp32"
            for p, identifier in zip(group["params"], saved["params"], strict=True):
                state = states.get(identifier, {})
                for name, signed in zip(self._state_names(group), self._signed(group), strict=True):
                    if f"{name}.codes" not in state:
                        continue
                    codes, scale = (tensors.local(state.pop(f"{name}.{part}")) for part in ("codes", "scale"))
                    shape = tensors.local(p).shape
                    record = codec.FORMATS[group["state_dtype"]]
                    scale = scale[: codec.block_count(shape.numel(), record.block_size)]
                    if record.codes_per_byte > 1:  # a shard may hold more than it needs
                        codes = codes[: record.codes_shape(shape)[0]]
                    encoded = {"codes": codes, "scale": scale}
                    state[name] = codec.decode_state(encoded, record.name, signed=signed, shape=shape)
        return {"state": states, "param_groups": result["param_groups"]}

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class, or with fp32 states of its counterpart in ``torch.optim``.

        Everything is checked first: a state dict that does not fit raises a ValueError and changes nothing.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            if replaced is not None:
                state_dict = replaced
        groups, params = self._checked_groups(state_dict)
        state: dict[Any, dict[str, Any]] = {}
        for group in groups:
            for p in group["params"]:
                saved = params.get(p)
                if saved:
                    state[p] = self._loaded_state(group, p, saved)
        self.__setstate__({"state": self._defaultdict(state), "param_groups": groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _defaultdict(self, state: dict[Any, dict[str, Any]]) -> Any:
        fresh = type(self.state)(dict)
        fresh.update(state)
        return fresh

    def _refuse(self, reason: str) -> ValueError:
        return ValueError(f"{type(self).__name__}.load_state_dict: {reason}; nothing was loaded")

    def _checked_groups(
        self, state_dict: dict[str, Any]
    ) -> tuple[list[dict[str, Any]], dict[Tensor, dict[str, Any]]]:
        """The groups to use from now on, and the saved state of each parameter."""
        if not isinstance(state_dict.get("state"), dict) or not isinstance(
            state_dict.get("param_groups"), list
        ):
            raise self._refuse("a state dict has the keys 'state' and 'param_groups'")
        saved_groups = state_dict["param_groups"]
        sizes = [len(group["params"]) for group in self.param_groups]
        saved_sizes = [len(group.get("params", ())) for group in saved_groups]
        if sizes != saved_sizes:
            raise self._refuse(f"its groups have {saved_sizes} parameters, this optimizer's have {sizes}")

        groups, params = [], {}
        states = dict(state_dict["state"])
        for number, (group, saved_group) in enumerate(zip(self.param_groups, saved_groups, strict=True)):
            missing = [key for key in ("lr", *self._hyperparameters()) if key not in saved_group]
            if missing:
                raise self._refuse(f"group {number} has no {missing[0]}: it is of another optimizer")
            for option in STORAGE_OPTIONS:
                if option in group and saved_group.get(option, group[option]) != group[option]:
                    raise self._refuse(
                        f"group {number} was saved with {option}={saved_group[option]!r}, "
                        f"this optimizer has {group[option]!r}"
                    )
            merged = {key: value for key, value in group.items() if key != "params"}
            merged |= deepcopy({key: value for key, value in saved_group.items() if key != "params"})
            try:
                self._check_group(merged)
            except ValueError as error:
                raise self._refuse(str(error)) from error
            groups.append({"params": group["params"], **merged})
            for p, identifier in zip(group["params"], saved_group["params"], strict=True):
                params[p] = dict(states.pop(identifier, {}))
                if params[p]:
                    self._check_state(groups[-1], p, identifier, params[p])
        if states:
            raise self._refuse(f"it has states of unknown parameters: {sorted(states, key=str)[:5]}")
        return groups, params

    def _hyperparameters(self) -> list[str]:
        """Arguments that every state dict of this kind of optimizer has, whoever wrote it."""
        ours = {
            "foreach",
            "fused",
            "capturable",
            "differentiable",
            "maximize",
            "seed",
            "ema_decay",
            "project_norm",
            "project_every",
            "cautious",
            *STORAGE_OPTIONS,
        }
        return [name for name in self.defaults if name not in ours]

    def _check_state(self, group: dict[str, Any], p: Tensor, identifier: Any, saved: dict[str, Any]) -> None:
        where = f"the state of parameter {identifier}"
        layout = self._state_layout(group, p)
        expected, found = {"step", *layout}, set(saved)
        if self._counts_no_steps and "step" not in saved:
            saved["step"] = torch.tensor(1.0 if saved else 0.0)
            found.add("step")
        if expected != found:
            raise self._refuse(
                f"{where} has the keys {sorted(found)}, expected {sorted(expected)} "
                f"for state_dtype={group['state_dtype']!r}"
            )
        step = saved["step"]
        step = step.item() if isinstance(step, Tensor) and step.numel() == 1 else step
        if not isinstance(step, (int, float)) or not 0 <= step <= 2**24 or step != int(step):
            raise self._refuse(f"{where}: step must be a whole number, got {step!r}")
        for name, entry in layout.items():
            value = saved[name]
            if not isinstance(value, Tensor):
                raise self._refuse(f"{where}: {name} must be a tensor, got {type(value).__name__}")
            shape = p.shape if entry.shape is None else self._new_state(p, entry).shape
            if value.shape != shape:
                raise self._refuse(f"{where}: {name} has shape {tuple(value.shape)}, expected {tuple(shape)}")
            exact = not entry.dtype.is_floating_point and not entry.dtype.is_complex
            if value.dtype != entry.dtype if exact else _kind(value.dtype) != _kind(entry.dtype):
                raise self._refuse(f"{where}: {name} has dtype {value.dtype}, expected {entry.dtype}")

    def _loaded_state(self, group: dict[str, Any], p: Tensor, saved: dict[str, Any]) -> dict[str, Any]:
        step = torch.as_tensor(saved["step"]).detach().reshape(())
        state = {"step": step.to(device=p.device, dtype=torch.float32, copy=True)}
        for name, entry in self._state_layout(group, p).items():
            state[name] = self._new_state(p, entry).copy_(saved[name])
        return state


def _kind(dtype: torch.dtype) -> str:
    return "complex" if dtype.is_complex else "floating" if dtype.is_floating_point else "other"
