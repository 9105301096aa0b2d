"""Command line: one subcommand per job of the public API, which does the work."""

from __future__ import annotations

import json
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

import fastcam

from .errors import FastcamError, WriteError
from .explaining.methods import METHODS
from .explaining.selftest import RUNTIMES, check_selftest_answer, run_selftest, write_selftest_picture
from .folders.jobs import FORMATS
from .metadata import PICTURES, PRECISIONS
from .preprocessing import Preprocessing
from .web.runtime import PACKAGE
from .web.site import build_site

# Exit statuses beside 0: the work or a part of it was refused; the command line was wrong (click's own); Ctrl-C, as
# shells count it.
_REFUSED, _INTERRUPTED = 1, 130

# What `info` says of a precision.
_PRECISION_FACTS = {"fp32": "float32", "fp16": "float16, gradients float32"}

# Seconds between two lines of progress where there is no terminal to draw a bar on.
_LOG_SECONDS = 10.0
# Failures that are listed by name, and images whose best classes are.
_LISTED = 10
_FILE = click.Path(path_type=Path)


class _Size(click.ParamType[Any]):
    """Height and width, "224x224", or one of the words that are allowed."""

    name = "size"

    def __init__(self, *words: str) -> None:
        self._words = words

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "|".join([*self._words, "HxW"])

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value in self._words:
            return value
        match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", str(value))
        if match is None:
            allowed = " or ".join([*map(repr, self._words), "height x width, '224x224'"])
            self.fail(f"{value!r} is no size: give {allowed}", param, ctx)
        return int(match[1]), int(match[2])


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="fastcam", message="fastcam %(version)s")
def commands() -> None:
    """Scores and Grad-CAM heatmaps from one forward pass of an exported image classifier."""


@commands.command(epilog="Example: fastcam train photos/ -o dogs.keras --unfreeze 1")
@click.argument("data_dir", type=_FILE)
@click.option("-o", "--out", type=_FILE, required=True, metavar="FILE", help="The .keras file to write.")
@click.option(
    "--backbone",
    default="vgg16",
    show_default=True,
    metavar="NAME",
    help="Any classifier of keras.applications: vgg16, resnet50, mobilenetv2, efficientnetb0 ...",
)
@click.option(
    "--weights",
    default="imagenet",
    show_default=True,
    metavar="imagenet|none|FILE",
    help="What the backbone knows: Keras' download, a file of it, or nothing.",
)
@click.option("--size", type=click.IntRange(min=1), help="Side of the photos in pixels. [default: the backbone's]")
@click.option(
    "--hidden",
    type=click.IntRange(min=1),
    multiple=True,
    metavar="UNITS",
    help="A fully connected layer before the last one; repeatable.",
)
@click.option(
    "--dropout",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.2,
    show_default=True,
    help="Before the last layer.",
)
@click.option("--epochs", type=click.IntRange(min=1), default=30, show_default=True, help="Of the head, at most.")
@click.option("--learning-rate", type=float, default=1e-3, show_default=True, help="Of the head.")
@click.option(
    "--unfreeze",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Train so many of the backbone's last blocks afterwards.",
)
@click.option(
    "--fine-epochs", type=click.IntRange(min=1), default=10, show_default=True, help="Of the blocks, at most."
)
@click.option("--fine-learning-rate", type=float, default=1e-5, show_default=True, help="Of the blocks.")
@click.option("--batch", type=click.IntRange(min=1), default=32, show_default=True, help="Photos a step.")
@click.option(
    "--patience",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="End after so many epochs of no gain.",
)
@click.option(
    "--augmentations",
    type=click.IntRange(min=0),
    default=4,
    show_default=True,
    help="Altered copies of each photo to learn from; 0 alters nothing.",
)
@click.option(
    "--class-weights/--no-class-weights", default=True, show_default=True, help="Let small classes count as much."
)
@click.option(
    "--validation",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.2,
    show_default=True,
    help="Share of each class to test on, where DATA_DIR has no val folder.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="The same one, the same weights."
)
@click.option("--resume", is_flag=True, help="Go on with a training that was interrupted.")
def train(data_dir: Path, weights: str, **options: Any) -> None:
    """Fine-tune a pretrained network on DATA_DIR, which holds a folder of photos for each class.

    The folders may also stand in DATA_DIR/train and DATA_DIR/val. FILE is a Keras model for `fastcam export`, which
    finds the classes' names in it. Beside it, in FILE without its suffix + .training, are learning curves, a confusion
    matrix, training.json with every setting, and what makes the next training with these photos faster.
    """
    show_progress = _TrainingBar() if sys.stderr.isatty() else _TrainingLog()
    weights_or_none = None if weights == "none" else weights
    result = fastcam.finetune(data_dir, weights=weights_or_none, progress=show_progress, **options)
    for reason in result.skipped[:_LISTED]:
        _say(f"skipped: {reason}", err=True)
    if len(result.skipped) > _LISTED:
        _say(f"skipped: {len(result.skipped) - _LISTED} more, listed in {result.folder / 'training.json'}", err=True)
    _say(f"classes: {_class_summary(result.classes, len(result.classes))}")
    _say(f"photos: {result.photos} to learn from, {result.held_out} held out")
    _say(f"accuracy on the photos held out: {result.accuracy:.1%}")
    _say(f"time: {', '.join(f'{step} {seconds:.1f} s' for step, seconds in result.seconds.items())}")
    _say(f"curves, confusion matrix, settings: {result.folder}")
    _say(f"wrote {result.path}: fastcam export {result.path} {result.path.with_suffix('.onnx')}")


