"""Replacing the modules of an existing model by narrowgauge's, and putting them back.

A replacement holds the very Parameter objects of the module it replaces, so optimizers, tied weights and
``state_dict`` keys stay as they were. What is replaced is decided by structure, never by importing a model
library: ``nn.LayerNorm``, ``nn.RMSNorm`` and ``nn.Linear`` by their forward; the RMSNorms that model
libraries write for themselves by what they compute on a small random input.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from narrowgauge import quant
from narrowgauge.norm import LayerNorm, RMSNorm, _arguments
from narrowgauge.norm._replacement import ReplacedNorm, Unsuitable, norm_replacements
from narrowgauge.ops.checks import check_choice

Filter = Callable[[str, nn.Module], bool]

ALREADY = "is narrowgauge's already"
COLUMNS = ("module", "count", "old", "new", "note")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HOOKS = [name for name in vars(nn.Module()) if name.endswith("_hooks")]
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
ORIGINAL = "_narrowgauge_original"


@dataclass(frozen=True)
class Entry:
    """One module: what it was, what it is now (None: left as it was), and what there is to say about it."""

    name: str
    old: str
    new: str | None
    note: str = ""


@dataclass
class SwapReport:
    """What `swap` or `unswap` did to ``model``. Prints as a table."""

    model: nn.Module = field(repr=False)
    replaced: list[Entry] = field(default_factory=list)
    left: list[Entry] = field(default_factory=list)

    @property
    def summary(self) -> str:
        if self.replaced:
            return f"{len(self.replaced)} replaced, {len(self.left)} left."
        if not self.left:
            return "Nothing to replace: the model has no such modules."
        if all(entry.note == ALREADY for entry in self.left):
            return f"Nothing to replace: every one of {len(self.left)} {ALREADY}."
        return f"Nothing replaced, {len(self.left)} left."

    def rows(self) -> list[tuple[str, ...]]:
        """The table's cells. Modules whose names differ only in their numbers share a row."""
        rows = Counter(
            (re.sub(r"\b\d+\b", "*", entry.name), entry.old, entry.new or "(left)", entry.note)
            for entry in (*self.replaced, *self.left)
        )
        return [(name, str(count), *rest) for (name, *rest), count in rows.items()]

    def __str__(self) -> str:
        rows = self.rows()
        if not rows:
            return self.summary
        widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (COLUMNS, *rows)]
        return "\n".join((*lines, self.summary))

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(*COLUMNS, caption=self.summary)
        for row in self.rows():
            table.add_row(*row)
        return table


def swap(
    model: nn.Module,
    norm: bool | str = True,
    linear: str | None = None,
    inplace: bool = True,
    filter: Filter | None = None,
) -> SwapReport:
    """Replaces normalization layers, and on request linear layers, by narrowgauge's.

    Args:
        model: Any model; one that is to be sharded is swapped before ``fully_shard``.
        norm: True replaces ``nn.LayerNorm``, ``nn.RMSNorm``, and modules that compute an RMSNorm with one weight,
            as Transformers writes it for Llama (``w``) and Gemma (``1 + w``), by layers that compute the same. A
            name replaces the same modules by another layer, to train with: ``"rms"``, ``"l1"``, ``"dyt"``,
            ``"derf"``, ``"power"``, ``"unified"`` or ``"fixed_std"``. False leaves norms alone.
        linear: Recipe of `narrowgauge.quant.Linear` for every ``nn.Linear``, the output head included
            (keep it out with ``filter=lambda name, module: name != "lm_head"``). None leaves them alone.
        inplace: Change ``model`` itself; otherwise a deep copy, which is the report's ``model``.
        filter: ``filter(name, module)`` decides whether a module that can be replaced is. A module that hangs
            in the model under several names must pass under each.

    Returns:
        What was replaced, what was left, and why: print it.

    Parameters are shared, not copied. Modules with hooks, parametrizations or a forward of their own are
    left. The new norms give back their input's dtype and round once. If anything raises, the model is as it
    was. `unswap` is the way back.
    """
    check_choice("swap", "norm", norm, (True, False, *norm_replacements))
    check_choice("swap", "linear", linear, (None, *quant.RECIPES))

    def replacement(module: nn.Module) -> tuple[nn.Module, str] | None:
        if linear is not None and isinstance(module, (nn.Linear, quant.Linear)):
            return _new_linear(module, linear)
        if norm and _looks_like_norm(module):
            return _new_norm(module) if norm is True else _other_norm(module, str(norm))
        return None

    return _replace("swap", model, replacement, inplace, filter)


