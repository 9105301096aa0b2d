"""What every importer returns, and what it establishes first: one image input, one vector of scores."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import helper

from ...arrays import Array
from ...errors import ArgumentError, ModelError, suggest
from ...graph import Dim, Graph, TensorType, attribute
from ...notes import Note
from ...preprocessing import LAYOUTS, Guess, Layout, Preprocessing

MINIMUM_OPSET = 18
MAXIMUM_OPSET = 20
# ONNX Runtime's CUDA provider runs MaxPool, Elu and Selu up to opset 21 only; 18 is the lowest with the ops we emit.
TARGET_OPSET = 18

# The name of a dynamic batch.
BATCH = "batch"


@dataclass(frozen=True)
class ImportOptions:
    """How to read a model that can be read in more than one way.

    Attributes
    ----------
    output : str or None
        The output with the scores, where there are several; or any value inside the model.
    input_size : tuple of int or None
        Height and width for a model with dynamic ones; (time,) or (depth, height, width) for series and volumes.
    example_input : object
        An image batch to trace a torch module with, or a Keras model that does not know its input.
    class_names : int or None
        Number of class names that the caller passes, compared with the model's scores before a long conversion.
    custom_objects : mapping of str to class or function, optional
        Layers and functions that a Keras file names.
    inputs : mapping of str to array, optional
        Values of the inputs apart from the image, which become constants.
    all_outputs : bool
        Whether to keep all outputs where ``output`` names none: detectors have scores and boxes.
    """

    output: str | None = None
    input_size: tuple[int, ...] | None = None
    example_input: Any = None
    class_names: int | None = None
    custom_objects: Mapping[str, Any] | None = None
    inputs: Mapping[str, Any] | None = None
    all_outputs: bool = False

    def check_scores(self, shape: Sequence[Any] | None) -> None:
        """Reject a wrong number of class names for scores of this shape, if they are known to be rows.

        Raises
        ------
        ArgumentError
            The numbers differ. One score may have two names, as for a binary classifier.
        """
        count = shape[1] if shape is not None and len(shape) == 2 else None
        if self.class_names is None or not isinstance(count, int):
            return
        if self.class_names != count and (self.class_names, count) != (2, 1):
            raise ArgumentError(wrong_count(self.class_names, count))


@dataclass(frozen=True)
class Sample:
    """The source model's scores for some images.

    Attributes
    ----------
    scores : ndarray
        Of `trial_images`, one row per image, as the model returns them: logits or probabilities.
    """

    scores: Array


# Number of elements per image above which a forward pass in the source framework is too expensive for a check.
_LARGEST_SAMPLE = 2**22


def trial_images(shape: Sequence[int], count: int) -> Array:
    """Return noise to run a model on: float32 (count, *shape) from 0 to 2, each image with a different brightness."""
    noise = np.random.default_rng(0).random((count, *shape), dtype=np.float32)
    brightness = np.array([1.0, 0.25, 2.0], np.float32)[np.arange(count) % 3]
    return noise * brightness.reshape(-1, *[1] * len(shape))


def sample_images(shape: Sequence[Dim]) -> Array | None:
    """Return three images to run a source model on, or None if they are too large or their size is dynamic.

    Parameters
    ----------
    shape : sequence
        Of one image.
    """
    sizes = [size for size in shape if isinstance(size, int)]
    if len(sizes) != len(shape) or math.prod(sizes) > _LARGEST_SAMPLE:
        return None
    return trial_images(sizes, 3)


@dataclass
class ImportedModel:
    """The forward pass of a classifier.

    Attributes
    ----------
    graph : Graph
        One input (the images), one output (the scores).
    framework : str
        "keras", "onnx" or "torch".
    layers : dict of str to str
        Value name of every framework layer's output that the graph computes, in the order of the forward pass.
    preprocessing : Preprocessing or None
        The one that the model was trained with, according to its file.
    guess : Guess or None
        The preprocessing that the published weights of the model's architecture expect.
    classes : tuple of str or None
        Names by class index, where the model knows them.
    notes : list of Note
        What the model's owner should know about what was changed or left unchanged.
    sample : Sample or None
        Scores of the source model, to check the exported file against.
    """

    graph: Graph
    framework: str
    layers: dict[str, str] = field(default_factory=dict)
    preprocessing: Preprocessing | None = None
    guess: Guess | None = None
    classes: tuple[str, ...] | None = None
    notes: list[Note] = field(default_factory=list)
    sample: Sample | None = None


@contextlib.contextmanager
def logging_from(level: int, *names: str) -> Iterator[None]:
    """Suppress these loggers' messages below ``level``: a converter's remarks about its own workings."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, before in zip(loggers, levels, strict=True):
            logger.setLevel(before)


