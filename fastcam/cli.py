"""Command line: one subcommand for each function of the public API, which does the work."""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

import fastcam

from .errors import FastcamError, WriteError
from .evaluating.metrics import GRID, METRICS
from .evaluating.page import write_evaluation_page, write_verification_page
from .evaluating.verification import CHECKS
from .explaining.methods import METHODS
from .explaining.selftest import RUNTIMES, check_selftest_answer, run_selftest, write_selftest_picture
from .files import writing
from .folders.drift import write_drift_page
from .folders.jobs import FORMATS
from .folders.sources import find_sources
from .metadata import EVIDENCE, FITS, PICTURES, PRECISIONS, SCORE_ACTIVATIONS, SCORES
from .preprocessing import CONTENTS, Preprocessing
from .web.runtime import PACKAGE
from .web.site import build_site

# Exit statuses other than 0 and click's own 2 for an invalid command line: the work failed, at least in part; and
# Ctrl-C, by shell convention.
_REFUSED, _INTERRUPTED = 1, 130

# How `info` describes a precision.
_PRECISION_FACTS = {"fp32": "float32", "fp16": "float16, gradients float32"}

# Seconds between two lines of progress if there is no terminal to draw a bar on.
_LOG_SECONDS = 10.0
# At most this many failures, and the top classes of at most this many images, are listed.
_LISTED = 10

# Not every version of click declares it as generic at run time.
if TYPE_CHECKING:
    _ParamType = click.ParamType[Any]
else:
    _ParamType = click.ParamType


