"""The questions that the benchmarks answer; each is a module of this package."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from .harness import Question

# In the order in which they run and are reported, with their shares of a run's time.
QUESTIONS: Mapping[str, float] = {
    "overhead": 0.2,
    "peers": 0.47,
    "endtoend": 0.1,
    "kernel": 0.05,
    "cold": 0.08,
    "export": 0.06,
    "scaling": 0.04,
}


def find_question(name: str) -> Question:
    """Return the module of a question."""
    module: Question = importlib.import_module(f".{name}", __package__)
    return module
