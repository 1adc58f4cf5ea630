"""Update rules: their operators, and the PyTorch definition of what a step does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from narrowgauge.ops import Operator, library, operator
from narrowgauge.ops.operator import Tolerance
from narrowgauge.ops.random import philox_words
from narrowgauge.optim import codec, master, rule_samples
from narrowgauge.optim.rule_samples import PARAM_UPDATES, row_count

_MASK = (1 << 64) - 1

Scalar = Tensor | float


@dataclass(frozen=True)
class Rule:
    """The arithmetic of one optimizer, in PyTorch. csrc/optim/rules/<name>.h repeats it operation by operation.

    A step is ``p, states = update(p, g, states, scalars)``, element by element. A rule whose step depends on sums over
    a parameter, or over its rows, also has `terms`: what one element adds to each sum. Its optimizer turns the sums
    into what the rule is `given` (a few numbers per parameter) and into `rows` (one number per row), which never
    happens inside a kernel: so there is one definition of it, it needs no synchronisation, and sums of shards can be
    added in between.

    Attributes:
        name: Name of the rule; the operators are called ``<name>_`` and ``<name>_sums``.
        options: Names of the rule's own numbers.
        signed: For every variant, whether each state takes negative values.
        scalars: ``scalars(variant, lr, step, given, *options)``: float64 numbers or tensors, one value per parameter.
        update: ``update(variant, p, g, states, scalars) -> (p, states)`` in float32 or float64; one more argument, the
            number of each element's row, when `rows`.
        terms: ``terms(variant, p, g, states, scalars) -> [term, ...]``.
        sums: How many sums each variant has; by default none.
        given: How many numbers each variant is given; by default none.
        rows: Whether `update` takes a number per row.
        exact: Whether the arithmetic is in the bit-exact set (docs/numerics.md): no exp, log, pow, atan2.
        sample_options: Option values for the samples of tests, in the order of `options`.
        declared: False for arithmetic alone, of an optimizer with operators of its own.
    """

    name: str
    options: tuple[str, ...]
    signed: tuple[tuple[bool, ...], ...]
    scalars: Callable[..., tuple[Scalar, ...]]
    update: Callable[..., tuple[Tensor, list[Tensor]]]
    terms: Callable[..., list[Tensor]] | None = None
    sums: tuple[int, ...] = ()
    given: tuple[int, ...] = ()
    rows: bool = False
    exact: bool = True
    sample_options: tuple[float, ...] = ()
    declared: bool = True
    step: Operator = field(init=False, compare=False)
    reduce: Operator = field(init=False, compare=False)

    def __post_init__(self) -> None:
        if not self.declared:
            return
        object.__setattr__(self, "step", _declare_step(self))
        if self.terms is not None:
            object.__setattr__(self, "reduce", _declare_sums(self))

    def sums_of(self, variant: int) -> int:
        return self.sums[variant] if self.sums else 0

    def given_of(self, variant: int) -> int:
        return self.given[variant] if self.given else 0


def integer_power(base: float, exponent: Tensor) -> Tensor:
    """base**exponent in float64 by squaring: multiplications round alike everywhere, ``pow`` does not."""
    exponent = exponent.long()
    power = torch.ones_like(exponent, dtype=torch.float64)
    for _ in range(25):  # a float32 counter stops at 2**24
        power = torch.where(exponent & 1 == 1, power * base, power)
        exponent = exponent >> 1
        base *= base
    return power


def interpolate(a: Tensor, b: Tensor, keep: Tensor, weight: Tensor) -> Tensor:
    """(1 - weight) a + weight b, exact at both ends; `keep` is 1 - weight, rounded on its own."""
    difference = b - a
    return torch.where(weight < 0.5, a + weight * difference, b - keep * difference)


def square_root(x: Tensor) -> Tensor:
    """The correctly rounded square root, which PyTorch's vectorised one is not."""
    root = x.double().sqrt()
    if x.dtype is torch.float32:
        return root.float()
    # One Newton step with the exact residual x - root^2 (Dekker's product, Numerische Mathematik 18, 1971).
    split = 134217729 * root
    high = split - (split - root)
    low = root - high
    square = root * root
    residual = (x - square) - (((high * high - square) + 2 * high * low) + low * low)
    better = root + residual / (2 * root)
    return torch.where(better.isfinite(), better, root)


