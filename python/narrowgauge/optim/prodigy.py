"""Prodigy (Mishchenko and Defazio, "Prodigy: An Expeditiously Adaptive Parameter-Free Learner", ICML 2024,
arXiv 2306.06101)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from narrowgauge.ops import system
from narrowgauge.optim import codec, tensors
from narrowgauge.optim.base import Call, Common, ElementwiseOptimizer, Params, check_betas, check_range
from narrowgauge.optim.checkpoint import Entry
from narrowgauge.optim.elementwise import Rule, Scalar, square_root
from narrowgauge.optim.rule_samples import PARAM_UPDATES

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Variants: l2 + 2 for the first of the two sums, <g, p0 - p>, whose only state is p0.


def _scalars(
    variant: int,
    lr: Tensor,
    step: Tensor,
    given: list[Tensor],
    beta1: float,
    beta2: float,
    beta3: float,
    weight_decay: float,
    eps: float,
) -> tuple[Scalar, ...]:
    d, rate, s_weight, next_d = given or (0.0,) * 4
    decay = weight_decay if variant & 1 else 1 - rate * weight_decay
    return (
        *(beta1, d * (1 - beta1), beta2, d * d * (1 - beta2), beta3, s_weight),
        *(decay, rate, next_d * eps),
    )


def _update(
    variant: int, p: Tensor, g: Tensor, states: list[Tensor], scalars: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    if variant & 2:
        return p, states
    first_keep, first_weight, second_keep, second_weight, s_keep, s_weight, decay, rate, eps = scalars
    if variant & 1:
        g = g + decay * p
    m, v, s = states
    m = m * first_keep + first_weight * g
    v = v * second_keep + second_weight * g * g
    s = s * s_keep + s_weight * g
    return (p if variant & 1 else p * decay) - rate * m / (square_root(v) + eps), [m, v, s]


def _terms(variant: int, p: Tensor, g: Tensor, states: list[Tensor], scalars: list[Tensor]) -> list[Tensor]:
    s_keep, s_weight, decay = scalars[4:7]
    if variant & 1:
        g = g + decay * p
    if variant & 2:
        return [g * (states[0] - p)]
    return [(states[2] * s_keep + s_weight * g).abs()]


prodigy_rule = Rule(
    name="prodigy",
    options=("beta1", "beta2", "beta3", "weight_decay", "eps"),
    signed=((True, False, True),) * 2 + ((True,),) * 2,
    scalars=_scalars,
    update=_update,
    terms=_terms,
    sums=(1, 1, 1, 1),
    given=(4, 4, 0, 0),
    sample_options=(0.9, 0.999, 0.999**0.5, 1e-2, 1e-8),
)


def _skip(call: Call, flag: Tensor) -> None:
    call.found_inf = flag if call.found_inf is None else torch.maximum(flag, call.found_inf.reshape(()))


# What every group holds of the estimate, as prodigyopt does, but on the device.
_NUMBERS = ("d", "d_max", "d_numerator", "k")


class Prodigy(ElementwiseOptimizer):
    """Adam that estimates its learning rate: leave `lr` at 1 and use it for schedules only.

    One estimate d for all parameters grows from `d0` to about the distance travelled over the gradients' norm. It stays
    on the device, as ``d`` in every group, in float64; a step waits for nothing. Two sums over everything precede it.

    State: ``exp_avg``, ``exp_avg_sq``, ``s`` (a moving sum of gradients) and ``p0`` (the parameter as it began, never
    coded). A step that is skipped, and one whose sums are not finite, leave the estimate as it was. `betas`, `beta3`,
    `d0`, `d_coef`, `growth_rate`, `use_bias_correction` and `safeguard_warmup` are those of the first group.

    Args:
        params: Parameters or parameter groups.
        lr: Factor of the estimated rate, a number or a tensor. Groups have the same or 0, which freezes a group.
        betas: Decay rates of the first and second moment.
        beta3: Decay rate of the sums; None is the square root of ``betas[1]``.
        eps: Added to the denominator, times d.
        weight_decay: Weight decay.
        decouple: Decay the parameter as AdamW does; otherwise the decay is added to the gradient.
        use_bias_correction: Correct the moments as Adam does.
        safeguard_warmup: Keep `lr` out of the denominator of the estimate, for schedules with a warm-up.
        d0: First estimate.
        d_coef: Factor of the estimate; the one to tune.
        growth_rate: The estimate grows at most by this factor in a step.
        fsdp_in_use: Add the sums over all processes. Needed for plain tensors that are shards; DTensors are seen.
        slice_p: Must be 1.
        **common: See `narrowgauge.optim.base.Common`.

    Raises:
        ValueError: An argument is out of range, or groups have different rates.
    """

    _rule = prodigy_rule

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        beta3: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decouple: bool = True,
        use_bias_correction: bool = False,
        safeguard_warmup: bool = False,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: float = math.inf,
        fsdp_in_use: bool = False,
        slice_p: int = 1,
        **common: Unpack[Common],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "beta3": beta3,
            "eps": eps,
            "weight_decay": weight_decay,
            "decouple": decouple,
            "use_bias_correction": use_bias_correction,
            "safeguard_warmup": safeguard_warmup,
            "d": d0,
            "d0": d0,
            "d_max": d0,
            "d_numerator": 0.0,
            "d_coef": d_coef,
            "k": 0,
            "growth_rate": growth_rate,
            "fsdp_in_use": fsdp_in_use,
            "slice_p": slice_p,
        }
        super().__init__(params, defaults, common)

    # --- options and states ---

    def _check_options(self, group: dict[str, Any]) -> None:
        name = type(self).__name__
        check_betas(name, group["betas"])
        if group["beta3"] is not None:
            check_range(name, "beta3", group["beta3"], 0, 1)
        check_range(name, "eps", group["eps"], 0)
        check_range(name, "weight_decay", group["weight_decay"], 0)
        for option in ("d0", "d_coef"):
            check_range(name, option, group[option], 0)
            if group[option] == 0:
                raise ValueError(f"{name}: {option} must be greater than 0, got 0")
        if not group["growth_rate"] >= 1:
            raise ValueError(f"{name}: growth_rate must be at least 1, got {group['growth_rate']!r}")
        if group["slice_p"] != 1:
            raise ValueError(
                f"{name}: slice_p must be 1, got {group['slice_p']!r}; to save memory use state_dtype='int8' or 'bf16'"
            )

    def _variant(self, group: dict[str, Any]) -> int:
        return int(not group["decouple"] and group["weight_decay"] != 0)

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "s")

    def _own_layout(self, group: dict[str, Any], p: Tensor) -> dict[str, Entry]:
        narrow = p.dtype in (torch.bfloat16, torch.float16)
        return {"p0": Entry(torch.float32 if narrow else p.dtype)}

    def _init_own(self, group: dict[str, Any], p: Tensor, state: dict[str, Any]) -> None:
        state["p0"].copy_(p.detach())

    def _check_state(self, group: dict[str, Any], p: Tensor, identifier: Any, saved: dict[str, Any]) -> None:
        for name in ("s", "p0"):  # prodigyopt keeps them flat, and zeros as one number
            value = saved.get(name)
            if isinstance(value, Tensor) and value.shape != p.shape and value.numel() in (1, p.numel()):
                saved[name] = value.reshape(-1).expand(p.numel()).reshape(p.shape)
        super()._check_state(group, p, identifier, saved)

    def _options(self, group: dict[str, Any]) -> list[float]:
        (beta1, beta2), beta3 = self.param_groups[0]["betas"], self.param_groups[0]["beta3"]
        return [
            beta1,
            beta2,
            math.sqrt(beta2) if beta3 is None else beta3,
            group["weight_decay"],
            group["eps"],
        ]

    # --- the step ---

    def _common_rate(self, device: torch.device) -> Tensor:
        """The rate of the groups that are not frozen."""
        rates = [group["lr"] for group in self.param_groups]
        if any(isinstance(rate, Tensor) for rate in rates):
            as_tensors = [
                rate.to(device, torch.float64).reshape(())
                if isinstance(rate, Tensor)
                else torch.full((), rate, dtype=torch.float64, device=device)
                for rate in rates
            ]
            return torch.stack(as_tensors).max()
        if len({rate for rate in rates if rate != 0}) > 1:
            raise ValueError(
                f"Prodigy.step: groups must have the same lr, or 0 to be left alone, got {rates}; "
                "there is one estimate for all"
            )
        return torch.full((), max(rates), dtype=torch.float64, device=device)

    def _distance(self, call: Call) -> Tensor:
        """<g, p0 - p> of each parameter of a call."""
        shards = [tensors.local(self.state[p]["p0"]) for p in call.whole]
        began = [tensors.like(shard, p) for shard, p in zip(shards, call.params, strict=True)]
        result = prodigy_rule.reduce(
            *(call.params, call.grads, began, [], call.steps, None, None, 0.0, self._options(call.group)),
            *(
                call.variant + 2,
                codec.FORMATS["fp32"].number,
                PARAM_UPDATES.index(call.param_update),
                call.rests,
            ),
            *(call.group["maximize"], [], call.grad_scale, call.clip),
        )
        return tensors.sum_over_shards(result.double(), call.whole[0])

    def _begin_step(self, calls: list[Call]) -> None:
        if not calls:
            return
        first, device = self.param_groups[0], calls[0].device
        d, largest, numerator, k = (tensors.group_number(first, name, device)[0] for name in _NUMBERS)
        for group in self.param_groups[1:]:  # that came later, or from a checkpoint
            group.update({name: first[name] for name in _NUMBERS})
        calls[:] = [call for call in calls if isinstance(call.group["lr"], Tensor) or call.group["lr"] != 0]
        if not calls:
            return
        overflow = calls[0].found_inf
        beta1, beta2, beta3, _, _ = self._options(first)
        rate = d * self._common_rate(device)
        if first["use_bias_correction"]:
            rate = rate * (1 - beta2 ** (k + 1)).sqrt() / (1 - beta1 ** (k + 1))
        s_weight = d / first["d0"] * (d if first["safeguard_warmup"] else rate)

        sums = torch.zeros(2, dtype=torch.float64, device=device)
        before = torch.stack([d, rate, s_weight, d])
        for call in calls:
            given = before.to(call.device).expand(len(call.params), -1).contiguous()
            parts = torch.stack([self._distance(call).sum(), call.sums(given).sum()])
            if call.lr_tensor is not None:
                frozen = call.learning_rate() == 0
                parts = torch.where(frozen, 0.0, parts)
                _skip(call, frozen.float())
            sums += parts.to(device)
        if first["fsdp_in_use"] and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)

        total = beta3 * numerator + d / first["d0"] * rate * sums[0]
        estimate = first["d_coef"] * total / sums[1]
        usable = (sums[1] > 0) & estimate.isfinite()
        grown = torch.where(d == first["d0"], torch.maximum(d, estimate), d)
        new_largest = torch.maximum(largest, estimate)
        new_d = torch.minimum(new_largest, grown * first["growth_rate"])
        self._next = [
            torch.where(usable, new, old)
            for new, old in ((new_d, d), (new_largest, largest), (total, numerator))
        ]
        self._next.append(k + 1)
        self._given_numbers = torch.stack([d, rate, s_weight, self._next[0]])
        nothing_yet = (sums[1] == 0).float()
        for call in calls:
            _skip(call, nothing_yet.to(call.device))
        self._skipped = nothing_yet if overflow is None else torch.maximum(nothing_yet, overflow.reshape(()))

    def _given(self, call: Call) -> tuple[Tensor | None, Tensor | None]:
        numbers = self._given_numbers.to(call.device)
        return numbers.expand(len(call.params), -1).contiguous(), None

    def _end_step(self, calls: list[Call]) -> None:
        if not calls:
            return
        for name, new in zip(_NUMBERS, self._next, strict=True):
            kept = self.param_groups[0][name]
            kept.copy_(torch.where(self._skipped != 0, kept, new))


system(
    "prodigy",
    title="Prodigy",
    source="arXiv 2306.06101",
    page="optim/prodigy.md",
    modules=("optim.Prodigy",),
    operators=("prodigy_", "prodigy_sums"),
    bench=("prodigy",),
    reasons={"golden": "no recorded run is here; the tests compare with the definition in float64"},
)
