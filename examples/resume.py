"""Training that is interrupted and resumed from a file ends with the same bits as training that is not.

`python -m narrowgauge.examples.resume` (needs the extra `cli`).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track

import narrowgauge as ng
from narrowgauge.examples.byte_llama import ByteLlama, Config
from narrowgauge.examples.standard_library_text import Batches, standard_library_text


def fresh(state_dtype: str, seed: int) -> tuple[ByteLlama, ng.optim.AdamW]:
    """A model in bfloat16 whose steps are rounded at random, which resuming must repeat."""
    torch.manual_seed(seed)
    model = ByteLlama(Config(dim=64, layers=2)).bfloat16()
    ng.swap(model)
    return model, ng.optim.AdamW(
        model.parameters(), lr=3e-3, param_update="stochastic", state_dtype=state_dtype
    )


def train(
    model: ByteLlama, optimizer: ng.optim.AdamW, batches: Batches, first: int, last: int, what: str
) -> list[float]:
    losses = []
    for step in track(range(first, last), what):
        loss = model.loss(*batches[step])
        loss.backward()
        optimizer.step(max_grad_norm=1.0)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(
    before: Annotated[int, typer.Option(min=1, help="Steps before the checkpoint.")] = 50,
    after: Annotated[int, typer.Option(min=1, help="Steps after it.")] = 100,
    state_dtype: Annotated[str, typer.Option(help="How the states are stored.")] = "int8",
) -> None:
    """Train, save, go on; then load into a new model and optimizer, take the same steps, and compare the bits."""
    batches = Batches(standard_library_text().train, before + after, batch_size=4, length=64, seed=0)
    model, optimizer = fresh(state_dtype, seed=0)
    train(model, optimizer, batches, 0, before, "until the checkpoint")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
        expected = train(model, optimizer, batches, before, before + after, "without a break")
        resumed, its_optimizer = fresh(state_dtype, seed=1)
        saved = torch.load(path, weights_only=True)
    resumed.load_state_dict(saved["model"])
    its_optimizer.load_state_dict(saved["optimizer"])
    losses = train(resumed, its_optimizer, batches, before, before + after, "resumed")

    same = [a == b for a, b in zip(losses, expected, strict=True)]
    equal = all(torch.equal(a, b) for a, b in zip(resumed.parameters(), model.parameters(), strict=True))
    console = Console()
    console.print(
        f"{sum(same)} of {len(same)} losses after the checkpoint are the same; the last is {losses[-1]:.4f}"
    )
    console.print(f"the parameters are {'the same, bit for bit' if equal else 'DIFFERENT'}")
    if not (all(same) and equal):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
