"""``python -m bench``: list the questions, measure them, and write the results.

python -m bench                        the questions
python -m bench overhead cold          measure these, unless they are already measured
python -m bench all --minutes 20       measure all of them, each in a separate process, within this time
python -m bench report                 write docs/benchmarks.md, its plots and the README's section from the results
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from .harness import (
    RESULTS,
    Record,
    Settings,
    machine,
    measure,
    read_record,
    results_path,
    table,
    write_record,
)
from .questions import QUESTIONS, find_question


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="question")
    parser.add_argument("--minutes", type=float, help="total time to spend; by default 20 for all questions")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="number of threads of every contestant")
    parser.add_argument("--fresh", action="store_true", help="measure again what has already been measured")
    parser.add_argument("--quick", action="store_true", help="use tiny networks, only to check that everything runs")
    parser.add_argument(
        "--weights", type=Path, help="Keras file with the weights of VGG16 without its head; random weights by default"
    )
    options = parser.parse_args(arguments)
    names = list(dict.fromkeys(options.names))
    unknown = set(names) - {*QUESTIONS, "all", "report"}
    if unknown:
        parser.error(f"no question {', '.join(sorted(unknown))}: choose from {', '.join(QUESTIONS)}, all, report")
    if not names:
        print(table(["question", "asks"], [[f"{name}:", find_question(name).ASKS] for name in QUESTIONS]))
        print(f"\n{__doc__}")
        return 0
    if names == ["report"]:
        from .report import write_report

        print("\n".join(f"written: {path}" for path in write_report(Path(__file__).parents[1], quick=options.quick)))
        return 0
    if "report" in names or ("all" in names and len(names) > 1):
        parser.error("'all' and 'report' cannot be combined with other questions")
    chosen = list(QUESTIONS) if names == ["all"] else names
    minutes = options.minutes or 20 * sum(QUESTIONS[name] for name in chosen)
    if len(chosen) == 1:
        return 0 if _answer(chosen[0], options, 60 * minutes) else 1
    return _answer_all(chosen, options, 60 * minutes)


def _answer_all(names: Sequence[str], options: argparse.Namespace, seconds: float) -> int:
    """Measure each in a separate process, unaffected by the memory and threads of the others."""
    begin = time.perf_counter()
    failed = []
    for number, name in enumerate(names):
        left = seconds - (time.perf_counter() - begin)
        share = QUESTIONS[name] / sum(QUESTIONS[other] for other in names[number:])
        command = [sys.executable, "-m", __package__ or "bench", name, "--minutes", f"{left * share / 60:.2f}"]
        command += ["--threads", str(options.threads), *(["--fresh"] if options.fresh else [])]
        command += [
            *(["--quick"] if options.quick else []),
            *(["--weights", options.weights] if options.weights else []),
        ]
        if subprocess.run(command, check=False).returncode != 0:
            failed.append(name)
    print(f"{time.perf_counter() - begin:.0f} s of {seconds:.0f} s")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def _answer(name: str, options: argparse.Namespace, seconds: float) -> bool:
    """Measure in this process, print and draw the results; return whether all cases succeeded."""
    question = find_question(name)
    path = results_path(name, quick=options.quick)
    record = _begin(name, path, {**machine(question.PACKAGES), "threads": options.threads}, fresh=options.fresh)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        settings = Settings(options.threads, Path(folder), options.quick, options.weights)
        whole = measure(name, question.cases(settings), record, path, seconds)
    if record.cases:
        print(f"\n{question.write(record)}\n")
        picture = path.with_suffix(".png")
        question.draw(record).savefig(picture, dpi=100)
        print(f"written: {path}, {picture}")
    return whole


def _begin(name: str, path: Path, found: dict[str, object], *, fresh: bool) -> Record:
    """Return the results so far; none if they come from another machine or other versions."""
    before = None if fresh else read_record(path)
    if before is not None and before.machine == found:
        return before
    if before is not None:
        print(f"{name}: {path} comes from another machine or other versions: measured again")
    record = Record(name, found, f"python -m bench {name}")
    RESULTS.mkdir(exist_ok=True)
    write_record(path, record)
    return record


if __name__ == "__main__":
    sys.exit(main())
