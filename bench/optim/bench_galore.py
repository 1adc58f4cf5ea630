"""GaLore and GradNormLoRP: steps within a basis beside AdamW, which keeps far larger states; and finding a basis."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import narrowgauge as ng
from bench.harness import Case, traffic
from bench.optim.cases import Make, step_case, step_traffic

SHAPES, RANK = [(1024, 1024)] * 8, 128
NEVER = 10**9  # a gap that no benchmark reaches


class EagerGaLore:
    """The method in plain PyTorch, parameter by parameter; for matrices that are not wide."""

    def __init__(
        self, params: list[Tensor], rank: int, gap: int, lr: float = 1e-3, scale: float = 0.25
    ) -> None:
        self.params, self.rank, self.gap, self.lr, self.scale = params, rank, gap, lr, scale
        self.states: list[dict[str, Tensor]] = [{} for _ in params]
        self.t = 0

    @torch.no_grad()
    def step(self) -> None:
        self.t += 1
        for p, state in zip(self.params, self.states, strict=True):
            g = p.grad
            assert g is not None
            if (self.t - 1) % self.gap == 0:
                state["basis"] = torch.linalg.svd(g.float(), full_matrices=False)[2][: self.rank].to(g.dtype)
            low = g @ state["basis"].T
            if "m" not in state:
                state["m"], state["v"] = torch.zeros_like(low), torch.zeros_like(low)
            m, v = state["m"], state["v"]
            m.mul_(0.9).add_(low, alpha=0.1)
            v.mul_(0.999).addcmul_(low, low, value=0.001)
            size = self.lr * math.sqrt(1 - 0.999**self.t) / (1 - 0.9**self.t)
            update = (m / v.sqrt().add_(1e-6)) @ state["basis"]
            p.add_(update.mul_(self.scale), alpha=-size)


def with_memory(detail: str, bytes_per_moment: float = 4, gain_moments: bool = False) -> str:
    """A case's name with the size of all states, beside AdamW's."""
    ours = theirs = 0.0
    for m, n in SHAPES:
        ours += (
            2 * RANK * max(m, n) * bytes_per_moment + 4 * RANK * min(m, n) + (8 * m if gain_moments else 0)
        )
        theirs += 8 * m * n
    return f"{detail} ({ours / 1e6:.1f} MB of states, AdamW {theirs / 1e6:.1f})"


def moved(optimizer: torch.optim.Optimizer) -> int:
    """As for every step, but the bases are only read."""
    states = [item for state in optimizer.state.values() for item in state.items()]
    return step_traffic(optimizer) - traffic([x for name, x in states if name.startswith("projection")])


def within_a_basis(operator: str, detail: str, name: str, **options: Any) -> Case:
    """Steps without a new basis."""

    def ours(params: list[Tensor]) -> torch.optim.Optimizer:
        kind = getattr(ng.optim, name)
        return kind(params, rank=RANK, update_proj_gap=NEVER, projection="randomized", **options)

    rivals = {
        "eager GaLore": lambda params: EagerGaLore(params, RANK, NEVER),
        "AdamW": ng.optim.AdamW,
        "torch AdamW foreach": lambda params: torch.optim.AdamW(params, foreach=True),
    }
    return step_case(operator, detail, ours, rivals, shapes=SHAPES, bytes_moved=moved)


def new_basis(projection: str) -> Case:
    """Steps that each find a new basis: ours approximates it, the peers decompose the whole gradient."""

    def with_projection(chosen: str) -> Make:
        return lambda params: ng.optim.GaLoreAdamW(params, rank=64, update_proj_gap=1, projection=chosen)

    rivals = {"svd": with_projection("svd"), "eager GaLore": lambda params: EagerGaLore(params, 64, 1)}
    detail = f"new basis by {projection} of 512x512, rank 64"
    return step_case(
        "galore", detail, with_projection(projection), rivals, shapes=[(512, 512)], bytes_moved=moved
    )


EIGHT = "8M in 8 matrices float32, rank 128"
CASES = [
    within_a_basis("galore", with_memory(EIGHT), "GaLoreAdamW"),
    within_a_basis(
        "galore", with_memory(f"{EIGHT}, int8 states", 1 + 4 / 256), "GaLoreAdamW", state_dtype="int8"
    ),
    within_a_basis("gradnormlorp", with_memory(EIGHT, gain_moments=True), "GradNormLoRP"),
    new_basis("randomized"),
    new_basis("subspace"),
]


def test_galore(case: Case, contest: Callable[[Case], None]) -> None:
    contest(case)