@commands.command(epilog="Example: fastcam export dogs.keras dogs.onnx --classes breeds.txt")
@click.argument("model", type=_FILE)
@click.argument("out", type=_FILE)
@click.option(
    "--layer",
    multiple=True,
    metavar="NAME",
    help="Layer to explain; repeat it for several. [default: the last with a map]",
)
@click.option(
    "--classes", metavar="FILE", help="Text file with the names of the classes, one a line, in the model's order."
)
@click.option(
    "--preprocess",
    metavar="NAME|JSON",
    help="How a picture becomes the input: vgg16, imagenet, scale, symmetric, none, "
    'or \'{"order": "RGB", "mean": [0, 0, 0], "scale": [1, 1, 1]}\'.',
)
@click.option(
    "--gradients",
    type=click.Choice(["pooled", "full"]),
    default="pooled",
    show_default=True,
    help="full: for every method, not Grad-CAM alone; a larger and slower file.",
)
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default="fp32",
    show_default=True,
    help="fp16: a network in float16, for GPUs, in half the file; its gradients stay float32.",
)
@click.option(
    "--draw",
    type=click.Choice(["heatmaps", "overlays"]),
    help="Draw in the graph, so that any ONNX runtime needs one run and no further code.",
)
@click.option(
    "--method",
    type=click.Choice(list(METHODS)),
    default="gradcam",
    show_default=True,
    help="What --draw draws by.",
)
@click.option("--signed", is_flag=True, help="With --draw: keep the evidence against a class, -1..1.")
@click.option(
    "--picture",
    type=click.Choice(PICTURES),
    help="With --draw: take uint8 RGB pictures of the input's size, or of any size.",
)
@click.option(
    "--target",
    type=click.Choice(["default", "required"]),
    default="default",
    show_default=True,
    help="required: an ordinary input, for runtimes other than ONNX Runtime.",
)
@click.option("--raw-outputs", is_flag=True, help="With --draw: give activations and weights, too.")
@click.option("--output", metavar="NAME", help="The scores, where the model has several outputs.")
@click.option("--input-size", type=_Size(), help="Size of the images, where the model leaves it open.")
@click.option("--token-grid", type=_Size(), help="Patches of a transformer's image, where the model does not tell.")
def export(model: Path, out: Path, layer: Sequence[str], preprocess: str | None, **options: Any) -> None:
    """Write MODEL (.keras, .h5 or .onnx) as OUT, one ONNX file that explains itself.

    Prints what is explained, and what the next command needs to know.
    """
    begin = time.perf_counter()
    result = fastcam.export(model, out, layer=_one_or_list(layer), preprocess=_preprocessing(preprocess), **options)
    _say(f"wrote {result.path}, {_megabytes(result.bytes)}, in {time.perf_counter() - begin:.1f} s")
    _say(f"layers: {', '.join(result.layers)}")
    _say(f"classes: {_class_summary(result.classes, result.class_count)}")
    _say(f"preprocessing: {_preprocessing_summary(result.preprocessing)}")
    for note in result.notes:
        _say(f"note: {note}")


