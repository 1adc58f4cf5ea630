"""The byte-level Llama trained by several optimizers, chosen by name: their losses in one picture.

`python -m narrowgauge.examples.five_optimizers --steps 200 AdamW=3e-3 Muon=0.02` (needs the extra `cli`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import narrowgauge as ng
from narrowgauge.examples.byte_llama import ByteLlama, Config
from narrowgauge.examples.standard_library_text import Batches, standard_library_text

FIVE = ["AdamW=3e-3", "Lion=1e-3", "Muon=0.02", "Prodigy=1", "ScheduleFreeAdamW=0.01"]


def parse(choice: str) -> tuple[str, float]:
    """`"AdamW=3e-3"` to the name and the rate."""
    name, _, rate = choice.partition("=")
    members = {n: getattr(ng.optim, n) for n in ng.optim.__all__}
    offered = [
        n for n, cls in members.items() if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)
    ]
    if name not in offered:
        raise typer.BadParameter(f"{name} is not an optimizer; there are {', '.join(offered)}")
    try:
        return name, float(rate)
    except ValueError:
        raise typer.BadParameter(f"{choice} needs a learning rate, such as {name}=1e-3") from None


def optimizer_of(model: ByteLlama, name: str, rate: float) -> torch.optim.Optimizer:
    if name == "Muon":  # for the matrices; AdamW takes the rest
        return ng.optim.Muon(ng.optim.muon_groups(model, adamw={"lr": 3e-3}), lr=rate)
    return getattr(ng.optim, name)(model.parameters(), lr=rate)


def train(
    optimizer_name: str, rate: float, batches: Batches, config: Config, advance: Callable[[], Any]
) -> Any:
    """The losses, and the bytes of the states."""
    torch.manual_seed(0)
    model = ByteLlama(config)
    ng.swap(model)
    optimizer = optimizer_of(model, optimizer_name, rate)
    losses = []
    for step in range(len(batches)):
        loss = model.loss(*batches[step])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        advance()
    held = sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value)
    )
    return losses, held / sum(p.numel() for p in model.parameters())


def main(
    choices: Annotated[
        list[str] | None, typer.Argument(help="NAME=RATE, several times. Five by default.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1)] = 100,
    dim: Annotated[int, typer.Option(help="Width of the model, a multiple of 64.")] = 64,
    layers: Annotated[int, typer.Option(min=1)] = 2,
    out: Annotated[Path, typer.Option(help="The picture.")] = Path("five_optimizers.png"),
) -> None:
    """Train a small language model with each optimizer on the same batches; draw the losses."""
    from narrowgauge.cli.plots import plt, save, smooth

    chosen = [parse(choice) for choice in choices or FIVE]
    batches = Batches(standard_library_text().train, steps, batch_size=8, length=64, seed=0)
    console = Console()
    table = Table("optimizer", "learning rate", "first loss", "last losses", "bytes of states per parameter")
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    with Progress(console=console) as progress:
        for name, rate in chosen:
            task = progress.add_task(f"{name:12}", total=steps)
            losses, per_parameter = train(
                name, rate, batches, Config(dim, layers), partial(progress.advance, task)
            )
            last = sum(losses[-10:]) / len(losses[-10:])
            table.add_row(name, f"{rate:g}", f"{losses[0]:.3f}", f"{last:.3f}", f"{per_parameter:.2f}")
            axes.plot(smooth(losses), label=f"{name}, {rate:g}")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, nats per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, out)
    console.print(table)
    console.print(f"Written: {out}")


if __name__ == "__main__":
    typer.run(main)
