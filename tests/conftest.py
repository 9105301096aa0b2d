"""Fixtures of several test files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import shim_kernels

# TensorFlow's start-up report would drown the tests' output.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(42)


@pytest.fixture(scope="session")
def shim_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CUDA kernels, compiled for the CPU."""
    reason = shim_kernels.missing()
    if reason is not None:
        pytest.skip(f"the CUDA kernels cannot be emulated: {reason}")
    return shim_kernels.build(tmp_path_factory.mktemp("shim") / "csrc")
