"""Steps of normalized length: NormalizedSGD, and normalized logistic regression (arXiv 2412.08424)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from narrowgauge.ops import checks, system
from narrowgauge.optim.base import ElementwiseOptimizer, Params, check_range

NORMS = ("global", "tensor", "row")


class NormalizedSGD(ElementwiseOptimizer):
    """Gradient descent whose step has the length of the learning rate, whatever the size of the gradient.

    p <- p - lr g / (|g| + eps); with momentum, buf <- momentum buf + g / (|g| + eps) and p <- p - lr buf. The norm is
    computed without waiting for the device. Arithmetic is float32 (float64 for float64 parameters); gradients are never
    modified. State, with momentum: `step` and `momentum_buffer`, float32 for narrow parameters.

    Args:
        params: Parameters or parameter groups, of any shape, also complex.
        lr: Learning rate, a number or a tensor: the length of a step.
        momentum: Factor of the buffer.
        norm: Of what the norm is taken: ``"global"``, all gradients of all groups with this word together;
            ``"tensor"``, each gradient; ``"row"``, each index of the first dimension (a vector is one row).
        eps: Added to the norm.
        maximize: Go up instead of down.

    Raises:
        ValueError: For arguments out of range, and state dicts that do not fit; nothing is changed.
        RuntimeError: For sparse gradients.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor,
        momentum: float = 0,
        norm: str = "global",
        eps: float = 1e-8,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "norm": norm,
                "eps": eps,
                "maximize": maximize,
                "differentiable": False,
                "state_dtype": "fp32",
                "param_update": "nearest",
                "seed": 0,
                "min_quantized_size": 0,
            },
        )

    def _check_options(self, group: dict[str, Any]) -> None:
        check_range("NormalizedSGD", "momentum", group["momentum"], 0)
        check_range("NormalizedSGD", "eps", group["eps"], 0)
        checks.check_choice("NormalizedSGD", "norm", group["norm"], NORMS)
        for option, value in (("state_dtype", "fp32"), ("param_update", "nearest")):
            if group[option] != value:
                raise ValueError(f"NormalizedSGD: {option} must be {value!r}, got {group[option]!r}")

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

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
        updated: list[list[Tensor]] = [[] for _ in self.param_groups]
        gradients: list[list[Tensor]] = [[] for _ in self.param_groups]
        for group, params, grads in zip(self.param_groups, updated, gradients, strict=True):
            for p in group["params"]:
                if p.grad is not None:
                    if p.grad.layout is not torch.strided:
                        raise RuntimeError("NormalizedSGD does not support sparse gradients")
                    params.append(p)
                    grads.append(p.grad)
        everything = [
            norm
            for group, grads in zip(self.param_groups, gradients, strict=True)
            if group["norm"] == "global"
            for norm in _norms(grads)
        ]
        whole = _norm_of_norms(everything)
        for group, params, grads in zip(self.param_groups, updated, gradients, strict=True):
            if group["norm"] == "global":
                norms = [whole] * len(params)
            elif group["norm"] == "tensor":
                norms = _norms(grads)
            else:
                norms = [_row_norms(g) for g in grads]
            for p, g, norm in zip(params, grads, norms, strict=True):
                self._move(group, p, g, norm)
        return loss

    def _move(self, group: dict[str, Any], p: Tensor, g: Tensor, norm: Tensor) -> None:
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        norm, lr = norm.to(p.device, non_blocking=True), group["lr"]
        if grad_scale is not None:
            scale = grad_scale.to(p.device, non_blocking=True).reshape(()).to(norm.dtype)
            factor = 1 / ((norm / scale + group["eps"]) * scale)
        else:
            factor = 1 / (norm + group["eps"])
        # A gradient of zeros does not move, also with eps = 0.
        factor = torch.where(norm == 0, 0, -factor if group["maximize"] else factor)
        if isinstance(lr, Tensor):
            lr = lr.to(p.device, norm.dtype, non_blocking=True).reshape(())
        skipped = None
        if found_inf is not None:
            skipped = found_inf.to(p.device, non_blocking=True).reshape(()) != 0

        wide = _wide(p.dtype) or p.dtype
        in_place = skipped is None and wide == p.dtype
        new, g = (p if in_place else p.to(wide, copy=True)), g.to(wide)
        if group["momentum"]:
            state = self.state[p] or self._init_state(group, p)
            old = state["momentum_buffer"]
            buffer = old if skipped is None else old.clone()
            buffer.mul_(group["momentum"]).addcmul_(g, factor)
            new.sub_(buffer * lr)
            state["step"].add_(1 if skipped is None else torch.where(skipped, 0, 1))
            if skipped is not None:
                old.copy_(torch.where(skipped, old, buffer))
        else:
            new.addcmul_(g, factor * lr, value=-1)
        if not in_place:
            p.copy_(new if skipped is None else torch.where(skipped, p, new))


