"""The `narrowgauge` command. Importable without its dependencies; running it says which extra brings them."""

from __future__ import annotations

import sys

EXTRA_OF = {
    "typer": "cli",
    "rich": "cli",
    "matplotlib": "cli",
    "pytest": "bench",
    "pytest_benchmark": "bench",
}


def app() -> None:
    """Entry point of the `narrowgauge` command."""
    try:
        from narrowgauge.cli.main import application

        application()
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRA_OF:
            raise
        sys.exit(f"This command needs {missing}: pip install 'narrowgauge[{EXTRA_OF[missing]}]'")
