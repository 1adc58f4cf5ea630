"""Continuing a run whose optimizer is one of PyTorch, bitsandbytes or torchao."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import narrowgauge.optim
from narrowgauge.optim import codec, tensors
from narrowgauge.optim.base import ElementwiseOptimizer
from narrowgauge.optim.convert import import_bitsandbytes_state, import_torchao_state

# The optimizers of other libraries: our class, its state_dtype, and the names of its states. bitsandbytes decays
# weights apart from the gradient in every Adam, so all of them are AdamW.
_ADAMW, _ADAM, _LION = ("AdamW", "Adam", "Lion")
BITSANDBYTES = {
    f"{paged}{name}{bits}": (_LION if name == "Lion" else _ADAMW, "int8" if bits == "8bit" else "fp32")
    for paged in ("", "Paged")
    for name in ("Adam", "AdamW", "Lion")
    for bits in ("", "8bit", "32bit")
}
TORCHAO = {
    f"{name}{bits}": (name, state_dtype)
    for name in (_ADAM, _ADAMW)
    for bits, state_dtype in (("8bit", "int8"), ("4bit", "int4"), ("Fp8", "fp8"))
} | {"_AdamW": (_ADAMW, "fp32")}


def _offered(name: str) -> Any:
    """Our optimizer of a name, or None."""
    member = getattr(narrowgauge.optim, name, None) if name in narrowgauge.optim.__all__ else None
    return member if isinstance(member, type) and issubclass(member, torch.optim.Optimizer) else None


def supported() -> list[str]:
    """What `from_torch` takes."""
    of_torch = [name for name in narrowgauge.optim.__all__ if _offered(name) and hasattr(torch.optim, name)]
    foreign = {"bitsandbytes": BITSANDBYTES, "torchao": TORCHAO}
    return [f"torch.optim.{name}" for name in of_torch] + [
        f"{library}'s {name}"
        for library, names in foreign.items()
        for name, (target, _) in names.items()
        if _offered(target)
    ]


def _identify(optimizer: Any) -> tuple[Any, str, str]:
    """Our class, the library it is from, and the state_dtype that keeps its states as they are."""
    kind = type(optimizer)
    library = kind.__module__.split(".")[0]
    target, state_dtype = None, "fp32"
    if library == "torch" and getattr(torch.optim, kind.__name__, None) is kind:
        target = kind.__name__
    elif library == "bitsandbytes":
        target, state_dtype = BITSANDBYTES.get(kind.__name__, (None, "fp32"))
    elif library == "torchao":
        target, state_dtype = TORCHAO.get(kind.__name__, (None, "fp32"))
    found = None if target is None else _offered(target)
    if found is None:
        raise TypeError(
            f"from_torch: optimizer is a {kind.__module__}.{kind.__qualname__}; accepted are exactly the classes "
            + ", ".join(supported())
        )
    return found, library, state_dtype


def from_torch(optimizer: torch.optim.Optimizer, **options: Any) -> Any:
    """The optimizer of this library that continues where another one stands.

    Parameters, groups, learning rates (also what schedulers keep in groups) and states are taken over; the states are
    copies. Hooks are not taken over. The given optimizer is not changed and must not step any more.

    Args:
        optimizer: Of ``torch.optim``, exactly one of its classes that this library offers; or an Adam, AdamW or Lion of
            bitsandbytes or torchao, 8-bit and the like included, whose codes are kept as they are.
        **options: Arguments of this library's class, for all groups, above those of `optimizer`:
            ``state_dtype="int8"`` stores the states in 8 bits from now on.

    Returns:
        An optimizer of the class of the same name.

    Raises:
        TypeError: `optimizer` is of another class, or an option is unknown.
        ValueError: An option or a state does not fit.
    """
    target, library, state_dtype = _identify(optimizer)
    elementwise = issubclass(target, ElementwiseOptimizer)
    if library == "bitsandbytes":
        _check_bitsandbytes(optimizer)
    if state_dtype != "fp32":
        options = {"state_dtype": state_dtype, **options}
    if getattr(optimizer, "bf16_stochastic_round", False):  # torchao
        options = {"param_update": "stochastic", **options}

    known = target([torch.zeros(1, 1)], **options).defaults
    defaults = {name: value for name, value in optimizer.defaults.items() if name in known}
    groups = []
    for group in optimizer.param_groups:
        kept = {
            name: value
            for name, value in group.items()
            if name not in ("params", "param_names")
            and (library == "torch" or name in (*known, "initial_lr"))
        }
        names = group.get("param_names")
        params = list(zip(names, group["params"], strict=True)) if names else list(group["params"])
        groups.append({**kept, **options, "params": params})
    ours = target(groups, **{**defaults, **options})

    loaded = ours.state_dict()
    for group, saved_group in zip(ours.param_groups, loaded["param_groups"], strict=True):
        for p, identifier in zip(group["params"], saved_group["params"], strict=True):
            state = {name: value for name, value in optimizer.state.get(p, {}).items() if value is not None}
            if not state:
                continue
            if library == "bitsandbytes":
                state = dict(import_bitsandbytes_state(state, ours._state_names(group)))
            elif library == "torchao":
                state = dict(import_torchao_state(state))
            loaded["state"][identifier] = (
                _stored_like(ours, group, p, state, state_dtype) if elementwise else state
            )
    ours.load_state_dict(loaded)
    return ours


def _check_bitsandbytes(optimizer: Any) -> None:
    args = getattr(optimizer, "args", None)
    for name, off in (("percentile_clipping", 100), ("max_unorm", 0.0)):
        value = getattr(args, name, off)
        if value != off:
            raise ValueError(
                f"from_torch: the bitsandbytes optimizer has {name}={value!r}, which this library does not offer; "
                "clip with step(max_grad_norm=...)"
            )


def _stored_like(
    ours: ElementwiseOptimizer, group: dict[str, Any], p: Tensor, found: dict[str, Any], theirs: str
) -> dict[str, Any]:
    """A state in the formats of our optimizer, with first values for what the other does not have.

    Codes in `found` have the format `theirs`.
    """
    state = dict(ours._init_state(group, p))
    if ours._counts_no_steps and "step" not in found:
        del state["step"]
    coded, state_dtype = ours._is_coded(group, p), group["state_dtype"]
    for name, signed in zip(ours._state_names(group), ours._signed(group), strict=True):
        if f"{name}.codes" in found and not (coded and theirs == state_dtype):
            encoded = {part: found.pop(f"{name}.{part}") for part in ("codes", "scale")}
            found[name] = codec.decode_state(encoded, theirs, signed=signed, shape=p.shape)
        if name in found and coded:
            _encode_into(state, name, p, found.pop(name), state_dtype, signed)
    return state | found


def _encode_into(
    state: dict[str, Any], name: str, p: Tensor, value: Tensor, state_dtype: str, signed: bool
) -> None:
    """Codes of this process's shard; its elements are taken in the order in which the parameter stores them."""
    shard = tensors.local(value)
    ordered = torch.empty_like(tensors.local(p), dtype=shard.dtype).copy_(shard)
    for part, encoded in codec.encode_state(ordered, state_dtype, signed=signed).items():
        target = tensors.local(state[f"{name}.{part}"])
        if target.shape == encoded.shape:
            target.copy_(encoded)
        else:  # a shard may hold more than it needs
            target[: len(encoded)].copy_(encoded)
