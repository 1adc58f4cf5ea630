"""The commands and the options they share."""

from __future__ import annotations

from typing import Annotated

import typer

import narrowgauge
from narrowgauge.cli.bench import bench
from narrowgauge.cli.demo import demo
from narrowgauge.cli.info import info
from narrowgauge.cli.report import report
from narrowgauge.cli.swap import swap

application = typer.Typer(
    name="narrowgauge",
    help="Kernels for the part of training that is not the matmul.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
for command in (demo, info, swap, bench, report):
    application.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(narrowgauge.__version__)
        raise typer.Exit


@application.callback()
def common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop."),
    ] = False,
) -> None:
    """Options before the command."""
