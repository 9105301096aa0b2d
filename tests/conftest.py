"""Fixtures shared by several test files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shim_kernels
from gpu_support import reasons_against_gpus

import fastcam.exporting.exporter
from fastcam.exporting.writer import write_model
from fastcam.graph import Graph

# TensorFlow's start-up report would drown the tests' output.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# With one worker per processor, more threads would only compete.
if "PYTEST_XDIST_WORKER" in os.environ:
    for name in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
        os.environ.setdefault(name, "1")


def _note_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Add a skipped test or file to the list that .ci/run repeats once the peers are installed."""
    listed = os.environ.get("FASTCAM_SKIPPED")
    if listed and report.skipped and "PYTEST_XDIST_WORKER" not in os.environ:
        with Path(listed).open("a", encoding="utf-8") as file:
            file.write(f"{report.nodeid}\n")


pytest_runtest_logreport = pytest_collectreport = _note_skipped


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(42)


@pytest.fixture(scope="session", autouse=True)
def every_exported_graph_runs_on_gpus() -> Iterator[None]:
    """Every file that a test exports in this process contains only ops that CUDA and TensorRT run."""

    def write_checked(graph: Graph, *arguments: Any) -> int:
        reasons = reasons_against_gpus(graph)
        assert not reasons, reasons
        return write_model(graph, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastcam.exporting.exporter, "write_model", write_checked)
        yield


@pytest.fixture(scope="session")
def shim_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CUDA kernels, compiled for the CPU."""
    reason = shim_kernels.missing()
    if reason is not None:
        pytest.skip(f"the CUDA kernels cannot be emulated: {reason}")
    return shim_kernels.build(tmp_path_factory.mktemp("shim") / "csrc")
