"""Writes docs/benchmarks.md, its plots, and the README's table, only from the results."""

from __future__ import annotations

from pathlib import Path

from .contestants import FASTCAM
from .harness import Question, Record, read_record, results_path
from .peers import summary
from .questions import QUESTIONS, find_question

_BEGIN, _END = "<!-- benchmark -->\n", "<!-- end of benchmark -->"
_PICTURES = Path("docs") / "benchmarks"
_INTRODUCTION = """\
# Benchmarks

Written by `python -m bench report` from the samples of `python -m bench`, wins and losses alike. Method:

- Contestants run in turn within one process, in bursts; the first runs of a burst do not count, because the previous
  contestant's threads keep spinning for a while. A change in the machine's speed affects all of them.
- A contestant's results are checked before it is timed. One that is missing, fails or disagrees is listed.
- Figures are medians, with the first and third quartile; ratios are ratios of medians. Contestants that take more than
  ten seconds have few samples.
- Every sample is kept in `bench/results/`, with the machine and the versions.

`python -m bench all --minutes 20` measures everything again, as far as the time allows; a second call continues.
"""


def write_report(root: Path, *, quick: bool = False) -> list[Path]:
    """Write everything that has results, and return the files.

    Parameters
    ----------
    root
        The project's folder.
    quick
        Use the results of quick runs and write into the results folder, only to look at, never into the documents.
    """
    records = {
        name: record
        for name in QUESTIONS
        if (record := read_record(results_path(name, quick=quick))) is not None and record.cases
    }
    if not records:
        raise SystemExit("there are no results: run python -m bench all first")
    target = results_path("", quick=True).parent / "report" if quick else root
    pictures = target / _PICTURES
    pictures.mkdir(parents=True, exist_ok=True)
    written = []
    for name, record in records.items():
        path = pictures / f"{name}.png"
        # No date or version inside: the same results give the same bytes.
        find_question(name).draw(record).savefig(path, dpi=110, metadata={"Software": None})
        written.append(path)
    document = target / "docs" / "benchmarks.md"
    document.write_text(compose(records), encoding="utf-8")
    written.append(document)
    if "peers" in records:
        readme = target / "README.md"
        text = (root / "README.md").read_text(encoding="utf-8")
        readme.write_text(fill(text, readme_part(records["peers"])), encoding="utf-8")
        written.append(readme)
    return written


def compose(records: dict[str, Record]) -> str:
    """Return the text of docs/benchmarks.md."""
    return "\n".join([_INTRODUCTION, *(_section(find_question(name), record) for name, record in records.items())])


def _section(question: Question, record: Record) -> str:
    about = (question.__doc__ or "").partition("\n")[0].rstrip(".")
    explained = (question.__doc__ or "").partition("\n")[2].strip()
    parts = [
        f"## {record.question}: {about}",
        explained,
        f"`{record.command}`, {setting(record)}.",
        f"![{about}](benchmarks/{record.question}.png)",
        question.write(record),
        _left_out(record),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def setting(record: Record) -> str:
    """Return when and on what machine it was measured."""
    machine = record.machine
    first, last = record.dates
    day = first if first == last else f"{first} to {last}"
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return (
        f"{day}, {machine['processor']}, {machine['processors']} processors, {machine['threads']} threads each, "
        f"{machine['system']}, Python {machine['python']}; {versions}"
    )


def _left_out(record: Record) -> str:
    """List contestants that did not take part, and cases that were not measured."""
    absent: dict[str, list[str]] = {}
    for key, case in record.cases.items():
        for name, reason in case["missing"].items():
            absent.setdefault(f"{name}: {reason}", []).append(key)
    lines = [f"- {who} ({'; '.join(keys)})" for who, keys in absent.items()]
    lines += [f"- not measured: {key}, which {reason}" for key, reason in record.skipped.items()]
    return "Left out:\n\n" + "\n".join(lines) if lines else ""


def readme_part(record: Record) -> str:
    """Return the README's section: one table."""
    days = record.dates[-1]
    return (
        f"Heatmaps by fastcam and by its peers, the same weights and images; medians of interleaved runs, the peers as "
        f"times {FASTCAM}'s:\n\n{summary(record)}\n\n"
        f"*`python -m bench peers`, {days}, {record.machine['processors']} processors of {_article(record)}"
        f"{record.machine['processor']}. Other benchmarks, their commands and machines, wins and losses: "
        f"[docs/benchmarks.md](docs/benchmarks.md).*\n"
    )


def _article(record: Record) -> str:
    return "an " if record.machine["processor"][:1] in "AEIOU" else "a "


def fill(text: str, part: str) -> str:
    """Insert the section between the README's markers.

    Raises
    ------
    ValueError
        The markers are missing or not unique.
    """
    if text.count(_BEGIN) != 1 or text.count(_END) != 1:
        raise ValueError(f"README.md needs one {_BEGIN.strip()} and one {_END}")
    head, _, rest = text.partition(_BEGIN)
    return head + _BEGIN + part + rest[rest.index(_END) :]