def _wide(dtype: torch.dtype) -> torch.dtype | None:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else None


def _norms(grads: list[Tensor]) -> list[Tensor]:
    """The norm of each tensor, float32 or float64."""
    alike: dict[Any, list[int]] = {}
    for i, g in enumerate(grads):
        alike.setdefault((g.device, g.dtype), []).append(i)
    norms: dict[int, Tensor] = {}
    for (_, dtype), indices in alike.items():
        found = torch._foreach_norm([grads[i] for i in indices], dtype=_wide(dtype))
        norms.update(zip(indices, found, strict=True))
    return [norms[i] for i in range(len(grads))]


def _norm_of_norms(norms: list[Tensor]) -> Tensor:
    if not norms:
        return torch.zeros(())
    dtype = torch.float64 if any(norm.dtype is torch.float64 for norm in norms) else torch.float32
    together = torch.stack([norm.to(norms[0].device, dtype, non_blocking=True) for norm in norms])
    return torch.linalg.vector_norm(together)


def _row_norms(g: Tensor) -> Tensor:
    dims = tuple(range(1, g.dim())) if g.dim() > 1 else None
    return torch.linalg.vector_norm(g, dim=dims, keepdim=g.dim() > 1, dtype=_wide(g.dtype))


@torch.no_grad()
def normalized_logistic_step_(theta: Tensor, A: Tensor, y: Tensor, gamma: float | Tensor) -> Tensor:
    """One step of logistic regression divided by the mean error, in place: at most gamma max |a_i| long.

    theta <- theta + gamma sum_i w_i y_i a_i, with w_i proportional to 1 / (1 + exp(y_i a_i . theta)) and of sum 1. The
    weights are a softmax, so the step is exact also where every single error underflows; for gamma to infinity it
    becomes the step of the batch perceptron. Repeated from theta = 0 on separable data with margin mu and largest norm
    R, it separates n samples in at most R^2 / mu^2 + 2 log(2 n - 1) / (gamma mu^2) steps.

    Source: arXiv 2412.08424.

    Args:
        theta: Weights, (d,), float32 or float64; changed.
        A: Samples, (n, d), n >= 1, of the same dtype.
        y: Labels, (n,), of any dtype, -1 or +1 (looked at on the CPU only).
        gamma: Step size, a number or a tensor of one element.

    Returns:
        `theta`.

    Raises:
        ValueError: For shapes, dtypes, labels or a step size that do not fit; nothing is changed.
    """
    function = "normalized_logistic_step_"
    if theta.dim() != 1 or theta.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{function}: theta must be a float32 or float64 vector, got {theta.dtype} of shape {tuple(theta.shape)}"
        )
    if A.dim() != 2 or A.shape[0] == 0 or A.shape[1] != theta.shape[0] or A.dtype != theta.dtype:
        raise ValueError(
            f"{function}: A must be {theta.dtype} of shape (n, {theta.shape[0]}) with n >= 1, got {A.dtype} of shape "
            f"{tuple(A.shape)}"
        )
    if y.shape != A.shape[:1]:
        raise ValueError(f"{function}: y must have shape ({A.shape[0]},), got {tuple(y.shape)}")
    if y.device.type == "cpu" and not bool((y.abs() == 1).all()):
        raise ValueError(f"{function}: y must hold -1 and +1 only; for labels 0 and 1 give 2 * y - 1")
    if isinstance(gamma, Tensor):
        if gamma.numel() != 1:
            raise ValueError(f"{function}: a tensor gamma must have one element, got {gamma.numel()}")
        gamma = gamma.reshape(())
    else:
        check_range(function, "gamma", gamma, 0)
    y = y.to(theta.dtype)
    log_errors = torch.nn.functional.logsigmoid(-y * (A @ theta))
    return theta.add_(gamma * (A.T @ (log_errors.softmax(0) * y)))


system(
    "normalized_sgd",
    title="Normalized SGD",
    source="arXiv 2412.08424",
    page="optim/normalized_sgd.md",
    functions=("optim.normalized_logistic_step_",),
    modules=("optim.NormalizedSGD",),
    golden=("normalized_gd",),
    bench=("normalized_sgd",),
    reasons={
        "reference": "PyTorch's norms",
        "cpu": "PyTorch's norms",
        "cuda": "PyTorch's norms",
    },
)
