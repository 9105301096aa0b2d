"""The harness of all benchmarks: interleaved timing within a budget; every sample is kept with its machine.

A question is a module with cases. A case compares a few contestants and returns a `Measurement`, which is written to
results/<question>.json as soon as it is done, so that an interrupted run continues where it stopped. Everything
printed, drawn and written about a question comes only from that file.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import statistics
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"

Contestants = Mapping[str, Callable[[], object]]


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
        """First and third quartile; a single sample is both."""
        if len(self.samples) == 1:
            return self.samples[0], self.samples[0]
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high


@dataclass(frozen=True)
class Pace:
    """How thoroughly a case is timed.

    Parameters
    ----------
    seconds
        Time budget.
    least, most
        Bounds on the number of rounds, whatever the budget.
    turn
        Seconds of consecutive samples per contestant; at least one sample.
    settle
        Seconds of runs at the start of a turn that do not count. Threads of ONNX Runtime and OpenMP keep spinning
        after a run: a run right after another contestant's would have one processor less. They do not spin for seconds,
        so runs longer than ten times this need no settling.
    slow
        A contestant that takes more seconds than this per sample runs only in every third round.
    """

    seconds: float
    least: int = 3
    most: int = 40
    turn: float = 0.4
    settle: float = 0.1
    slow: float = 10


def interleave(
    contestants: Contestants, pace: Pace, *, repeats: int = 1, known: Mapping[str, float] | None = None
) -> dict[str, Timing]:
    """Time the contestants in turn, so that a change in the machine's speed affects all of them.

    Parameters
    ----------
    contestants
        Names and functions to run. Check their results beforehand, which also warms them up: this only times.
    pace
        Rounds and turns. Every round starts with a different contestant.
    repeats
        Runs per sample, for functions too short for the clock; the sample is the time of one run.
    known
        Known seconds per run, for contestants that need no extra run to learn it.
    """
    names = list(contestants)
    samples: dict[str, list[float]] = {name: [] for name in names}
    before = known or {}
    last = {name: before[name] if name in before else _time_of(contestants[name], repeats) for name in names}
    begin = time.perf_counter()
    for number in range(pace.most):
        # Assume that another round takes as long as those before.
        if number >= pace.least and (time.perf_counter() - begin) * (number + 1) / number > pace.seconds:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            if number % 3 and last[name] > pace.slow:
                continue
            if last[name] <= 10 * pace.settle:
                _keep_running(contestants[name], pace.settle, repeats)
            samples[name] += _keep_running(contestants[name], pace.turn, repeats)
            last[name] = samples[name][-1]
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def _keep_running(run: Callable[[], object], seconds: float, repeats: int) -> list[float]:
    """Run at least once, and until the seconds are up; return the time of each run."""
    samples: list[float] = []
    begin = time.perf_counter()
    while not samples or time.perf_counter() - begin + samples[-1] * repeats <= seconds:
        samples.append(_time_of(run, repeats))
    return samples


def _time_of(run: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


@dataclass(frozen=True)
class Measurement:
    """The result of a case.

    Attributes
    ----------
    samples
        By contestant: seconds, or in ``unit``.
    facts
        Anything else that the tables need: sizes, bytes, errors relative to another result.
    missing
        Contestants that could not take part, and why.
    unit
        Of the samples.
    """

    samples: Mapping[str, Sequence[float]]
    facts: Mapping[str, Any] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    unit: str = "s"

    @classmethod
    def of(cls, timings: Mapping[str, Timing], **others: Any) -> Measurement:
        """Return the samples of `interleave`."""
        return cls({name: timing.samples for name, timing in timings.items()}, **others)


@dataclass(frozen=True)
class Case:
    """One comparison.

    Parameters
    ----------
    key
        Its name in the results.
    seconds
        About the minimum time on two processors, including preparation. With less time left it is skipped.
    measure
        From the time budget to the result.
    """

    key: str
    seconds: float
    measure: Callable[[float], Measurement]


@dataclass(frozen=True)
class Settings:
    """Command-line options common to all questions.

    Attributes
    ----------
    threads
        Of every contestant.
    folder
        For temporary files.
    quick
        Tiny networks and few rounds: only to check that it works, never for the report.
    weights
        Keras' file of VGG16's ImageNet weights without its head; None draws random ones.
    """

    threads: int
    folder: Path
    quick: bool = False
    weights: Path | None = None


class Question(Protocol):
    """The interface of a question's module."""

    ASKS: str
    PACKAGES: Sequence[str]

    def cases(self, settings: Settings) -> list[Case]:
        """Return the comparisons, the most informative first."""

    def write(self, record: Record) -> str:
        """Return the tables, as Markdown."""

    def draw(self, record: Record) -> Figure:
        """Return the picture."""


