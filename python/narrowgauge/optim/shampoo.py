"""Shampoo: a matrix preconditioner for every mode of a gradient (Gupta, Koren, Singer, arXiv 1802.09568)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from narrowgauge.ops import checks, system
from narrowgauge.optim.base import Params, check_range
from narrowgauge.optim.checkpoint import Entry
from narrowgauge.optim.matrix import (
    STEP,
    MatrixOptimizer,
    check_count,
    check_flag,
    gram,
    learning_rate,
    like_parameter,
    locals_of,
    mode_product,
    shards,
    square,
    whole,
)


def inverse_root(matrices: Tensor, root: int, smallest: float, method: str) -> Tensor:
    """Symmetric matrices to the power -1/root; `smallest` bounds the eigenvalues where rounding made them less."""
    if method == "svd":
        u, values, vh = torch.linalg.svd(matrices)
        return (u * values.pow(-1 / root)[..., None, :]) @ vh
    values, vectors = torch.linalg.eigh(matrices)
    return (vectors * values.clamp_min(smallest).pow(-1 / root)[..., None, :]) @ vectors.mT


class Shampoo(MatrixOptimizer):
    """Shampoo as in pytorch_optimizer 4.1.0, without its changes to gradients; parameters of one shape run as a batch.

    A gradient with k dimensions is multiplied along each by the inverse 2k-th root of the sum of its past Gram matrices
    along it. Parameters have any number of dimensions; those without any follow the gradient itself. States are float32
    (float64 for float64 parameters).

    Source: Gupta, Koren, Singer, *Shampoo: Preconditioned Stochastic Tensor Optimization*, ICML 2018, arXiv 1802.09568.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, a number or a tensor.
        momentum: Share of the previous update in what is preconditioned next.
        weight_decay: Weight decay, added to the gradient unless `weight_decouple`.
        weight_decouple: Decay the parameter by 1 - lr weight_decay instead.
        fixed_decay: Decay the parameter by 1 - weight_decay instead; only with `weight_decouple`.
        preconditioning_compute_steps: Roots are taken at the first and at every so many steps.
        matrix_eps: The preconditioners start from this times the identity.
        maximize: Go up instead of down.
        max_precondition_dim: Dimensions larger than this have no preconditioner.
        root_method: ``"svd"`` as pytorch_optimizer, or ``"eigh"``, which is faster.
    """

    _own_options = ("maximize", "max_precondition_dim", "root_method")

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        weight_decouple: bool = False,
        fixed_decay: bool = False,
        preconditioning_compute_steps: int = 1,
        matrix_eps: float = 1e-6,
        maximize: bool = False,
        *,
        max_precondition_dim: int = 10000,
        root_method: str = "svd",
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "weight_decouple": weight_decouple,
                "fixed_decay": fixed_decay,
                "preconditioning_compute_steps": preconditioning_compute_steps,
                "matrix_eps": matrix_eps,
                "maximize": maximize,
                "max_precondition_dim": max_precondition_dim,
                "root_method": root_method,
            },
        )

    def _check_options(self, group: dict[str, Any]) -> None:
        check_range("Shampoo", "momentum", group["momentum"], 0, 1)
        check_flag("Shampoo", "weight_decouple", group["weight_decouple"])
        check_flag("Shampoo", "fixed_decay", group["fixed_decay"])
        check_count("Shampoo", "preconditioning_compute_steps", group["preconditioning_compute_steps"])
        check_range("Shampoo", "matrix_eps", group["matrix_eps"], 0)
        check_count("Shampoo", "max_precondition_dim", group["max_precondition_dim"], 0)
        checks.check_choice("Shampoo", "root_method", group["root_method"], ("svd", "eigh"))

    def _modes(self, group: dict[str, Any], p: Tensor) -> list[int]:
        return [mode for mode, size in enumerate(p.shape) if size <= group["max_precondition_dim"]]

    def _state_layout(self, group: dict[str, Any], p: Tensor) -> dict[str, Entry]:
        layout = {"step": STEP}
        if group["momentum"]:
            layout["momentum_buffer"] = like_parameter(p)
        for mode in self._modes(group, p):
            for name in ("pre_cond", "inv_pre_cond"):
                layout[f"{name}_{mode}"] = square(p, p.shape[mode])
        return layout

    def _step_group(self, group: dict[str, Any]) -> None:
        if not self._overflowed():
            for params in self._batches(group):
                self._step_batch(group, params)

    def _step_batch(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Updates parameters of one shape together."""
        p, weight_decay, momentum = params[0], group["weight_decay"], group["momentum"]
        lr, step = learning_rate(group, p), int(self.state[p]["step"].item()) + 1
        g = self._gradients(group, params)
        if momentum and step > 1:
            g = g.lerp(torch.stack(self._states(params, "momentum_buffer")), momentum)
        decay: float | Tensor = 1.0
        if weight_decay and group["weight_decouple"]:
            decay = 1 - weight_decay * (1 if group["fixed_decay"] else lr)
        elif weight_decay:
            g = g + weight_decay * torch.stack(locals_of(params)).to(g.dtype)

        g = preconditioned = whole(g, p)
        changed: list[tuple[str, Tensor]] = []
        for mode in self._modes(group, p):
            sums = gram(g, mode)
            if step > 1:
                sums += torch.stack([self.state[q][f"pre_cond_{mode}"] for q in params])
            else:
                sums += group["matrix_eps"] * torch.eye(p.shape[mode], dtype=sums.dtype, device=sums.device)
            changed.append((f"pre_cond_{mode}", sums))
            if step == 1 or step % group["preconditioning_compute_steps"] == 0:
                roots = inverse_root(sums, 2 * p.dim(), group["matrix_eps"], group["root_method"])
                changed.append((f"inv_pre_cond_{mode}", roots))
            else:
                roots = torch.stack([self.state[q][f"inv_pre_cond_{mode}"] for q in params])
            preconditioned = mode_product(preconditioned, roots, mode)
        updates = shards(preconditioned, p)
        # Nothing is changed before here: matrices that are not finite have no roots, and raise.
        for name, values in changed:
            torch._foreach_copy_([self.state[q][name] for q in params], values.unbind())
        if momentum:
            torch._foreach_copy_(self._states(params, "momentum_buffer"), updates.unbind())
        for q in params:
            self.state[q]["step"] += 1
        self._apply(params, decay, updates * lr)


system(
    "shampoo",
    title="Shampoo",
    source="arXiv 1802.09568",
    page="optim/shampoo.md",
    modules=("optim.Shampoo",),
    golden=("extra_optim",),
    bench=("shampoo",),
    reasons={
        "reference": "Python around PyTorch's linear algebra",
        "cpu": "PyTorch's linear algebra",
        "cuda": "PyTorch's linear algebra",
    },
)
