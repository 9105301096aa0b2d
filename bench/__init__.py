"""Benchmarks: one file per question, one harness; `__main__` lists and runs them."""