class _Path(_ParamType):
    """The path of a file or folder; an empty string, as from an unset variable, is rejected."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not os.fspath(value):
            self.fail("the path is empty", param, ctx)
        return Path(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        return click.Path().shell_complete(ctx, param, incomplete)


_FILE = _Path()


class _Size(_ParamType):
    """Height and width, "224x224", or one of the allowed words."""

    name = "size"

    def __init__(self, *words: str) -> None:
        self._words = words

    # click 8.1 passes no context.
    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return "|".join([*self._words, "HxW"])

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value in self._words:
            return value
        match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", str(value))
        if match is None:
            allowed = " or ".join([*map(repr, self._words), "height x width, '224x224'"])
            self.fail(f"{value!r} is not a size: give {allowed}", param, ctx)
        return int(match[1]), int(match[2])


class _Shard(_ParamType):
    """A share of a job, "3/16"."""

    name = "i/n"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", str(value))
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            self.fail(f"{value!r} is not a share: give i/n with i from 1 to n, '3/16'", param, ctx)
        return int(match[1]), int(match[2])


class _Region(_ParamType):
    """Four shares of a picture, "0.1,0.1,0.9,0.9"."""

    name = "top,left,bottom,right"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if re.fullmatch(r"\d*\.?\d+(,\d*\.?\d+){3}", str(value)) is None:
            self.fail(f"{value!r} is not a region: give four shares, '0.1,0.1,0.9,0.9'", param, ctx)
        return tuple(map(float, str(value).split(",")))


class _Setting(_ParamType):
    """A name and a number, "masks=4000"."""

    name = "name=number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int | float]:
        match = re.fullmatch(r"([a-z_]+)=(-?(?:\d{1,12}|\d*\.\d+))", str(value))
        if match is None:
            self.fail(f"{value!r} is not a setting: give a name and a number, 'masks=4000'", param, ctx)
        return match[1], float(match[2]) if "." in match[2] else int(match[2])


class _Command(click.Command):
    """A command that also takes options under their former names, hidden, for one release."""

    def __init__(self, *args: Any, formerly: Mapping[str, str], **options: Any) -> None:
        super().__init__(*args, **options)
        self._formerly = formerly

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        return super().parse_args(ctx, [*map(self._renamed, args[:end]), *args[end:]])

    def _renamed(self, argument: str) -> str:
        name, equals, value = argument.partition("=")
        if name not in self._formerly:
            return argument
        _say(f"fastcam: {name} is deprecated: use {self._formerly[name]}", err=True)
        return f"{self._formerly[name]}{equals}{value}"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="fastcam", message="fastcam %(version)s")
def commands() -> None:
    """Scores and Grad-CAM heatmaps from one forward pass of an exported image classifier."""


_background = click.option(
    "--background",
    multiple=True,
    metavar="INPUT",
    help="Pictures or a folder to compare with, for expectedgradients, like those of the training; repeatable.",
)


@commands.command(
    cls=_Command,
    formerly={"--batch": "--batch-size", "--validation": "--validation-split"},
    epilog="Example: fastcam train photos/ -o dogs.keras --unfreeze 1",
)
@click.argument("data_dir", type=_FILE)
@click.option("-o", "--out", type=_FILE, required=True, metavar="FILE", help="The .keras file to write.")
@click.option(
    "--backbone",
    default="vgg16",
    show_default=True,
    metavar="NAME",
    help="Any classifier of keras.applications, for example vgg16, resnet50, mobilenetv2 or efficientnetb0.",
)
@click.option(
    "--weights",
    default="imagenet",
    show_default=True,
    metavar="imagenet|none|FILE",
    help="Weights of the backbone: ImageNet weights, downloaded by Keras; random ones; or those in FILE.",
)
@click.option(
    "--size",
    type=click.IntRange(min=1),
    help="Height and width of the input in pixels.  [default: that of the backbone]",
)
@click.option(
    "--hidden",
    type=click.IntRange(min=1),
    multiple=True,
    metavar="UNITS",
    help="Add a fully connected layer before the last one; repeatable.",
)
@click.option(
    "--dropout",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.2,
    show_default=True,
    help="Dropout rate before the last layer.",
)
@click.option(
    "--epochs", type=click.IntRange(min=1), default=30, show_default=True, help="Maximum number of epochs for the head."
)
@click.option("--learning-rate", type=float, default=1e-3, show_default=True, help="Learning rate of the head.")
@click.option(
    "--unfreeze",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Number of blocks at the end of the backbone to train after the head.",
)
@click.option(
    "--fine-epochs",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    help="Maximum number of epochs for these blocks.",
)
@click.option(
    "--fine-learning-rate", type=float, default=1e-5, show_default=True, help="Learning rate of these blocks."
)
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True, help="Photos per batch.")
@click.option(
    "--patience",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Stop after this many epochs without a lower validation loss.",
)
@click.option(
    "--augmentations",
    type=click.IntRange(min=0),
    default=4,
    show_default=True,
    help="Number of randomly altered copies of each photo to train on.",
)
@click.option(
    "--class-weights/--no-class-weights",
    default=True,
    show_default=True,
    help="Weight photos so that every class counts equally.",
)
@click.option(
    "--validation-split",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.2,
    show_default=True,
    help="Fraction of each class to hold out for validation, unless DATA_DIR has a val folder.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Random seed; the same seed gives the same weights.",
)
@click.option("--resume", is_flag=True, help="Continue an interrupted training.")
def train(data_dir: Path, weights: str, **options: Any) -> None:
    """Fine-tune a pretrained network on DATA_DIR, which contains one folder of photos per class.

    The class folders may also be split into DATA_DIR/train and DATA_DIR/val. The result is a Keras model that contains
    the class names, ready for `fastcam export`. Learning curves, a confusion matrix, all settings (training.json) and a
    cache for the next training on the same photos are written to a folder named like FILE, with the suffix .training.
    """
    show_progress = _TrainingBar() if sys.stderr.isatty() else _TrainingLog()
    weights_or_none = None if weights == "none" else weights
    result = fastcam.finetune(data_dir, weights=weights_or_none, progress=show_progress, **options)
    for reason in result.skipped[:_LISTED]:
        _say(f"skipped: {reason}", err=True)
    if len(result.skipped) > _LISTED:
        _say(f"skipped: {len(result.skipped) - _LISTED} more, listed in {result.folder / 'training.json'}", err=True)
    _say(f"classes: {_class_summary(result.classes, len(result.classes))}")
    _say(f"photos: {result.photos} for training, {result.held_out} for validation")
    _say(f"validation accuracy: {result.accuracy:.1%}")
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
    help="Layer to explain; repeatable.  [default: the last one with a spatial map]",
)
@click.option(
    "--classes",
    metavar="FILE",
    help="Text file with the class names, one per line, in the order of the model's outputs.",
)
@click.option(
    "--preprocess",
    metavar="NAME|JSON",
    help="Preprocessing of pictures: vgg16, imagenet, scale, symmetric, none, "
    'or \'{"order": "RGB", "mean": [0, 0, 0], "scale": [1, 1, 1]}\'.',
)
@click.option(
    "--score",
    type=click.Choice(SCORES),
    default="classes",
    show_default=True,
    help="What the model's outputs are: classes, values of a regression, a segmentation, or the boxes of a detector.",
)
@click.option(
    "--fit",
    type=click.Choice(FITS),
    help="How pictures of other proportions become the input: stretched, or scaled as a whole and surrounded by grey.  "
    "[default: stretch; letterbox for boxes]",
)
@click.option(
    "--gradients",
    type=click.Choice(["none", "pooled", "full", "image"]),
    help="none: scores only, for rise and occlusion, of any model; full: for methods such as gradcam++ and layercam; "
    "image: also for saliency and integratedgradients. Each is larger and slower than the one before.  "
    "[default: pooled; full for boxes]",
)
@click.option(
    "--evidence",
    multiple=True,
    type=click.Choice(list(EVIDENCE)),
    help="A further output for single methods, see docs/methods.md; repeatable.",
)
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default="fp32",
    show_default=True,
    help="fp16: the network in float16, for GPUs, and half the file size; gradients stay in float32.",
)
@click.option("--output", metavar="NAME", help="Output with the scores, if the model has several outputs.")
@click.option("--input-size", type=_Size(), help="Size of the input images, if the model does not fix it.")
@click.option(
    "--token-grid", type=_Size(), help="Rows and columns of a transformer's patches, if the model does not define them."
)
@click.option(
    "--score-activation",
    type=click.Choice(SCORE_ACTIVATIONS),
    help="What turns the scores into probabilities, for models that end in raw scores: softmax (one class per image), "
    "sigmoid (several, or binary), none (no probabilities), probabilities (they are). [default: the model's own]",
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
    help="Method for --draw.",
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
@click.option("--raw-outputs", is_flag=True, help="With --draw: also output activations and weights.")
@click.option(
    "--contrast",
    is_flag=True,
    help="With --draw: one heatmap per image, why the first target rather than the others.",
)
def export(model: Path, out: Path, layer: Sequence[str], preprocess: str | None, **options: Any) -> None:
    """Export MODEL (.keras, .h5 or .onnx) to OUT, a single ONNX file that explains itself.

    Prints the explained layers, the classes and the preprocessing.
    """
    begin = time.perf_counter()
    result = fastcam.export(model, out, layer=_one_or_list(layer), preprocess=_preprocessing(preprocess), **options)
    _say(f"wrote {result.path}, {_megabytes(result.bytes)}, in {time.perf_counter() - begin:.1f} s")
    _say(f"layers: {', '.join(result.layers)}")
    _say(f"classes: {_class_summary(result.classes, result.class_count)}")
    _say(f"preprocessing: {_preprocessing_summary(result.preprocessing)}")
    for note in result.notes:
        _say(f"note: {note}")


@commands.command(
    cls=_Command,
    formerly={"--top": "--top-k", "--batch": "--batch-size"},
    epilog="Example: fastcam explain dogs.onnx photos/ -o why --top-k 3",
)
@click.argument("model", type=_FILE)
@click.argument("inputs", nargs=-1, required=True, type=click.Path(readable=False), metavar="INPUT...")
@click.option("-o", "--out", type=_FILE, required=True, metavar="DIR", help="Folder for the results.")
@click.option(
    "--top-k",
    type=click.IntRange(min=1),
    help="Explain the top K classes, or a detector's K best boxes.  [default: 1; 10 boxes]",
)
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1),
    help="Lowest probability of a box to explain, for a detector.  [default: 0.25]",
)
@click.option(
    "--target",
    multiple=True,
    metavar="CLASS",
    help="Explain this class instead, given by name, or by index if no class has that name; repeatable.",
)
@click.option(
    "--method",
    type=click.Choice(list(METHODS)),
    help="How to explain; `fastcam info` lists what MODEL offers.  [default: gradcam; hirescam for boxes]",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=NUMBER",
    type=_Setting(),
    help="A setting of the method, such as masks=4000 for rise; repeatable. See docs/methods.md.",
)
@_background
@click.option(
    "--layer",
    multiple=True,
    metavar="NAME",
    help="One of the file's explained layers; the maps of several are averaged.  [default: the first; all for boxes]",
)
@click.option(
    "--format",
    type=click.Choice(FORMATS),
    default="jpg",
    show_default=True,
    help="Picture format of the overlays; npy: heatmaps as float32 arrays instead.",
)
@click.option(
    "--size",
    type=_Size("image", "input"),
    default="image",
    show_default=True,
    help="Size of overlays and heatmaps: that of the picture, that of the model's input, or a given one.",
)
@click.option("--alpha", type=click.FloatRange(0, 1), default=0.5, show_default=True, help="Opacity of the heatmap.")
@click.option(
    "--colormap",
    default="jet",
    show_default=True,
    metavar="NAME",
    help="Any colour map of the cmap library, for example turbo, viridis or inferno.",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Images per batch.")
@click.option("--threads", type=click.IntRange(min=1), help="Number of CPU threads.  [default: all processors]")
@click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="Device to run the model on: auto, cpu, cuda, cuda:1 or tensorrt.",
)
@click.option("--report/--no-report", default=True, show_default=True, help="Write report.html and its thumbnails.")
@click.option(
    "--shard",
    type=_Shard(),
    help="Explain only a share of the pictures, 3/16: sixteen machines work on one job. See `fastcam merge`.",
)
@click.option("--resume", is_flag=True, help="Continue an earlier run in DIR, or add new images to it.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print each line of results.jsonl to standard output as it is written."
)
def explain(
    model: Path,
    inputs: Sequence[str],
    out: Path,
    target: Sequence[str],
    layer: Sequence[str],
    settings: Sequence[tuple[str, float]],
    background: Sequence[str],
    as_json: bool,
    **options: Any,
) -> int:
    """Explain pictures with MODEL, a file written by `fastcam export`, and write overlays and a report.

    INPUT is a picture, a folder (including its subfolders), a quoted pattern like 'photos/**/*.jpg', a .txt or .lst
    file with one of these per line, or - for such a list on standard input.

    \b
    The following is written to DIR:
      report.html     a page for browsing the results, without network or server
      results.jsonl   one line per image: path, classes or boxes, probabilities, files, timing
      overlays/       or heatmaps/, with --format npy
      run.json        settings and counts

    A picture that cannot be explained is listed and skipped. The exit status is then 1, as for every error; 2 means an
    invalid command line, 130 an interruption. An interrupted run can be continued with --resume.
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
        settings=dict(settings) or None,
        background=background or None,
        progress=progress,
        **options,
    )
    _print_summary(result, err=as_json)
    return _REFUSED if result.failures else 0