def stream_seed(seed: int, index: int) -> int:
    """The seed of one parameter's random bits: splitmix64's finaliser, as a signed 64-bit number."""
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    z ^= z >> 31
    return z - (1 << 64) if z >> 63 else z


def _stochastic_bfloat16(x: Tensor, seed: int, step: Tensor, first_element: int) -> Tensor:
    key = torch.tensor(seed, device=x.device)
    words = philox_words(torch.stack((key, step.long())), x.numel(), first_element)
    return master.round_stochastic(x, words >> 16)


class _Call:
    """The arguments of either operator as its definition uses them, parameter by parameter."""

    def __init__(
        self,
        rule: Rule,
        variant: int,
        params: list[Tensor],
        grads: list[Tensor],
        states: list[Tensor],
        scales: list[Tensor],
        steps: list[Tensor],
        given: Tensor | None,
        lr: float | Tensor,
        options: list[float],
        state_format: int,
        maximize: bool,
        grad_scale: Tensor | None,
        clip: Tensor | None,
    ) -> None:
        self.rule, self.variant = rule, variant
        self.params, self.grads, self.states, self.scales = params, grads, states, scales
        self.maximize, self.grad_scale, self.clip = maximize, grad_scale, clip
        self.signed = rule.signed[variant]
        self.format = codec.STATE_DTYPES[state_format]
        device = params[0].device
        self.compute = torch.float64 if params[0].dtype is torch.float64 else torch.float32
        self.steps = torch.stack([step.reshape(()) for step in steps]).double() + 1
        rate = torch.as_tensor(lr, dtype=torch.float64, device=device).reshape(())
        nothing = [torch.zeros((), dtype=torch.float64, device=device)] * rule.given_of(variant)
        columns = list(given.double().unbind(1)) if given is not None else nothing
        self._scalars = [
            torch.as_tensor(scalar, dtype=torch.float64, device=device).to(self.compute).expand(len(params))
            for scalar in rule.scalars(variant, rate, self.steps, columns, *options)
        ]

    def scalars(self, i: int) -> list[Tensor]:
        return [scalar[i] for scalar in self._scalars]

    def param(self, i: int, rests: list[Tensor], split: bool) -> Tensor:
        p = codec.flat(self.params[i])
        return master.join_master(p, codec.flat(rests[i])) if split else p.to(self.compute)

    def grad(self, i: int) -> Tensor:
        g = codec.flat(self.grads[i]).to(self.compute)
        if self.grad_scale is not None:
            g = g / self.grad_scale.to(self.compute)
        if self.clip is not None:
            g = g * self.clip.to(self.compute)
        return -g if self.maximize else g

    def stored(self, i: int) -> list[tuple[Tensor, Tensor | None]]:
        """The states of parameter i: their numbers or codes, and the scales of codes."""
        count = len(self.signed)
        values = [codec.flat(state) for state in self.states[i * count :][:count]]
        scales: list[Any] = self.scales[i * count :][:count] if self.scales else [None] * count
        return list(zip(values, scales, strict=True))

    def decoded(self, i: int) -> list[Tensor]:
        stored, numel = self.stored(i), self.params[i].numel()
        if self.format == "fp32":
            return [value for value, _ in stored]
        return [
            codec.decode(codes, codes if scale is None else scale, self.format, signed, numel)
            for (codes, scale), signed in zip(stored, self.signed, strict=True)
        ]


