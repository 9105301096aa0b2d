"""The command line: what it calls, what it prints, how it fails."""

from __future__ import annotations

import fcntl
import inspect
import json
import os
import pty
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from networks import small_classifier
from photo_folders import make_class_folders
from PIL import Image

import fastcam
import fastcam.__main__
import fastcam.cli
from fastcam import cli
from fastcam.errors import WriteError
from fastcam.explaining.methods import METHODS
from fastcam.folders.jobs import FORMATS
from fastcam.metadata import EVIDENCE

# A test run in the background of a script ignores Ctrl-C, and so would its children.
_HEARING = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
_COMMAND = [sys.executable, "-c", f"{_HEARING}; from fastcam.cli import main; main()"]
_CLASSES = ["beagle", "pug", "boxer", "collie", "husky"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "dogs.onnx"
    fastcam.export(small_classifier().to_model(), path, classes=_CLASSES, preprocess="symmetric")
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (20, 30), (80 * number, 50, 99)).save(folder / f"dog{number}.png")
    return folder


def _run(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command in a separate process, as a shell would."""
    command = [*_COMMAND, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, **options)
    assert "Traceback" not in done.stderr
    return done


def _invoke(*arguments: str | Path, **options: Any) -> Result:
    return CliRunner().invoke(cli.commands, list(map(str, arguments)), **options)


# Help


def test_version() -> None:
    assert _invoke("--version").output == f"fastcam {version('fastcam')}\n"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_the_subcommands(arguments: list[str]) -> None:
    output = _invoke(*arguments).output
    for name in ("completion", "demo", "explain", "export", "info", "selftest", "train", "web"):
        assert f"\n  {name}  " in output


@pytest.mark.parametrize(
    ("command", "example"),
    [
        ("train", "fastcam train photos/ -o dogs.keras --unfreeze 1"),
        ("export", "fastcam export dogs.keras dogs.onnx --classes breeds.txt"),
        ("explain", "fastcam explain dogs.onnx photos/ -o why --top-k 3"),
        ("info", "fastcam info dogs.onnx"),
        ("web", "fastcam web dogs.onnx -o site"),
        ("selftest", "fastcam selftest dogs.onnx --runtime openvino"),
        ("demo", "fastcam demo --out pictures"),
        ("completion", "fastcam completion bash >> ~/.bashrc"),
    ],
)
def test_each_help_has_an_example_that_parses(command: str, example: str) -> None:
    result = _invoke(command, "--help", terminal_width=110)
    assert f"Example: {example}" in result.output
    name, *arguments = example.partition(" >> ")[0].partition(" && ")[0].removeprefix("fastcam ").split()
    cli.commands.commands[name].make_context(name, arguments)


def test_explains_help_names_what_may_be_chosen() -> None:
    output = " ".join(_invoke("explain", "--help", terminal_width=110).output.split())
    for name in (*METHODS, *FORMATS, "image|input|HxW", "exit status", "--resume"):
        assert name in output


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_complete(shell: str) -> None:
    script = _invoke("completion", shell).output
    assert f"_FASTCAM_COMPLETE={shell}_complete" in script
    if shutil.which(shell):
        # The shell's own view of the lines; the results below are those that they request.
        subprocess.run([shell, "-n"], input=script, text=True, check=True)
    environment = {**os.environ, "_FASTCAM_COMPLETE": "bash_complete", "COMP_WORDS": "fastcam ex", "COMP_CWORD": "1"}
    assert _run(env=environment).stdout.split() == ["plain,explain", "plain,export"]


@pytest.mark.parametrize(
    ("arguments", "expected", "deprecated"),
    [
        ("explain m.onnx x.jpg -o out --top 3", {"top_k": 3}, {"--top": "--top-k"}),
        (
            "explain m.onnx x.jpg -o out --top=3 --batch=2",
            {"top_k": 3, "batch_size": 2},
            {"--top": "--top-k", "--batch": "--batch-size"},
        ),
        ("train x -o x.keras --validation 0.3", {"validation_split": 0.3}, {"--validation": "--validation-split"}),
        ("explain m.onnx -o out --top-k 3 -- --top", {"top_k": 3}, {}),
    ],
)
def test_former_names_of_options_are_taken_for_one_release(
    monkeypatch: pytest.MonkeyPatch, arguments: str, expected: dict[str, Any], deprecated: dict[str, str]
) -> None:
    seen: dict[str, Any] = {}

    def record(*_: object, **options: object) -> None:
        seen.update(options)
        raise fastcam.ArgumentError("seen")

    for name in ("explain_files", "finetune"):
        monkeypatch.setattr(fastcam, name, record)
    result = _invoke(*arguments.split())
    assert {name: seen[name] for name in expected} == expected
    said = [line for line in result.stderr.splitlines() if "deprecated" in line]
    assert said == [f"fastcam: {old} is deprecated: use {new}" for old, new in deprecated.items()]
    for old in deprecated:
        assert f"{old} " not in _invoke(arguments.split(maxsplit=1)[0], "--help").output


@pytest.mark.parametrize(
    "arguments",
    [
        ["explain", "m.onnx", "x.jpg", "-o", ""],
        ["export", "", "x.onnx"],
        ["demo", "--out", ""],
        ["train", "", "-o", "x.keras"],
    ],
)
def test_an_empty_path_is_refused(arguments: list[str]) -> None:
    """As from an unset variable; it would mean the current folder."""
    result = _invoke(*arguments)
    assert result.exit_code == 2
    assert "the path is empty" in result.output


# train


def test_training_options_reach_the_function_with_its_own_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: dict[str, Any] = {}

    def finetune(data_dir: Path, **options: Any) -> fastcam.TrainingResult:
        called.update(options, data_dir=data_dir)
        folder = tmp_path / "dogs.training"
        history: dict[str, Any] = {}
        return fastcam.TrainingResult(
            tmp_path / "dogs.keras", folder, ("a", "b"), 0.75, ((2, 0), (1, 1)), history, 9, 4, ("bad",), {"head": 2.0}
        )

    signature = inspect.signature(fastcam.finetune)
    monkeypatch.setattr(fastcam, "finetune", finetune)
    assert _invoke("train", "photos", "-o", tmp_path / "dogs.keras").exit_code == 0
    for name, parameter in signature.parameters.items():
        if name not in ("progress", "data_dir", "out"):
            assert called[name] == parameter.default, name
    arguments = """--backbone mobilenetv2 --weights none --size 64 --hidden 32 --hidden 16 --dropout 0.5 --epochs 3
        --learning-rate 0.1 --unfreeze 2 --fine-epochs 4 --fine-learning-rate 0.2 --batch-size 5 --patience 6
        --augmentations 7 --no-class-weights --validation-split 0.3 --seed 8 --resume""".split()
    result = _invoke("train", "photos", "-o", tmp_path / "dogs.keras", *arguments)
    assert result.exit_code == 0, result.output
    del called["progress"]
    assert called == {
        "data_dir": Path("photos"),
        "out": tmp_path / "dogs.keras",
        "backbone": "mobilenetv2",
        "weights": None,
        "size": 64,
        "hidden": (32, 16),
        "dropout": 0.5,
        "epochs": 3,
        "learning_rate": 0.1,
        "unfreeze": 2,
        "fine_epochs": 4,
        "fine_learning_rate": 0.2,
        "batch_size": 5,
        "patience": 6,
        "augmentations": 7,
        "class_weights": False,
        "validation_split": 0.3,
        "seed": 8,
        "resume": True,
    }
    assert "validation accuracy: 75.0%" in result.output
    assert "skipped: bad" in result.output


def test_photos_become_heatmaps_in_three_commands(tmp_path: Path) -> None:
    """Train, export and explain, as a shell runs them."""
    pytest.importorskip("keras", reason="needs tensorflow: pip install fastcam[train]")
    make_class_folders(tmp_path / "photos", 4)
    (tmp_path / "photos" / "grün" / "broken.jpg").write_bytes(b"")
    options = "--backbone mobilenet --weights none --size 64 --epochs 2 --batch-size 64".split()
    trained = _run("train", "photos", "-o", "dogs.keras", *options, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "network: epoch 2 of 2, loss " in trained.stderr
    assert "photos: 13 photos done" in trained.stderr
    assert "skipped: 'photos/grün/broken.jpg' is empty or not a picture" in trained.stderr
    assert "classes: 3: grün, red one, 蓝" in trained.stdout
    assert "wrote dogs.keras: fastcam export dogs.keras dogs.onnx" in trained.stdout
    exported = _run("export", "dogs.keras", "dogs.onnx", cwd=tmp_path)
    assert "classes: 3: grün, red one, 蓝" in exported.stdout
    assert "preprocessing: symmetric" in exported.stdout
    explained = _run("explain", "dogs.onnx", "photos", "-o", "why", cwd=tmp_path)
    assert "explained 12 of 13 images" in explained.stdout
    assert len(list((tmp_path / "why" / "overlays").iterdir())) == 12


def test_a_terminal_gets_a_bar_for_each_step_of_a_training(capsys: pytest.CaptureFixture[str]) -> None:
    logs = {"loss": 0.5, "accuracy": 0.75, "val_loss": 0.25, "val_accuracy": 1.0, "seconds": 1.0}
    show = cli._TrainingBar()
    steps: list[tuple[Any, int, int, dict[str, float]]] = [
        ("photos", 2, 4, {}),
        ("photos", 4, 4, {}),
        ("head", 1, 3, logs),
        ("head", 2, 3, logs),
        ("blocks", 1, 1, logs),
    ]
    for step, done, total, figures in steps:
        show(fastcam.TrainingProgress(step, done, total, figures))
    shown = capsys.readouterr().err
    assert "photos: 100%" in shown
    assert "4/4 [" in shown
    assert "head:  67%" in shown
    assert "blocks: 100%" in shown
    assert "loss 0.500, accuracy 75.0%, validation: loss 0.250, accuracy 100.0%" in shown


# export


def test_export_writes_what_the_function_writes(tmp_path: Path) -> None:
    onnx.save(small_classifier().to_model(), tmp_path / "in.onnx")
    (tmp_path / "breeds.txt").write_text("\n".join(_CLASSES), encoding="utf-8")
    spec = '{"order": "BGR", "mean": [1, 2, 3], "scale": [1, 1, 0.5]}'
    result = _invoke(
        *("export", tmp_path / "in.onnx", tmp_path / "out.onnx", "--classes", tmp_path / "breeds.txt"),
        *("--preprocess", spec, "--gradients", "full"),
    )
    assert result.exit_code == 0, result.output
    explainer = fastcam.Explainer(tmp_path / "out.onnx")
    assert f"layers: {explainer.layer}\n" in result.output
    assert "classes: 5: beagle, pug, boxer, collie, husky\n" in result.output
    assert explainer.preprocessing == fastcam.Preprocessing("BGR", (1, 2, 3), (1, 1, 0.5))
    assert explainer.methods == tuple(name for name, row in METHODS.items() if EVIDENCE.keys().isdisjoint(row.reads))
    fastcam.export(
        small_classifier().to_model(),
        tmp_path / "same.onnx",
        classes=_CLASSES,
        preprocess=explainer.preprocessing,
        gradients="full",
    )
    assert (tmp_path / "out.onnx").read_bytes() == (tmp_path / "same.onnx").read_bytes()


def test_export_takes_several_layers_and_says_what_is_missing(tmp_path: Path) -> None:
    onnx.save(small_classifier().to_model(), tmp_path / "in.onnx")
    fastcam.export(tmp_path / "in.onnx", tmp_path / "one.onnx")
    layers = fastcam.Explainer(tmp_path / "one.onnx").candidates[:2]
    result = _invoke("export", tmp_path / "in.onnx", tmp_path / "out.onnx", "--layer", layers[1], "--layer", layers[0])
    assert fastcam.Explainer(tmp_path / "out.onnx").layers == (layers[1], layers[0])
    assert "preprocessing: unknown: pictures cannot be explained; export again with --preprocess\n" in result.output
    assert "classes: 5, without names\n" in result.output


# explain


def test_explain_writes_and_says_what_it_found(model: Path, photos: Path, tmp_path: Path) -> None:
    done = _run(
        "explain", model, photos, "-o", tmp_path / "out", "--top-k", "2", "--format", "png", "--colormap", "turbo"
    )
    assert done.returncode == 0, done.stderr
    explained = fastcam.Explainer(model)([*sorted(photos.iterdir())], "top2")
    lines = done.stdout.splitlines()
    for number, image in enumerate(explained):
        assert image.probabilities is not None
        shares = image.probabilities[image.targets]
        first, second = (f"{label} {share:.1%}" for label, share in zip(image.labels, shares, strict=True))
        assert lines[number] == f"{photos / f'dog{number}.png'}: {first}, {second}"
    assert lines[3].startswith("explained 3 of 3 images, in ")
    assert lines[4] == f"report: {tmp_path / 'out' / 'report.html'}"
    overlay = np.asarray(Image.open(next((tmp_path / "out" / "overlays").glob("dog0-*.1.*.png"))))
    assert np.abs(overlay.astype(int) - explained[0].overlay(0, colormap="turbo")).max() <= 2


def test_options_reach_the_job(model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: dict[str, Any] = {}

    def explain_files(model: Path, inputs: Any, out: Path, **options: Any) -> fastcam.JobResult:
        called.update(options, inputs=inputs, out=out)
        return fastcam.JobResult(out / "results.jsonl", None, 0, 0, (), 0, 1.0)

    monkeypatch.setattr(fastcam, "explain_files", explain_files)
    arguments = """--target pug --target 3 --method layercam --set a_b=0.5
        --layer a --layer b --format npy --size 50x60 --alpha 0.25
        --colormap magma --batch-size 4 --threads 2 --device cpu --no-report --resume --top-k 4
        --background trained""".split()
    result = _invoke("explain", model, photos, "list.txt", "-o", tmp_path / "out", *arguments)
    assert result.exit_code == 0, result.output
    del called["progress"]
    assert called == {
        "inputs": (str(photos), "list.txt"),
        "out": tmp_path / "out",
        "target": ["pug", "3"],
        "top_k": 4,
        "threshold": None,
        "method": "layercam",
        "settings": {"a_b": 0.5},
        "background": ("trained",),
        "layer": ["a", "b"],
        "format": "npy",
        "size": (50, 60),
        "alpha": 0.25,
        "colormap": "magma",
        "batch_size": 4,
        "threads": 2,
        "device": "cpu",
        "report": False,
        "shard": None,
        "resume": True,
    }
    assert result.output.endswith(f"results: {tmp_path / 'out' / 'results.jsonl'}\n")


def test_json_is_what_lands_in_the_results(model: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "broken.png").write_bytes(b"")
    done = _run("explain", model, photos, "-o", tmp_path / "out", "--json")
    assert done.returncode == 1
    lines = (tmp_path / "out" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in done.stdout.splitlines()] == [json.loads(line) for line in lines]
    assert "explained 3 of 4 images" in done.stderr


def test_failures_are_named_and_the_status_says_so(model: Path, photos: Path, tmp_path: Path) -> None:
    for number in range(12):
        (photos / f"broken{number:02}.png").write_bytes(b"")
    done = _run("explain", model, photos, "-o", tmp_path / "out")
    assert done.returncode == 1
    assert f"failed: '{photos / 'broken00.png'}' is empty or not a picture" in done.stderr
    assert done.stderr.count("failed: '") == 10
    assert f"failed: 2 more, listed in {tmp_path / 'out' / 'results.jsonl'}" in done.stderr
    assert "explained 3 of 15 images" in done.stdout


def test_lists_come_through_standard_input(model: Path, photos: Path, tmp_path: Path) -> None:
    names = f"{photos / 'dog1.png'}\n{photos / 'dog0.png'}\n"
    done = _run("explain", model, "-", "-o", tmp_path / "out", "--json", input=names)
    assert [json.loads(line)["path"] for line in done.stdout.splitlines()] == names.split()


def test_resuming_says_what_was_there(model: Path, photos: Path, tmp_path: Path) -> None:
    assert _run("explain", model, photos / "dog1.png", "-o", tmp_path / "out").returncode == 0
    refused = _run("explain", model, photos, "-o", tmp_path / "out")
    assert refused.returncode == 1
    assert "contains an earlier run" in refused.stderr
    done = _run("explain", model, photos, "-o", tmp_path / "out", "--resume")
    assert "explained 3 of 3 images, 1 of them in an earlier run, in" in done.stdout


def test_animations_are_counted(model: Path, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    done = _run("explain", model, tmp_path / "two.gif", "-o", tmp_path / "out")
    assert "files with several frames or pages, of which only the first was explained: 1\n" in done.stdout


def test_a_log_gets_plain_lines_from_time_to_time(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    seconds = iter([0.0, 1.0, 2.0, 11.0, 12.0, 25.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(seconds))
    log = cli._Log()
    for done in (101, 110, 301, 320, 500):
        log(fastcam.JobProgress(done, 2, 10_000, {}))
    # 100 images were finished before; 200 in the 10 s since the first call, 399 in 24 s.
    assert capsys.readouterr().err.splitlines() == [
        "301 of 10000 images, 20.0/s, 08:04 left, 2 failed",
        "500 of 10000 images, 16.6/s, 09:31 left, 2 failed",
    ]


def test_a_terminal_gets_a_bar_with_rate_and_time_left(model: Path, photos: Path, tmp_path: Path) -> None:
    for number in range(40):
        Image.new("RGB", (20, 30), (6 * number, 50, 99)).save(photos / f"more{number}.png")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    command = [*_COMMAND, "explain", str(model), str(photos), "-o", str(tmp_path / "out"), "--batch-size", "2"]
    with subprocess.Popen(command, stderr=theirs, stdout=subprocess.DEVNULL) as child:
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:
                break
            if not part:
                break
            shown += part
    os.close(ours)
    assert child.returncode == 0
    text = shown.decode()
    assert "100%" in text
    assert "43/43 [00:0" in text
    assert "img/s]" in text


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT as POSIX knows it")
def test_an_interruption_is_said_and_can_be_resumed(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(300):
        Image.effect_noise((600, 500), 30 + number / 10).convert("RGB").save(folder / f"{number:03}.jpg")
    command = [*_COMMAND, "explain", str(model), str(folder), "-o", str(tmp_path / "out")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        partial = tmp_path / "out" / "results.partial.jsonl"
        while child.poll() is None and not (partial.exists() and partial.stat().st_size):
            time.sleep(0.005)
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=60)
    assert child.returncode == 130
    assert said.strip() == "fastcam: interrupted; continue `fastcam explain` or `fastcam train` with --resume"
    assert not list((tmp_path / "out").rglob("*.part"))
    done = _run("explain", model, folder, "-o", tmp_path / "out", "--resume")
    assert done.returncode == 0
    assert "explained 300 of 300 images" in done.stdout
    assert " of them in an earlier run" in done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT as POSIX knows it")
@pytest.mark.parametrize("count", [2, 4])
def test_repeated_interruptions_end_without_a_traceback(model: Path, tmp_path: Path, count: int) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(60):
        Image.effect_noise((600, 500), 30 + number / 10).convert("RGB").save(folder / f"{number:03}.jpg")
    command = [*_COMMAND, "explain", str(model), str(folder), "-o", str(tmp_path / "out"), "--batch-size", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        partial = tmp_path / "out" / "results.partial.jsonl"
        while child.poll() is None and not (partial.exists() and partial.stat().st_size):
            time.sleep(0.005)
        for _ in range(count):
            child.send_signal(signal.SIGINT)
            time.sleep(0.01)
        _, said = child.communicate(timeout=300)
    assert child.returncode == 130, said
    assert "Traceback" not in said
    done = _run("explain", model, folder, "-o", tmp_path / "out", "--batch-size", "2", "--resume")
    assert "explained 60 of 60 images" in done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT as POSIX knows it")
def test_an_interruption_while_the_interpreter_ends_changes_nothing() -> None:
    """Modules are destroyed after the interpreter has reset the handlers that are written in Python."""
    late = (
        "import os, signal, sys; from fastcam import cli\n"
        "class Late:\n"
        "    def __del__(self, kill=os.kill, own=os.getpid(), number=signal.SIGINT): kill(own, number)\n"
        "late = Late(); sys.argv = ['fastcam', '--version']; cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", late], check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_first_interruption_is_raised_and_the_third_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signals that arrive together are merged, so a process may not see all three."""
    said: list[bytes] = []
    ended: list[int] = []
    monkeypatch.setattr(os, "write", lambda _, text: said.append(text))
    monkeypatch.setattr(os, "_exit", ended.append)
    interrupt = cli._Interruptions()
    with pytest.raises(KeyboardInterrupt):
        interrupt(signal.SIGINT, None)
    assert (said, ended) == ([], [])
    interrupt(signal.SIGINT, None)
    assert (said, ended) == ([b"fastcam: stopping\n"], [])
    interrupt(signal.SIGINT, None)
    assert (said, ended) == ([b"fastcam: stopping\n"] * 2, [130])


# info


def test_info_says_what_inspect_found(model: Path) -> None:
    found = fastcam.inspect(model)
    lines = dict(line.split(maxsplit=1) for line in _invoke("info", model).output.splitlines()[::-1])
    assert lines["file"] == f"{model}, {found.bytes / 1e6:.1f} MB, opset {found.opset}, from onnx"
    assert lines["input"] == "image (batch, 3, 12, 12), NCHW"
    assert lines["preprocessing"] == "symmetric"
    assert lines["classes"] == "5: beagle, pug, boxer, collie, husky"
    assert lines["parameters"] == f"{found.parameters:,}, plus {found.gradient_parameters:,} for the gradients"
    assert lines["multiply-adds"].startswith(f"{found.macs / 1e6:,.1f} million per image")
    assert lines["methods"].startswith("gradcam, eigencam, ")
    assert lines["methods"].endswith(", occlusion (others need export --gradients or --evidence)")
    output = _invoke("info", model).output
    (name, (channels, height, width)) = next(iter(found.layers.items()))
    assert f"explained layer {name}: {channels} channels of {height} x {width}\n" in output
    assert found.candidates[1] in output
    assert "CPUExecutionProvider: available" in output


def test_info_as_json(model: Path) -> None:
    told = json.loads(_invoke("info", model, "--json").output)
    assert told == json.loads(json.dumps(fastcam.inspect(model).to_json()))


# demo


@pytest.mark.parametrize(("arguments", "folder"), [([], "fastcam-demo"), (["--out", "a/b"], "a/b")])
def test_demo_runs_in_the_folder(monkeypatch: pytest.MonkeyPatch, arguments: list[str], folder: str) -> None:
    called: list[Any] = []

    def run(out_dir: Path, say: Any) -> None:
        called.append(out_dir)
        say("a line")

    monkeypatch.setattr("fastcam.demo.run.run", run)
    result = _invoke("demo", *arguments)
    assert called == [Path(folder)]
    assert result.output == "a line\n"
    assert result.exit_code == 0


# Errors


def test_a_refusal_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(out_dir: Path, say: Any) -> None:
        raise WriteError(f"cannot make the folder '{out_dir}' (full). Choose another with --out")

    monkeypatch.setattr("fastcam.demo.run.run", run)
    monkeypatch.setattr(sys, "argv", ["fastcam", "demo", "--out", "x"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    captured = capsys.readouterr()
    assert captured.err == "fastcam: cannot make the folder 'x' (full). Choose another with --out\n"
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ("explode", 2, "No such command 'explode'"),
        ("explain m.onnx", 2, "Missing argument 'INPUT...'"),
        ("explain m.onnx x.jpg", 2, "Missing option '-o'"),
        ("explain m.onnx x.jpg -o out --size 3", 2, "'3' is not a size: give 'image' or 'input' or height x width"),
        ("explain m.onnx x.jpg -o out --top-k 0", 2, "not in the range"),
        ("explain m.onnx x.jpg -o out --format bmp", 2, "not one of"),
        ("explain gone.onnx x.jpg -o out", 1, "fastcam: gone.onnx: no such file"),
        ("explain m.onnx nothing/*.jpg -o out", 1, "the pattern 'nothing/*.jpg' contains no pictures"),
        ("explain m.onnx x.jpg -o out --target pugg", 1, "did you mean 'pug'"),
        ("explain m.onnx x.jpg -o out --target 5", 1, "target 5 is out of range"),
        ("explain m.onnx x.jpg -o out --device gpu", 1, "device='gpu' is not known"),
        ("explain m.onnx x.jpg -o out --method layercam", 1, 'export the model again with gradients="full"'),
        ("explain m.onnx x.jpg -o m.onnx", 1, "m.onnx: cannot be written: File exists"),
        ("explain plain.onnx x.jpg -o out", 1, "this ONNX file does not explain itself: run fastcam.export"),
        ("info .", 1, "fastcam: .: is a folder, not a file"),
        ("info x.jpg", 1, "Give a file of fastcam.export"),
        ("train nowhere -o out.keras", 1, "fastcam: nowhere: is not a folder"),
        ("train . -o out.txt", 1, "must end in .keras"),
        ("train empty -o out.keras --epochs 0", 2, "not in the range"),
        ("export gone.keras out.onnx", 1, "gone.keras"),
        ("export plain.onnx out.onnx --preprocess vgg", 1, "unknown preprocessing 'vgg'"),
        ("export plain.onnx out.onnx --preprocess {", 1, "does not describe a preprocessing"),
        ("export plain.onnx out.onnx --classes gone.txt", 1, "gone.txt"),
        ("export plain.onnx nowhere/out.onnx", 1, "the folder 'nowhere' does not exist"),
        ("info plain.onnx", 1, "run fastcam.export on it first"),
        ("info m.txt", 1, "m.txt"),
    ],
)
def test_refusals_end_in_one_line_and_a_status(
    model: Path, tmp_path: Path, arguments: str, status: int, said: str
) -> None:
    (tmp_path / "m.onnx").write_bytes(model.read_bytes())
    (tmp_path / "m.txt").write_text("no model", encoding="utf-8")
    onnx.save(small_classifier().to_model(), tmp_path / "plain.onnx")
    Image.new("RGB", (20, 20)).save(tmp_path / "x.jpg")
    done = _run(*arguments.split(), cwd=tmp_path)
    assert done.returncode == status, done.stderr
    assert said in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


def test_names_cannot_command_the_terminal(model: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"\x1b[31mred\xff.jpg")
    (tmp_path / name).write_bytes(b"")
    done = subprocess.run(
        [*_COMMAND, "explain", model, tmp_path, "-o", tmp_path / "out"], capture_output=True, check=False
    )
    assert done.returncode == 1
    assert b"\x1b" not in done.stderr
    assert rb"\x1b[31mred\udcff.jpg' is empty or not a picture" in done.stderr


def test_names_cannot_forge_a_line(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a\nexplained 5 of 5 images.jpg").write_bytes(b"")
    done = _run("explain", model, tmp_path, "-o", tmp_path / "out")
    assert rb"a\nexplained 5 of 5 images.jpg' is".decode() in done.stderr
    assert not [line for line in done.stderr.splitlines() if line.startswith("explained 5")]


def test_a_reader_that_leaves_is_no_traceback(model: Path, photos: Path, tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [*_COMMAND, "explain", str(model), str(photos), "-o", str(tmp_path / "out"), "--json"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_a_number_is_a_classs_name_before_it_is_an_index(photos: Path, tmp_path: Path) -> None:
    names = ["0", "1", "10", "100", "2"]
    fastcam.export(small_classifier().to_model(), tmp_path / "m.onnx", classes=names, preprocess="scale")
    explainer = fastcam.Explainer(tmp_path / "m.onnx")
    for name, index in (("2", 4), ("10", 2), ("3", 3)):
        assert explainer(photos / "dog0.png", name).targets.tolist() == [[index]]
        done = _invoke("explain", tmp_path / "m.onnx", photos, "-o", tmp_path / name, "--target", name)
        assert f"dog0.png: {names[index]} " in done.output


@pytest.mark.parametrize(("redirection", "status"), [("<&-", 0), ("2>&-", 0), (">&-", 0), (">/dev/full", 1)])
def test_streams_that_are_closed_or_full(
    model: Path, photos: Path, tmp_path: Path, redirection: str, status: int
) -> None:
    if "full" in redirection and not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    command = [*_COMMAND, "explain", str(model), str(photos), "-o", str(tmp_path / "out")]
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert ("standard output cannot be written: No space left" in done.stderr) == (status == 1)
    assert status or (tmp_path / "out" / "report.html").exists()


def test_a_picture_that_may_not_be_read_is_named_and_the_others_are_done(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode, **rest: "dog1" not in str(path) and real(path, mode, **rest))
    done = _invoke("explain", model, photos / "dog0.png", photos / "dog1.png", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output


# methods


def test_a_method_and_its_settings_from_the_command_line(model: Path, photos: Path, tmp_path: Path) -> None:
    arguments = ("explain", model, photos, "-o", tmp_path / "out", "--method", "rise", "--set", "masks=20")
    result = _invoke(*arguments, "--set", "keep=0.4", "--format", "npy", "--size", "input")
    assert result.exit_code == 0, result.output
    settings = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (settings["method"], settings["settings"]) == ("rise", {"masks": 20, "keep": 0.4})
    line = json.loads((tmp_path / "out" / "results.jsonl").read_text().splitlines()[0])
    written = np.load(tmp_path / "out" / line["classes"][0]["file"])
    explained = fastcam.Explainer(model)(line["path"], method="rise", settings={"masks": 20, "keep": 0.4})
    np.testing.assert_allclose(written, explained.heatmaps[0, 0], atol=1e-3)


@pytest.mark.parametrize("text", ["masks", "masks=many", "=3", "masks=--1"])
def test_what_is_not_a_setting(model: Path, photos: Path, tmp_path: Path, text: str) -> None:
    result = _invoke("explain", model, photos, "-o", tmp_path / "out", "--method", "rise", "--set", text)
    assert result.exit_code == 2
    assert "is not a setting: give a name and a number" in result.output


def test_the_entry_point_runs_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[bool] = []
    monkeypatch.setattr(fastcam.cli, "main", lambda: ran.append(True))
    fastcam.__main__.main()
    assert ran == [True]
