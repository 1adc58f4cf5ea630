"""Schedule-free AdamW and SGD (Defazio et al., "The Road Less Scheduled", NeurIPS 2024, arXiv 2405.15682)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from narrowgauge.ops import system
from narrowgauge.optim import tensors
from narrowgauge.optim.base import LISTS, Call, Common, ElementwiseOptimizer, Params, check_betas, check_range
from narrowgauge.optim.elementwise import Rule, Scalar, interpolate, square_root
from narrowgauge.optim.rule_samples import PARAM_UPDATES

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _average(rate: Tensor, weight: Tensor, beta1: float) -> tuple[Scalar, ...]:
    """What both rules need to move y towards z and along the direction."""
    return 1 - weight, weight, rate * (1 - beta1 * (1 - weight)), rate


def _adamw_scalars(
    variant: int,
    lr: Tensor,
    step: Tensor,
    given: list[Tensor],
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
) -> tuple[Scalar, ...]:
    rate, weight, correction = given
    return beta2, 1 - beta2, correction, eps, weight_decay, *_average(rate, weight, beta1)


def _adamw_update(
    variant: int, p: Tensor, g: Tensor, states: list[Tensor], scalars: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    second_keep, second_weight, correction, eps, decay, keep, weight, step_size, rate = scalars
    z, v = states
    v = v * second_keep + second_weight * g * g
    direction = g / (square_root(v) / correction + eps) + decay * p
    return interpolate(p, z, keep, weight) - step_size * direction, [z - rate * direction, v]


def _sgd_scalars(
    variant: int, lr: Tensor, step: Tensor, given: list[Tensor], momentum: float, weight_decay: float
) -> tuple[Scalar, ...]:
    return weight_decay, *_average(given[0], given[-1], momentum)


def _sgd_update(
    variant: int, p: Tensor, g: Tensor, states: list[Tensor], scalars: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    decay, keep, weight, step_size, rate = scalars
    if variant == 1:
        return interpolate(p, g, keep, weight), []
    (z,) = states
    direction = g + decay * p
    return interpolate(p, z, keep, weight) - step_size * direction, [z - rate * direction]


schedule_free_adamw_rule = Rule(
    name="schedule_free_adamw",
    options=("beta1", "beta2", "weight_decay", "eps"),
    signed=((True, False),),
    scalars=_adamw_scalars,
    update=_adamw_update,
    given=(3,),
    sample_options=(0.9, 0.999, 1e-2, 1e-8),
)

# Variant 1 only moves p towards g, by a weight.
schedule_free_sgd_rule = Rule(
    name="schedule_free_sgd",
    options=("momentum", "weight_decay"),
    signed=((True,), ()),
    scalars=_sgd_scalars,
    update=_sgd_update,
    given=(2, 1),
    sample_options=(0.9, 1e-2),
)


class _ScheduleFree(ElementwiseOptimizer):
    _counts_no_steps = True  # the authors' count steps by group

    def _momentum(self, group: dict[str, Any]) -> float:
        raise NotImplementedError

    def _correction(self, group: dict[str, Any], step: Tensor) -> list[Tensor]:
        """What the rule is given beside the learning rate and the average's weight."""
        return []

    def _check_options(self, group: dict[str, Any]) -> None:
        name = type(self).__name__
        check_range(name, "weight_decay", group["weight_decay"], 0)
        check_range(name, "warmup_steps", group["warmup_steps"], 0)
        check_range(name, "r", group["r"], 0)
        check_range(name, "weight_lr_power", group["weight_lr_power"], 0)
        if not 0 < self._momentum(group) < 1:
            what = "momentum" if "momentum" in group else "betas[0]"
            raise ValueError(f"{name}: {what} must be in (0, 1), got {self._momentum(group)!r}")
        if group["state_dtype"] not in ("fp32", "bf16"):
            raise ValueError(
                f"{name}: state_dtype must be 'fp32' or 'bf16', got {group['state_dtype']!r}; "
                "its state z holds weights, which codes of 8 bits and less cannot"
            )

    def _init_own(self, group: dict[str, Any], p: Tensor, state: dict[str, Any]) -> None:
        state["z"].copy_(p.detach())

    def _schedule(self, call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """This step's number, its learning rate, the largest so far, and the point's weight in the average."""
        group = call.group
        k, largest = (tensors.group_number(group, name, call.device)[0] for name in ("k", "lr_max"))
        step = k + 1
        rate = call.learning_rate()
        if group["warmup_steps"]:
            rate = rate * (step / group["warmup_steps"]).clamp(max=1)
        largest = torch.maximum(rate, largest)
        return step, rate, largest, step ** group["r"] * largest ** group["weight_lr_power"]

    def _begin_step(self, calls: list[Call]) -> None:
        if not all(group["train_mode"] for group in self.param_groups):
            raise RuntimeError(
                f"{type(self).__name__}.step: the parameters hold the average, not the point to train at; "
                "call train() first"
            )

    def _given(self, call: Call) -> tuple[Tensor | None, Tensor | None]:
        step, rate, _, weight = self._schedule(call)
        total = tensors.group_number(call.group, "weight_sum", call.device)[0] + weight
        share = torch.where(total > 0, weight / total, 0.0)
        numbers = torch.stack([rate, share, *self._correction(call.group, step)])
        return numbers.expand(len(call.params), -1).contiguous(), None

    def _end_step(self, calls: list[Call]) -> None:
        for previous, call in zip([None, *calls], calls, strict=False):
            if previous is not None and previous.group is call.group:
                continue
            step, _, largest, weight = self._schedule(call)
            total = tensors.group_number(call.group, "weight_sum", call.device)[0] + weight
            for name, value in (("k", step), ("lr_max", largest), ("weight_sum", total)):
                kept = call.group[name]
                if call.found_inf is not None:
                    value = torch.where(call.found_inf.reshape(()) != 0, kept, value)
                kept.copy_(value)

    def train(self) -> None:
        """Puts the point where gradients are taken into the parameters; call it before training goes on."""
        self._switch(True)

    def eval(self) -> None:
        """Puts the average into the parameters: the model to evaluate and to keep."""
        self._switch(False)

    @torch.no_grad()
    def _switch(self, train_mode: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] is train_mode:
                continue
            beta1 = self._momentum(group)
            self._move_to_z(group, 1 - beta1 if train_mode else 1 - 1 / beta1)
            group["train_mode"] = train_mode

    def _move_to_z(self, group: dict[str, Any], weight: float) -> None:
        """p + weight (z - p), rounded and kept as every other update of the parameter."""
        batches: dict[Any, list[list[Any]]] = {}
        rest_name = self._rest_name(group)
        for p in group["params"]:
            state = self.state.get(p)
            if not state:
                continue
            rest, copy = state.get(rest_name), self._copies.get(p)
            key = (p.dtype, p.device, state["z"].dtype, rest is not None, copy is not None and copy.dtype)
            lists = batches.setdefault(key, [[] for _ in LISTS])
            for name, value in (("params", p), ("grads", state["z"]), ("steps", state["step"])):
                lists[LISTS.index(name)].append(value)
            lists[LISTS.index("rests")] += [] if rest is None else [rest]
            lists[LISTS.index("copies")] += [] if copy is None else [copy]
        for lists in batches.values():
            call = Call(self, group, False, lists)
            how = call.param_update if call.param_update != "stochastic" else "nearest"
            steps = list(torch.zeros(len(call.params), device=call.device).unbind())
            given = torch.full((len(call.params), 1), weight, dtype=torch.float64, device=call.device)
            schedule_free_sgd_rule.step(
                *(call.params, call.grads, [], [], steps, call.rests, [], call.copies, given, None),
                *(None, 0.0, [0.0, 0.0], 1, 0, PARAM_UPDATES.index(how), False, False, 0.0, []),
                *(group["seed"], [], [], None, None, None),
            )
            call.finish()


class ScheduleFreeAdamW(_ScheduleFree):
    """AdamW that needs no learning-rate schedule: gradients are taken between the iterate and its average.

    In training mode, which it begins in, the parameters hold that point between; `eval` puts the average into them and
    `train` takes it out again. A step outside training mode raises. A warm-up is all the schedule there is.
    Batch statistics of a model (BatchNorm) must be taken anew after `eval`.

    State: ``z`` and ``exp_avg_sq``, shaped like the parameter; a group also keeps ``k``, ``lr_max`` and ``weight_sum``
    on the device.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, a number or a tensor.
        betas: How near to the average gradients are taken, in (0, 1), and the decay rate of the second moment.
        eps: Added to the denominator.
        weight_decay: Decay at the point where gradients are taken.
        warmup_steps: Steps over which the rate grows linearly.
        r: The average weights step k by ``k**r``.
        weight_lr_power: And by the largest rate so far to this power.
        **common: See `narrowgauge.optim.base.Common`; of `state_dtype` only ``"fp32"`` and ``"bf16"``.

    Raises:
        ValueError: An argument is out of range.
    """

    _rule = schedule_free_adamw_rule

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        **common: Unpack[Common],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= _schedule_defaults(warmup_steps, r, weight_lr_power)
        super().__init__(params, defaults, common)

    def _momentum(self, group: dict[str, Any]) -> float:
        return float(group["betas"][0])

    def _check_options(self, group: dict[str, Any]) -> None:
        check_betas(type(self).__name__, group["betas"])
        check_range(type(self).__name__, "eps", group["eps"], 0)
        super()._check_options(group)

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("z", "exp_avg_sq")

    def _options(self, group: dict[str, Any]) -> list[float]:
        return [*group["betas"], group["weight_decay"], group["eps"]]

    def _correction(self, group: dict[str, Any], step: Tensor) -> list[Tensor]:
        return [(1 - group["betas"][1] ** step).sqrt()]


class ScheduleFreeSGD(_ScheduleFree):
    """SGD that needs no learning-rate schedule; as `ScheduleFreeAdamW`, without the second moment.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, a number or a tensor.
        momentum: How near to the average gradients are taken, in (0, 1).
        weight_decay: L2 penalty at the point where gradients are taken.
        warmup_steps: Steps over which the rate grows linearly.
        r: The average weights step k by ``k**r``.
        weight_lr_power: And by the largest rate so far to this power.
        **common: See `narrowgauge.optim.base.Common`; of `state_dtype` only ``"fp32"`` and ``"bf16"``.

    Raises:
        ValueError: An argument is out of range.
    """

    _rule = schedule_free_sgd_rule

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        **common: Unpack[Common],
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        defaults |= _schedule_defaults(warmup_steps, r, weight_lr_power)
        super().__init__(params, defaults, common)

    def _momentum(self, group: dict[str, Any]) -> float:
        return float(group["momentum"])

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("z",)

    def _options(self, group: dict[str, Any]) -> list[float]:
        return [group["momentum"], group["weight_decay"]]


def _schedule_defaults(warmup_steps: int, r: float, weight_lr_power: float) -> dict[str, Any]:
    """The arguments both have, and what a group keeps between steps."""
    schedule = {"warmup_steps": warmup_steps, "r": r, "weight_lr_power": weight_lr_power}
    return schedule | {"k": 0, "train_mode": True, "weight_sum": 0.0, "lr_max": -1.0}


system(
    "schedule_free",
    title="Schedule-free AdamW and SGD",
    source="arXiv 2405.15682",
    page="optim/schedule_free.md",
    modules=("optim.ScheduleFreeAdamW", "optim.ScheduleFreeSGD"),
    operators=("schedule_free_adamw_", "schedule_free_sgd_"),
    golden=("extra_optim",),
    bench=("schedule_free",),
)
