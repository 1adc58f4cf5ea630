"""Benchmarks: one harness and the cases of each room. `narrowgauge bench` runs them; so does pytest."""
