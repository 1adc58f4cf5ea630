"""What the optimizers share that keep Adam's moments in a basis of each matrix gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from narrowgauge.ops import checks
from narrowgauge.optim import codec, tensors
from narrowgauge.optim.adamw import AdamW
from narrowgauge.optim.base import Call, check_range
from narrowgauge.optim.checkpoint import Entry
from narrowgauge.optim.elementwise import Rule, Scalar, integer_power, square_root, stream_seed
from narrowgauge.optim.projection import PROJ_TYPES, PROJECTIONS, find_bases, sides
from narrowgauge.optim.rule_samples import PARAM_UPDATES


def _scalars(
    variant: int,
    lr: Tensor,
    step: Tensor,
    given: list[Tensor],
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> tuple[Scalar, ...]:
    correction = (1 - integer_power(beta2, step)).sqrt()
    step_size = lr * correction / (1 - integer_power(beta1, step))
    return beta1, 1 - beta1, beta2, 1 - beta2, step_size, eps, 1 - lr * weight_decay


def _update(
    variant: int, p: Tensor, g: Tensor, states: list[Tensor], scalars: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    first_keep, first_weight, second_keep, second_weight, step_size, eps, decay = scalars
    if variant == 1:
        return (p - g) * decay, states
    m = first_keep * states[0] + first_weight * g
    v = second_keep * states[1] + second_weight * g * g
    return step_size * m / (square_root(v) + eps), [m, v]


# Variant 0 replaces its parameter, a buffer, by what Adam subtracts, with eps outside the bias correction; variant 1
# subtracts its gradient, which is that projected back, and decays.
low_rank_rule = Rule(
    name="low_rank",
    options=("beta1", "beta2", "eps", "weight_decay"),
    signed=((True, False), ()),
    scalars=_scalars,
    update=_update,
    sample_options=(0.9, 0.999, 1e-6, 1e-2),
)

OWN_OPTIONS = ("rank", "update_proj_gap", "scale", "proj_type", "projection")


class LowRankCall(Call):
    """Parameters of one dtype that take a low-rank step together."""

    optimizer: LowRankOptimizer

    @torch._disable_dynamo
    def step(self, given: Tensor | None = None, rows: Tensor | None = None, zero_grad: bool = False) -> None:
        self.skipped = None if self.found_inf is None else self.found_inf.reshape(()) != 0
        self.optimizer._low_rank_step(self)
        for target, value in self.written_back:
            target.copy_(value)
        for p in self.whole if zero_grad else ():
            assert p.grad is not None
            self.write(p.grad, torch.zeros_like(p.grad))
        torch.autograd.graph.increment_version(self.whole)

    def write(self, target: Tensor, value: Tensor) -> None:
        """Copies, unless the step is skipped."""
        target.copy_(value if self.skipped is None else torch.where(self.skipped, target, value))

    def gradient(self, i: int) -> Tensor:
        """Of parameter i, as a matrix in float32 or float64; not yet scaled."""
        return matrix(self.grads[i], compute_dtype(self.params[i]))

    def adam(
        self,
        params: Sequence[Tensor],
        grads: list[Tensor],
        names: Sequence[str],
        *,
        scaled: bool = False,
        last: bool = True,
    ) -> list[Tensor]:
        """Adam's updates, zero when the step is skipped.

        Args:
            params: Parameters as the user has them.
            grads: For each of them a gradient in the shape of the moments.
            names: The names of the two moments.
            scaled: Whether the gradients are still to be divided, clipped and negated as the call says.
            last: Whether the step counters go up.
        """
        updates = [torch.zeros_like(g, memory_format=torch.contiguous_format) for g in grads]
        alike: dict[bool, list[int]] = {}
        for i, p in enumerate(params):
            alike.setdefault(f"{names[0]}.codes" in self.optimizer.state[p], []).append(i)
        for coded, numbers in alike.items():
            kept = [self.optimizer.state[params[i]] for i in numbers]
            suffix = ".codes" if coded else ""
            states = [state[name + suffix] for state in kept for name in names]
            scales = [state[f"{name}.scale"] for state in kept for name in names] if coded else []
            steps = [state["step"] if last else state["step"].clone() for state in kept]
            narrow = states[0].dtype is torch.bfloat16
            stored = self.group["state_dtype"] if coded or narrow else "fp32"
            stochastic = narrow and self.group["param_update"] == "stochastic"
            self._rule_step(
                [updates[i] for i in numbers],
                [grads[i].contiguous() for i in numbers],
                states,
                scales,
                steps,
                state_dtype=stored,
                param_update="stochastic" if stochastic else "nearest",
                indices=[self.optimizer._indices[params[i]] for i in numbers] if stochastic else [],
                maximize=self.group["maximize"] and scaled,
                scalers=(self.grad_scale, self.clip) if scaled else (None, None),
            )
        return updates

    def subtract(self, i: int, delta: Tensor, weight_decay: float = 0.0) -> None:
        """p <- (p - delta) (1 - lr weight_decay), kept as the group wants narrow parameters kept."""
        p, whole = self.params[i], self.whole[i]
        stochastic = self.param_update == "stochastic"
        step = self.optimizer.state[whole]["step"] - 1 if stochastic else torch.zeros((), device=p.device)
        self._rule_step(
            [p],
            [tensors.like(delta.view(p.shape), p)],
            [],
            [],
            [step],
            variant=1,
            rest=[self.rests[i : i + 1], self.emas[i : i + 1], self.copies[i : i + 1]],
            weight_decay=weight_decay,
            param_update=self.param_update,
            indices=[self.optimizer._indices[whole]] if stochastic else [],
        )

    def is_plain(self, i: int) -> bool:
        """Whether parameter i can be updated by PyTorch's matrix product in place."""
        p = self.params[i]
        return p.dim() == 2 and p.dtype is compute_dtype(p) and not self.emas and not self.copies

    def decay(self) -> float | Tensor:
        """1 - lr weight_decay, and 1 when the step is skipped."""
        weight_decay = self.group["weight_decay"]
        if not weight_decay:
            return 1.0
        lr = self.lr if self.lr_tensor is None else self.lr_tensor.reshape(())
        decay = 1.0 - lr * weight_decay
        return decay if self.skipped is None else torch.where(self.skipped, 1.0, decay)

    def _rule_step(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        states: list[Tensor],
        scales: list[Tensor],
        steps: list[Tensor],
        *,
        variant: int = 0,
        rest: Sequence[Sequence[Tensor]] = ((), (), ()),
        weight_decay: float = 0.0,
        state_dtype: str = "fp32",
        param_update: str = "nearest",
        maximize: bool = False,
        indices: Sequence[int] = (),
        scalers: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> None:
        group = self.group
        rests, emas, copies = (list(each) for each in rest)
        options = [*group["betas"], group["eps"], weight_decay]
        numbers = variant, codec.FORMATS[state_dtype].number, PARAM_UPDATES.index(param_update)
        low_rank_rule.step(
            *(params, grads, states, scales, steps, rests, emas, copies, None, None),
            *(self.lr_tensor, self.lr, options, *numbers, maximize, False, group["ema_decay"] or 0.0),
            *([], group["seed"], list(indices), [0] * len(indices), *scalers, self.found_inf),
        )


class LowRankOptimizer(AdamW):
    """Base of the optimizers that keep their moments in a basis of the gradient.

    A subclass defines `_low_rank_step`; groups that are not its own, as `_is_own` says, are `AdamW`.
    """

    _until_look: dict[Tensor, int]

    # --- what a subclass defines ---

    def _is_own(self, group: dict[str, Any]) -> bool:
        return group["rank"] is not None

    def _moment_shapes(self, group: dict[str, Any], p: Tensor) -> dict[str, tuple[int, ...]]:
        """The moments by name; those with the shape of the projected gradient are stored as `state_dtype` says."""
        low = low_shape(group, p)
        return {"exp_avg": low, "exp_avg_sq": low}

    def _low_rank_step(self, call: LowRankCall) -> None:
        raise NotImplementedError

    # --- groups ---

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        name, rank = type(self).__name__, group["rank"]
        if rank is not None:
            _check_count(name, "rank", rank, " or None")
        _check_count(name, "update_proj_gap", group["update_proj_gap"])
        check_range(name, "scale", group["scale"], 0)
        checks.check_choice(name, "proj_type", group["proj_type"], PROJ_TYPES)
        checks.check_choice(name, "projection", group["projection"], PROJECTIONS)
        for option in ("amsgrad", "cautious") if self._is_own(group) else ():
            if group[option]:
                raise ValueError(f"{name}: {option} must be False in a group with low-rank states")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):
            options = {**self.defaults, **param_group}
            params = param_group["params"]
            param_group["params"] = params = [params] if isinstance(params, Tensor) else list(params)
            for p in params:
                tensor = p[1] if isinstance(p, tuple) else p
                if isinstance(tensor, Tensor) and self._is_own(options):
                    self._check_param(options, tensor)
        super().add_param_group(param_group)

    def _check_param(self, group: dict[str, Any], p: Tensor) -> None:
        name = type(self).__name__
        if p.is_complex():
            raise ValueError(f"{name}: a parameter has dtype {p.dtype}; low-rank states are for real ones")
        if tensors.is_dtensor(p):
            raise ValueError(
                f"{name}: a parameter is sharded (DTensor), but its basis needs the whole gradient; "
                "put it into a group with rank=None, or of narrowgauge.optim.AdamW"
            )
        if group["rank"] is not None and p.dim() < 2:
            raise ValueError(
                f"{name}: a parameter of shape {tuple(p.shape)} is no matrix; put it into a group with rank=None"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._until_look = {}

    # --- states: the rule of the base sees none, they are all our own ---

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return () if self._is_own(group) else super()._state_names(group)

    def _signed(self, group: dict[str, Any]) -> tuple[bool, ...]:
        return () if self._is_own(group) else super()._signed(group)

    def _own_layout(self, group: dict[str, Any], p: Tensor) -> dict[str, Entry]:
        if not self._is_own(group):
            return {}
        wide, low, record = compute_dtype(p), low_shape(group, p), codec.FORMATS[group["state_dtype"]]
        layout = {name: _entry(wide, shape) for name, shape in projection_shapes(group, p).items()}
        for name, shape in self._moment_shapes(group, p).items():
            if shape == low and self._is_coded(group, p):
                layout[f"{name}.codes"] = _entry(
                    record.codes_dtype(_is_signed(name)), record.codes_shape(shape)
                )
                layout[f"{name}.scale"] = _entry(record.scale, record.scale_shape(math.prod(shape)))
            else:
                narrow = shape == low and record.name == "bf16" and wide is torch.float32
                layout[name] = _entry(torch.bfloat16 if narrow else wide, shape)
        return layout

    def dequantized_state_dict(self) -> dict[str, Any]:
        result = super().dequantized_state_dict()
        for group, saved in zip(self.param_groups, result["param_groups"], strict=True):
            for p, identifier in zip(group["params"], saved["params"], strict=True):
                state = result["state"].get(identifier, {})
                for name in [key.removesuffix(".codes") for key in state if key.endswith(".codes")]:
                    encoded = {part: state.pop(f"{name}.{part}") for part in ("codes", "scale")}
                    shape, signed = self._moment_shapes(group, p)[name], _is_signed(name)
                    state[name] = codec.decode_state(
                        encoded, group["state_dtype"], signed=signed, shape=shape
                    )
        return result

    def _hyperparameters(self) -> list[str]:
        return [name for name in super()._hyperparameters() if name not in OWN_OPTIONS]

    # --- the step ---

    def _new_call(self, group: dict[str, Any], plain: bool, lists: list[list[Any]]) -> Call:
        return (LowRankCall if self._is_own(group) else Call)(self, group, plain, lists)

    def _bases(self, call: LowRankCall, i: int, g: Tensor) -> tuple[tuple[str, ...], list[Tensor]]:
        """Sides and bases in force at this step, found anew from `g` every `update_proj_gap` steps.

        The step counter lives on the device, and stands still when a step is skipped. So the host counts calls, which
        are never fewer, and looks at the counter only when a new basis may be due.
        """
        group, p = call.group, call.whole[i]
        names = list(projection_shapes(group, p))
        if not names:
            return (), []
        state, where = self.state[p], sides(g.shape, group["proj_type"])
        bases = [state[name] for name in names]
        left = self._until_look.get(p, 0)
        if left > 0:
            self._until_look[p] = left - 1
            return where, bases
        if call.skipped is not None and call.skipped.item():
            return where, bases
        step, gap = int(state["step"].item()), group["update_proj_gap"]
        self._until_look[p] = gap - 1 - step % gap
        if step % gap == 0:
            generator = torch.Generator()
            generator.manual_seed(stream_seed(stream_seed(group["seed"], self._indices[p]), step) % 2**63)
            rank, old = min(group["rank"], *g.shape), bases if step else None
            new = find_bases(g, rank, where, group["projection"], old, generator)
            for basis, value in zip(bases, new, strict=True):
                basis.copy_(value)
        return where, bases


def compute_dtype(p: Tensor) -> torch.dtype:
    """float64 for float64 parameters, else float32."""
    return torch.float64 if p.dtype is torch.float64 else torch.float32


def matrix_shape(x: Tensor) -> tuple[int, int]:
    """A tensor of more dimensions is the matrix of its first one against the others; a vector is one row."""
    rows = x.shape[0] if x.dim() > 1 else 1
    return rows, math.prod(x.shape[1:]) if x.dim() > 1 else x.numel()


def matrix(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` as a matrix of this dtype, itself where it is one already."""
    return x.to(dtype).reshape(matrix_shape(x))


def low_shape(group: dict[str, Any], p: Tensor) -> tuple[int, int]:
    """The shape of the projected gradient."""
    rows, columns = matrix_shape(p)
    if group["rank"] is None:
        return rows, columns
    rank, where = min(group["rank"], rows, columns), sides((rows, columns), group["proj_type"])
    return rank if "left" in where else rows, rank if "right" in where else columns


def projection_shapes(group: dict[str, Any], p: Tensor) -> dict[str, tuple[int, int]]:
    """The bases by their names in the state."""
    if group["rank"] is None:
        return {}
    rows, columns = matrix_shape(p)
    rank, where = min(group["rank"], rows, columns), sides((rows, columns), group["proj_type"])
    shapes = {"left": (rows, rank), "right": (rank, columns)}
    return {"projection" if len(where) == 1 else f"projection_{side}": shapes[side] for side in where}


def _is_signed(moment: str) -> bool:
    return "sq" not in moment


def _entry(dtype: torch.dtype, shape: tuple[int, ...]) -> Entry:
    return Entry(dtype, lambda numel: shape)


def _check_count(function: str, name: str, value: Any, or_else: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{function}: {name} must be an integer >= 1{or_else}, got {value!r}")
