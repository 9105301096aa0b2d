"""The harness of every benchmark: warm up, time in turns, keep every sample with the machine it came from."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Timing:
    """Samples of one contestant, in seconds, in the order in which they were taken."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.samples)

    @property
    def spread(self) -> tuple[float, float]:
        """First and third quartile."""
        low, _, high = statistics.quantiles(self.samples, n=4)
        return low, high


def interleave(
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 2,
    repeats: int = 1,
    burst: int = 1,
    settle: int = 0,
) -> dict[str, Timing]:
    """Time the contestants in turns, so that a change of the machine's speed meets all of them.

    Parameters
    ----------
    contestants
        Name and what to run. Check what they compute before: this only times.
    rounds
        Turns of each. Every round starts with another contestant.
    warmup
        Runs of each before the first sample.
    repeats
        Runs per sample, for what is too short for the clock; the sample is the time of one.
    burst
        Samples in a row of a contestant in its turn.
    settle
        Runs at the start of a turn that do not count. Threads of ONNX Runtime go on spinning after a run: what comes
        right after another session's would be timed with a processor less.
    """
    names = list(contestants)
    for name in names:
        for _ in range(warmup * repeats):
            contestants[name]()
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            run = contestants[name]
            for _ in range(settle):
                run()
            for _ in range(burst):
                samples[name].append(_time_of(run, repeats))
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def _time_of(run: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def machine(packages: Sequence[str]) -> dict[str, Any]:
    """What the figures depend on: processor, system, Python, versions of the installed among `packages`."""
    return {
        "processor": _processor(),
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version for name in packages if (version := _version(name)) is not None},
    }


def save(name: str, packages: Sequence[str], results: object) -> Path:
    """Write `results` to results/<name>.json, together with the machine."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(packages), "results": results}, indent=1) + "\n")
    return path


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Text columns, the first to the left and the others to the right."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = (
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )
    return "\n".join(lines)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
