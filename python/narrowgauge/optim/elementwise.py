"""Update rules that treat every element alike: their operators, and the PyTorch definition of what a step does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from narrowgauge.ops import Operator, Sample, SampleMaker, library, operator
from narrowgauge.ops.random import philox_words
from narrowgauge.optim import codec
from narrowgauge.optim.master import round_stochastic

_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Rule:
    """The arithmetic of one optimizer, in PyTorch. csrc/optim/<name>_rule.h repeats it operation by operation.

    Attributes:
        name: Name of the optimizer; the operator is called ``<name>_``.
        options: The rule's own arguments, in schema language.
        signed: Whether each state takes the signed 8-bit map.
        scalars: ``scalars(lr, step, *options)``: float64 numbers or tensors, one value per parameter.
        update: ``update(p, g, states, scalars) -> (p, states)``, in float32 or float64.
    """

    name: str
    options: str
    signed: tuple[bool, ...]
    scalars: Callable[..., tuple[Tensor | float, ...]]
    update: Callable[..., tuple[Tensor, list[Tensor]]]


def integer_power(base: float, exponent: Tensor) -> Tensor:
    """base**exponent in float64 by squaring: multiplications round alike everywhere, ``pow`` does not."""
    exponent = exponent.long()
    power = torch.ones_like(exponent, dtype=torch.float64)
    for _ in range(25):  # a float32 counter stops at 2**24
        power = torch.where(exponent & 1 == 1, power * base, power)
        exponent = exponent >> 1
        base *= base
    return power


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


def _reference(rule: Rule) -> Callable[..., None]:
    def step(
        params: list[Tensor],
        grads: list[Tensor],
        states: list[Tensor],
        scales: list[Tensor],
        steps: list[Tensor],
        lr_tensor: Tensor | None,
        lr: float,
        *rest: Any,
    ) -> None:
        *options, maximize, stochastic, seed, indices, first_elements, grad_scale, found_inf = rest
        if not params:
            return
        device, count = params[0].device, len(states) // len(params)
        skipped = None if found_inf is None else found_inf.reshape(()) != 0

        def write(target: Tensor, value: Tensor) -> None:
            target.copy_(value if skipped is None else torch.where(skipped, target, value))

        compute = torch.float64 if params[0].dtype is torch.float64 else torch.float32
        new_steps = torch.stack([step.reshape(()) for step in steps]) + 1
        rate = torch.tensor(lr, dtype=torch.float64, device=device) if lr_tensor is None else lr_tensor
        scalars = [
            torch.as_tensor(scalar, dtype=torch.float64, device=device).to(compute).expand(len(params))
            for scalar in rule.scalars(rate.double().reshape(()), new_steps.double(), *options)
        ]
        for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
            p, g = codec.flat(param), codec.flat(grad).to(compute)
            if grad_scale is not None:
                g = g / grad_scale.to(compute)
            kept = states[i * count : (i + 1) * count]
            kept_scales = scales[i * count : (i + 1) * count]
            if scales:
                values = [
                    codec.decode(codec.flat(codes), scale, "int8", signed, p.numel())
                    for codes, scale, signed in zip(kept, kept_scales, rule.signed, strict=False)
                ]
            else:
                values = [codec.flat(state) for state in kept]
            new_p, values = rule.update(
                p.to(compute), -g if maximize else g, values, [scalar[i] for scalar in scalars]
            )
            if stochastic:
                key = torch.tensor(stream_seed(seed, indices[i]), device=device)
                words = philox_words(torch.stack((key, new_steps[i].long())), p.numel(), first_elements[i])
                new_p = round_stochastic(new_p, words >> 16)
            write(p, new_p.to(p.dtype))
            if scales:
                for codes, scale, value, signed in zip(kept, kept_scales, values, rule.signed, strict=False):
                    new_codes, new_scale = codec.encode(value, "int8", signed)
                    write(codec.flat(codes), new_codes)
                    write(scale, new_scale)
            else:
                for state, value in zip(kept, values, strict=True):
                    write(codec.flat(state), value)
            write(steps[i], new_steps[i].reshape(steps[i].shape))

    return step


def _bytes_moved(
    params: list[Tensor], grads: list[Tensor], states: list[Tensor], scales: list[Tensor], *rest: Any
) -> int:
    def size(tensors: list[Tensor]) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    return size(grads) + 2 * (size(params) + size(states) + size(scales))


def declare(
    rule: Rule, samples: Callable[[SampleMaker], Iterable[Sample]], dtypes: tuple[torch.dtype, ...]
) -> Operator:
    """Declares the operator of a rule: one step over a list of parameters, in place.

    The parameters of a call share dtype, device and kind of state, and every gradient and state is stored like its
    parameter. States follow each other parameter by parameter; `scales` is empty unless they are 8-bit codes. The
    step counters go up by one; nothing at all changes when `found_inf` is not 0.
    """
    schema = (
        f"{rule.name}_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, Tensor(c!)[] scales, "
        f"Tensor(d!)[] steps, Tensor? lr_tensor, float lr, {rule.options}, bool maximize, bool stochastic, int seed, "
        "int[] indices, int[] first_elements, Tensor? grad_scale, Tensor? found_inf) -> ()"
    )
    declared = operator(schema, samples=samples, dtypes=dtypes, tolerance="exact", bytes_moved=_bytes_moved)(
        _reference(rule)
    )
    torch.library.register_fake(f"narrowgauge::{rule.name}_", lambda *args: None, lib=library._library)
    return declared