@commands.command(epilog="Example: fastcam explain dogs.onnx photos/ -o why --top 3")
@click.argument("model", type=_FILE)
@click.argument("inputs", nargs=-1, required=True, type=click.Path(readable=False), metavar="INPUT...")
@click.option("-o", "--out", type=_FILE, required=True, metavar="DIR", help="Folder for the results.")
@click.option(
    "--top", type=click.IntRange(min=1), default=1, show_default=True, help="Explain the best so many classes."
)
@click.option(
    "--target",
    multiple=True,
    metavar="CLASS",
    help="Explain this class instead, by name, or index where none is called so; repeatable.",
)
@click.option(
    "--method",
    type=click.Choice(list(METHODS)),
    default="gradcam",
    show_default=True,
    help="All but gradcam need a file exported with --gradients full.",
)
@click.option(
    "--layer",
    multiple=True,
    metavar="NAME",
    help="Which of the file's layers; several are averaged. [default: the first]",
)
@click.option(
    "--format",
    type=click.Choice(FORMATS),
    default="jpg",
    show_default=True,
    help="Overlays, or npy: heatmaps as float32 arrays.",
)
@click.option(
    "--size", type=_Size("image", "input"), default="image", show_default=True, help="Of overlays and heatmaps."
)
@click.option("--alpha", type=click.FloatRange(0, 1), default=0.5, show_default=True, help="Opacity of the heatmap.")
@click.option(
    "--colormap",
    default="jet",
    show_default=True,
    metavar="NAME",
    help="Any of the cmap library: turbo, viridis, inferno ...",
)
@click.option(
    "--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Images given to the model at once."
)
@click.option("--threads", type=click.IntRange(min=1), help="[default: all processors]")
@click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="Where the model runs: auto, cpu, cuda, cuda:1 or tensorrt.",
)
@click.option("--report/--no-report", default=True, show_default=True, help="Write report.html and its thumbnails.")
@click.option("--resume", is_flag=True, help="Go on with an earlier run in DIR, or extend it by new images.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print the lines of results.jsonl on standard output, as they come."
)
def explain(
    model: Path,
    inputs: Sequence[str],
    out: Path,
    target: Sequence[str],
    layer: Sequence[str],
    as_json: bool,
    **options: Any,
) -> int:
    """Explain pictures with MODEL, a file of `fastcam export`, and write overlays and a report.

    INPUT is a picture, a folder (with all below it), a quoted pattern like 'photos/**/*.jpg', a .txt or .lst file with
    one of these a line, or - for such a list on standard input.

    \b
    DIR gets
      report.html     a page to look through, which needs no network and no server
      results.jsonl   a line an image: path, classes, probabilities, files, timing
      overlays/       or heatmaps/, with --format npy
      run.json        the settings and counts

    A picture that cannot be explained is listed and skipped. The exit status is then 1, as for every refusal; 2 means
    a wrong command line, 130 an interruption. An interrupted run goes on with --resume.
    """  # noqa: D301 - the escape tells click to keep the lines
    show_progress = _Bar() if sys.stderr.isatty() else _Log()
    print_image = _print_entry if as_json else _print_classes

    def progress(step: fastcam.JobProgress) -> None:
        show_progress(step)
        print_image(step)

    result = fastcam.explain_files(
        model,
        inputs,
        out,
        target=list(target) or None,
        layer=_one_or_list(layer),
        progress=progress,
        **options,
    )
    _print_summary(result, err=as_json)
    return _REFUSED if result.failures else 0


