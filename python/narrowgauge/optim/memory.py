"""How many bytes a model's training holds, for every way in which an optimizer can store them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from narrowgauge.optim.adamw import AdamW
from narrowgauge.optim.codec import STATE_DTYPES
from narrowgauge.optim.rule_samples import PARAM_UPDATES


@dataclass(frozen=True)
class Memory:
    """Bytes of one alternative.

    Attributes:
        optimizer: Name of the optimizer.
        param_dtype: dtype of the parameters; what is neither float32 nor bfloat16 stays what it is.
        state_dtype, param_update: Its options, or "" where it has none.
        params, grads, states: Bytes.
    """

    optimizer: str
    param_dtype: str
    state_dtype: str
    param_update: str
    params: int
    grads: int
    states: int

    @property
    def total(self) -> int:
        return self.params + self.grads + self.states


class MemoryTable(list[Memory]):
    """The alternatives; the first is AdamW in float32. Printed, it is a table."""

    def __str__(self) -> str:
        head = (
            "optimizer",
            "parameters",
            "states",
            "update",
            "param MB",
            "grad MB",
            "state MB",
            "total MB",
            "",
        )
        lines: list[tuple[str, ...]] = [head]
        for row in self:
            sizes = [f"{size / 1e6:,.2f}" for size in (row.params, row.grads, row.states, row.total)]
            share = f"{row.total / self[0].total:.0%}" if self[0].total else ""
            lines.append((row.optimizer, row.param_dtype, row.state_dtype, row.param_update, *sizes, share))
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if column < 4 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )


def _named(model_or_params: Any) -> Iterator[tuple[str, Tensor]]:
    """Every parameter once."""
    if isinstance(model_or_params, nn.Module):
        yield from model_or_params.named_parameters()
        return
    seen = set()
    for number, item in enumerate(model_or_params):
        if isinstance(item, dict):
            pairs: Iterable[Any] = item["params"]
        else:
            pairs = [item]
        for pair in pairs:
            name, p = pair if isinstance(pair, tuple) else (f"{number}", pair)
            if not isinstance(p, Tensor):
                raise TypeError(f"memory: parameters must be tensors, got {type(p).__name__}")
            if p not in seen:
                seen.add(p)
                yield name, p


def _stand_ins(named: list[tuple[str, Tensor]], dtype: torch.dtype) -> list[tuple[str, nn.Parameter]]:
    """Parameters like the given ones, float32 and bfloat16 ones in `dtype`, that take no memory."""
    return [
        (
            name,
            nn.Parameter(
                torch.empty(
                    p.shape,
                    dtype=dtype if p.dtype in (torch.float32, torch.bfloat16) else p.dtype,
                    device="meta",
                ),
                requires_grad=p.requires_grad,
            ),
        )
        for name, p in named
    ]


def state_bytes(optimizer: Any) -> int:
    """Bytes of the states that `optimizer` makes for its parameters, counted without making them."""
    total = 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer._init_state(group, p)
            total += sum(value.nbytes for value in state.values() if isinstance(value, Tensor))
    return total


def memory(model_or_params: Any, optimizer: Callable[..., Any] = AdamW, **options: Any) -> MemoryTable:
    """Bytes of parameters, gradients and states under every storage option of an optimizer, beside AdamW in float32.

    Nothing is allocated: states are made on the meta device. A gradient takes as much as its parameter; parameters
    that need no gradient have neither gradient nor state. Of sharded parameters the whole is counted.

    Args:
        model_or_params: A module, parameters, named parameters or parameter groups.
        optimizer: A class of this library, or a function that makes an optimizer of parameters.
        **options: Its arguments. With `state_dtype` or `param_update` only that format is listed.

    Returns:
        One `Memory` per alternative that the optimizer offers: the parameters in float32 or, for the updates that are
        for it, in bfloat16.

    Raises:
        TypeError: `model_or_params` holds something else than parameters.
        ValueError: An option is out of range.
    """
    named = list(_named(model_or_params))
    table = MemoryTable([_row(AdamW, named, torch.float32, "fp32", "nearest", {})])
    names = inspect.signature(optimizer).parameters
    if "common" not in names and "state_dtype" not in names:
        table.append(_row(optimizer, named, torch.float32, "", "", options))
        return table
    fixed = dict(options)
    updates = [fixed.pop("param_update")] if "param_update" in fixed else list(PARAM_UPDATES)
    if "common" not in names and "param_update" not in names:
        updates = ["nearest"]
    formats = [fixed.pop("state_dtype")] if "state_dtype" in fixed else list(STATE_DTYPES)
    for update in updates:
        dtype = torch.float32 if update == "nearest" else torch.bfloat16
        for state_dtype in formats:
            try:
                row = _row(optimizer, named, dtype, state_dtype, update, fixed)
            except ValueError as error:
                # An optimizer may not offer all of them; what was asked for must be.
                refused = [name for name in ("state_dtype", "param_update") if name in str(error)]
                if not refused or any(name in options for name in refused):
                    raise
                continue
            if row not in table:
                table.append(row)
    return table


def _row(
    optimizer: Callable[..., Any],
    named: list[tuple[str, Tensor]],
    dtype: torch.dtype,
    state_dtype: str,
    param_update: str,
    options: dict[str, Any],
) -> Memory:
    params = _stand_ins(named, dtype)
    trained = [(name, p) for name, p in params if p.requires_grad]
    wants_names = "named_parameters" in inspect.signature(optimizer).parameters
    given = trained if wants_names else [p for _, p in trained]
    storage = {"state_dtype": state_dtype} if state_dtype else {}
    if param_update != "nearest" and param_update:
        storage["param_update"] = param_update
    states = state_bytes(optimizer(given, **options, **storage)) if given else 0
    name = getattr(optimizer, "__name__", type(optimizer).__name__)
    return Memory(
        optimizer=name,
        param_dtype=str(dtype).removeprefix("torch."),
        state_dtype=state_dtype,
        param_update=param_update,
        params=sum(p.nbytes for _, p in params),
        grads=sum(p.nbytes for _, p in trained),
        states=states,
    )
