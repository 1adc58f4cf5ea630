"""GaLore and GradNormLoRP: steps within a basis beside AdamW, which keeps far larger states; and finding a basis."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

import narrowgauge as ng
from bench.harness import OURS, Call, Case, Contest, Setting, traffic
from bench.optim.bench_adamw import parameters

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


def step_case(
    operator: str, detail: str, build_ours: Callable[[list[Tensor]], torch.optim.Optimizer]
) -> Case:
    """Steps without a new basis."""

    def build(setting: Setting) -> Contest:
        def new() -> list[Tensor]:
            return parameters(setting, SHAPES, torch.float32)

        def eager() -> Call:
            optimizer = EagerGaLore(new(), RANK, NEVER)
            optimizer.step()
            return optimizer.step

        params = new()
        ours = build_ours(params)
        ours.step()
        states = list(ours.state.values())
        bases = [value for state in states for name, value in state.items() if name.startswith("projection")]
        moved = traffic([p.grad for p in params]) + 2 * traffic(params) + 2 * traffic(states) - traffic(bases)
        contest = Contest({OURS: ours.step}, moved)
        contest.add("eager GaLore", eager)
        contest.add("AdamW", lambda: ng.optim.AdamW(new()).step)
        contest.add("torch AdamW foreach", lambda: torch.optim.AdamW(new(), foreach=True).step)
        return contest

    return Case(operator, detail, build)


def basis_case(projection: str) -> Case:
    """Steps that each find a new basis: ours approximates it, the peers decompose the whole gradient."""

    def build(setting: Setting) -> Contest:
        def ours(chosen: str) -> Call:
            params = parameters(setting, [(512, 512)], torch.float32)
            optimizer = ng.optim.GaLoreAdamW(params, rank=64, update_proj_gap=1, projection=chosen)
            optimizer.step()
            return optimizer.step

        contest = Contest({OURS: ours(projection)})
        contest.add("svd", lambda: ours("svd"))
        contest.add(
            "eager GaLore", lambda: EagerGaLore(parameters(setting, [(512, 512)], torch.float32), 64, 1).step
        )
        return contest

    return Case("galore", f"new basis by {projection} of 512x512, rank 64", build)


CASES = [
    step_case(
        "galore",
        with_memory("8M in 8 matrices float32, rank 128"),
        lambda params: ng.optim.GaLoreAdamW(
            params, rank=RANK, update_proj_gap=NEVER, projection="randomized"
        ),
    ),
    step_case(
        "galore",
        with_memory("8M in 8 matrices float32, rank 128, int8 states", 1 + 4 / 256),
        lambda params: ng.optim.GaLoreAdamW(
            params, rank=RANK, update_proj_gap=NEVER, projection="randomized", state_dtype="int8"
        ),
    ),
    step_case(
        "gradnormlorp",
        with_memory("8M in 8 matrices float32, rank 128", gain_moments=True),
        lambda params: ng.optim.GradNormLoRP(
            params, rank=RANK, update_proj_gap=NEVER, projection="randomized"
        ),
    ),
    basis_case("randomized"),
    basis_case("subspace"),
]


def test_galore(case: Case, contest: Callable[[Case], None]) -> None:
    contest(case)
