"""Small complete programs; each runs with `python -m narrowgauge.examples.<name>`."""
