"""Optimizers that reduce before they step: 16 million parameters in 16 matrices, and in 1,000.

The rivals are the algorithms as one would write them in PyTorch, over lists wherever that exists; packages that are
installed compete as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import narrowgauge as ng
from bench.harness import Case
from bench.optim.cases import MANY, Make, step_case, stock
from bench.optim.cases import Rival as Lists

Params = list[Tensor]


class Rival(Lists):
    """With eps behind the correction of the second moment, as in Adam."""

    def denominators(self, correction: float, eps: float) -> Params:
        roots = torch._foreach_sqrt(self.second)
        torch._foreach_div_(roots, correction)
        torch._foreach_add_(roots, eps)
        return roots


def projected(p: Tensor, g: Tensor, u: Tensor, eps: float = 1e-8) -> tuple[Tensor, float]:
    """The decision of AdamP as its authors take it: read on the host, tensor by tensor."""
    for rows in (p.shape[0], 1):
        weights, gradient, step = (x.reshape(rows, -1) for x in (p, g, u))
        cosine = torch.nn.functional.cosine_similarity(gradient, weights, dim=1, eps=eps).abs()
        if cosine.max() < 0.1 / weights.shape[1] ** 0.5:
            unit = weights / (weights.norm(dim=1, keepdim=True) + eps)
            return (step - unit * (unit * step).sum(1, keepdim=True)).reshape(p.shape), 0.1
    return u, 1.0


class AdamP(Rival):
    def update(self) -> None:
        for p, g, m, v in zip(self.params, self.grads, self.first, self.second, strict=True):
            m.mul_(0.9).add_(g, alpha=0.1)
            v.mul_(0.999).addcmul_(g, g, value=1e-3)
            u = m / (v.sqrt().div_((1 - 0.999**self.count) ** 0.5).add_(1e-8))
            u, ratio = projected(p, g, u)
            p.mul_(1 - 1e-3 * 1e-2 * ratio)
            p.add_(u, alpha=-1e-3 / (1 - 0.9**self.count))


class SGDP(Rival):
    def update(self) -> None:
        for p, g, buffer in zip(self.params, self.grads, self.first, strict=True):
            buffer.mul_(0.9).add_(g)
            u, ratio = projected(p, g, buffer)
            p.mul_(1 - 0.1 * 1e-4 * ratio / 0.1)
            p.add_(u, alpha=-0.1)


class LAMB(Rival):
    def update(self) -> None:
        norm = torch.stack(torch._foreach_norm(self.grads)).norm().clamp_min(1.0)
        self.moments(0.9, 0.999, list(torch._foreach_div(self.grads, norm)))
        steps = torch._foreach_div(self.first, 1 - 0.9**self.count)
        torch._foreach_div_(steps, self.denominators((1 - 0.999**self.count) ** 0.5, 1e-6))
        torch._foreach_add_(steps, self.params, alpha=0.01)
        norms = torch._foreach_norm(self.params), torch._foreach_norm(steps)
        torch._foreach_mul_(steps, torch._foreach_div(*norms))
        torch._foreach_add_(self.params, steps, alpha=-1e-3)


class LARS(Rival):
    def update(self) -> None:
        norms, grad_norms = torch._foreach_norm(self.params), torch._foreach_norm(self.grads)
        torch._foreach_add_(grad_norms, norms, alpha=1e-4)
        ratios = torch._foreach_div(torch._foreach_mul(norms, 1e-3), grad_norms)
        steps = torch._foreach_add(self.grads, self.params, alpha=1e-4)
        torch._foreach_mul_(steps, ratios)
        torch._foreach_mul_(self.first, 0.9)
        torch._foreach_add_(self.first, steps)
        torch._foreach_add_(self.params, self.first, alpha=-0.1)


class StableAdamW(Rival):
    def update(self) -> None:
        weights = [(1 - beta) / (1 - beta**self.count) for beta in (0.9, 0.99)]
        self.moments(1 - weights[0], 1 - weights[1], self.grads)
        shares = torch._foreach_div(
            torch._foreach_mul(self.grads, self.grads), torch._foreach_clamp_min(self.second, 1e-16)
        )
        rates = [-1e-3 / share.mean().sqrt().clamp_min(1.0) for share in shares]
        torch._foreach_mul_(self.params, [1 + rate * 1e-2 for rate in rates])
        roots = self.denominators(1.0, 1e-8)
        torch._foreach_div_(roots, rates)
        torch._foreach_addcdiv_(self.params, self.first, roots)


class AdamMini(Rival):
    """A second moment per row."""

    def update(self) -> None:
        torch._foreach_lerp_(self.first, self.grads, 0.1)
        for p, g, m, v in zip(self.params, self.grads, self.first, self.second, strict=True):
            mean = v[:, :1]
            mean.mul_(0.999).add_((g * g).mean(1, keepdim=True), alpha=1e-3)
            size = (mean.sqrt() / (1 - 0.999**self.count) ** 0.5).add_(1e-8).mul_(1 - 0.9**self.count)
            p.addcdiv_(m, size, value=-1e-3)


def bytes_per_parameter(count: int) -> Callable[[Any], int]:
    return lambda optimizer: (
        count * sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    )


def timm(name: str, **options: Any) -> Make:
    def make(params: Params) -> Any:
        import timm.optim

        return getattr(timm.optim, name)(params, **options)

    return make


def published(package: str, name: str, **options: Any) -> Make:
    def make(params: Params) -> Any:
        return getattr(__import__(package), name)(params, **options)

    return make


def named(params: Params) -> list[tuple[str, Tensor]]:
    return [(f"mlp.{i}", p) for i, p in enumerate(params)]


def authors_adam_mini(params: Params) -> Any:
    from adam_mini import Adam_mini

    return Adam_mini(named(params), verbose=False)


def both(
    operator: str, moved: int, ours: Make, rivals: dict[str, Make], requires: dict[str, str] | None = None
) -> list[Case]:
    """`moved` is what a step must move per parameter; see the pages of the optimizers."""
    options: dict[str, Any] = {"bytes_moved": bytes_per_parameter(moved), "requires": requires}
    return [
        step_case(operator, "16M in 16 tensors float32", ours, rivals, **options),
        step_case(operator, "16M in 1000 tensors float32", ours, rivals, shapes=MANY, **options),
    ]


CASES = [
    *both(
        "adamp",
        44,
        lambda params: ng.optim.AdamP(params, weight_decay=1e-2),
        {"authors' algorithm": AdamP, "timm": timm("AdamP", weight_decay=1e-2)},
        {"timm": "timm"},
    ),
    *both(
        "sgdp",
        32,
        lambda params: ng.optim.SGDP(params, lr=0.1, momentum=0.9, weight_decay=1e-4),
        {"authors' algorithm": SGDP, "timm": timm("SGDP", lr=0.1, momentum=0.9, weight_decay=1e-4)},
        {"timm": "timm"},
    ),
    *both("lamb", 48, ng.optim.LAMB, {"torch foreach": LAMB, "timm": timm("Lamb")}, {"timm": "timm"}),
    *both(
        "lars",
        28,
        lambda params: ng.optim.LARS(params, lr=0.1, weight_decay=1e-4),
        {"torch foreach": LARS, "pytorch_optimizer": published("pytorch_optimizer", "LARS", lr=0.1)},
        {"pytorch_optimizer": "pytorch_optimizer"},
    ),
    *both(
        "stable_adamw",
        36,
        ng.optim.StableAdamW,
        {"torch foreach": StableAdamW, "optimi": published("optimi", "StableAdamW", lr=1e-3)},
        {"optimi": "optimi"},
    ),
    *both(
        "adam_mini",
        24,
        lambda params: ng.optim.AdamMini(named(params)),
        {"PyTorch": AdamMini, "adam-mini": authors_adam_mini},
        {"adam-mini": "adam_mini"},
    ),
    *both("adafactor", 24, ng.optim.Adafactor, stock("Adafactor")),
]


def test_reductions(case: Case, contest: Callable[[Case], None]) -> None:
    contest(case)
