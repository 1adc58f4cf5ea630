"""What the benchmarks of optimizers share: shapes, parameters with gradients, and a case that compares steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from bench.harness import OURS, Case, Contest, Setting, traffic

LARGE = [(1024, 1024)] * 16
MANY = [(128, 128)] * 1000
TINY = [(64,)] * 1000

Make = Callable[[list[torch.Tensor]], Any]


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


class Rival:
    """A step over lists of tensors, the fastest form without a kernel of one's own; a subclass defines `update`."""

    def __init__(self, params: list[torch.Tensor]) -> None:
        self.params = params
        self.grads = [p.grad for p in params if p.grad is not None]
        self.first, self.second, self.diff, self.last = (
            [torch.zeros_like(p) for p in params] for _ in range(4)
        )
        self.count = 0

    @torch.no_grad()
    def step(self) -> None:
        self.count += 1
        self.update()

    def update(self) -> None:
        raise NotImplementedError

    def average_squares(self, beta: float, values: list[torch.Tensor]) -> None:
        torch._foreach_mul_(self.second, beta)
        torch._foreach_addcmul_(self.second, values, values, value=1 - beta)

    def moments(self, beta1: float, beta2: float, grads: list[torch.Tensor]) -> None:
        torch._foreach_lerp_(self.first, grads, 1 - beta1)
        self.average_squares(beta2, grads)


def step_case(
    operator: str,
    detail: str,
    ours: Make,
    rivals: dict[str, Make] | None = None,
    *,
    shapes: list[tuple[int, ...]] | None = None,
    dtype: torch.dtype = torch.float32,
    requires: dict[str, str] | None = None,
    bytes_moved: Callable[[Any], int] = step_traffic,
) -> Case:
    """Compares steps of optimizers, each with parameters of its own.

    Args:
        operator: Name in tables; the `bench` of the system's record.
        detail: What is special about this case.
        ours: Makes our optimizer from parameters.
        rivals: Makes the others, by the names of their columns.
        shapes: Shapes of the parameters; by default `LARGE`.
        dtype: Their dtype.
        requires: For a rival of another package, the module it needs.
        bytes_moved: Bytes that a step of ours must move, from our optimizer after its first step.
    """
    shapes = LARGE if shapes is None else shapes

    def build(setting: Setting) -> Contest:
        optimizer = ours(parameters(setting, shapes, dtype))
        optimizer.step()
        contest = Contest({OURS: optimizer.step}, bytes_moved(optimizer))
        for name, make in (rivals or {}).items():
            package = (requires or {}).get(name)
            contest.add(
                name, _step_of(make, setting, shapes, dtype), **({"requires": package} if package else {})
            )
        return contest

    return Case(operator, detail, build, host_time=shapes is TINY)


def _step_of(
    make: Make, setting: Setting, shapes: list[tuple[int, ...]], dtype: torch.dtype
) -> Callable[[], Callable[[], Any]]:
    def step() -> Callable[[], Any]:
        optimizer = make(parameters(setting, shapes, dtype))
        return optimizer.step  # type: ignore[no-any-return]

    return step


def stock(name: str, **options: Any) -> dict[str, Make]:
    """The foreach and, where there is one, the fused form of an optimizer of PyTorch, as rivals."""
    kind = getattr(torch.optim, name)
    found: dict[str, Make] = {"torch foreach": lambda params: kind(params, foreach=True, **options)}
    if name in ("SGD", "Adam", "AdamW", "Adagrad"):
        found["torch fused"] = lambda params: kind(params, fused=True, **options)
    return found


def cases(operator: str, ours: Make, rivals: dict[str, Make], **options: Any) -> Iterable[Case]:
    """The usual two: 16 million parameters in 16 tensors, and in 1,000."""
    yield step_case(operator, "16M in 16 tensors float32", ours, rivals, **options)
    yield step_case(operator, "16M in 1000 tensors float32", ours, rivals, shapes=MANY, **options)