@commands.command(epilog="Example: fastcam merge part1 part2 part3 -o why")
@click.argument("folders", metavar="DIR...", type=_FILE, nargs=-1, required=True)
@click.option("-o", "--out", type=_FILE, required=True, metavar="DIR", help="Folder for the joined results.")
def merge(folders: Sequence[Path], out: Path) -> int:
    """Join the results of all shards of a job, DIR..., written by `fastcam explain --shard`, into those of one job."""
    result = fastcam.merge_results(list(folders), out)
    _say(f"joined {result.images} images, {result.failed} of them failed: {result.results}")
    if result.report is not None:
        _say(f"report: {result.report}")
    return _REFUSED if result.failed else 0


@commands.command(epilog="Example: fastcam drift why-in-may why-in-june -o moved --region 0.1,0.1,0.9,0.9")
@click.argument("reference", type=_FILE)
@click.argument("new", type=_FILE)
@click.option("-o", "--out", type=_FILE, required=True, metavar="DIR", help="Folder for the comparison.")
@click.option(
    "--region",
    type=_Region(),
    help="Where objects are expected: top,left,bottom,right as shares of the picture, 0 to 1.",
)
def drift(reference: Path, new: Path, out: Path, region: tuple[float, float, float, float] | None) -> int:
    """Compare where the heatmaps of each class lie in two folders of results, REFERENCE and NEW.

    The exit status is 1 if a class moved more than chance explains.

    \b
    The following is written to DIR:
      drift.html   mean maps side by side, the classes that moved most first
      drift.json   the same numbers
    """  # noqa: D301 - the escape tells click to keep the lines
    found = fastcam.compare_results(reference, new, region=region)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    found.save(out / "drift.json")
    page = write_drift_page(found, out / "drift.html")
    _say(f"moved: {', '.join(found.moved) or 'no class more than chance explains'}")
    _say(f"page: {page}")
    return _REFUSED if found.moved else 0