def unswap(model: nn.Module, inplace: bool = True) -> SwapReport:
    """Undoes `swap`: replaced modules are of their old type again, with the parameters they have now.

    Args:
        model: A model that was swapped, or a copy of one, pickled ones included.
        inplace: Change ``model`` itself; otherwise a deep copy, which is the report's ``model``.
    """
    return _replace("unswap", model, _old_module, inplace)


def _replace(
    function: str,
    model: nn.Module,
    replacement: Callable[[nn.Module], tuple[nn.Module, str] | None],
    inplace: bool,
    filter: Filter | None = None,
) -> SwapReport:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")
    report = SwapReport(model if inplace else copy.deepcopy(model))

    places: dict[nn.Module, list[tuple[str, nn.Module | None, str]]] = {report.model: [("", None, "")]}
    for prefix, parent in report.model.named_modules():
        for key, child in parent._modules.items():
            if child is not None:
                places.setdefault(child, []).append((f"{prefix}.{key}" if prefix else key, parent, key))

    replacements: dict[nn.Module, nn.Module] = {}
    for _, old in report.model.named_modules():
        names = [name for name, _, _ in places[old]]
        described = ", ".join(names) or "(the model)", _type_name(old)
        try:
            suitable = replacement(old)
            if suitable is None:
                continue
            if filter is not None and not all(filter(name, old) for name in names):
                raise Unsuitable("kept out by the filter")
        except Unsuitable as reason:
            report.left.append(Entry(*described, None, str(reason)))
            continue
        if old is model:
            raise ValueError(
                f"{function}: model is itself a {_type_name(old)}, which cannot be replaced in place; "
                f"use {function}(model, inplace=False).model"
            )
        new, note = suitable
        replacements[old] = new
        report.replaced.append(Entry(*described, _type_name(new), note))

    # From here on only dictionary entries change, so the model changes as a whole or not at all.
    for old, new in replacements.items():
        for _, parent, key in places[old]:
            if parent is None:
                report.model = new
            else:
                parent._modules[key] = new
    return report


def _type_name(module: nn.Module) -> str:
    return f"{type(module).__module__.partition('.')[0]}.{type(module).__name__}"


def _looks_like_norm(module: nn.Module) -> bool:
    named_so = "norm" in type(module).__name__.lower() and not module._modules
    return isinstance(module, NORMS) or named_so or _has_weight_and_eps(module)


