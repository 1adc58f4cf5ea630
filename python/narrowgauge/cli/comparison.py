"""Two trainings of one model side by side: stock PyTorch, and after `ng.swap` with `ng.optim.AdamW`."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import narrowgauge as ng
from narrowgauge.cli import machine
from narrowgauge.cli.spread import Spread
from narrowgauge.examples.byte_llama import ByteLlama, Config
from narrowgauge.examples.standard_library_text import Batches, standard_library_text

STOCK, OURS = "PyTorch", "narrowgauge"
VALIDATION_BATCHES = 16
# Of the final losses, in nats per byte. One last bit more in every parameter at the start moves the loss of
# the default 300 float32 steps by 3e-5 at most (two seeds); the tolerances leave room for other machines
# and longer runs. Quantized layers or states are another training, not another rounding: there the
# tolerance says "about as good".
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2, "quantized": 5e-2}


@dataclass(frozen=True)
class Options:
    steps: int = 300
    batch_size: int = 8
    sequence_length: int = 128
    dim: int = 192
    layers: int = 4
    device: str = "cpu"
    dtype: str = "float32"
    linear: str | None = None
    state_dtype: str = "fp32"
    learning_rate: float = 1e-3
    seed: int = 0
    block: int = 10  # steps of one training before the other has its turn

    @property
    def tolerance(self) -> float:
        quantized = self.linear or self.state_dtype != "fp32"
        return TOLERANCE["quantized" if quantized else self.dtype]


class Run:
    """One of the two trainings, and what it has cost so far."""

    def __init__(self, model: ByteLlama, optimizer: torch.optim.Optimizer, steps: int, device: torch.device):
        self.model, self.optimizer, self.device = model, optimizer, device
        # A warm-up, then a fall to zero: with a high rate the last bit of a rounding grows into a visible
        # difference of the loss.
        self.schedule = LambdaLR(
            optimizer, lambda step: min((step + 1) / (0.1 * steps), 1.0, 1.0 - step / steps)
        )
        self.losses: list[float] = []
        self.tokens_per_second: list[float] = []  # one number per complete block

    def train(self, batches: Batches, steps: Iterable[int], on_step: Callable[[], None]) -> None:
        """One block of steps. Losses stay on the device until its end: the host never waits inside."""
        losses, tokens = [], 0
        start = time.perf_counter()
        try:
            for step in steps:
                inputs, targets = (tensor.to(self.device) for tensor in batches[step])
                loss = self.model.loss(inputs, targets)
                loss.backward()
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
                losses.append(loss.detach())
                tokens += inputs.numel()
                on_step()
            self._wait()
            self.tokens_per_second.append(tokens / (time.perf_counter() - start))
        finally:
            self.losses += [loss.item() for loss in losses]

    @torch.no_grad()
    def validate(self, batches: Batches) -> float:
        total = 0.0
        for index in range(len(batches)):
            total += self.model.loss(*(tensor.to(self.device) for tensor in batches[index])).item()
        return total / len(batches)

    def parameter_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.model.parameters())

    def optimizer_state_bytes(self) -> int:
        return sum(
            value.nbytes
            for state in self.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        )

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Comparison:
    """Builds both trainings from one seed, alternates them in blocks of steps, and sums up."""

    def __init__(self, options: Options):
        self.options = options
        text = standard_library_text()
        shape = (options.batch_size, options.sequence_length, options.seed)
        self.training = Batches(text.train, options.steps, *shape)
        self.validation = Batches(text.validation, VALIDATION_BATCHES, *shape)
        device = torch.device(options.device)
        torch.manual_seed(options.seed)
        stock = ByteLlama(Config(dim=options.dim, layers=options.layers))
        stock = stock.to(device, getattr(torch, options.dtype))
        ours = copy.deepcopy(stock)
        self.swapped = ng.swap(ours, linear=options.linear)
        our_adamw = ng.optim.AdamW(
            ours.parameters(), lr=options.learning_rate, state_dtype=options.state_dtype
        )
        self.runs = {
            STOCK: Run(stock, stock_adamw(stock, options.learning_rate), options.steps, device),
            OURS: Run(ours, our_adamw, options.steps, device),
        }

    def blocks(self) -> Iterable[tuple[Run, range]]:
        """Whose turn it is, with which steps. Whoever ends a round begins the next: drift falls on both."""
        order = list(self.runs.values())
        for start in range(0, self.options.steps, self.options.block):
            steps = range(start, min(start + self.options.block, self.options.steps))
            for run in order:
                yield run, steps
            order.reverse()

    def result(self, partial: bool = False) -> dict[str, Any]:
        """Everything known so far, ready for JSON. A partial result has no validation losses."""
        steps = min(len(run.losses) for run in self.runs.values())  # that both have done
        runs = {name: self._summary(run, steps, partial) for name, run in self.runs.items()}
        return {
            "kind": "demo",
            "schema": 1,
            "partial": partial,
            "options": asdict(self.options),
            "machine": machine.facts(),
            "training_bytes": self.training.text.numel(),
            "swap": str(self.swapped).splitlines(),
            "runs": runs,
            "comparison": compare(runs[STOCK], runs[OURS], self.options.tolerance),
        }

    def _summary(self, run: Run, steps: int, partial: bool) -> dict[str, Any]:
        last = run.losses[max(0, steps - self.options.block) : steps]
        return {
            "losses": run.losses,
            "training_loss": sum(last) / len(last) if last else None,
            "validation_loss": None if partial else run.validate(self.validation),
            "tokens_per_second": run.tokens_per_second,
            "parameter_bytes": run.parameter_bytes(),
            "optimizer_state_bytes": run.optimizer_state_bytes(),
        }


def stock_adamw(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """`torch.optim.AdamW` in its fastest form: fused where the device has it."""
    try:
        return torch.optim.AdamW(model.parameters(), lr=learning_rate, fused=True)
    except RuntimeError:
        return torch.optim.AdamW(model.parameters(), lr=learning_rate)


def compare(stock: dict[str, Any], ours: dict[str, Any], tolerance: float) -> dict[str, Any]:
    """Differences and ratios, ours against stock; None where a side has no number yet."""
    speeds = list(zip(stock["tokens_per_second"], ours["tokens_per_second"], strict=False))
    speeds = speeds[1:] or speeds  # the first block warms up
    ratios = [mine / other for other, mine in speeds]
    differences = {
        f"{kind}_loss": None
        if None in (stock[f"{kind}_loss"], ours[f"{kind}_loss"])
        else ours[f"{kind}_loss"] - stock[f"{kind}_loss"]
        for kind in ("training", "validation")
    }
    known = [difference for difference in differences.values() if difference is not None]
    return {
        "difference": differences,
        "tolerance": tolerance,
        "agree": all(abs(difference) <= tolerance for difference in known) if known else None,
        "speed_ratio": asdict(Spread.of(ratios)) if ratios else None,
    }
