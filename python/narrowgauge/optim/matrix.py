"""What the optimizers of whole matrices share: checks, gradients, checkpoints. Their products are PyTorch's matmul."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from narrowgauge.ops.operator import FLOATING
from narrowgauge.optim.base import Params, _dtensor, check_range

# A batch holds at most so many elements, or one parameter: it bounds the memory of a step.
BATCH_ELEMENTS = 1 << 24


def wide_dtype(p: Tensor) -> torch.dtype:
    """What a parameter's states are stored and computed in."""
    return torch.float64 if p.dtype is torch.float64 else torch.float32


def check_flag(function: str, name: str, value: Any) -> None:
    """A hyperparameter must be True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{function}: {name} must be True or False, got {value!r}")


def check_betas(function: str, betas: Any) -> None:
    """Two decay rates in [0, 1)."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"{function}: betas must be two numbers in [0, 1), got {betas!r}")
    for i, beta in enumerate(betas):
        check_range(function, f"betas[{i}]", beta, 0, 1)


def check_count(function: str, name: str, value: Any, low: int = 1, below: float = float("inf")) -> None:
    """A hyperparameter must be a whole number in [low, below)."""
    check_range(function, name, value, low, below)
    if not isinstance(value, int):
        raise ValueError(f"{function}: {name} must be a whole number, got {value!r}")


def learning_rate(group: dict[str, Any], p: Tensor) -> float | Tensor:
    """The learning rate, on the parameter's device if it is a tensor."""
    lr: float | Tensor = group["lr"]
    if isinstance(lr, Tensor):
        lr = lr.to(p.device, wide_dtype(p), non_blocking=True).reshape(())
    return lr


# --- modes: the first dimension of x counts tensors, the others are their modes ---


def gram(x: Tensor, mode: int) -> Tensor:
    """The products of the slices along one mode with each other, one matrix per tensor."""
    size = x.shape[mode + 1]
    if mode == x.dim() - 2:  # no copy, as the first mode
        rows = x.reshape(len(x), -1, size)
        return rows.mT @ rows
    slices = x.movedim(mode + 1, 1).reshape(len(x), size, -1)
    return slices @ slices.mT


def mode_product(x: Tensor, matrices: Tensor, mode: int) -> Tensor:
    """Takes the vectors along one mode to their products with the columns of the tensor's matrix."""
    size = x.shape[mode + 1]
    if mode == x.dim() - 2:
        return (x.reshape(len(x), -1, size) @ matrices).reshape(x.shape)
    moved = x.movedim(mode + 1, 1)
    return (matrices.mT @ moved.reshape(len(x), size, -1)).reshape(moved.shape).movedim(1, mode + 1)


# --- sharded parameters ---


def locals_of(tensors: list[Any]) -> list[Tensor]:
    """This process's shards; the list itself if nothing is sharded."""
    return [x.to_local() for x in tensors] if _is_sharded(tensors[0]) else tensors


def _stacked_placements(p: Any) -> list[Any]:
    """Where the dimensions of parameters like `p` are when they are stacked."""

    def moved(place: Any) -> Any:
        if place.is_replicate():
            return place
        strided = {"split_factor": place.split_factor} if hasattr(place, "split_factor") else {}
        return type(place)(place.dim + 1, **strided)

    return [moved(place) for place in p.placements]


def _is_sharded(p: Any) -> bool:
    dtensor = _dtensor()
    return dtensor is not None and isinstance(p, dtensor)


def whole(stacked: Tensor, p: Any) -> Tensor:
    """The whole of tensors whose shards, cut like `p`, this process has."""
    if not _is_sharded(p):
        return stacked
    shape = torch.Size((len(stacked), *p.shape))
    stride = torch.empty(shape, device="meta").stride()
    placed = _stacked_placements(p)
    x = _dtensor().from_local(stacked, p.device_mesh, placed, run_check=False, shape=shape, stride=stride)
    return x.full_tensor()


def shards(stacked: Tensor, p: Any) -> Tensor:
    """This process's shards of tensors that all have, cut like `p`; nothing is sent."""
    if not _is_sharded(p):
        return stacked
    from torch.distributed.tensor import Replicate

    everywhere = [Replicate()] * p.device_mesh.ndim
    x = _dtensor().from_local(stacked, p.device_mesh, everywhere, run_check=False)
    return x.redistribute(placements=_stacked_placements(p)).to_local()


