"""Rewrites of a model's weights that keep its function: one file per conversion."""

__all__: list[str] = []