@commands.command(epilog="Example: fastcam info dogs.onnx")
@click.argument("file", type=_FILE)
@click.option("--json", "as_json", is_flag=True, help="Print it as one JSON object.")
def info(file: Path, as_json: bool) -> None:
    """Say what FILE, a file of `fastcam export`, takes, gives, explains and costs, and what can run it here."""
    found = fastcam.inspect(file)
    if as_json:
        _say(json.dumps(found.to_json(), indent=2))
        return
    for name, value in _facts(found):
        _say(f"{name:<16}{value}")


@commands.command(epilog="Example: fastcam web dogs.onnx -o site && python -m http.server -d site")
@click.argument("file", type=_FILE)
@click.option("-o", "--out", type=_FILE, required=True, metavar="DIR", help="Folder for the page.")
@click.option("--title", help="Heading of the page. [default: the file's name]")
@click.option(
    "--runtime-archive",
    "archive",
    type=_FILE,
    metavar="TGZ",
    help=f"The result of 'npm pack {PACKAGE}', for machines without npm or network.",
)
def web(file: Path, out: Path, title: str | None, archive: Path | None) -> None:
    """Write a static page that explains photos with FILE in the browser: no photo leaves the machine.

    FILE was exported with --draw heatmaps --picture input --target required. ONNX Runtime Web comes from npm and is
    checked by its hash; the page loads nothing from elsewhere. Any web server serves DIR, GitHub Pages for one.
    """
    site = build_site(file, out, title=title, archive=archive)
    _say(f"wrote {site.folder}: {', '.join(f'{part} {_megabytes(size)}' for part, size in site.bytes.items())}")
    _say(f"open it: python -m http.server -d {site.folder}, then http://localhost:8000")


@commands.command(epilog="Example: fastcam selftest dogs.onnx --runtime openvino")
@click.argument("file", type=_FILE)
@click.option(
    "--runtime",
    type=click.Choice(list(RUNTIMES)),
    default="onnxruntime",
    show_default=True,
    help="Where to run it.",
)
@click.option(
    "--picture", type=_FILE, metavar="PNG", help="Run nothing: write the test's picture, for a program of your own."
)
@click.option(
    "--answer", type=_FILE, metavar="FILE", help="Run nothing: check the heatmap that it wrote, as raw float32."
)
def selftest(file: Path, runtime: str, picture: Path | None, answer: Path | None) -> int:
    """Check that a runtime computes the scores and the heatmap that FILE expects of it.

    FILE, exported with --draw, carries a test input, and a class other than the top one to explain. The exit status is
    1 where the answer differs.
    """
    if picture is not None:
        _say(f"wrote {picture}: explain class {write_selftest_picture(file, picture)}")
    if answer is not None:
        error, tolerance = check_selftest_answer(file, answer)
        _say(f"relative error: heatmap {error:.1e}")
        return _passed(error <= tolerance, tolerance)
    if picture is not None:
        return 0
    result = run_selftest(file, runtime)
    _say(f"runtime: {result.runtime}")
    _say(f"class: asked for {result.target}, explained {result.explained}")
    _say(f"relative error: scores {result.logits_error:.1e}, heatmap {result.heatmap_error:.1e}")
    return _passed(result.passed, result.tolerance)


def _passed(passed: bool, tolerance: float) -> int:
    _say(f"{'passed' if passed else 'FAILED'}, tolerance {tolerance:.1e}")
    return 0 if passed else _REFUSED


@commands.command(epilog='Example: fastcam demo --out pictures  (needs: pip install "fastcam[demo]")')
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("fastcam-demo"),
    show_default=True,
    metavar="DIR",
    help="Folder for the model and the pictures.",
)
@click.option("--web", "in_browser", is_flag=True, help="Then open a page that explains your own photos.")
def demo(out: Path, in_browser: bool) -> None:
    """Explain four photos with a trained EfficientNet-Lite0 and write overlays and a contact sheet.

    Nothing is downloaded: weights, photos and class names come with the [demo] extra. Only --web brings ONNX Runtime
    Web from npm.
    """
    from .demo.run import run

    run(out, say=_say)
    if in_browser:
        from .demo.page import open_page

        open_page(out, say=_say)