def wrong_count(names: int, count: int) -> str:
    """Return the message for a wrong number of class names."""
    binary = "; a binary classifier of one score takes two names, or one for its class 1" if count == 1 else ""
    return f"{names} class names for a model of {count} classes{binary}"


def settle_signature(graph: Graph, options: ImportOptions) -> list[Note]:
    """Reduce the graph to one output and one float32 image input of fixed size with a named dynamic batch.

    A detector's graph keeps all outputs.

    Inputs that nothing reads are dropped; those that the options give values for become constants; images in integers
    are cast from float32.

    Returns
    -------
    list of Note

    Raises
    ------
    ModelError
        There are several outputs or inputs to choose from, or the input is not an image.
    """
    inner = {name for node in graph.nodes for name in node.output}
    wanted = options.output
    if wanted is not None or not options.all_outputs:
        graph.outputs = [wanted if wanted is not None and wanted in inner else choose_output(graph.outputs, wanted)]
    graph.prune()
    notes = _drop_unused_inputs(graph) + _fix_inputs(graph, options.inputs or {})
    if len(graph.inputs) != 1:
        raise ModelError(
            f"the model has {len(graph.inputs)} inputs {list(graph.inputs)}: fastcam explains one image. Pass the "
            'values of the others, for example inputs={"age": array}'
        )
    (name, type_) = next(iter(graph.inputs.items()))
    if type_.dtype.kind not in "fui" or len(type_.shape) not in LAYOUTS:
        raise ModelError(
            f"input {name!r} is {type_.dtype} of shape {type_.shape}: fastcam explains pictures (N,C,H,W), series "
            "(N,C,T) and volumes (N,C,D,H,W), with the channels first or last"
        )
    batch, *image = type_.shape
    sizes = _with_size(graph, name, image, options.input_size)
    settled = (batch if isinstance(batch, int) else BATCH, *sizes)
    if settled != type_.shape:
        graph.inputs[name] = TensorType(type_.dtype, settled)
        # The declared output shapes may be valid for the dynamic sizes only.
        graph.types = {}
        graph.infer_types()
    return notes + _take_floats(graph, name)


def _drop_unused_inputs(graph: Graph) -> list[Note]:
    read = {name for node in graph.nodes for name in node.input}
    unused = [name for name in graph.inputs if name not in read]
    for name in unused:
        del graph.inputs[name]
    return (
        [Note("inputs", f"Inputs that the scores do not depend on were dropped: {_listed(unused)}.")] if unused else []
    )


def _fix_inputs(graph: Graph, values: Mapping[str, Any]) -> list[Note]:
    """Turn inputs into constants; one with a row per image repeats the given row."""
    for name, value in values.items():
        if name not in graph.inputs:
            raise ModelError(f"inputs={{{name!r}: ...}}: the model has no such input. Inputs: {list(graph.inputs)}")
        type_ = graph.inputs.pop(name)
        try:
            array = np.asarray(value).astype(type_.dtype)
        except (TypeError, ValueError) as error:
            raise ModelError(f"inputs[{name!r}] is not an array of {type_.dtype}: {error}") from error
        rows = type_.shape[1:]
        if array.shape == rows:
            array = array[np.newaxis]
        fits = array.ndim == len(type_.shape) and all(
            not isinstance(size, int) or size == own for size, own in zip(rows, array.shape[1:], strict=True)
        )
        if not fits or (len(array) != 1 and len(array) != type_.shape[0]):
            raise ModelError(f"inputs[{name!r}] has shape {array.shape}, but the model takes {type_.shape}")
        _repeat(graph, name, array, open_batch=not isinstance(type_.shape[0], int))
    if values:
        graph.infer_types()
        return [Note("inputs", f"Inputs were fixed to the given values: {_listed(list(values))}.")]
    return []


def _repeat(graph: Graph, name: str, array: Array, *, open_batch: bool) -> None:
    if not open_batch or not graph.inputs:
        graph.constants[name] = array
        return
    image = next(iter(graph.inputs))
    row, batch, shape = (graph.unused_name(f"{name}/{part}") for part in ("row", "batch", "shape"))
    graph.constants[row] = array
    sizes = graph.emit_constant(np.array(array.shape[1:], np.int64), stem=f"{name}/sizes")
    graph.insert_before(
        graph.nodes[0],
        helper.make_node("Shape", [image], [batch], name=batch, start=0, end=1),
        helper.make_node("Concat", [batch, sizes], [shape], name=shape, axis=0),
        helper.make_node("Expand", [row, shape], [name], name=name),
    )


