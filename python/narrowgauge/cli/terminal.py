"""What the commands share when they talk to a person."""

from __future__ import annotations

import typer
from rich.console import Console

console = Console(soft_wrap=True)


def bad_option(name: str, message: str) -> typer.BadParameter:
    """An error in one option or argument, to be raised before any work."""
    return typer.BadParameter(message, param_hint=name)
