"""What the benchmarks compute: turns and budgets, ratios, agreement, the report."""

from __future__ import annotations

import ast
import json
import time
from collections.abc import Callable
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import cold, endtoend, kernel, overhead, peers, report
from bench.__main__ import main
from bench.contestants import FASTCAM, Agreement, Models, agreement, compare
from bench.export import run_watched
from bench.harness import (
    Case,
    Measurement,
    Pace,
    Record,
    Timing,
    figures,
    interleave,
    markdown,
    measure,
    read_record,
    write_record,
)
from bench.networks import drawn_images, tiny
from bench.questions import QUESTIONS, find_question
from fastcam.pictures.reading import read_image

_MACHINE = {
    "processor": "Abacus",
    "processors": 2,
    "threads": 2,
    "system": "Linux x86_64",
    "python": "3.11",
    "packages": {"fastcam": "0.1.0"},
}


def _record(question: str, **cases: dict[str, list[float]]) -> Record:
    found = {
        key: {"date": "2026-01-02T03:04:05+00:00", "spent_seconds": 1, "unit": "s", "samples": samples, "facts": {},
              "missing": {}}
        for key, samples in cases.items()
    }  # fmt: skip
    return Record(question, dict(_MACHINE), f"python -m bench {question}", found)


def test_median_and_quartiles() -> None:
    assert Timing((5, 1, 2, 4, 3)).median == 3
    assert Timing((5, 1, 2, 4, 3)).spread == (2, 4)
    assert Timing((7,)).spread == (7, 7)


def _clocked(
    monkeypatch: pytest.MonkeyPatch, costs: dict[str, float]
) -> tuple[dict[str, Callable[[], None]], list[str]]:
    """Return contestants that advance a fake clock, and a list of those that ran."""
    now, ran = [0.0], list[str]()

    def contestant(name: str) -> Callable[[], None]:
        def run() -> None:
            ran.append(name)
            now[0] += costs[name]

        return run

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return {name: contestant(name) for name in costs}, ran


def test_turns_begin_with_another_contestant_and_end_with_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    contestants, ran = _clocked(monkeypatch, {"a": 1, "b": 2})
    timings = interleave(contestants, Pace(11, least=2, turn=0, settle=0), known={"a": 1, "b": 2})
    assert ran == ["a", "b", "b", "a", "a", "b"]
    assert list(timings["a"].samples) == [1, 1, 1]
    assert list(timings["b"].samples) == [2, 2, 2]
    ran.clear()
    interleave(contestants, Pace(0, least=2, turn=0, settle=0), known={"a": 1, "b": 2})
    assert ran == ["a", "b", "b", "a"]


def test_a_turn_is_a_burst_whose_first_runs_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    contestants, ran = _clocked(monkeypatch, {"quick": 0.125})
    timings = interleave(contestants, Pace(0, least=1, turn=0.5, settle=0.25))
    # One run to learn its duration, two to settle, four samples.
    assert list(timings["quick"].samples) == [0.125] * 4
    assert len(ran) == 7


def test_slow_contestants_are_in_every_third_round(monkeypatch: pytest.MonkeyPatch) -> None:
    contestants, _ = _clocked(monkeypatch, {"quick": 1, "slow": 20})
    timings = interleave(contestants, Pace(0, least=4, turn=0, settle=0, slow=10))
    assert len(timings["quick"].samples) == 4
    assert len(timings["slow"].samples) == 2


def test_repeats_are_divided_out(monkeypatch: pytest.MonkeyPatch) -> None:
    contestants, _ = _clocked(monkeypatch, {"tick": 0.5})
    assert interleave(contestants, Pace(0, least=2, turn=0, settle=0), repeats=8)["tick"].samples == (0.5, 0.5)


