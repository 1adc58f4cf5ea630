"""What the optimizers of whole matrices share: checks, gradients, checkpoints. Their products are PyTorch's matmul."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from narrowgauge.ops.operator import FLOATING
from narrowgauge.optim import tensors
from narrowgauge.optim.base import Params, check_range
from narrowgauge.optim.checkpoint import Checkpoints, Entry

# A batch holds at most so many elements, or one parameter: it bounds the memory of a step.
BATCH_ELEMENTS = 1 << 24


def wide_dtype(p: Tensor) -> torch.dtype:
    """What a parameter's states are stored and computed in."""
    return torch.float64 if p.dtype is torch.float64 else torch.float32


def check_flag(function: str, name: str, value: Any) -> None:
    """A hyperparameter must be True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{function}: {name} must be True or False, got {value!r}")


def check_count(function: str, name: str, value: Any, low: int = 1, below: float = float("inf")) -> None:
    """A hyperparameter must be a whole number in [low, below)."""
    check_range(function, name, value, low, below)
    if not isinstance(value, int):
        raise ValueError(f"{function}: {name} must be a whole number, got {value!r}")


def like_parameter(p: Tensor) -> Entry:
    """The record of a state shaped like its parameter."""
    return Entry(wide_dtype(p))


def square(p: Tensor, size: int) -> Entry:
    """The record of a matrix beside a parameter."""
    return Entry(wide_dtype(p), lambda numel: (size, size))


STEP = Entry(torch.float32, lambda numel: ())


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


def locals_of(values: list[Any]) -> list[Tensor]:
    """This process's shards; the list itself if nothing is sharded."""
    return [x.to_local() for x in values] if tensors.is_dtensor(values[0]) else values


def _stacked_placements(p: Any) -> list[Any]:
    """Where the dimensions of parameters like `p` are when they are stacked."""

    def moved(place: Any) -> Any:
        if place.is_replicate():
            return place
        strided = {"split_factor": place.split_factor} if hasattr(place, "split_factor") else {}
        return type(place)(place.dim + 1, **strided)

    return [moved(place) for place in p.placements]


def whole(stacked: Tensor, p: Any) -> Tensor:
    """The whole of tensors whose shards, cut like `p`, this process has."""
    if not tensors.is_dtensor(p):
        return stacked
    shape = torch.Size((len(stacked), *p.shape))
    stride = torch.empty(shape, device="meta").stride()
    placed = _stacked_placements(p)
    x = tensors.dtensor_class().from_local(
        stacked, p.device_mesh, placed, run_check=False, shape=shape, stride=stride
    )
    return x.full_tensor()


def shards(stacked: Tensor, p: Any) -> Tensor:
    """This process's shards of tensors that all have, cut like `p`; nothing is sent."""
    if not tensors.is_dtensor(p):
        return stacked
    from torch.distributed.tensor import Replicate

    everywhere = [Replicate()] * p.device_mesh.ndim
    x = tensors.dtensor_class().from_local(stacked, p.device_mesh, everywhere, run_check=False)
    return x.redistribute(placements=_stacked_placements(p)).to_local()


class MatrixOptimizer(Checkpoints):
    """Base of the optimizers that treat a parameter as a matrix or a product of modes.

    A subclass defines `_check_options`, `_check_param`, `_state_layout` and `_step_group`. States that are not shaped
    like their parameter are whole in every process.
    """

    _step_supports_amp_scaling = True
    # Arguments that state dicts of other implementations do not have.
    _own_options: ClassVar[tuple[str, ...]] = ("maximize",)

    def __init__(self, params: Params, defaults: dict[str, Any]) -> None:
        self._check_group(defaults)
        super().__init__(params, defaults)

    # --- what a subclass defines ---

    def _check_options(self, group: dict[str, Any]) -> None:
        """Raises for arguments of the method that are out of range."""
        raise NotImplementedError

    def _check_param(self, group: dict[str, Any], p: Tensor) -> None:
        """Raises for parameters that the method cannot update."""

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
            if not self.state[p]:
                self._init_state(group, p)
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

    def _init_state(self, group: dict[str, Any], p: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[p]
        for name, entry in self._state_layout(group, p).items():
            state[name] = self._new_state(p, entry)
        return state

    def _new_state(self, p: Tensor, entry: Entry) -> Tensor:
        if entry.shape is None:
            return super()._new_state(p, entry)
        shape = entry.shape(p.numel())
        # Steps are counted on the host, which decides by them.
        return torch.zeros(shape, dtype=entry.dtype, device=p.device if shape else "cpu")

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

    def dequantized_state_dict(self) -> dict[str, Any]:
        """The state dict: no state is coded."""
        return self.state_dict()

    def _hyperparameters(self) -> list[str]:
        return [name for name in self.defaults if name not in self._own_options]

    def _check_state(self, group: dict[str, Any], p: Tensor, identifier: Any, saved: dict[str, Any]) -> None:
        where, layout = f"the state of parameter {identifier}", self._state_layout(group, p)
        if set(saved) != set(layout):
            raise self._refuse(f"{where} has the keys {sorted(saved)}, expected {sorted(layout)}")
        for name, entry in layout.items():
            value = saved[name]
            if not isinstance(value, Tensor) or not value.is_floating_point():
                kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise self._refuse(f"{where}: {name} must be a floating-point tensor, got {kind}")
            expected = tuple(p.shape if entry.shape is None else entry.shape(p.numel()))
            if tuple(value.shape) != expected:
                raise self._refuse(f"{where}: {name} has shape {tuple(value.shape)}, expected {expected}")
            if name == "step" and (value < 0 or value != value.floor()):
                raise self._refuse(f"{where}: step must be a whole number, got {value.item()}")

    def _loaded_state(self, group: dict[str, Any], p: Tensor, saved: dict[str, Any]) -> dict[str, Any]:
        layout = self._state_layout(group, p)
        return {name: self._new_state(p, entry).copy_(saved[name]) for name, entry in layout.items()}
