"""What all elementwise optimizers share: states, step, checkpoints. An optimizer adds its rule and its arguments."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from itertools import chain
from operator import itemgetter
from typing import Any, ClassVar

import torch
from torch import Tensor

from narrowgauge.ops import Operator, checks
from narrowgauge.optim import codec

Params = Iterable[Any]

PARAM_DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.complex128,
)
# Options that describe how this optimizer stores things; a checkpoint may not change them.
STORAGE_OPTIONS = ("state_dtype", "min_quantized_size")


def check_range(function: str, name: str, value: Any, low: float, below: float = math.inf) -> None:
    """A hyperparameter must be a number in [low, below)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value < below:
        interval = f"in [{low}, {below})" if below < math.inf else f">= {low}"
        raise ValueError(f"{function}: {name} must be a finite number {interval}, got {value!r}")


def _dtensor() -> Any:
    """The DTensor class, when this process has imported it."""
    module = sys.modules.get("torch.distributed.tensor")
    return getattr(module, "DTensor", None)


def _local(x: Any) -> Tensor:
    dtensor = _dtensor()
    if dtensor is not None and isinstance(x, dtensor):
        x = x.to_local()
    return torch.view_as_real(x) if x.is_complex() else x


def _is_dense(x: Tensor) -> bool:
    covered = 1
    for size, stride in sorted(zip(x.shape, x.stride(), strict=True), key=lambda pair: pair[1]):
        if size > 1:
            if stride != covered:
                return False
            covered *= size
    return True


def _like(x: Tensor, model: Tensor) -> Tensor:
    """`x` itself when it is stored element for element like `model`, else such a copy."""
    if x.stride() == model.stride():
        return x
    return torch.empty_like(model, dtype=x.dtype).copy_(x)


def _new_sharded_scale(p: Any, dtype: torch.dtype) -> Tensor:
    """Scales for the blocks of a sharded parameter, which do not cross shards.

    Every process holds as many as the largest shard needs, because shards of a DTensor that is made of local tensors
    must have one size: checkpoints are cut by it.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    sizes = list(p.shape)
    placements: list[Any] = []
    for placement, parts in zip(p.placements, p.device_mesh.shape, strict=True):
        dim = getattr(placement, "dim", None)
        placements.append(Replicate() if dim is None else Shard(0))
        if dim is not None:
            sizes[dim] = -(-sizes[dim] // parts)
    scale = torch.zeros(codec.block_count(math.prod(sizes)), dtype=dtype, device=p.device)
    return DTensor.from_local(scale, p.device_mesh, placements, run_check=False)


def _first_element(p: Any) -> int:
    """Where this process's shard begins in the whole parameter."""
    dtensor = _dtensor()
    if dtensor is None or not isinstance(p, dtensor):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if any(not (placement.is_replicate() or placement.is_shard(0)) for placement in p.placements):
        raise ValueError(
            "param_update='stochastic' needs parameters that are replicated or sharded in dimension 0, "
            f"got {p.placements}"
        )
    _, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    return offset[0] * math.prod(p.shape[1:]) if offset else 0


def _getter(names: Sequence[str]) -> Callable[[dict[str, Any]], Iterable[Any]]:
    """``itemgetter``, which is several times faster than a comprehension, also for a single name."""
    return itemgetter(*names) if len(names) > 1 else lambda state: (state[names[0]],)


class _Batch:
    """Parameters of a group that go into one call of the operator."""

    def __init__(self, plain: bool) -> None:
        self.plain = plain
        self.lists: tuple[list[Tensor], ...] = ([], [], [], [], [])