@dataclass
class Record:
    """The results of a question, as stored in its file."""

    question: str
    machine: dict[str, Any]
    command: str
    cases: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def medians(self, key: str) -> dict[str, float]:
        """Return each contestant's median in a case."""
        return {name: statistics.median(values) for name, values in self.cases[key]["samples"].items()}

    def spread(self, key: str, name: str) -> tuple[float, float]:
        """Return a contestant's quartiles in a case."""
        return Timing(tuple(self.cases[key]["samples"][name])).spread

    @property
    def dates(self) -> tuple[str, str]:
        """The first and the last day on which a case was measured."""
        days = sorted(case["date"][:10] for case in self.cases.values())
        return days[0], days[-1]


def results_path(question: str, *, quick: bool = False) -> Path:
    """Return the path of a question's results; quick runs have a separate one that the report does not read."""
    return (RESULTS / "quick" if quick else RESULTS) / f"{question}.json"


def read_record(path: Path) -> Record | None:
    """Read results; None if there are none."""
    if not path.is_file():
        return None
    return Record(**json.loads(path.read_text(encoding="utf-8")))


def write_record(path: Path, record: Record) -> None:
    """Write results, completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(record.__dict__, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def measure(
    question: str,
    cases: Sequence[Case],
    record: Record,
    path: Path,
    seconds: float,
    *,
    say: Callable[[str], None] = print,
) -> bool:
    """Measure the cases missing from the record, as many as fit into the time, and write it after each.

    A case gets its share of the remaining time, in proportion to the minimum times of the remaining cases. A case
    that raises is recorded, and the others continue. Return whether none did.
    """
    begin = time.perf_counter()
    waiting = [case for case in cases if case.key not in record.cases]
    record.skipped = {}
    whole = True
    for number, case in enumerate(waiting):
        left = seconds - (time.perf_counter() - begin)
        if left < case.seconds:
            record.skipped[case.key] = f"needs about {case.seconds:.0f} s"
            say(f"{question}: {case.key}: skipped: {max(left, 0):.0f} s left, at least {case.seconds:.0f} s needed")
            write_record(path, record)
            continue
        fitting = _fitting(waiting[number:], left)
        allowance = left * case.seconds / sum(other.seconds for other in fitting)
        start = time.perf_counter()
        try:
            found = case.measure(allowance)
        except Exception as error:  # noqa: BLE001  # whatever it is, the results of the other cases are not lost
            traceback.print_exc()
            record.skipped[case.key] = f"failed ({type(error).__name__}: {error})"
            whole = False
            write_record(path, record)
            continue
        gc.collect()
        spent = time.perf_counter() - start
        record.cases[case.key] = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "spent_seconds": round(spent, 1),
            "unit": found.unit,
            "samples": {name: list(values) for name, values in found.samples.items()},
            "facts": dict(found.facts),
            "missing": dict(found.missing),
        }
        write_record(path, record)
        say(f"{question}: {case.key}: {spent:.0f} s of {allowance:.0f} s")
    return whole


def _fitting(cases: Sequence[Case], seconds: float) -> list[Case]:
    """Return the cases whose minimum times fit into the seconds, in order."""
    fitting: list[Case] = []
    for case in cases:
        if sum(other.seconds for other in fitting) + case.seconds <= seconds:
            fitting.append(case)
    return fitting or [cases[0]]


def machine(packages: Sequence[str]) -> dict[str, Any]:
    """What the figures depend on: processor, system, Python, versions of the installed among `packages`."""
    return {
        "processor": _processor(),
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
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
    """Text columns, the first left-aligned and the others right-aligned."""
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


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table, the first column left-aligned and the others right-aligned."""
    lines = [list(header), ["---", *["---:"] * (len(header) - 1)], *([str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def figures(value: float) -> str:
    """Return a number with three significant figures, for tables: 0.123, 12.3, 1230."""
    if value == 0:
        return "0"
    digits = max(0, 2 - int(f"{value:.2e}".partition("e")[2]))
    return f"{float(f'{value:.3g}'):.{digits}f}"


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