@commands.command(epilog="Example: fastcam evaluate dogs.onnx photos/ -o which --method gradcam --method layercam")
@click.argument("model", type=_FILE)
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True)
@click.option("-o", "--out", type=_FILE, required=True, metavar="DIR", help="Folder for the results.")
@click.option(
    "--method",
    multiple=True,
    type=click.Choice(list(METHODS)),
    help="Repeatable.  [default: all that need no further runs of the model]",
)
@click.option(
    "--metric",
    multiple=True,
    type=click.Choice([*METRICS, GRID]),
    help="Repeatable.  [default: the most used ones]",
)
@click.option(
    "--masks",
    type=_FILE,
    metavar="DIR",
    help="Pictures that are bright where the object is, one for each photo, with its name and the suffix .png.",
)
@click.option(
    "--target", metavar="CLASS", help="Explain this class, by name or index.  [default: the top class of each picture]"
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=NUMBER",
    type=_Setting(),
    help="A setting of a metric, such as steps=50; repeatable. See docs/evaluation.md.",
)
@_background
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True, help="Images per batch.")
@click.option("--device", default="auto", show_default=True, metavar="NAME", help="Device to run the model on.")
def evaluate(
    model: Path,
    inputs: Sequence[str],
    out: Path,
    method: Sequence[str],
    metric: Sequence[str],
    masks: Path | None,
    target: str | None,
    settings: Sequence[tuple[str, float]],
    background: Sequence[str],
    batch_size: int,
    device: str,
) -> None:
    """Measure which method explains MODEL best, on your own pictures, beside baselines that know nothing of it.

    \b
    The following is written to DIR:
      evaluation.html   the methods in order, for each metric
      evaluation.json   every number, and the settings
    """  # noqa: D301 - the escape tells click to keep the lines
    photos = [Path(source.path) for source in find_sources(inputs, [out])]
    compared = [source.path for source in find_sources(background)] if background else None
    explainer = fastcam.Explainer(model, device=device, background=compared)
    bar = _Count("img")
    found = fastcam.evaluate(
        explainer,
        photos,
        target=target,
        methods=list(method) or None,
        metrics=list(metric) or None,
        masks=None if masks is None else [masks / f"{photo.stem}.png" for photo in photos],
        settings=dict(settings),
        batch_size=batch_size,
        progress=bar if sys.stderr.isatty() else None,
    )
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    found.save(out / "evaluation.json")
    page = write_evaluation_page(found, out / "evaluation.html")
    for line in str(found).splitlines():
        _say(line)
    _say(f"page: {page}")


