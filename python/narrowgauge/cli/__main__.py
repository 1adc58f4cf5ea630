"""`python -m narrowgauge.cli` is the `narrowgauge` command."""

from narrowgauge.cli import app

app()
