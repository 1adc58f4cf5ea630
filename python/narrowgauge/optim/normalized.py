"""Steps of normalized length: NormalizedSGD, and normalized logistic regression (arXiv 2412.08424)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from narrowgauge.ops import checks, system
from narrowgauge.optim import tensors
from narrowgauge.optim.base import Call, Common, ElementwiseOptimizer, Params, check_range
from narrowgauge.optim.elementwise import Rule

if TYPE_CHECKING:
    from typing_extensions import Unpack

NORMS = ("global", "tensor", "row")


def _update(
    variant: int, p: Tensor, g: Tensor, states: list[Tensor], scalars: list[Tensor], factor: Tensor
) -> tuple[Tensor, list[Tensor]]:
    lr, momentum = scalars
    direction = g * factor
    if variant == 1:
        direction = momentum * states[0] + direction
    return p - lr * direction, [direction] if variant == 1 else []


# Variant 1: with momentum. The number of each row is one over a norm.
normalized_sgd_rule = Rule(
    name="normalized_sgd",
    options=("momentum",),
    signed=((), (True,)),
    scalars=lambda variant, lr, step, given, momentum: (lr, momentum),
    update=_update,
    terms=lambda variant, p, g, states, scalars: [g * g],
    sums=(1, 1),
    rows=True,
    sample_options=(0.9,),
)


class NormalizedSGD(ElementwiseOptimizer):
    """Gradient descent whose step has the length of the learning rate, whatever the size of the gradient.

    p <- p - lr g / (|g| + eps); with momentum, buf <- momentum buf + g / (|g| + eps) and p <- p - lr buf. The norm
    stays on the device. Arithmetic is float32 (float64 for float64 parameters); gradients are never modified. State:
    `step`, and with momentum `momentum_buffer`.

    Args:
        params: Parameters or parameter groups; with ``norm="row"`` real ones that are not sharded.
        lr: Learning rate, a number or a tensor: the length of a step.
        momentum: Factor of the buffer.
        norm: Of what the norm is taken: ``"global"``, all gradients of all groups with this word together;
            ``"tensor"``, each gradient; ``"row"``, each index of the first dimension (a vector is one row).
        eps: Added to the norm.
        **common: See `narrowgauge.optim.base.Common`.

    Raises:
        ValueError: For arguments out of range, and state dicts that do not fit; nothing is changed.
        RuntimeError: For sparse gradients.
    """

    _rule = normalized_sgd_rule

    def __init__(
        self,
        params: Params,
        lr: float | Tensor,
        momentum: float = 0,
        norm: str = "global",
        eps: float = 1e-8,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "norm": norm, "eps": eps}, common)

    def _check_options(self, group: dict[str, Any]) -> None:
        check_range("NormalizedSGD", "momentum", group["momentum"], 0)
        check_range("NormalizedSGD", "eps", group["eps"], 0)
        checks.check_choice("NormalizedSGD", "norm", group["norm"], NORMS)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict) and {**self.defaults, **param_group}["norm"] == "row":
            params = param_group["params"]
            param_group["params"] = params = [params] if isinstance(params, Tensor) else list(params)
            for p in params:
                tensor = p[1] if isinstance(p, tuple) else p
                if isinstance(tensor, Tensor) and (tensor.is_complex() or tensors.is_dtensor(tensor)):
                    raise ValueError(
                        "NormalizedSGD: norm='row' takes real parameters that are not sharded, got "
                        f"{type(tensor).__name__} of {tensor.dtype}; use norm='tensor'"
                    )
        super().add_param_group(param_group)

    def _variant(self, group: dict[str, Any]) -> int:
        return 1 if group["momentum"] else 0

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def _options(self, group: dict[str, Any]) -> list[float]:
        return [group["momentum"]]

    def _row_length(self, group: dict[str, Any], p: Tensor) -> int:
        return super()._row_length(group, p) if group["norm"] == "row" else p.numel()

    def _squared_norms(self, call: Call) -> Tensor:
        """Of the gradients, or of their rows, over all shards."""
        squared = call.sums()[:, 0]
        if call.group["norm"] != "row":  # rows are never cut
            squared = tensors.sum_over_shards(squared, call.whole[0], inside_rows=False)
        return squared

    def _begin_step(self, calls: list[Call]) -> None:
        of_all = [call for call in calls if call.group["norm"] == "global"]
        if of_all:
            device = of_all[0].device
            self._global = torch.stack([self._squared_norms(call).sum().to(device) for call in of_all]).sum()

    def _given(self, call: Call) -> tuple[Tensor | None, Tensor | None]:
        if call.group["norm"] == "global":
            squared = self._global.to(call.device).expand(len(call.params))
        else:
            squared = self._squared_norms(call)
        norm = squared.sqrt()
        # A gradient of zeros does not move, also with eps = 0.
        factor = torch.where(norm == 0, 0, 1 / (norm + call.group["eps"]))
        return None, factor.to(torch.float64 if call.params[0].dtype is torch.float64 else torch.float32)


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
    operators=("normalized_sgd_", "normalized_sgd_sums"),
    golden=("normalized_gd",),
    bench=("normalized_sgd",),
)