def test_a_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, float] = {}
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def case(key: str, seconds: float) -> Case:
        def run(allowance: float) -> Measurement:
            given[key] = allowance
            now[0] += seconds
            return Measurement({"it": [seconds]})

        return Case(key, seconds, run)

    cases, path = [case("long", 30), case("short", 10), case("endless", 1000)], tmp_path / "q.json"
    record = Record("q", dict(_MACHINE), "python -m bench q")
    measure("q", cases, record, path, 80, say=lambda text: None)
    # In proportion to their needs: the endless one does not fit, and gets nothing.
    assert given == {"long": 60, "short": 50}
    found = read_record(path)
    assert found is not None
    assert found == record
    assert list(found.cases) == ["long", "short"]
    assert found.skipped == {"endless": "needs about 1000 s"}
    given.clear()
    measure("q", cases, found, path, 2000, say=lambda text: None)
    assert given == {"endless": 2000}
    assert found.skipped == {}


def test_a_case_that_fails_is_named_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(allowance: float) -> Measurement:
        raise RuntimeError("no disk")

    cases = [Case("bad", 1, fail), Case("good", 1, lambda allowance: Measurement({"it": [1.0]}))]
    record = Record("q", dict(_MACHINE), "python -m bench q")
    assert not measure("q", cases, record, tmp_path / "q.json", 10)
    assert list(record.cases) == ["good"]
    assert record.skipped == {"bad": "failed (RuntimeError: no disk)"}
    assert "Traceback" in capsys.readouterr().err
    # The next run tries it again.
    cases[0] = Case("bad", 1, lambda allowance: Measurement({"it": [2.0]}))
    assert measure("q", cases, record, tmp_path / "q.json", 10)
    assert set(record.cases) == {"good", "bad"}


def test_results_are_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "q.json"
    assert read_record(path) is None
    write_record(path, _record("q", case={"a": [1.0]}))
    assert [entry.name for entry in path.parent.iterdir()] == ["q.json"]
    assert json.loads(path.read_text())["machine"]["processor"] == "Abacus"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0312345, "0.0312"),
        (1.2345, "1.23"),
        (12.345, "12.3"),
        (1234.5, "1230"),
        (9.996, "10.0"),
        (0, "0"),
        (999.7, "1000"),
    ],
)
def test_three_figures_count(value: float, text: str) -> None:
    assert figures(value) == text


def test_markdown_has_a_line_for_each_row() -> None:
    assert markdown(["a", "b"], [["x", 1], ["y", 2]]).splitlines() == [
        "| a | b |",
        "| --- | ---: |",
        "| x | 1 |",
        "| y | 2 |",
    ]


def test_the_weights_are_the_same_in_every_framework() -> None:
    keras = pytest.importorskip("keras", reason="needs tensorflow: pip install fastcam[keras]")
    assert keras
    import onnxruntime

    network = tiny()
    images = drawn_images(2, (3, 16, 16))
    (expected,) = onnxruntime.InferenceSession(network.to_onnx().SerializeToString()).run(None, {"images": images})
    logits = np.asarray(network.to_keras()(images.transpose(0, 2, 3, 1)), np.float64)
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_allclose(exponentials / exponentials.sum(1, keepdims=True), expected, rtol=1e-4, atol=1e-7)


def test_agreement_is_measured_map_by_map() -> None:
    expected = np.ones((2, 2, 4, 4))
    found = expected.copy()
    found[0, 1] *= 1.05
    assert compare(expected, expected) == Agreement(0, 0)
    # One map of four is a kink; two mean a different formula.
    assert compare(found, expected).median == 0
    assert compare(found, expected).worst == pytest.approx(0.05)
    assert compare(found, expected).holds
    found[1] *= 1.05
    assert not compare(found, expected).holds
    found = expected.copy()
    found[0, 0] *= 1.5
    assert not compare(found, expected).holds
    assert not compare(expected[:1], expected).holds
    # Maps of zeros: NaN only where it is expected.
    expected[0, 0] = np.nan
    assert compare(expected, expected).holds
    assert not compare(np.nan_to_num(expected), expected).holds


