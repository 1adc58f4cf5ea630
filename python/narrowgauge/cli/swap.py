"""`narrowgauge swap`"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

import narrowgauge as ng
from narrowgauge.cli.terminal import bad_option, console


def load(target: str) -> Any:
    """What `package.module:name` names; modules of the current directory are found too."""
    module_name, colon, name = target.partition(":")
    if not (module_name and colon and name):
        raise bad_option("TARGET", f"must look like package.module:name, got {target!r}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise bad_option("TARGET", f"{target!r} cannot be imported: {error}") from error
    return found


def swap(
    target: Annotated[
        str,
        typer.Argument(help="A model, or a callable without arguments that builds one: package.module:name."),
    ],
    linear: Annotated[
        str | None, typer.Option(help="Recipe for nn.Linear: int8-row or fp8-row. Left alone by default.")
    ] = None,
    norm: Annotated[
        bool, typer.Option(help="Replace normalization layers by ones that compute the same.")
    ] = True,
    norm_by: Annotated[
        str | None, typer.Option(help="Replace them by this layer instead, such as dyt or power.")
    ] = None,
) -> None:
    """Show what ng.swap would replace in a model, what it would leave, and why."""
    found = load(target)
    model = found if isinstance(found, nn.Module) else found()
    if not isinstance(model, nn.Module):
        raise bad_option("TARGET", f"{target!r} gave a {type(model).__name__}, not a torch.nn.Module")
    try:
        console.print(str(ng.swap(model, norm=norm_by or norm, linear=linear)), markup=False, highlight=False)
    except ValueError as error:
        raise bad_option("--norm-by" if "norm must" in str(error) else "--linear", str(error)) from error