@commands.command(epilog="Example: fastcam verify dogs.onnx photos/ -o checks --threshold blank=0.2")
@click.argument("model", type=_FILE)
@click.argument("inputs", metavar="[INPUT...]", nargs=-1)
@click.option("-o", "--out", type=_FILE, required=True, metavar="DIR", help="Folder for the results.")
@click.option(
    "--method", type=click.Choice(list(METHODS)), help="How to explain.  [default: the file's own default method]"
)
@click.option(
    "--compare-with",
    type=_FILE,
    metavar="MODEL",
    help="The same model in another precision: agreement of the classes, and drift of the heatmaps.",
)
@click.option(
    "--threshold",
    "thresholds",
    multiple=True,
    metavar="NAME=NUMBER",
    type=_Setting(),
    help=f"Another threshold, by the name of the check: {', '.join(CHECKS)}; repeatable.",
)
def verify(
    model: Path,
    inputs: Sequence[str],
    out: Path,
    method: str | None,
    compare_with: Path | None,
    thresholds: Sequence[tuple[str, float]],
) -> int:
    """Check MODEL on this machine: its gradients, its arithmetic, and what its heatmaps depend on.

    INPUT are photos like those of production, a few dozen. The exit status is 1 if a threshold is missed, so that a
    pipeline can depend on it.

    \b
    The following is written to DIR:
      verification.html   what was measured, with thresholds
      verification.json   the same, with hashes and versions
    """  # noqa: D301 - the escape tells click to keep the lines
    photos = [Path(source.path) for source in find_sources(inputs, [out])] if inputs else None
    found = fastcam.verify(model, photos, method=method, compare_with=compare_with, thresholds=dict(thresholds))
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    found.save(out / "verification.json")
    page = write_verification_page(found, out / "verification.html")
    for finding in found.findings:
        value = "not measured" if finding.value is None else f"{finding.value:.3g}"
        verdict = {None: finding.reason, True: "met", False: "MISSED"}[finding.passed]
        _say(f"{finding.name:<16}{value:<14}{finding.side} {finding.bound:.3g}: {verdict}")
    _say(f"page: {page}")
    return 0 if found.passed else _REFUSED