def test_a_peer_with_another_formula_is_found(tmp_path: Path) -> None:
    images = drawn_images(2, (3, 16, 16))
    explainer = Models(tiny(), tmp_path, 1).explainer
    raw = explainer(images, [0, 1], size="layer", normalize=None).maps

    def explain(classes: Any) -> Any:
        return explainer(images, list(classes)).heatmaps

    assert agreement(FASTCAM, explain, raw, [0, 1], (16, 16)).holds
    assert not agreement(FASTCAM, lambda classes: explain(classes) ** 2, raw, [0, 1], (16, 16)).holds
    assert not agreement(FASTCAM, lambda classes: explain(classes)[:, ::-1], raw, [0, 1], (16, 16)).holds


_PEERS = {
    peers.PLAIN: [0.09, 0.1, 0.11],
    FASTCAM: [0.1, 0.1, 0.2],
    "torch, by hand": [0.15],
    "torch.compile, by hand": [0.12],
    "textbook TensorFlow": [0.6],
    "captum": [0.05],
}


def test_peers_are_told_as_times_fastcams_median_losses_too() -> None:
    record = _record("peers", **{"VGG16, batch 1, 1 class": _PEERS})
    record.cases["VGG16, batch 1, 1 class"]["facts"]["errors"] = {"captum": {"median": 1e-7, "worst": 2e-7}}
    text = peers.write(record)
    assert "| captum | 50.0 (50.0..50.0), 0.50x |" in text
    assert "| **fastcam** | 100 (100..150), 1.00x |" in text
    assert "0.50 times as fast as the fastest peer (captum) and 6.00 times as fast as the textbook code" in text
    assert "| captum | 1.0e-07 | 2.0e-07 |" in text
    assert "| xplique | - |" in text
    # Peers that took part in no case have no column.
    summary = peers.summary(record).splitlines()[-1]
    assert summary == "| VGG16, batch 1, 1 class | 100 ms | **100 ms** | 1.50x | 1.20x | 0.50x | 6.00x |"
    fewer = {name: samples for name, samples in _PEERS.items() if name != "captum"}
    record = _record("peers", **{"VGG16, batch 1, 1 class": _PEERS, "small, batch 1, 1 class": fewer})
    summary = peers.summary(record).splitlines()[-1]
    assert summary == "| small, batch 1, 1 class | 100 ms | **100 ms** | 1.50x | 1.20x | - | 6.00x |"


def test_overhead_is_the_ratio_of_medians() -> None:
    samples = {"plain": [1.0, 2.0, 9.0], "K = 1": [2.1, 2.1, 1.0], "K = 5": [2.5], "K = 15": [1.0]}
    record = _record("overhead", net=samples)
    assert overhead.overheads(record, "net") == {"K = 1": 1.05, "K = 5": 1.25, "K = 15": 0.5}
    assert overhead.write(record).splitlines()[-1].endswith("| 1.050 | 1.250 | 0.500 |")


def test_bandwidth_is_held_to_the_fastest_reading() -> None:
    record = _record("kernel", load={"render": [2.0], "read, prefetch 0": [4.0], "read, prefetch 512": [1.0]})
    record.cases["load"]["facts"] = {"rendered_bytes": 16e9, "read_bytes": 10e9, "maps": 1000}
    assert kernel.Bandwidth.of(record, "load") == kernel.Bandwidth(rendered=8.0, read=10.0)
    assert "| load | 8.0 | 10.0 | 80% | 2000 |" in kernel.write(record)


def test_shares_of_the_model_alone() -> None:
    record = _record("endtoend", net={endtoend.ALONE: [0.19], endtoend.JOB: [0.2], endtoend.SCRIPT: [1.9]})
    shares = endtoend.shares(record, "net")
    assert shares[endtoend.JOB] == pytest.approx(0.95)
    assert f"| net, {endtoend.JOB} | 5.00 (5.00..5.00) | 0.950 |" in endtoend.write(record)


