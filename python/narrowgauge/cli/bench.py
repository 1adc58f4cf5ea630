"""`narrowgauge bench`"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

import narrowgauge
from narrowgauge.cli import machine
from narrowgauge.cli.demo import check_device
from narrowgauge.cli.files import write_json
from narrowgauge.cli.report import bench_table
from narrowgauge.cli.terminal import bad_option, console


def find_checkout() -> Path | None:
    """The source tree around the current directory, or around an editable install."""
    places = [Path.cwd(), Path(narrowgauge.__file__).resolve().parent]
    candidates = (directory for place in places for directory in (place, *place.parents))
    return next(
        (directory for directory in candidates if (directory / "bench" / "harness.py").is_file()), None
    )


def load_bench(checkout: Path) -> tuple[Any, list[Any]]:
    """The harness and the modules with cases."""
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    names = sorted(
        path.relative_to(checkout).with_suffix("").as_posix().replace("/", ".")
        for path in (checkout / "bench").rglob("bench_*.py")
    )
    return importlib.import_module("bench.harness"), [importlib.import_module(name) for name in names]


def bench(
    pattern: Annotated[
        str,
        typer.Argument(help='Words of the case\'s name, such as "*norm fwd bfloat16". All cases by default.'),
    ] = "",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    seconds: Annotated[float, typer.Option(min=0.0, help="Time per case, after the warm-up.")] = 2.0,
    compile: Annotated[
        bool, typer.Option(help="Compare with torch.compile too; it takes long to warm up.")
    ] = True,
    room: Annotated[str, typer.Option(help="Only the cases of bench/<room>: norm, quant or optim.")] = "",
    out: Annotated[
        Path | None, typer.Option(help="JSON file to write, with a PNG beside it. Default: in bench/results.")
    ] = None,
    list_only: Annotated[bool, typer.Option("--list", help="List the cases and stop.")] = False,
) -> None:
    """Time narrowgauge beside eager PyTorch, torch.compile and installed peers (from a source checkout)."""
    from narrowgauge.cli.plots import plot_speedups

    checkout = find_checkout()
    if checkout is None:
        console.print(
            "The benchmarks are in the source checkout, not in the package: clone it and run this inside."
        )
        raise typer.Exit(2)
    harness, modules = load_bench(checkout)
    if room:
        modules = [module for module in modules if module.__name__.startswith(f"bench.{room}.")]
        if not modules:
            raise bad_option("--room", f"there is no bench/{room}; rooms are norm, quant and optim")
    cases = harness.cases_of(modules, device, pattern)
    if not cases:
        raise bad_option("PATTERN", f"no case has {pattern!r} in its name; --list shows all")
    if list_only:
        for case in cases:
            console.print(case.name, highlight=False)
        return
    check_device(device)
    suffix = "".join("-" + re.sub(r"\W+", "-", part) for part in (room, pattern) if part)
    out = out or checkout / "bench" / "results" / f"{device.partition(':')[0]}{suffix}.json"

    allocator = harness.keep_freed_memory()
    setting = harness.Setting(device=device, compile=compile)
    result: dict[str, Any] = {
        "kind": "bench",
        "schema": 1,
        "partial": False,
        "device": device,
        "machine": machine.facts(),
        "allocator": allocator,
        "copy_bytes_per_second": harness.copy_bandwidth(device),
        "cases": [],
    }
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(cases))
        try:
            for case in cases:
                progress.update(task, description=case.name)
                result["cases"].append(harness.run(case, setting, seconds))
                progress.advance(task)
        except KeyboardInterrupt:
            result["partial"] = True
    write_json(out, result)
    plot_speedups(result, out.with_suffix(".png"))
    console.print(bench_table(result))
    console.print(f"Written: {out} and {out.with_suffix('.png')}")
    if result["partial"]:
        raise typer.Exit(130)
