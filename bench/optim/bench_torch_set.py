"""Steps of SGD, RMSprop, Adagrad, Adadelta, Adamax, NAdam and RAdam beside those of torch.optim."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import narrowgauge as ng
from bench.harness import Case
from bench.optim.cases import TINY, cases, step_case, stock

OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9},
    "RMSprop": {},
    "Adagrad": {},
    "Adadelta": {},
    "Adamax": {},
    "NAdam": {},
    "RAdam": {},
}


def cases_of(name: str, options: dict[str, Any]) -> Iterator[Case]:
    def ours(params: Any) -> Any:
        return getattr(ng.optim, name)(params, **options)

    rivals = stock(name, **options)
    yield from cases(name.lower(), ours, rivals)
    yield step_case(name.lower(), "1000 tensors of 64 float32", ours, rivals, shapes=TINY)


CASES = [case for name, options in OPTIONS.items() for case in cases_of(name, options)]
CASES.append(step_case("sgd", "16M in 16 tensors float32, no momentum", ng.optim.SGD, stock("SGD")))
CASES.append(
    step_case(
        "rmsprop",
        "16M in 16 tensors float32, centered with momentum",
        lambda params: ng.optim.RMSprop(params, centered=True, momentum=0.9),
        stock("RMSprop", centered=True, momentum=0.9),
    )
)


def test_torch_set(case: Case, contest: Callable[[Case], None]) -> None:
    contest(case)