class ElementwiseOptimizer(torch.optim.Optimizer):
    """Base of the optimizers whose rule treats every element alike.

    A subclass sets `_operator` and defines `_check_options`, `_state_names` and `_options`.
    """

    _operator: ClassVar[Operator]
    _step_supports_amp_scaling = True

    def __init__(self, params: Params, defaults: dict[str, Any]) -> None:
        self._check_group(defaults)
        super().__init__(params, defaults)

    # --- what a subclass defines ---

    def _check_options(self, group: dict[str, Any]) -> None:
        """Raises for arguments of the rule that are out of range."""

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        raise NotImplementedError

    def _options(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """The rule's arguments, in the order of the operator."""
        raise NotImplementedError

    # --- groups ---

    def _check_group(self, group: dict[str, Any]) -> None:
        name, lr = type(self).__name__, group["lr"]
        if isinstance(lr, Tensor):
            if lr.numel() != 1 or not lr.is_floating_point():
                raise ValueError(f"{name}: a tensor lr must be one floating-point number, got {lr!r}")
        else:
            check_range(name, "lr", lr, 0)
        self._check_options(group)
        checks.check_choice(name, "state_dtype", group["state_dtype"], ("fp32", "int8"))
        checks.check_choice(name, "param_update", group["param_update"], ("nearest", "stochastic"))
        seed = group["seed"]
        if not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
            raise ValueError(f"{name}: seed must be an integer of 64 bits, got {seed!r}")
        check_range(name, "min_quantized_size", group["min_quantized_size"], 0)
        if group["differentiable"]:
            raise ValueError(
                f"{name}: differentiable=True is not offered, the fused step has no gradient; "
                f"use torch.optim.{name}(differentiable=True)"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):
            self._check_group({**self.defaults, **param_group})
            params = param_group["params"]
            params = [params] if isinstance(params, Tensor) else list(params)
            for p in params:
                tensor = p[1] if isinstance(p, tuple) else p
                if isinstance(tensor, Tensor) and tensor.dtype not in PARAM_DTYPES:
                    raise ValueError(
                        f"{type(self).__name__}: a parameter has dtype {tensor.dtype}; accepted are "
                        + ", ".join(str(dtype) for dtype in PARAM_DTYPES)
                    )
            param_group["params"] = params
        super().add_param_group(param_group)
        self._indices = {
            p: i for i, p in enumerate(chain.from_iterable(g["params"] for g in self.param_groups))
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        self._indices = {
            p: i for i, p in enumerate(chain.from_iterable(g["params"] for g in self.param_groups))
        }

    # --- states ---

    def _is_quantized(self, group: dict[str, Any], p: Tensor) -> bool:
        return (
            group["state_dtype"] == "int8"
            and p.dtype in (torch.float32, torch.bfloat16, torch.float16)
            and p.numel() >= group["min_quantized_size"]
        )

    def _state_layout(self, group: dict[str, Any], p: Tensor) -> dict[str, tuple[torch.dtype, bool]]:
        """The keys of a parameter's state (without `step`): dtype, and whether it has the parameter's shape."""
        names = self._state_names(group)
        if self._is_quantized(group, p):
            codes = {f"{name}.codes": (torch.uint8, True) for name in names}
            return codes | {f"{name}.scale": (torch.float32, False) for name in names}
        narrow = p.dtype in (torch.bfloat16, torch.float16)
        return dict.fromkeys(names, (torch.float32 if narrow else p.dtype, True))

    def _new_state(self, p: Tensor, dtype: torch.dtype, shaped: bool) -> Tensor:
        if shaped:
            return torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)
        dtensor = _dtensor()
        if dtensor is not None and isinstance(p, dtensor):
            return _new_sharded_scale(p, dtype)
        return torch.zeros(codec.block_count(p.numel()), dtype=dtype, device=p.device)

    def _init_state(self, group: dict[str, Any], p: Tensor) -> dict[str, Any]:
        state = self.state[p]
        state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        for name, (dtype, shaped) in self._state_layout(group, p).items():
            state[name] = self._new_state(p, dtype, shaped)
        return state

    # --- the step ---

    def _batches(self, group: dict[str, Any]) -> list[_Batch]:
        """The parameters that have a gradient, by what one call can take together. Runs at every step: kept lean."""
        names = self._state_names(group)
        code_names, scale_names = [f"{name}.codes" for name in names], [f"{name}.scale" for name in names]
        get_states, get_codes, get_scales = _getter(names), _getter(code_names), _getter(scale_names)
        batches: dict[Any, _Batch] = {}
        previous = None
        for p in group["params"]:
            g = p.grad
            if g is None:
                continue
            if g.layout is not torch.strided:
                raise RuntimeError(
                    f"{type(self).__name__} does not support sparse gradients; use torch.optim.SparseAdam, "
                    "or build the layer with sparse=False"
                )
            state = self.state[p] or self._init_state(group, p)
            quantized = code_names[0] in state
            # Whether the kernel can work on both as they are; everything else goes through _local_lists.
            plain = (
                (type(p) is torch.nn.Parameter or type(p) is Tensor)
                and p.is_contiguous()
                and g.is_contiguous()
            )
            key = (p.dtype, g.dtype, p.device, quantized, plain)
            if key != previous:
                batch = batches.get(key)
                if batch is None:
                    batch = batches[key] = _Batch(plain and not p.is_complex())
                params, grads, states, scales, steps = batch.lists
                previous = key
            params.append(p)
            grads.append(g)
            steps.append(state["step"])
            if quantized:
                states += get_codes(state)
                scales += get_scales(state)
            else:
                states += get_states(state)
        return list(batches.values())

    def _init_group(self, group: dict[str, Any], number: int, *lists: list[Any]) -> int:
        """Fills the lists with batch `number`; returns flags. torch.compile runs this eagerly, under this name."""
        if number == 0:
            self._pending = self._batches(group)
        if number >= len(self._pending):
            return 0
        batch = self._pending[number]
        for target, source in zip(lists, batch.lists, strict=True):
            target.extend(source)
        return (1 if number + 1 < len(self._pending) else 0) | (0 if batch.plain else 2)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one step.

        Args:
            closure: Reevaluates the model and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            number, flags = 0, 1
            while flags & 1:
                params: list[Tensor] = []
                grads: list[Tensor] = []
                states: list[Tensor] = []
                scales: list[Tensor] = []
                steps: list[Tensor] = []
                flags = self._init_group(group, number, params, grads, states, scales, steps)
                if params:
                    self._update(group, flags < 2, params, grads, states, scales, steps)
                number += 1
        return loss

    def _update(
        self,
        group: dict[str, Any],
        plain: bool,
        params: list[Tensor],
        grads: list[Tensor],
        states: list[Tensor],
        scales: list[Tensor],
        steps: list[Tensor],
    ) -> None:
        whole, device = params, params[0].device
        stochastic = group["param_update"] == "stochastic" and params[0].dtype is torch.bfloat16
        indices = [self._indices[p] for p in params] if stochastic else []
        first_elements = [_first_element(p) for p in params] if stochastic else []
        written_back: list[tuple[Tensor, Tensor]] = []
        if not plain:
            params, grads, states, scales, written_back = self._local_lists(params, grads, states, scales)
        if grads[0].dtype not in (params[0].dtype, torch.float32, torch.bfloat16) or (
            params[0].dtype is torch.float64 and grads[0].dtype is not torch.float64
        ):
            grads = [g.to(params[0].dtype) for g in grads]

        lr: float | Tensor = group["lr"]
        lr_tensor = None
        if isinstance(lr, Tensor):
            dtype = lr.dtype if lr.dtype in (torch.float32, torch.float64) else torch.float32
            lr_tensor = lr.to(device, dtype, non_blocking=True)
            lr = 0.0
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if grad_scale is not None:
            grad_scale = grad_scale.to(device, torch.float32, non_blocking=True)
        if found_inf is not None:
            found_inf = found_inf.to(device, torch.float32, non_blocking=True)
        self._operator(
            *(params, grads, states, scales, steps, lr_tensor, lr, *self._options(group)),
            *(group["maximize"], stochastic, group["seed"], indices, first_elements, grad_scale, found_inf),
        )
        for target, value in written_back:
            target.copy_(value)
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(whole)

    def _local_lists(
        self, params: list[Tensor], grads: list[Tensor], states: list[Tensor], scales: list[Tensor]
    ) -> tuple[Any, ...]:
        """This process's shards, as real numbers in dense tensors of one layout; and what to copy back afterwards."""
        written_back = []
        per_param = len(states) // len(params)
        local_params, local_grads, local_states, local_scales = [], [], [], []
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            original = _local(p)
            p = original if _is_dense(original) else original.contiguous()
            if p is not original:
                written_back.append((original, p))
            local_params.append(p)
            local_grads.append(_like(_local(g), p))
            for state in states[i * per_param : (i + 1) * per_param]:
                original = _local(state)
                state = _like(original, p)
                if state is not original:
                    written_back.append((original, state))
                local_states.append(state)
            for scale in scales[i * per_param : (i + 1) * per_param]:
                local_scales.append(_local(scale)[: codec.block_count(p.numel())])
        return local_params, local_grads, local_states, local_scales, written_back

    # --- checkpoints ---

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
                if saved_group.get(option, group[option]) != group[option]:
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
                params[p] = states.pop(identifier, {})
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
            "param_update",
            "seed",
            *STORAGE_OPTIONS,
        }
        return [name for name in self.defaults if name not in ours]

    def _check_state(self, group: dict[str, Any], p: Tensor, identifier: Any, saved: dict[str, Any]) -> None:
        where = f"the state of parameter {identifier}"
        layout = self._state_layout(group, p)
        expected, found = {"step", *layout}, set(saved)
        if expected != found:
            raise self._refuse(
                f"{where} has the keys {sorted(found)}, expected {sorted(expected)} "
                f"for state_dtype={group['state_dtype']!r}"
            )
        step = saved["step"]
        step = step.item() if isinstance(step, Tensor) and step.numel() == 1 else step
        if not isinstance(step, (int, float)) or not 0 <= step <= 2**24 or step != int(step):
            raise self._refuse(f"{where}: step must be a whole number, got {step!r}")
        for name, (dtype, shaped) in layout.items():
            value = saved[name]
            if not isinstance(value, Tensor):
                raise self._refuse(f"{where}: {name} must be a tensor, got {type(value).__name__}")
            shape = p.shape if shaped else self._new_state(p, dtype, shaped).shape
            if value.shape != shape:
                raise self._refuse(f"{where}: {name} has shape {tuple(value.shape)}, expected {tuple(shape)}")
            same_kind = value.dtype == dtype if dtype is torch.uint8 else _kind(value) == _kind(p)
            if not same_kind:
                raise self._refuse(f"{where}: {name} has dtype {value.dtype}, expected {dtype}")

    def _loaded_state(self, group: dict[str, Any], p: Tensor, saved: dict[str, Any]) -> dict[str, Any]:
        step = torch.as_tensor(saved["step"]).detach().reshape(())
        state = {"step": step.to(device=p.device, dtype=torch.float32, copy=True)}
        for name, (dtype, shaped) in self._state_layout(group, p).items():
            state[name] = self._new_state(p, dtype, shaped).copy_(saved[name])
        return state


def _kind(x: Tensor) -> str:
    return "complex" if x.is_complex() else "floating" if x.is_floating_point() else "other"