class MatrixOptimizer(torch.optim.Optimizer):
    """Base of the optimizers that treat a parameter as a matrix or a product of modes.

    A subclass defines `_check_options`, `_check_param`, `_state_layout` and `_step_group`.
    """

    _step_supports_amp_scaling = True
    # Arguments that state dicts of other implementations do not have.
    _own_options: tuple[str, ...] = ("maximize",)

    def __init__(self, params: Params, defaults: dict[str, Any]) -> None:
        self._check_group(defaults)
        super().__init__(params, defaults)

    # --- what a subclass defines ---

    def _check_options(self, group: dict[str, Any]) -> None:
        """Raises for arguments of the method that are out of range."""
        raise NotImplementedError

    def _check_param(self, group: dict[str, Any], p: Tensor) -> None:
        """Raises for parameters that the method cannot update."""

    def _state_layout(self, group: dict[str, Any], p: Tensor) -> dict[str, tuple[int, ...] | None]:
        """The keys of a parameter's state, and their shapes; None: stored like the parameter."""
        raise NotImplementedError

    def _step_group(self, group: dict[str, Any]) -> None:
        raise NotImplementedError

    # --- groups ---

    def _check_group(self, group: dict[str, Any]) -> None:
        name, lr = type(self).__name__, group["lr"]
        if isinstance(lr, Tensor):
            if lr.numel() != 1 or not lr.is_floating_point():
                raise ValueError(f"{name}: a tensor lr must be one floating-point number, got {lr!r}")
        else:
            check_range(name, "lr", lr, 0)
        check_range(name, "weight_decay", group["weight_decay"], 0)
        check_flag(name, "maximize", group["maximize"])
        self._check_options(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):
            group = {**self.defaults, **param_group}
            self._check_group(group)
            params = param_group["params"]
            params = [params] if isinstance(params, Tensor) else list(params)
            for p in params:
                tensor = p[1] if isinstance(p, tuple) else p
                if isinstance(tensor, Tensor):
                    if tensor.dtype not in FLOATING:
                        raise ValueError(
                            f"{type(self).__name__}: a parameter has dtype {tensor.dtype}; accepted are "
                            + ", ".join(str(dtype) for dtype in FLOATING)
                        )
                    self._check_param(group, tensor)
            param_group["params"] = params
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    # --- the step ---

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
            self._step_group(group)
        return loss

    def _with_gradient(self, group: dict[str, Any]) -> list[Tensor]:
        """The parameters to update, with their states in place."""
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if p.grad.layout is not torch.strided:
                raise RuntimeError(
                    f"{type(self).__name__} does not support sparse gradients; use torch.optim.SparseAdam, "
                    "or build the layer with sparse=False"
                )
        for p in params:
            state = self.state[p]
            if not state:
                for name, shape in self._state_layout(group, p).items():
                    state[name] = self._new_state(p, name, shape)
        return params

    def _batches(self, group: dict[str, Any]) -> Iterator[list[Tensor]]:
        """The parameters to update, by what one batch can take together."""
        batches: dict[Any, list[Tensor]] = {}
        for p in self._with_gradient(group):
            if p.numel():
                step = self.state[p].get("step")
                key = (
                    p.shape,
                    p.dtype,
                    p.device,
                    getattr(p, "placements", None),
                    None if step is None else step.item(),
                )
                batches.setdefault(key, []).append(p)
        for params in batches.values():
            size = max(1, BATCH_ELEMENTS // params[0].numel())
            for start in range(0, len(params), size):
                yield params[start : start + size]

    def _new_state(self, p: Tensor, name: str, shape: tuple[int, ...] | None) -> Tensor:
        if name == "step":
            return torch.zeros((), dtype=torch.float32)
        if shape is None:
            return torch.zeros_like(
                p, dtype=wide_dtype(p), memory_format=torch.preserve_format, requires_grad=False
            )
        return torch.zeros(shape, dtype=wide_dtype(p), device=p.device)

    def _overflowed(self) -> bool:
        """Whether a gradient scaler found an infinity. Waits for the device."""
        found_inf = getattr(self, "found_inf", None)
        return found_inf is not None and bool(found_inf.item())

    def _gradients(self, group: dict[str, Any], params: list[Tensor]) -> Tensor:
        """The gradients to descend along, unscaled, in the dtype of the states: this process's shards, stacked."""
        g = torch.stack(locals_of([p.grad for p in params])).to(wide_dtype(params[0]))
        scale = getattr(self, "grad_scale", None)
        if scale is not None:
            g = g / scale.to(g.device, g.dtype, non_blocking=True).reshape(())
        return -g if group["maximize"] else g

    def _states(self, params: list[Tensor], name: str) -> list[Tensor]:
        """One state of each parameter: this process's shards."""
        return locals_of([self.state[p][name] for p in params])

    def _apply(self, params: list[Tensor], decay: float | Tensor, updates: Tensor) -> None:
        """p ← decay p - update, in the dtype of the updates."""
        targets = locals_of(params)
        same = params[0].dtype is updates.dtype
        values = targets if same else [target.to(updates.dtype) for target in targets]
        torch._foreach_mul_(values, decay)
        torch._foreach_sub_(values, updates.unbind())
        if not same:
            torch._foreach_copy_(targets, values)
        if targets is not params and not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(params)

    # --- checkpoints ---

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class.

        Everything is checked first: a state dict that does not fit raises a ValueError and changes nothing.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            if replaced is not None:
                state_dict = replaced
        if not isinstance(state_dict.get("state"), dict) or not isinstance(
            state_dict.get("param_groups"), list
        ):
            raise self._refuse("a state dict has the keys 'state' and 'param_groups'")
        saved_groups = state_dict["param_groups"]
        sizes = [len(group["params"]) for group in self.param_groups]
        saved_sizes = [len(group.get("params", ())) for group in saved_groups]
        if sizes != saved_sizes:
            raise self._refuse(f"its groups have {saved_sizes} parameters, this optimizer's have {sizes}")
        states = dict(state_dict["state"])
        groups = []
        loaded = type(self.state)(dict)
        for number, (group, saved_group) in enumerate(zip(self.param_groups, saved_groups, strict=True)):
            saved = {name: states.pop(name) for name in saved_group["params"] if name in states}
            group, group_states = self._loaded_group(number, group, saved_group, saved)
            groups.append(group)
            loaded.update(group_states)
        if states:
            raise self._refuse(f"it has states of unknown parameters: {sorted(states, key=str)[:5]}")
        self.__setstate__({"state": loaded, "param_groups": groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _refuse(self, reason: str) -> ValueError:
        return ValueError(f"{type(self).__name__}.load_state_dict: {reason}; nothing was loaded")

    def _loaded_group(
        self, number: int, group: dict[str, Any], saved_group: dict[str, Any], saved: dict[Any, Any]
    ) -> tuple[dict[str, Any], dict[Tensor, dict[str, Any]]]:
        """The group to use from now on, and the states of its parameters."""
        missing = [
            name for name in self.defaults if name not in self._own_options and name not in saved_group
        ]
        if missing:
            raise self._refuse(f"group {number} has no {missing[0]}: it is of another optimizer")
        merged = {key: value for key, value in group.items() if key != "params"}
        merged |= deepcopy({key: value for key, value in saved_group.items() if key != "params"})
        try:
            self._check_group(merged)
            for p in group["params"]:
                self._check_param(merged, p)
        except ValueError as error:
            raise self._refuse(str(error)) from error
        states = {}
        for p, identifier in zip(group["params"], saved_group["params"], strict=True):
            if saved.get(identifier):
                states[p] = self._loaded_state(merged, p, identifier, saved[identifier])
        return {"params": group["params"], **merged}, states

    def _loaded_state(
        self, group: dict[str, Any], p: Tensor, identifier: Any, saved: dict[str, Any]
    ) -> dict[str, Any]:
        where, layout = f"the state of parameter {identifier}", self._state_layout(group, p)
        if set(saved) != set(layout):
            raise self._refuse(f"{where} has the keys {sorted(saved)}, expected {sorted(layout)}")
        state = {}
        for name, shape in layout.items():
            value = saved[name]
            if not isinstance(value, Tensor) or not value.is_floating_point():
                kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise self._refuse(f"{where}: {name} must be a floating-point tensor, got {kind}")
            expected = tuple(p.shape if shape is None else shape)
            if tuple(value.shape) != expected:
                raise self._refuse(f"{where}: {name} has shape {tuple(value.shape)}, expected {expected}")
            if name == "step" and (value < 0 or value != value.floor()):
                raise self._refuse(f"{where}: step must be a whole number, got {value.item()}")
            state[name] = self._new_state(p, name, shape).copy_(value)
        return state