def test_the_readmes_part_stands_between_its_markers() -> None:
    text = "a\n<!-- benchmark -->\nold\n<!-- end of benchmark -->\nz\n"
    once = report.fill(text, "new\n")
    assert once == "a\n<!-- benchmark -->\nnew\n<!-- end of benchmark -->\nz\n"
    assert report.fill(once, "new\n") == once
    for broken in ("a\n", text + text):
        with pytest.raises(ValueError, match="needs one <!-- benchmark"):
            report.fill(broken, "new\n")
    readme = (Path(report.__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert "new\n" in report.fill(readme, "new\n")


def test_the_report_is_written_from_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = _record("peers", **{"VGG16, batch 1, 1 class": _PEERS})
    case = record.cases["VGG16, batch 1, 1 class"]
    case["facts"]["errors"] = {}
    case["missing"] = {"xplique": "not installed"}
    record.skipped = {"VGG16, batch 16, 1 class": "needs about 250 s"}
    (tmp_path / "README.md").write_text("<!-- benchmark -->\n<!-- end of benchmark -->\n", encoding="utf-8")
    monkeypatch.setattr(report, "results_path", lambda name, quick=False: tmp_path / f"{name}.json")
    with pytest.raises(SystemExit, match="there are no results"):
        report.write_report(tmp_path)
    write_record(tmp_path / "peers.json", record)
    written = [path.relative_to(tmp_path).as_posix() for path in report.write_report(tmp_path)]
    assert written == ["docs/benchmarks/peers.png", "docs/benchmarks.md", "README.md"]
    text = (tmp_path / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for said in (
        "`python -m bench peers`, 2026-01-02, Abacus, 2 processors, 2 threads each, Linux x86_64, Python 3.11; fastcam",
        "- xplique: not installed (VGG16, batch 1, 1 class)",
        "- not measured: VGG16, batch 16, 1 class, which needs about 250 s",
        "0.50x",
    ):
        assert said in text
    readme = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert peers.summary(record) in readme
    before = (tmp_path / written[0]).read_bytes()
    report.write_report(tmp_path)
    assert (tmp_path / written[0]).read_bytes() == before


def test_the_command_lists_the_questions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(f"{name}:" in out for name in QUESTIONS)
    assert sum(QUESTIONS.values()) == pytest.approx(1)
    for name in QUESTIONS:
        assert find_question(name).ASKS in out


@pytest.mark.parametrize("arguments", [["what"], ["all", "cold"], ["report", "cold"]])
def test_other_questions_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)


def test_requirements_are_followed() -> None:
    found = cold.requirements(["fastcam"])
    assert {"fastcam", "numpy", "onnx", "protobuf", "pillow", "jinja2", "markupsafe"} <= found
    # Extras are for other machines.
    assert "tensorflow-cpu" not in found
    assert cold.requirements(["no-such-package"]) == set()


def test_processes_are_watched() -> None:
    import sys

    hungry = "import time; kept = bytearray(300_000_000); time.sleep(0.3)"
    _, peak = run_watched([sys.executable, "-c", hungry], 60, 1e9)
    assert 3e8 < peak < 4e8
    with pytest.raises(RuntimeError, match="stopped after"):
        run_watched([sys.executable, "-c", hungry], 60, 1e8)
    with pytest.raises(RuntimeError, match="status 1: ValueError: no"):
        run_watched([sys.executable, "-c", "raise ValueError('no')"], 60, 1e9)


def test_photos_are_different_cuts(tmp_path: Path) -> None:
    pytest.importorskip("skimage", reason="needs scikit-image: pip install fastcam[demo]")
    photos = endtoend.make_photos(tmp_path / "photos", 5, (64, 48))
    pixels = {read_image(photo).tobytes() for photo in photos}
    assert len(pixels) == 5


def test_no_module_imports_another_that_imports_it() -> None:
    folder = Path(peers.__file__).parent
    imports: dict[str, set[str]] = {}
    for path in folder.glob("*.py"):
        nodes = [
            node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)
        ]
        imports[path.stem] = {
            name
            for node in nodes
            if node.level
            for name in ([node.module] if node.module else [alias.name for alias in node.names])
        }
    TopologicalSorter(imports).prepare()
    assert not [name for name, others in imports.items() if "__main__" in others]