@commands.command(epilog="Example: fastcam completion bash >> ~/.bashrc")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the lines that teach SHELL to complete fastcam's commands and options."""
    from click.shell_completion import get_completion_class

    script = get_completion_class(shell)
    if script is not None:
        _echo(script(commands, {}, "fastcam", "_FASTCAM_COMPLETE").source())


def _one_or_list(names: Sequence[str]) -> str | list[str] | None:
    return list(names) if len(names) > 1 else next(iter(names), None)


def _preprocessing(text: str | None) -> str | Preprocessing | None:
    return Preprocessing.from_json(text) if text is not None and text.lstrip().startswith("{") else text


class _Bar:
    """A progress bar on the terminal, with rate and time left."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __call__(self, progress: fastcam.JobProgress) -> None:
        from tqdm import tqdm

        if self._bar is None:
            # The images of an earlier run, or the first one, count for where the bar starts and not for the rate.
            self._bar = tqdm(total=progress.total, initial=progress.done, unit="img", dynamic_ncols=True)
        self._bar.set_postfix({"failed": progress.failed} if progress.failed else {}, refresh=False)
        self._bar.update(progress.done - self._bar.n)
        if progress.done == progress.total:
            self._bar.close()


class _Log:
    """A plain line from time to time."""

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None
        self._last = time.monotonic()

    def __call__(self, progress: fastcam.JobProgress) -> None:
        from tqdm import tqdm

        now = time.monotonic()
        start, done = self._first = self._first or (now, progress.done)
        if now - self._last < _LOG_SECONDS or now == start:
            return
        self._last = now
        rate = (progress.done - done) / (now - start)
        left = tqdm.format_interval((progress.total - progress.done) / rate) if rate else "?"
        _say(
            f"{progress.done} of {progress.total} images, {rate:.1f}/s, {left} left, {progress.failed} failed", err=True
        )


class _TrainingBar:
    """A progress bar on the terminal for each step of a training."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._step = ""

    def __call__(self, progress: fastcam.TrainingProgress) -> None:
        from tqdm import tqdm

        if progress.step != self._step:
            if self._bar is not None:
                self._bar.close()
            unit = "epoch" if progress.logs else "photo"
            self._bar = tqdm(total=progress.total, desc=progress.step, unit=unit, dynamic_ncols=True)
            self._step = progress.step
        if progress.logs:
            self._bar.set_postfix_str(_training_figures(progress.logs), refresh=False)
        self._bar.update(progress.done - self._bar.n)
        if progress.done == progress.total:
            self._bar.close()


class _TrainingLog:
    """A line an epoch, and one at the end of every other step."""

    def __call__(self, progress: fastcam.TrainingProgress) -> None:
        if progress.logs:
            figures = _training_figures(progress.logs)
            _say(f"{progress.step}: epoch {progress.done} of {progress.total}, {figures}", err=True)
        elif progress.done == progress.total:
            _say(f"{progress.step}: {progress.done} photos done", err=True)


def _training_figures(logs: Mapping[str, float]) -> str:
    return (
        f"loss {logs['loss']:.3f}, accuracy {logs['accuracy']:.1%}, held out: loss {logs['val_loss']:.3f}, "
        f"accuracy {logs['val_accuracy']:.1%}"
    )


def _print_entry(progress: fastcam.JobProgress) -> None:
    if progress.entry:
        _echo(json.dumps(progress.entry))


def _print_classes(progress: fastcam.JobProgress) -> None:
    if progress.total <= _LISTED and "classes" in progress.entry:
        classes = (f"{item['label']} {item['probability']:.1%}" for item in progress.entry["classes"])
        _say(f"{progress.entry['path']}: {', '.join(classes)}")


def _print_summary(result: fastcam.JobResult, *, err: bool) -> None:
    explained = result.images - len(result.failures)
    earlier = f", {result.resumed} of them earlier" if result.resumed else ""
    _say(
        f"explained {explained} of {result.images} images{earlier}, in {result.seconds:.1f} s ({result.rate:.1f}/s)",
        err=err,
    )
    if result.several_frames:
        _say(f"{result.several_frames} files hold several frames or pages: the first ones were explained", err=err)
    for _, reason in result.failures[:_LISTED]:
        _say(f"failed: {reason}", err=True)
    if len(result.failures) > _LISTED:
        _say(f"failed: {len(result.failures) - _LISTED} more, listed in {result.results}", err=True)
    _say(f"report: {result.report}" if result.report else f"results: {result.results}", err=err)