@commands.command(epilog="Example: fastcam info dogs.onnx")
@click.argument("file", type=_FILE)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def info(file: Path, as_json: bool) -> None:
    """Show the inputs, outputs, classes, layers and cost of FILE, written by `fastcam export`, and what can run it."""
    found = fastcam.inspect(file)
    if as_json:
        _echo(json.dumps(found.to_json(), indent=2))
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

    FILE must be exported with --draw heatmaps --picture input --target required. ONNX Runtime Web comes from npm and is
    checked by its hash; the page loads nothing from elsewhere. Any web server serves DIR, for example GitHub Pages.
    """
    site = build_site(file, out, title=title, archive=archive)
    _say(f"wrote {site.folder}: {', '.join(f'{part} {_megabytes(size)}' for part, size in site.bytes.items())}")
    _say(f"open it: python -m http.server -d {site.folder}, then http://localhost:8000")


@commands.command(epilog="Example: fastcam serve dogs.onnx --port 8000")
@click.argument("models", metavar="MODEL...", type=_FILE, nargs=-1, required=True)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for all networks.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Calls at the same time.  [default: on the CPU one per processor, with one thread each]",
)
@click.option("--queue", type=click.IntRange(min=1), default=64, show_default=True, help="Requests that may wait.")
@click.option(
    "--max-batch",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Pictures of different requests given to the model together; more than 1 helps on GPUs.",
)
@click.option(
    "--max-wait",
    type=click.FloatRange(0, 1),
    default=0.005,
    show_default=True,
    help="Seconds that a request waits for others to join its batch.",
)
@click.option(
    "--timeout", type=click.FloatRange(0.001, 3600), default=30.0, show_default=True, help="Seconds per request."
)
@click.option("--max-bytes", type=click.IntRange(min=1), default=20_000_000, show_default=True, help="Largest body.")
@click.option(
    "--max-pixels", type=click.IntRange(min=1), default=50_000_000, show_default=True, help="Largest picture."
)
@click.option(
    "--token",
    envvar="FASTCAM_TOKEN",
    help="Clients must send it as a bearer token. Better in the variable FASTCAM_TOKEN, which other users cannot see.",
)
@click.option("--device", default="auto", show_default=True, metavar="NAME", help="Device to run the models on.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads per call.  [default: processors / workers]")
def serve(
    models: Sequence[Path],
    host: str,
    port: int,
    device: str,
    threads: int | None,
    workers: int | None,
    **limits: Any,
) -> None:
    """Explain over HTTP with each MODEL, under its file's name, until SIGTERM.

    \b
    POST /explain               a photo in; an overlay, JSON or an array out, as Accept asks
    GET  /                      a page to drop a photo on
    POST /v2/models/NAME/infer  the Open Inference Protocol, for KServe's and Triton's clients
    GET  /metrics               for Prometheus
    GET  /openapi.json          the interface
    """  # noqa: D301 - the escape tells click to keep the lines
    from .serving.server import default_workers
    from .serving.server import serve as run_server
    from .serving.settings import ServerSettings

    settings = ServerSettings(workers=workers or default_workers(device, threads), **limits)
    run_server(models, host=host, port=port, device=device, threads=threads, settings=settings)


@commands.command(epilog="Example: fastcam triton dogs.onnx -o repository --device cpu")
@click.argument("model", type=_FILE)
@click.option("-o", "--out", type=_FILE, required=True, metavar="DIR", help="The model repository.")
@click.option("--name", help="The model's name.  [default: the file's]")
@click.option("--max-batch", type=click.IntRange(min=1), default=8, show_default=True, help="Largest batch.")
@click.option("--instances", type=click.IntRange(min=1), default=1, show_default=True, help="Copies that run at once.")
@click.option("--device", type=click.Choice(["cpu", "gpu"]), default="gpu", show_default=True)
@click.option("--tensorrt", is_flag=True, help="Hand the network to TensorRT.")
def triton(model: Path, out: Path, **options: Any) -> None:
    """Write a model repository for NVIDIA's Triton from MODEL, exported with --target required."""
    written = fastcam.write_triton_repository(model, out, **options)
    _say(f"wrote {written.config}: {', '.join(written.inputs)} to {', '.join(written.outputs)}")
    _say(f"serve it: tritonserver --model-repository={out}")


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
    "--picture", type=_FILE, metavar="PNG", help="Do not run it: write the test's picture, for a program of your own."
)
@click.option(
    "--answer",
    type=_FILE,
    metavar="FILE",
    help="Do not run it: check your program's heatmap, raw float32.",
)
def selftest(file: Path, runtime: str, picture: Path | None, answer: Path | None) -> int:
    """Check that a runtime computes the scores and the heatmap that FILE expects.

    FILE, exported with --draw, contains a test input and a class to explain, other than the top one. The exit status
    is 1 if the result differs.
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
    type=_FILE,
    default="fastcam-demo",
    show_default=True,
    metavar="DIR",
    help="Folder for the model and the pictures.",
)
@click.option("--web", "in_browser", is_flag=True, help="Then open a page on which you can explain your own photos.")
def demo(out: Path, in_browser: bool) -> None:
    """Explain four photos with a trained EfficientNet-Lite0, and write overlays and a contact sheet.

    Nothing is downloaded: weights, photos and class names are part of the [demo] extra. Only --web downloads ONNX
    Runtime Web, from npm.
    """
    from .demo.run import run

    run(out, say=_say)
    if in_browser:
        from .demo.page import open_page

        open_page(out, say=_say)


@commands.command(epilog="Example: fastcam completion bash >> ~/.bashrc")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a script that makes SHELL complete fastcam's commands and options."""
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
            # Images of an earlier run, and the first image, do not count towards the rate.
            self._bar = tqdm(total=progress.total, initial=progress.done, unit="img", dynamic_ncols=True)
        self._bar.set_postfix({"failed": progress.failed} if progress.failed else {}, refresh=False)
        self._bar.update(progress.done - self._bar.n)
        if progress.done == progress.total:
            self._bar.close()


