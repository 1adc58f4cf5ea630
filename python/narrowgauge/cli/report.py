"""`narrowgauge report`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from narrowgauge.cli import demo
from narrowgauge.cli.files import read_json
from narrowgauge.cli.terminal import bad_option, console

OURS = "narrowgauge"


def report(
    results: Annotated[Path, typer.Argument(help="JSON written by bench or demo.")],
    other: Annotated[Path | None, typer.Argument(help="A second one, to compare with the first.")] = None,
    markdown: Annotated[
        bool, typer.Option(help="Print a Markdown page of ratios, as in docs/speed.md.")
    ] = False,
) -> None:
    """Show what a results file holds, or how two of them differ."""
    first = read(results, "RESULTS")
    second = read(other, "OTHER") if other else None
    if second and second["kind"] != first["kind"]:
        raise bad_option(
            "OTHER", f"holds a {second['kind']} result and cannot be compared with a {first['kind']} result"
        )
    if (markdown or second) and first["kind"] != "bench":
        raise bad_option("RESULTS", "only results of bench can be compared or printed as Markdown")
    if second:
        console.print(difference_table(first, second))
    elif markdown:
        typer.echo(markdown_page(first))
    elif first["kind"] == "bench":
        console.print(bench_table(first))
    else:
        console.print(demo.table(first))
        console.print(demo.verdict(first))


def read(path: Path, name: str) -> dict[str, Any]:
    try:
        return read_json(path)
    except ValueError as error:
        raise bad_option(name, str(error)) from error


def rivals_of(result: dict[str, Any]) -> list[str]:
    """Every contestant but ours, in the order of appearance."""
    return list(dict.fromkeys(name for case in result["cases"] for name in case["speedups"]))


def duration(seconds: float) -> str:
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def speedup(case: dict[str, Any], rival: str, spread: bool = False) -> str:
    if rival not in case["speedups"]:
        return "-"
    ratio = case["speedups"][rival]
    inner = f" ({ratio['p20']:.2f}-{ratio['p80']:.2f})" if spread else ""
    return f"{ratio['median']:.2f}x{inner}"


def roofline(case: dict[str, Any]) -> str:
    return f"{case['roofline'][OURS]:.0%}" if OURS in case["roofline"] else "-"


def bench_table(result: dict[str, Any]) -> Table:
    """Times, speed-ups with their spread, and the share of the copy bandwidth."""
    rivals = rivals_of(result)
    table = Table(
        title="stopped early" if result["partial"] else None, caption="2.00x: twice the time of ours"
    )
    for heading in ("case", "ours", *rivals, "of roofline"):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for case in result["cases"]:
        ratios = (speedup(case, rival, spread=True) for rival in rivals)
        table.add_row(case["name"], duration(case["times"][OURS]["median"]), *ratios, roofline(case))
    return table


def difference_table(first: dict[str, Any], second: dict[str, Any]) -> Table:
    """Speed-ups of the cases both results have. Ratios only: times of two runs cannot be compared."""
    before = {case["name"]: case for case in first["cases"]}
    rivals = [rival for rival in rivals_of(first) if rival in rivals_of(second)]
    table = Table()
    table.add_column("case")
    for heading in (*rivals, "of roofline"):
        table.add_column(heading, justify="right")
    for case in second["cases"]:
        if case["name"] in before:
            old = before[case["name"]]
            ratios = (f"{speedup(old, rival)} → {speedup(case, rival)}" for rival in rivals)
            table.add_row(case["name"], *ratios, f"{roofline(old)} → {roofline(case)}")
    return table


def markdown_page(result: dict[str, Any]) -> str:
    """Ratios of one run with the facts of its machine."""
    machine, rivals = result["machine"], rivals_of(result)
    cases = result["cases"]
    columns = [name for name in rivals if 4 * sum(name in case["speedups"] for case in cases) >= len(cases)]
    others = [name for name in rivals if name not in columns]
    on_cuda = result["device"].startswith("cuda")
    place = (
        machine["gpu"]
        if on_cuda
        else f"{machine['cpu']}, {machine['threads']} threads, {machine['cpu_isa']} kernels"
    )
    headings = ["case", *columns, *(["others"] if others else []), "of copy bandwidth"]
    lines = [
        f"Measured on {place}, torch {machine['torch']}, {machine['date'][:10]}.",
        "2.00x says that the contestant takes twice the time narrowgauge takes in the same run: the median",
        "of paired rounds, with the 20th to 80th percentile in parentheses. The last column compares",
        "narrowgauge with a copy of as many bytes.",
        "",
        "| " + " | ".join(headings) + " |",
        "|---" + "|---:" * (len(headings) - 1) + "|",
    ]
    for case in cases:
        cells = [case["name"], *(speedup(case, rival, spread=True) for rival in columns)]
        if others:
            named = (f"{name} {speedup(case, name)}" for name in others if name in case["speedups"])
            cells.append(", ".join(named) or "-")
        cells.append(roofline(case))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
