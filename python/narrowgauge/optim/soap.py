"""SOAP: Adam in the eigenbasis of Shampoo's preconditioners (Vyas et al., arXiv 2409.11321)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from narrowgauge.ops import system
from narrowgauge.optim.base import Params, check_betas, check_range
from narrowgauge.optim.checkpoint import Entry
from narrowgauge.optim.matrix import (
    STEP,
    MatrixOptimizer,
    check_count,
    check_flag,
    gram,
    learning_rate,
    like_parameter,
    mode_product,
    shards,
    square,
    whole,
)


def merged_shape(shape: tuple[int, ...], largest: int) -> tuple[int, ...]:
    """Neighbouring dimensions multiplied as long as the product is at most `largest`."""
    merged: list[int] = []
    for size in shape:
        if merged and merged[-1] * size <= largest:
            merged[-1] *= size
        else:
            merged.append(size)
    return tuple(merged)


class SOAP(MatrixOptimizer):
    """SOAP as in pytorch_optimizer 4.1.0, without its changes to gradients; parameters of one shape run as a batch.

    For every mode (dimension) of a gradient an average of its Gram matrices along it is kept; Adam runs on the gradient
    rotated into their eigenvectors, and its update is rotated back. A parameter's first call only initialises these,
    and changes nothing else. States are float32 (float64 for float64 parameters).

    Source: Vyas et al., *SOAP: Improving and Stabilizing Shampoo using Adam*, arXiv 2409.11321.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, a number or a tensor.
        betas: Decay rates of the first and second moment.
        shampoo_beta: Decay rate of the Gram matrices; None takes ``betas[1]``.
        weight_decay: Decoupled weight decay, after the update.
        precondition_frequency: Every so many steps the eigenvectors follow by one power iteration and a QR.
        max_precondition_dim: Dimensions larger than this are not rotated.
        merge_dims: Multiply neighbouring dimensions as long as the product is at most `max_precondition_dim`.
        precondition_1d: Rotate parameters with one dimension too; otherwise they take plain Adam.
        correct_bias: Correct the bias of both moments.
        normalize_gradient: Divide the update by its root mean square.
        eps: Added to the denominator.
        maximize: Go up instead of down.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float | None = None,
        weight_decay: float = 1e-2,
        precondition_frequency: int = 10,
        max_precondition_dim: int = 10000,
        merge_dims: bool = False,
        precondition_1d: bool = False,
        correct_bias: bool = True,
        normalize_gradient: bool = False,
        *,
        eps: float = 1e-8,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "shampoo_beta": shampoo_beta,
                "weight_decay": weight_decay,
                "precondition_frequency": precondition_frequency,
                "max_precondition_dim": max_precondition_dim,
                "merge_dims": merge_dims,
                "precondition_1d": precondition_1d,
                "correct_bias": correct_bias,
                "normalize_gradient": normalize_gradient,
                "eps": eps,
                "maximize": maximize,
            },
        )

    def _check_options(self, group: dict[str, Any]) -> None:
        check_betas("SOAP", group["betas"])
        if group["shampoo_beta"] is not None:
            check_range("SOAP", "shampoo_beta", group["shampoo_beta"], 0, 1)
        check_count("SOAP", "precondition_frequency", group["precondition_frequency"])
        check_count("SOAP", "max_precondition_dim", group["max_precondition_dim"])
        for name in ("merge_dims", "precondition_1d", "correct_bias", "normalize_gradient"):
            check_flag("SOAP", name, group[name])
        check_range("SOAP", "eps", group["eps"], 0)

    def _modes(self, group: dict[str, Any], p: Tensor) -> tuple[tuple[int, ...], list[int]]:
        """The shape whose modes are rotated, and which of them are."""
        shape, largest = tuple(p.shape), group["max_precondition_dim"]
        if len(shape) == 1 and not group["precondition_1d"]:
            return shape, []
        if group["merge_dims"]:
            shape = merged_shape(shape, largest)
        return shape, [mode for mode, size in enumerate(shape) if size <= largest]

    def _state_layout(self, group: dict[str, Any], p: Tensor) -> dict[str, Entry]:
        layout = {"step": STEP, "exp_avg": like_parameter(p), "exp_avg_sq": like_parameter(p)}
        shape, modes = self._modes(group, p)
        return layout | {f"{name}_{mode}": square(p, shape[mode]) for mode in modes for name in ("GG", "Q")}

    def _step_group(self, group: dict[str, Any]) -> None:
        if not self._overflowed():
            for params in self._batches(group):
                self._step_batch(group, params)

    def _step_batch(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Updates parameters of one shape together."""
        p = params[0]
        shape, modes = self._modes(group, p)
        g = self._gradients(group, params)
        step = int(self.state[p]["step"].item())  # of Adam: the first call, with 0, only initialises
        whole_g = whole(g, p) if step == 0 else self._adam(group, params, g, step)
        whole_g = whole_g.reshape(-1, *shape)
        beta = group["betas"][1] if group["shampoo_beta"] is None else group["shampoo_beta"]
        for mode in modes:
            self._follow(group, params, whole_g, mode, step, beta)
        for q in params:
            self.state[q]["step"] += 1

    def _replicated(self, params: list[Tensor], name: str) -> Tensor:
        """A state that every process has, stacked."""
        return torch.stack([self.state[p][name] for p in params])

    def _adam(self, group: dict[str, Any], params: list[Tensor], g: Tensor, step: int) -> Tensor:
        """Adam in the eigenbasis; returns the whole gradients."""
        p, (beta1, beta2) = params[0], group["betas"]
        shape, modes = self._modes(group, p)
        bases = {mode: self._replicated(params, f"Q_{mode}") for mode in modes}
        averages, squares = self._states(params, "exp_avg"), self._states(params, "exp_avg_sq")
        m = torch.stack(averages).lerp(g, 1 - beta1)
        torch._foreach_copy_(averages, m.unbind())
        whole_g = whole(g, p)
        # Gradient and average are rotated together, side by side in front of the last mode.
        last = len(shape) - 1
        pair = [x.reshape(len(params), *shape) for x in (whole_g, whole(m, p))]
        rotated = torch.stack(pair, last + 1) if modes else torch.stack(pair, 1)
        for mode, basis in bases.items():
            rotated = mode_product(rotated, basis, mode + (mode == last))
        rotated_g, rotated_m = rotated.unbind(last + 1 if modes else 1)
        v = whole(torch.stack(squares), p).reshape(rotated_g.shape).lerp(rotated_g.square(), 1 - beta2)
        torch._foreach_copy_(squares, shards(v.reshape(whole_g.shape), p).unbind())
        updates = rotated_m / v.sqrt().add_(group["eps"])
        for mode, basis in bases.items():
            updates = mode_product(updates, basis.mT, mode)
        updates = updates.reshape(whole_g.shape)
        if group["normalize_gradient"]:
            dims = tuple(range(1, updates.dim()))
            updates = updates / (updates.square().mean(dims, keepdim=True).sqrt() + group["eps"])
        lr = learning_rate(group, p)
        decay, rate = 1 - lr * group["weight_decay"], lr
        if group["correct_bias"]:
            rate = lr * (math.sqrt(1 - beta2**step) / (1 - beta1**step))
        # The decay comes after the update: it shrinks it too.
        self._apply(params, decay, shards(updates, p) * (rate * decay))
        return whole_g

    def _follow(
        self, group: dict[str, Any], params: list[Tensor], g: Tensor, mode: int, step: int, beta: float
    ) -> None:
        """Moves the Gram matrices of one mode, and when it is time their eigenvectors."""
        p = params[0]
        grams = self._replicated(params, f"GG_{mode}").lerp(gram(g, mode), 1 - beta)
        bases = None
        if step == 0:
            bases = torch.linalg.eigh(grams).eigenvectors.flip(-1)  # the largest first; raises on NaN
        elif step % group["precondition_frequency"] == 0:
            bases = self._replicated(params, f"Q_{mode}")
            product = grams @ bases
            order = (bases * product).sum(-2).argsort(-1, descending=True)
            bases = torch.linalg.qr(product.gather(-1, order[:, None].expand_as(product))).Q
            # The second moments stay with their eigenvectors.
            squares = self._states(params, "exp_avg_sq")
            v = whole(torch.stack(squares), p)
            rows = v.reshape(g.shape).movedim(mode + 1, -1)
            places = order.reshape(len(params), *[1] * (rows.dim() - 2), -1).expand_as(rows)
            v = rows.gather(-1, places).movedim(-1, mode + 1).reshape(v.shape)
            torch._foreach_copy_(squares, shards(v, p).unbind())
        torch._foreach_copy_([self.state[q][f"GG_{mode}"] for q in params], grams.unbind())
        if bases is not None:
            torch._foreach_copy_([self.state[q][f"Q_{mode}"] for q in params], bases.unbind())


system(
    "soap",
    title="SOAP",
    source="arXiv 2409.11321",
    page="optim/soap.md",
    modules=("optim.SOAP",),
    golden=("extra_optim",),
    bench=("soap",),
    reasons={
        "reference": "Python around PyTorch's linear algebra",
        "cpu": "PyTorch's linear algebra",
        "cuda": "PyTorch's linear algebra",
    },
)