def _has_weight_and_eps(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    only_weight = weight is not None and weight.dim() == 1 and len(module._parameters) == 1
    return only_weight and isinstance(_eps(module), float)


def _width(module: nn.Module) -> int:
    weight = module._parameters["weight"]
    assert weight is not None
    return weight.numel()


def _eps(module: nn.Module) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _new_norm(old: nn.Module) -> tuple[nn.Module, str]:
    new: nn.Module
    if isinstance(old, (LayerNorm, RMSNorm)):
        raise Unsuitable(ALREADY)
    if isinstance(old, nn.LayerNorm):
        _check_forward(old, nn.LayerNorm)
        _check_bare(old, {"weight", "bias"})
        affine = old.weight is not None
        new = LayerNorm(old.normalized_shape, old.eps, affine, bias=old.bias is not None, device="meta")
        return _take_over(new, old), ""
    if isinstance(old, nn.RMSNorm):
        _check_forward(old, nn.RMSNorm)
        _check_bare(old, {"weight"})
        eps, note = old.eps, ""
        if eps is None and old.weight is not None:
            # None means the machine epsilon of the type that F.rms_norm computes in.
            eps = torch.finfo(torch.float64 if old.weight.dtype == torch.float64 else torch.float32).eps
            note = f"eps None is {eps:.3g}"
        new = RMSNorm(old.normalized_shape, eps, old.weight is not None, device="meta")
        return _take_over(new, old), note
    if not _has_weight_and_eps(old):
        raise Unsuitable("narrowgauge has no replacement for it")
    _check_bare(old, {"weight"})
    offset = _probe_weight_offset(old)
    new = RMSNorm(_width(old), _eps(old), weight_offset=offset, device="meta")
    return _take_over(new, old), "scales by 1 + w" if offset else "scales by w"


def _other_norm(old: nn.Module, kind: str) -> tuple[nn.Module, str]:
    """A layer that computes something else, with the parameters of the old one."""
    if isinstance(old, (LayerNorm, RMSNorm)):
        if ORIGINAL in vars(old):
            raise Unsuitable(f"{ALREADY}: unswap first")
        same: nn.Module = old
        _check_bare(old, set(old._parameters))
    else:
        same = _new_norm(old)[0]
    assert isinstance(same, (LayerNorm, RMSNorm))
    if same.weight_offset != 0:
        raise Unsuitable("scales by 1 + w, which the weight of another layer does not mean")
    parameter = next((p for p in old._parameters.values() if p is not None), torch.empty(0))
    norm = ReplacedNorm(
        same.normalized_shape,
        _arguments.machine_eps(parameter.dtype) if same.eps is None else same.eps,
        same.weight is not None,
        same.bias is not None,
        parameter.device,
        parameter.dtype,
    )
    new = norm_replacements[kind](norm)
    if type(new) is type(same):
        return _new_norm(old)
    return _take_over(new, old), "another layer"


def _new_linear(old: nn.Module, recipe: str) -> tuple[nn.Module, str]:
    if isinstance(old, quant.Linear):
        raise Unsuitable(ALREADY if old.recipe == recipe else f"has recipe {old.recipe}: unswap first")
    assert isinstance(old, nn.Linear)
    if isinstance(old, NonDynamicallyQuantizableLinear):
        raise Unsuitable("nn.MultiheadAttention reads its parameters and never calls it")
    _check_forward(old, nn.Linear)
    _check_bare(old, {"weight", "bias"})
    return _take_over(quant.Linear.from_linear(old, recipe), old), recipe


def _take_over(new: nn.Module, old: nn.Module) -> nn.Module:
    """Gives the new module the parameters and mode of the old one, and the old one to remember."""
    for name, parameter in old._parameters.items():
        if parameter is not None:
            setattr(new, name, parameter)
    # Past nn.Module.__setattr__, which would register it as a child. It holds no parameters, because those of
    # the new module may be replaced (by fully_shard, for example) and the old ones would then be kept alive.
    new.__dict__[ORIGINAL] = _with_parameters(old, dict.fromkeys(old._parameters))
    return new.train(old.training)


def _old_module(new: nn.Module) -> tuple[nn.Module, str] | None:
    old = vars(new).get(ORIGINAL)
    if old is None:
        return None
    _check_bare(new, set(new._parameters), buffers=True)
    old = _with_parameters(old, {name: new._parameters.get(name) for name in old._parameters})
    return old.train(new.training), ""


def _with_parameters(module: nn.Module, parameters: dict[str, Any]) -> nn.Module:
    twin = copy.copy(module)
    twin._parameters = parameters
    return twin


def _check_forward(module: nn.Module, base: type[nn.Module]) -> None:
    if type(module).forward is not base.forward:
        raise Unsuitable(f"overrides the forward of nn.{base.__name__}")


def _check_bare(module: nn.Module, parameters: set[str], buffers: bool = False) -> None:
    """There must be nothing about a module that its replacement would not have."""
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        if type(parameter) is not nn.Parameter:
            remedy = ": come before fully_shard" if type(parameter).__name__ == "DTensor" else ""
            raise Unsuitable(f"its {name} is a {type(parameter).__name__}{remedy}")
        if parameter.dtype not in DTYPES:
            raise Unsuitable(f"its {name} is {parameter.dtype}")
    if "forward" in vars(module):
        raise Unsuitable("its forward was replaced")
    if "parametrizations" in module._modules:
        raise Unsuitable("has parametrizations")
    if any(vars(module).get(hooks) for hooks in HOOKS):
        raise Unsuitable("has hooks")
    if module._modules or (module._buffers and not buffers):
        raise Unsuitable("has child modules or buffers")
    if set(module._parameters) != parameters:
        raise Unsuitable(f"its parameters are not {' and '.join(sorted(parameters))}")


def _probe_weight_offset(module: nn.Module) -> float:
    """0 for an RMSNorm that scales by w, 1 for one by 1 + w; found by running a twin on a small input."""
    if len(inspect.signature(module.forward).parameters) != 1:
        raise Unsuitable("its forward takes more than one argument")
    eps, width = _eps(module), _width(module)
    generator = torch.Generator("cpu").manual_seed(0)
    weight = torch.rand(width, generator=generator, device="cpu") + 0.5
    x = torch.randn(2, 3, width, generator=generator, device="cpu")
    x[0] *= max(eps, 0.0) ** 0.5  # rows this small show where eps stands
    twin = _with_parameters(module, {"weight": nn.Parameter(weight)})
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            y = twin.forward(x.clone())
    except Exception as error:
        raise Unsuitable(f"its forward failed on a small float32 tensor: {error}") from error
    if not isinstance(y, Tensor) or (y.shape, y.dtype) != (x.shape, x.dtype):
        raise Unsuitable("does not give a tensor like its input")
    x_hat = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    for offset in (0.0, 1.0):
        if torch.allclose(y, x_hat * (weight + offset), rtol=1e-5, atol=1e-6):
            return offset
    raise Unsuitable("computes neither x̂·w nor x̂·(1 + w)")
