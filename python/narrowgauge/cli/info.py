"""`narrowgauge info`"""

from __future__ import annotations

from rich.table import Table

import narrowgauge as ng
from narrowgauge.cli.terminal import console


def info() -> None:
    """Show which native libraries are in use, for what, and why not when not."""
    table = Table(show_header=False)
    for name, value in vars(ng.info()).items():
        table.add_row(name.replace("_", " "), str(value))
    console.print(table)
