"""`narrowgauge demo`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from narrowgauge.cli.files import write_json
from narrowgauge.cli.spread import Spread
from narrowgauge.cli.terminal import bad_option, console


def demo(
    steps: Annotated[int, typer.Option(min=1, help="Steps of each training.")] = 300,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Of parameters and activations.")
    ] = "float32",
    linear: Annotated[
        Literal["int8-row", "fp8-row"] | None,
        typer.Option(help="Also train the linear layers in low precision."),
    ] = None,
    state_dtype: Annotated[Literal["fp32", "int8"], typer.Option(help="Of our optimizer's states.")] = "fp32",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dim: Annotated[int, typer.Option(help="Width of the model, a multiple of 64.")] = 192,
    layers: Annotated[int, typer.Option(min=1)] = 4,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per step.")] = 8,
    sequence_length: Annotated[int, typer.Option(min=1, help="Bytes per sequence.")] = 128,
    learning_rate: Annotated[float, typer.Option(min=0)] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of the parameters and the batches.")] = 0,
    out: Annotated[Path, typer.Option(help="Directory for the picture and the numbers.")] = Path("demo"),
) -> None:
    """Train a small language model twice, with stock PyTorch and with narrowgauge, and compare.

    The text is the source of the running Python's standard library. Both trainings start from the same
    parameters, see the same batches, and take turns every few steps, so that whatever else the machine does
    falls on both. Ctrl-C keeps what there is.
    """
    from narrowgauge.cli.comparison import Comparison, Options
    from narrowgauge.cli.plots import plot_losses

    check_device(device)
    check_directory(out)
    options = Options(
        steps=steps,
        batch_size=batch_size,
        sequence_length=sequence_length,
        dim=dim,
        layers=layers,
        device=device,
        dtype=dtype,
        linear=linear,
        state_dtype=state_dtype,
        learning_rate=learning_rate,
        seed=seed,
    )
    try:
        comparison = Comparison(options)
    except (ValueError, FileNotFoundError) as error:
        raise typer.BadParameter(str(error)) from error
    console.print(str(comparison.swapped), markup=False, highlight=False)
    interrupted = not train(comparison)
    result = comparison.result(partial=interrupted)
    write_json(out / "demo.json", result)
    plot_losses(result, out / "demo.png")
    console.print(table(result))
    console.print(verdict(result))
    console.print(f"Written: {out / 'demo.json'} and {out / 'demo.png'}")
    if interrupted:
        raise typer.Exit(130)


def check_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise bad_option("--device", f"{device!r} cannot be used: {reason}") from error


def check_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise bad_option(
            "--out", f"{path} is not a directory that can be written: {error.strerror}"
        ) from error


def train(comparison: Any) -> bool:
    """Runs all blocks behind a progress bar; False when Ctrl-C ended it early."""
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[losses]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=comparison.options.steps * len(comparison.runs), losses="")
        try:
            for run, steps in comparison.blocks():
                run.train(comparison.training, steps, lambda: progress.advance(task))
                losses = (f"{name} {r.losses[-1]:.3f}" for name, r in comparison.runs.items() if r.losses)
                progress.update(task, losses="loss: " + ", ".join(losses))
        except KeyboardInterrupt:
            return False
    return True


def table(result: dict[str, Any]) -> Table:
    """The result of a demo, for the terminal."""
    stock, ours = result["runs"].values()
    comparison = result["comparison"]
    made = Table(title="partial result: stopped early" if result["partial"] else None)
    made.add_column("")
    for name in result["runs"]:
        made.add_column(name, justify="right")
    made.add_column("")
    for kind in ("training", "validation"):
        difference = comparison["difference"][f"{kind}_loss"]
        note = "" if difference is None else f"difference {difference:+.4f}"
        made.add_row(f"{kind} loss", *(number(r[f"{kind}_loss"], ".4f") for r in (stock, ours)), note)
    speeds = [
        Spread.of(r["tokens_per_second"]).median if r["tokens_per_second"] else None for r in (stock, ours)
    ]
    ratio = comparison["speed_ratio"]
    note = f"{ratio['median']:.2f}x ({ratio['p20']:.2f}-{ratio['p80']:.2f})" if ratio else ""
    made.add_row("tokens per second", *(number(speed, ",.0f") for speed in speeds), note)
    for what in ("parameter", "optimizer_state"):
        sizes = [r[f"{what}_bytes"] for r in (stock, ours)]
        note = f"{sizes[1] / sizes[0]:.2f}x" if sizes[0] else ""
        made.add_row(f"{what.replace('_', ' ')} bytes", *(number(size, ",") for size in sizes), note)
    return made


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def verdict(result: dict[str, Any]) -> str:
    comparison = result["comparison"]
    differences = [difference for difference in comparison["difference"].values() if difference is not None]
    tolerance = comparison["tolerance"]
    if not differences:
        return "Nothing to compare yet."
    if comparison["agree"]:
        return f"[green]The losses agree[/green] within {tolerance} nats."
    if max(differences) <= tolerance:
        return f"[green]narrowgauge's loss is lower[/green], by more than {tolerance} nats."
    return f"[red]narrowgauge's loss is higher[/red] by more than {tolerance} nats."