class _Count:
    """A progress bar of so many of all."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(total=total, unit=self._unit, dynamic_ncols=True)
        self._bar.update(done - self._bar.n)
        if done == total:
            self._bar.close()


class _Log:
    """A plain progress line every few seconds."""

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
    """A progress bar on the terminal for each step of training."""

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
    """One line per epoch, and one at the end of every other step."""

    def __call__(self, progress: fastcam.TrainingProgress) -> None:
        if progress.logs:
            figures = _training_figures(progress.logs)
            _say(f"{progress.step}: epoch {progress.done} of {progress.total}, {figures}", err=True)
        elif progress.done == progress.total:
            _say(f"{progress.step}: {progress.done} photos done", err=True)


def _training_figures(logs: Mapping[str, float]) -> str:
    return (
        f"loss {logs['loss']:.3f}, accuracy {logs['accuracy']:.1%}, validation: loss {logs['val_loss']:.3f}, "
        f"accuracy {logs['val_accuracy']:.1%}"
    )


def _print_entry(progress: fastcam.JobProgress) -> None:
    if progress.entry:
        _echo(json.dumps(progress.entry))


def _print_classes(progress: fastcam.JobProgress) -> None:
    if progress.total <= _LISTED and "classes" in progress.entry:
        found = ", ".join(map(_described, progress.entry["classes"])) or "nothing found"
        _say(f"{progress.entry['path']}: {found}")


def _described(item: Mapping[str, Any]) -> str:
    """Return a class from results.jsonl with its probability, or its score if there is no probability."""
    probability = item["probability"]
    strength = f"{item['score']:.3g}" if probability is None else f"{probability:.1%}"
    blank = f" ({item['caption']})" if item.get("evidence") == 0 and "caption" in item else ""
    return f"{item['label']} {strength}{blank}"


def _print_summary(result: fastcam.JobResult, *, err: bool) -> None:
    explained = result.images - len(result.failures)
    earlier = f", {result.resumed} of them in an earlier run" if result.resumed else ""
    _say(
        f"explained {explained} of {result.images} images{earlier}, in {result.seconds:.1f} s ({result.rate:.1f}/s)",
        err=err,
    )
    if result.several_frames:
        _say(
            f"files with several frames or pages, of which only the first was explained: {result.several_frames}",
            err=err,
        )
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
    if len(found.input_layout) == 4:
        yield "preprocessing", _preprocessing_summary(found.preprocessing)
    else:
        contents = CONTENTS[len(found.input_layout)]
        yield "use", f"{contents}, from Python: fastcam.Explainer({str(found.path)!r})(array)"
    for note in found.notes:
        yield "note", note
    yield "score", _SCORE_FACTS[found.score]
    if found.fit == "letterbox":
        yield "fit", "letterbox: pictures are scaled as a whole and surrounded by grey"
    yield _NAMED.get(found.score, "classes"), _class_summary(found.classes, found.class_count)
    for name, (channels, *sides) in found.layers.items():
        yield "explained layer", f"{name}: {channels} channels of {' x '.join(map(str, sides))}"
    yield "precision", _PRECISION_FACTS[found.precision]
    others = [name for name in found.candidates if name not in found.layers]
    yield (
        "candidates",
        ", ".join(others[:_LISTED]) + (f" and {len(others) - _LISTED} more" if len(others) > _LISTED else ""),
    )
    yield (
        "methods",
        ", ".join(found.methods)
        + ("" if len(found.methods) == len(METHODS) else " (others need export --gradients or --evidence)"),
    )
    yield "parameters", f"{found.parameters:,}, plus {found.gradient_parameters:,} for the gradients"
    share = found.gradient_macs / found.macs if found.macs else 0
    yield (
        "multiply-adds",
        f"{found.macs / 1e6:,.1f} million per image; explaining adds {found.gradient_macs / 1e6:,.3f} ({share:.2%})",
    )
    for name, reason in found.providers.items():
        yield "provider", f"{name}: {'available' if reason is None else 'not available: ' + reason}"
    yield "convolutions", _convolution_summary(found)


_SCORE_FACTS = {
    "classes": "a target is a class",
    "values": "a target is a value, as the model gives it",
    "segmentation": "a target is a class: the mean logit over the pixels where it is predicted",
    "boxes": "a target is a box: by rank (top5), or an entry of an explanation's targets",
    "embedding": "no target: the similarity to references, which a call is given",
}
_NAMED = {"values": "values", "embedding": "numbers"}


def _convolution_summary(info: fastcam.ModelInfo) -> str:
    found = info.convolutions
    if found.reason is not None:
        return f"ONNX Runtime's on the CPU: {found.reason}"
    counts = ", ".join(f"{count} {name}" for name, count in sorted(Counter(found.layers.values()).items()))
    return f"fastcam's on the CPU ({counts}), {found.others} left to ONNX Runtime"


def _class_summary(classes: Sequence[str] | None, count: int) -> str:
    if classes is None:
        return f"{count}, without names"
    return f"{count}: {', '.join(classes[:5])}{' ...' if count > 5 else ''}"


def _preprocessing_summary(preprocessing: Preprocessing | None) -> str:
    if preprocessing is None:
        return "unknown: pictures cannot be explained; export again with --preprocess"
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
            # There is no place to report this.
            return
        _discard_output()
        raise WriteError(f"standard output cannot be written: {error.strerror}") from None


def _discard_output() -> None:
    """Discard what is still in the buffer, so that the interpreter does not fail to write it when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _printable(text: str) -> str:
    """Escape characters of file names that a terminal would interpret or cannot show.

    That includes line breaks: a name must not look like a line of output.
    """
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def main() -> None:
    """Run the command line; errors are one line on standard error and exit status 1."""
    # Pillow's warnings about damaged pictures are redundant: the pictures are explained, or listed as failed.
    warnings.filterwarnings("ignore", module=r"PIL\b")
    _open_missing_streams()
    with suppress(ValueError):
        # Only the main thread can do this, which this always is except in tests.
        signal.signal(signal.SIGINT, _Interruptions())
        # The interpreter resets handlers written in Python to the default action before it has ended, and a Ctrl-C from
        # then on would end the process by the signal: without this exit status, and with a cleanup cut short.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    sys.exit(_status())


class _Interruptions:
    """Ctrl-C: the first one ends the work cleanly, the second one changes nothing, and the third one does not wait."""

    def __init__(self) -> None:
        self._count = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        if self._count == 1:
            raise KeyboardInterrupt
        # Not through click or print, which may hold a lock at this point.
        with suppress(OSError):
            os.write(2, b"fastcam: stopping\n")
        if self._count > 2:
            # Results appear completely or not at all, so nothing is damaged, and --resume continues.
            os._exit(_INTERRUPTED)


def _open_missing_streams() -> None:
    """Open an empty stream in place of each missing standard stream, before another file takes its number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 - stays open


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
        _say("fastcam: interrupted; continue `fastcam explain` or `fastcam train` with --resume", err=True)
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of standard output, for example `head`, is gone.
        _discard_output()
        return _REFUSED
