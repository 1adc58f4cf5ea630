"""AdamW steps: 16 million parameters in 16 tensors, and 1,000 tiny tensors where only the call costs."""

from __future__ import annotations

from collections.abc import Callable

import torch

import narrowgauge as ng
from bench.harness import OURS, Call, Case, Contest, Setting, traffic

LARGE = [(1024, 1024)] * 16
TINY = [(64,)] * 1000


def parameters(setting: Setting, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[torch.Tensor]:
    """Parameters with gradients, for one contestant alone."""
    made = [setting.random(*shape, dtype=dtype, requires_grad=True) for shape in shapes]
    for parameter in made:
        parameter.grad = setting.random(*parameter.shape, dtype=dtype)
    return made


def step_traffic(optimizer: torch.optim.Optimizer) -> int:
    """A step reads gradients, and reads and writes parameters and states; these exist after the first."""
    updated = [group["params"] for group in optimizer.param_groups]
    gradients = [parameter.grad for group in updated for parameter in group]
    return traffic(gradients) + 2 * traffic(updated) + 2 * traffic(list(optimizer.state.values()))


def adamw_case(
    detail: str, shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32, **options: str
) -> Case:
    """Ours with `options` beside torch's implementations, which keep states in the parameter's dtype."""

    def build(setting: Setting) -> Contest:
        def stock(**chosen: bool) -> Call:
            return torch.optim.AdamW(parameters(setting, shapes, dtype), **chosen).step

        def torchao() -> Call:
            from torchao.optim import AdamW8bit

            return AdamW8bit(parameters(setting, shapes, dtype)).step

        ours = ng.optim.AdamW(parameters(setting, shapes, dtype), **options)
        ours.step()
        contest = Contest({OURS: ours.step}, step_traffic(ours))
        contest.add("torch fused", lambda: stock(fused=True))
        contest.add("torch foreach", lambda: stock(foreach=True))
        if setting.compile and options.get("state_dtype") == "int8":  # torchao compiles its step
            contest.add("torchao 8-bit", torchao, requires="torchao")
        return contest

    return Case("adamw", detail, build, host_time=shapes is TINY)


CASES = [
    adamw_case("16M in 16 tensors float32", LARGE),
    adamw_case("16M in 16 tensors float32, int8 states", LARGE, state_dtype="int8"),
    adamw_case("16M in 16 tensors bfloat16 stochastic", LARGE, torch.bfloat16, param_update="stochastic"),
    adamw_case("1000 tensors of 64 float32", TINY),
]


def test_adamw(case: Case, contest: Callable[[Case], None]) -> None:
    contest(case)
