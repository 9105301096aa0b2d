"""What every importer hands over, and what it settles before: one image, one vector of scores."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...errors import ModelError, suggest
from ...graph import Array, Dim, Graph, TensorType
from ...notes import Note
from ...preprocessing import Guess, Preprocessing

MINIMUM_OPSET = 18
MAXIMUM_OPSET = 20
# ONNX Runtime's CUDA provider runs MaxPool, Elu and Selu up to opset 21 only; 18 is the lowest with the ops we emit.
TARGET_OPSET = 18

# The name of an open batch.
BATCH = "batch"


@dataclass(frozen=True)
class ImportOptions:
    """How to read a model that can be read in more than one way.

    Attributes
    ----------
    output : str or None
        The output with the scores, where there are several.
    input_size : (int, int) or None
        Height and width for a model that leaves them open.
    example_input : object
        An image batch to trace a torch module with.
    """

    output: str | None = None
    input_size: tuple[int, int] | None = None
    example_input: Any = None


@dataclass(frozen=True)
class Sample:
    """What the source model gives for some images.

    Attributes
    ----------
    scores : ndarray
        Of `trial_images`, a row per image, as the model returns them: logits or probabilities.
    """

    scores: Array


# Elements of an image above which a forward pass in the source's framework costs too much for a check.
_LARGEST_SAMPLE = 2**22


def trial_images(shape: Sequence[int], count: int) -> Array:
    """Return noise to run a model on: float32 (count, *shape) from 0 to 2, each image of another brightness."""
    noise = np.random.default_rng(0).random((count, *shape), dtype=np.float32)
    brightness = np.array([1.0, 0.25, 2.0], np.float32)[np.arange(count) % 3]
    return noise * brightness.reshape(-1, *[1] * len(shape))


def sample_images(shape: Sequence[Dim]) -> Array | None:
    """Return three images to ask a source model about; None where they are too large, or their size is open.

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
        What the model's file says that it was trained with.
    guess : Guess or None
        The preprocessing that the published weights of the model's architecture expect.
    classes : tuple of str or None
        Names by class index, where the model knows them.
    notes : list of Note
        What was done to the model, or left as it was, that its owner should know.
    sample : Sample or None
        Scores of the source model, to check the exported file with.
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
    """Keep what these loggers say below ``level`` out of the user's log: a converter's remarks on itself."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, before in zip(loggers, levels, strict=True):
            logger.setLevel(before)


def settle_signature(graph: Graph, options: ImportOptions) -> None:
    """Leave the graph one output, and one image input of fixed size whose open batch has a name.

    Raises
    ------
    ModelError
        When there are several outputs or inputs to choose from, or the input is no image.
    """
    graph.outputs = [choose_output(graph.outputs, options.output)]
    graph.prune()
    if len(graph.inputs) != 1:
        raise ModelError(f"the model has {len(graph.inputs)} inputs {list(graph.inputs)}: fastcam explains one image")
    (name, type_) = next(iter(graph.inputs.items()))
    if type_.dtype != np.float32 or len(type_.shape) != 4:
        raise ModelError(
            f"input {name!r} is {type_.dtype} of shape {type_.shape}: "
            "an image classifier takes float32 (N,H,W,3) or (N,3,H,W)"
        )
    batch, *image = type_.shape
    settled = (batch if isinstance(batch, int) else BATCH, *_with_size(name, image, options.input_size))
    if settled != type_.shape:
        graph.inputs[name] = TensorType(type_.dtype, settled)
        # What was declared of the outputs may hold for the open sizes only.
        graph.types = {}
        graph.infer_types()


def choose_output(outputs: list[str], wanted: str | None) -> str:
    """Return the output called ``wanted``, or at that position; None for the only one. Raises ModelError."""
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


def _with_size(name: str, image: list[Dim], size: tuple[int, int] | None) -> tuple[Dim, ...]:
    """Return the three axes of an image behind the batch, with open heights and widths set."""
    open_axes = [axis for axis in range(3) if not isinstance(image[axis], int)]
    channels = next((axis for axis in (0, 2) if image[axis] in (1, 3)), None)
    if not open_axes and size is None:
        return tuple(image)
    if channels is None:
        raise ModelError(
            f"input {name!r} has the open shape {('batch', *image)}: fix its channels, for example with "
            "onnx.tools.update_model_dims, or where the model is exported"
        )
    if size is None:
        raise ModelError(
            f"input {name!r} has the open shape {('batch', *image)}: say which height and width to explain it at, "
            "for example input_size=(224, 224)"
        )
    for axis, length in zip([axis for axis in range(3) if axis != channels], size, strict=True):
        if axis not in open_axes and image[axis] != length:
            raise ModelError(f"input {name!r} has the fixed shape {('batch', *image)}, not input_size={size}")
        image[axis] = length
    return tuple(image)
