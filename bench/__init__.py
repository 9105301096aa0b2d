"""Benchmarks: one file per question, one harness. Run as modules, e.g. ``python -m bench.kernel``."""
