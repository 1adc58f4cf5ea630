"""AdamW (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from narrowgauge.ops import Sample, SampleMaker, system
from narrowgauge.ops.operator import FLOATING
from narrowgauge.optim import codec
from narrowgauge.optim.base import ElementwiseOptimizer, Params, check_range
from narrowgauge.optim.elementwise import Rule, declare, integer_power, square_root


def _scalars(
    lr: Tensor, step: Tensor, beta1: float, beta2: float, weight_decay: float, eps: float, amsgrad: bool
) -> tuple[Tensor | float, ...]:
    step_size = lr / (1 - integer_power(beta1, step))
    correction = (1 - integer_power(beta2, step)).sqrt()
    return 1 - lr * weight_decay, beta1, 1 - beta1, beta2, 1 - beta2, step_size, correction, eps


def _update(p: Tensor, g: Tensor, states: list[Tensor], scalars: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    decay, first_keep, first_weight, second_keep, second_weight, step_size, correction, eps = scalars
    m, v, *largest = states
    difference = g - m
    # Two forms of the same interpolation: each is exact at its end, beta1 = 1 and beta1 = 0.
    m = torch.where(first_weight < 0.5, m + first_weight * difference, g - first_keep * difference)
    v = v * second_keep + second_weight * g * g
    largest = [torch.maximum(largest[0], v)] if largest else []
    denominator = square_root(largest[0] if largest else v) / correction + eps
    return p * decay - step_size * m / denominator, [m, v, *largest]


def _samples(make: SampleMaker) -> Iterator[Sample]:
    def call(
        shapes: list[tuple[int, ...]], *, amsgrad: bool = False, int8: bool = False, **options: Any
    ) -> tuple[Any, ...]:
        params = [make(*shape) for shape in shapes]
        grads = [make(*shape, dtype=options.get("grad_dtype")) for shape in shapes]
        states, scales = [], []
        for p in params:
            wide = torch.float64 if p.dtype is torch.float64 else torch.float32
            values = [make(*p.shape, dtype=wide)] + [
                make(*p.shape, dtype=wide).square() for _ in range(1 + amsgrad)
            ]
            if int8:
                encoded = [codec.encode(value.flatten(), "int8", k == 0) for k, value in enumerate(values)]
                states += [codes.view(p.shape) for codes, _ in encoded]
                scales += [scale for _, scale in encoded]
            else:
                states += values
        steps = [make(dtype=torch.float32, scale=0.0) + i for i in range(len(params))]
        stochastic = options.get("stochastic", False)
        indices, firsts = (list(range(len(params))), [0] * len(params)) if stochastic else ([], [])

        def scalar(name: str) -> Tensor | None:
            return make(dtype=torch.float32, scale=0.0) + options[name] if name in options else None

        return (
            *(params, grads, states, scales, steps, scalar("lr"), 1e-2, 0.9, 0.999, 1e-2, 1e-8, amsgrad),
            *(options.get("maximize", False), stochastic, 7, indices, firsts),
            *(scalar("grad_scale"), scalar("found_inf")),
        )

    yield Sample(
        call([(17, 9), (5,), (), (0, 3), (1,)]), "several shapes, among them a scalar and an empty one"
    )
    yield Sample(
        call([(255,), (256,), (257,), (1023,), (1025,), (8193,)]), "around block and chunk boundaries"
    )
    yield Sample(call([(33, 65)], amsgrad=True, maximize=True), "amsgrad and maximize")
    yield Sample(call([(300,), (7,)], lr=0.03, grad_scale=3.0), "learning rate and gradient scale as tensors")
    yield Sample(call([(300,)], found_inf=1.0), "skipped because a gradient overflowed")
    if make.dtype is not torch.float64:
        yield Sample(call([(257,), (64, 64), (3,)], int8=True), "8-bit states")
        yield Sample(call([(700,)], int8=True, amsgrad=True), "8-bit states with amsgrad")
        yield Sample(call([(300,), (5,)], grad_dtype=torch.bfloat16), "bfloat16 gradients")
        yield Sample(call([(300,), (5,)], grad_dtype=torch.float32), "float32 gradients")
    if make.dtype is torch.bfloat16:
        yield Sample(call([(258,), (2049,)], stochastic=True), "stochastic rounding")
        yield Sample(
            call([(258,), (2049,)], stochastic=True, int8=True), "stochastic rounding with 8-bit states"
        )


adamw_op = declare(
    Rule(
        name="adamw",
        options="float beta1, float beta2, float weight_decay, float eps, bool amsgrad",
        signed=(True, False, False),
        scalars=_scalars,
        update=_update,
    ),
    _samples,
    FLOATING,
)


class AdamW(ElementwiseOptimizer):
    """A drop-in for `torch.optim.AdamW` in one kernel for all parameters, with narrow states and parameters.

    Arithmetic is float32 (float64 for float64 parameters) whatever the storage. Gradients are never modified, also not
    by a gradient scaler.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, a number or a tensor.
        betas: Decay rates of the first and second moment.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        amsgrad: Use the largest second moment so far.
        maximize: Go up instead of down.
        foreach, fused, capturable: Accepted for compatibility; every step is fused, and capturable on CUDA.
        differentiable: Must be False.
        state_dtype: ``"fp32"``, or ``"int8"`` for 8-bit blockwise states of parameters with at least
            `min_quantized_size` elements.
        param_update: How bfloat16 parameters are rounded: ``"nearest"``, or ``"stochastic"``, under which small
            updates are not lost. Parameters of other dtypes are always rounded to nearest.
        seed: Seed of the stochastic rounding.
        min_quantized_size: Smaller parameters keep fp32 states.
    """

    _operator = adamw_op

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: str = "fp32",
        param_update: str = "nearest",
        seed: int = 0,
        min_quantized_size: int = 4096,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "amsgrad": amsgrad,
                "maximize": maximize,
                "foreach": foreach,
                "capturable": capturable,
                "differentiable": differentiable,
                "fused": fused,
                "state_dtype": state_dtype,
                "param_update": param_update,
                "seed": seed,
                "min_quantized_size": min_quantized_size,
            },
        )

    def _check_options(self, group: dict[str, Any]) -> None:
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"AdamW: betas must be two numbers in [0, 1), got {betas!r}")
        for i, beta in enumerate(betas):
            check_range("AdamW", f"betas[{i}]", beta, 0, 1)
        check_range("AdamW", "eps", group["eps"], 0)
        check_range("AdamW", "weight_decay", group["weight_decay"], 0)

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")

    def _options(self, group: dict[str, Any]) -> tuple[Any, ...]:
        beta1, beta2 = group["betas"]
        return beta1, beta2, group["weight_decay"], group["eps"], group["amsgrad"]


system(
    "adamw",
    title="AdamW",
    source="arXiv 1711.05101; 8-bit states: arXiv 2110.02861",
    page="adamw.md",
    modules=("optim.AdamW",),
    operators=("adamw_",),
    golden=("torch_optim", "torchao_lowbit", "bnb8bit"),
    bench=("adamw",),
)