def _facts(found: fastcam.ModelInfo) -> Iterator[tuple[str, str]]:
    yield "file", f"{found.path}, {_megabytes(found.bytes)}, opset {found.opset}, from {found.framework}"
    for heading, values in (("input", found.inputs), ("output", found.outputs)):
        for name, shape in values.items():
            layout = f", {found.input_layout}" if heading == "input" else ""
            yield heading, f"{name} ({', '.join(map(str, shape))}){layout}"
    yield "preprocessing", _preprocessing_summary(found.preprocessing)
    yield "classes", _class_summary(found.classes, found.class_count)
    for name, (channels, height, width) in found.layers.items():
        yield "explained layer", f"{name}: {channels} channels of {height} x {width}"
    yield "precision", _PRECISION_FACTS[found.precision]
    others = [name for name in found.candidates if name not in found.layers]
    yield (
        "candidates",
        ", ".join(others[:_LISTED]) + (f" and {len(others) - _LISTED} more" if len(others) > _LISTED else ""),
    )
    yield (
        "methods",
        ", ".join(found.methods) + ("" if len(found.methods) > 1 else " (others need export --gradients full)"),
    )
    yield "parameters", f"{found.parameters:,}, and {found.gradient_parameters:,} more for the gradients"
    share = found.gradient_macs / found.macs if found.macs else 0
    yield (
        "multiply-adds",
        f"{found.macs / 1e6:,.1f} million an image; explaining adds {found.gradient_macs / 1e6:,.3f} ({share:.2%})",
    )
    for name, reason in found.providers.items():
        yield "provider", f"{name}: {'runs it here' if reason is None else 'no: ' + reason}"


def _class_summary(classes: Sequence[str] | None, count: int) -> str:
    if classes is None:
        return f"{count}, without names"
    return f"{count}: {', '.join(classes[:5])}{' ...' if count > 5 else ''}"


def _preprocessing_summary(preprocessing: Preprocessing | None) -> str:
    if preprocessing is None:
        return "unknown: photos cannot be explained; export again with --preprocess"
    return preprocessing.name or preprocessing.to_json()


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _say(text: str, *, err: bool = False) -> None:
    _echo(_printable(text), err=err)


def _echo(text: str, *, err: bool = False) -> None:
    try:
        click.echo(text, err=err)
    except BrokenPipeError:
        raise
    except OSError as error:
        if err:
            # Nobody is left to be told.
            return
        _discard_output()
        raise WriteError(f"standard output cannot be written: {error.strerror}") from None


def _discard_output() -> None:
    """Let what is still in the buffer go nowhere, so that the interpreter does not fail on it at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _printable(text: str) -> str:
    """Escape what names of files may hold and a terminal would obey, or could not show."""
    return "".join(
        character if character.isprintable() or character == "\n" else ascii(character)[1:-1] for character in text
    )


def main() -> None:
    """Run the command line; a refusal is one line on standard error and exit status 1."""
    # What Pillow thinks of damaged pictures is no news to their owner: they are explained, or listed as failed.
    warnings.filterwarnings("ignore", module=r"PIL\b")
    _open_missing_streams()
    sys.exit(_status())


def _open_missing_streams() -> None:
    """Give a process that was started without a standard stream an empty one, before a result takes its number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 - open until the process ends


def _status() -> int:
    try:
        return int(commands.main(prog_name="fastcam", standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except FastcamError as error:
        _say(f"fastcam: {error}", err=True)
        return _REFUSED
    except (click.Abort, KeyboardInterrupt):
        _say("fastcam: interrupted; `fastcam explain` and `fastcam train` go on with --resume", err=True)
        return _INTERRUPTED
    except BrokenPipeError:
        # Who reads standard output has gone, `head` for example: nobody is left to be told, at exit neither.
        _discard_output()
        return _REFUSED