_LISTS = "Tensor[] grads, Tensor[] states, Tensor[] scales, Tensor[] steps"
_NUMBERS = "Tensor? lr_tensor, float lr, float[] options, int variant, int state_format, int param_update"


def step_reference(rule: Rule) -> Callable[..., None]:
    """One step over a list of parameters, in place.

    The parameters of a call share dtype, device and kind of state; everything with a parameter's shape is stored like
    it. States follow each other parameter by parameter; `scales` is empty unless they are codes. The step counters go
    up by one; nothing at all changes when `found_inf` is not 0.
    """

    def step(
        params: list[Tensor],
        grads: list[Tensor],
        states: list[Tensor],
        scales: list[Tensor],
        steps: list[Tensor],
        rests: list[Tensor],
        emas: list[Tensor],
        copies: list[Tensor],
        given: Tensor | None,
        rows: Tensor | None,
        lr_tensor: Tensor | None,
        lr: float,
        options: list[float],
        variant: int,
        state_format: int,
        param_update: int,
        maximize: bool,
        zero_grad: bool,
        ema_decay: float,
        row_lengths: list[int],
        seed: int,
        indices: list[int],
        first_elements: list[int],
        grad_scale: Tensor | None,
        clip: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        if not params:
            return
        rate = lr if lr_tensor is None else lr_tensor
        call = _Call(
            *(rule, variant, params, grads, states, scales, steps, given, rate, options, state_format),
            *(maximize, grad_scale, clip),
        )
        how = PARAM_UPDATES[param_update]
        skipped = None if found_inf is None else found_inf.reshape(()) != 0

        def write(target: Tensor, value: Tensor) -> None:
            target.copy_(value if skipped is None else torch.where(skipped, target, value))

        first_row = 0
        for i, param in enumerate(params):
            old, g = call.param(i, rests, how == "split"), call.grad(i)
            extra: tuple[Tensor, ...] = ()
            if rule.rows:
                assert rows is not None
                count = row_count(param, row_lengths[i])
                of_param = rows[first_row : first_row + count]
                extra = (of_param.repeat_interleave(row_lengths[i]),)
                first_row += count
            new, values = rule.update(variant, old, g, call.decoded(i), call.scalars(i), *extra)

            p, written = codec.flat(param), new.to(param.dtype)
            if how == "stochastic" and param.dtype is torch.bfloat16:
                written = _stochastic_bfloat16(
                    new, stream_seed(seed, indices[i]), call.steps[i], first_elements[i]
                )
            elif how == "kahan":
                rest = codec.flat(rests[i])
                written, compensation = master.kahan_add(p, rest, new - p.to(new.dtype))
                write(rest, compensation)
            elif how == "split":
                written, left = master.split_master(new, rests[i].element_size() * 8)
                write(codec.flat(rests[i]), left)
            write(p, written)

            for k, ((target, scale), value) in enumerate(zip(call.stored(i), values, strict=True)):
                if call.format == "fp32":
                    write(target, value)
                elif call.format == "bf16" and how == "stochastic":
                    key = stream_seed(stream_seed(seed, indices[i]), k)
                    write(target, _stochastic_bfloat16(value, key, call.steps[i], first_elements[i]))
                else:
                    codes, new_scale = codec.encode(value, call.format, call.signed[k])
                    write(target, codes)
                    if scale is not None:
                        write(scale, new_scale)

            kept = new if how == "split" else written
            if emas:
                ema = codec.flat(emas[i])
                weight = torch.tensor(1 - ema_decay, dtype=torch.float32, device=ema.device)
                write(ema, ema + weight * (kept.float() - ema))
            if copies:
                write(codec.flat(copies[i]), new.to(copies[i].dtype))
            if zero_grad:
                write(codec.flat(grads[i]), torch.zeros_like(codec.flat(grads[i])))
            write(steps[i], call.steps[i].to(torch.float32).reshape(steps[i].shape))

    return step


def _declare_step(rule: Rule) -> Operator:
    schema = (
        f"{rule.name}_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] states, Tensor(d!)[] scales, "
        "Tensor(e!)[] steps, Tensor(f!)[] rests, Tensor(g!)[] emas, Tensor(h!)[] copies, Tensor? given, Tensor? rows, "
        f"{_NUMBERS}, bool maximize, bool zero_grad, float ema_decay, int[] row_lengths, int seed, int[] indices, "
        "int[] first_elements, Tensor? grad_scale, Tensor? clip, Tensor? found_inf) -> ()"
    )
    tolerance: Tolerance = "exact" if rule.exact else "rounding"
    declared = operator(
        schema,
        samples=lambda make: rule_samples.step_samples(rule, make),
        tolerance=tolerance,
        bytes_moved=_step_bytes,
    )(step_reference(rule))
    torch.library.register_fake(f"narrowgauge::{rule.name}_", lambda *args: None, lib=library._library)
    return declared


def _declare_sums(rule: Rule) -> Operator:
    """Declares the sums of a rule over each row: a fresh tensor of shape (rows, sums). Changes nothing."""

    def sums(
        params: list[Tensor],
        grads: list[Tensor],
        states: list[Tensor],
        scales: list[Tensor],
        steps: list[Tensor],
        given: Tensor | None,
        lr_tensor: Tensor | None,
        lr: float,
        options: list[float],
        variant: int,
        state_format: int,
        param_update: int,
        rests: list[Tensor],
        maximize: bool,
        row_lengths: list[int],
        grad_scale: Tensor | None,
        clip: Tensor | None,
    ) -> Tensor:
        assert rule.terms is not None
        rate = lr if lr_tensor is None else lr_tensor
        call = _Call(
            *(rule, variant, params, grads, states, scales, steps, given, rate, options, state_format),
            *(maximize, grad_scale, clip),
        )
        split = PARAM_UPDATES[param_update] == "split"
        results = []
        for i, param in enumerate(params):
            terms = rule.terms(
                variant, call.param(i, rests, split), call.grad(i), call.decoded(i), call.scalars(i)
            )
            length = row_lengths[i] if row_lengths else param.numel()
            shape = (row_count(param, length), length)
            results.append(torch.stack([term.double().reshape(shape).sum(1) for term in terms], 1))
        return torch.cat(results).to(call.compute)

    schema = (
        f"{rule.name}_sums(Tensor[] params, {_LISTS}, Tensor? given, {_NUMBERS}, Tensor[] rests, bool maximize, "
        "int[] row_lengths, Tensor? grad_scale, Tensor? clip) -> Tensor"
    )
    declared = operator(
        schema,
        samples=lambda make: rule_samples.sums_samples(rule, make),
        tolerance="rounding",
        bytes_moved=_sums_bytes,
    )(sums)

    def fake(params: list[Tensor], *rest: Any) -> Tensor:
        variant, row_lengths = rest[8], rest[13]
        rows = sum(row_count(p, row_lengths[i] if row_lengths else p.numel()) for i, p in enumerate(params))
        compute = torch.float64 if params[0].dtype is torch.float64 else torch.float32
        return params[0].new_empty((rows, rule.sums_of(variant)), dtype=compute)

    torch.library.register_fake(f"narrowgauge::{rule.name}_sums", fake, lib=library._library)
    return declared


def _size(*lists: Sequence[Any]) -> int:
    everything = (item for items in lists for item in items)
    return sum(item.numel() * item.element_size() for item in everything if isinstance(item, Tensor))


def _step_bytes(*args: Any) -> int:
    params, grads, states, scales, _, rests, emas, copies = args[:8]
    zeroed = grads if args[17] else []
    return _size(grads, copies, zeroed) + 2 * _size(params, states, scales, rests, emas)


def _sums_bytes(*args: Any) -> int:
    return sum(_size(value if isinstance(value, list) else [value]) for value in args)
