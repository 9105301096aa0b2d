"""Fixtures of several test files."""

from __future__ import annotations

import os

import numpy as np
import pytest

# TensorFlow's start-up report would drown the tests' output.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(42)