def _take_floats(graph: Graph, name: str) -> list[Note]:
    """Accept integer images as float32."""
    type_ = graph.inputs[name]
    if type_.dtype == np.float32:
        return []
    cast = graph.unused_name(f"{name}/{type_.dtype}")
    graph.replace_uses(name, cast, outputs=False)
    kind = helper.np_dtype_to_tensor_dtype(type_.dtype)
    graph.insert_before(graph.nodes[0], helper.make_node("Cast", [name], [cast], name=cast, to=kind))
    graph.inputs[name] = TensorType(np.dtype(np.float32), type_.shape)
    graph.infer_types()
    return [
        Note("inputs", f"The model takes {type_.dtype} images: the exported one takes the same numbers in float32.")
    ]


def image_layout(graph: Graph) -> Layout | None:
    """Return the axis of the image's channels, by the first convolution's weights; None if they leave it open."""
    shape = next(iter(graph.inputs.values())).shape
    channels = _channels_of_first_conv(graph)
    fits = [layout for layout in LAYOUTS[len(shape)] if channels is not None and shape[layout.index("C")] == channels]
    return fits[0] if len(fits) == 1 else None


def _channels_of_first_conv(graph: Graph) -> int | None:
    node = next((node for node in graph.nodes if node.op_type == "Conv"), None)
    if node is None or graph.rank(node.input[1]) is None:
        return None
    channels = graph.shape(node.input[1])[1]
    return channels * int(attribute(node, "group", 1)) if isinstance(channels, int) else None


def choose_output(outputs: list[str], wanted: str | None) -> str:
    """Return the output called ``wanted``, or at that position; None means the only one. Raises ModelError."""
    positions = {str(position): output for position, output in enumerate(outputs)}
    if wanted is not None and (wanted in outputs or wanted in positions):
        return wanted if wanted in outputs else positions[wanted]
    if wanted is not None:
        raise ModelError(f"the model has no output {wanted!r}: {suggest(wanted, outputs)}Outputs: {_listed(outputs)}")
    if len(outputs) != 1:
        raise ModelError(
            f"the model has {len(outputs)} outputs, {_listed(outputs)}: name the one that holds the scores, "
            f"for example output={outputs[0]!r}"
        )
    return outputs[0]


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names))


def _with_size(graph: Graph, name: str, image: list[Dim], size: tuple[int, ...] | None) -> tuple[Dim, ...]:
    """Return the axes of an image after the batch, with dynamic ones set."""
    last = len(image) - 1
    open_axes = [axis for axis in range(len(image)) if not isinstance(image[axis], int)]
    if not open_axes and size is None:
        return tuple(image)
    shape = ("batch", *image)
    channels = next((axis for axis in (0, last) if image[axis] in (1, 3)), None)
    if channels is None:
        count = _channels_of_first_conv(graph)
        channels = _channel_axis(graph, image, count)
        if channels is None or count is None:
            raise ModelError(
                f"input {name!r} has the open shape {shape}: fix its channels, for example with "
                "onnx.tools.update_model_dims, or where the model is exported"
            )
        image[channels] = count
        open_axes = [axis for axis in open_axes if axis != channels]
        if not open_axes and size is None:
            return tuple(image)
    if size is None:
        raise ModelError(
            f"input {name!r} has the open shape {shape}: give the size to explain it at, "
            f"for example input_size={EXAMPLE_SIZES[len(image)]}"
        )
    axes = [axis for axis in range(len(image)) if axis != channels]
    if len(axes) != len(size):
        raise ModelError(f"input {name!r} has the shape {shape}: input_size={size} does not fit it")
    for axis, length in zip(axes, size, strict=True):
        if axis not in open_axes and image[axis] != length:
            raise ModelError(f"input {name!r} has the fixed shape {shape}, not input_size={size}")
        image[axis] = length
    return tuple(image)


# By the number of axes after the batch.
EXAMPLE_SIZES = {2: "(1000,)", 3: "(224, 224)", 4: "(64, 64, 64)"}


def _channel_axis(graph: Graph, image: list[Dim], count: int | None) -> int | None:
    """Return the axis of ``count`` channels: last where the image is transposed before the first convolution."""
    last = len(image) - 1
    turned = any(
        node.op_type == "Transpose" and node.input[0] in graph.inputs and attribute(node, "perm", [])[1:2] == [last + 1]
        for node in graph.nodes
    )
    axis = last if turned else 0
    return axis if image[axis] == count or not isinstance(image[axis], int) else None
