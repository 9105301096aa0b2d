"""What every importer hands over, and what it settles before: one image, one vector of scores."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import ModelError
from ..graph import Graph, TensorType

MINIMUM_OPSET = 18
MAXIMUM_OPSET = 20
# ONNX Runtime's CUDA provider runs MaxPool, Elu and Selu up to opset 21 only; 18 is the lowest with the ops we emit.
TARGET_OPSET = 18

_BATCH = "batch"


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
    preprocessing : str or None
        Name of the preprocessing that the architecture is known to be trained with; None where that is not known.
    notes : list of str
        What was done to the model, or left as it was, that its owner may want to know; a sentence each.
    """

    graph: Graph
    framework: str
    layers: dict[str, str] = field(default_factory=dict)
    preprocessing: str | None = None
    notes: list[str] = field(default_factory=list)


def check_one_input_one_output(graph: Graph) -> None:
    """Raise ModelError unless the graph takes one image batch and gives one output."""
    for kind, names in (("input", list(graph.inputs)), ("output", graph.outputs)):
        if len(names) != 1:
            raise ModelError(
                f"the model has {len(names)} {kind}s {names}: fastcam explains one image, one score vector"
            )
    (name, type_) = next(iter(graph.inputs.items()))
    if type_.dtype != np.float32 or len(type_.shape) != 4:
        raise ModelError(
            f"input {name!r} is {type_.dtype} of shape {type_.shape}: "
            "an image classifier takes float32 (N,H,W,3) or (N,3,H,W)"
        )
    if not all(isinstance(size, int) for size in type_.shape[1:]):
        raise ModelError(
            f"input {name!r} has the open shape {type_.shape}: fix its height and width, for example with "
            "onnx.tools.update_model_dims, or where the model is exported"
        )


def open_batch(graph: Graph) -> None:
    """Name the open batch dimension, so that every value's shape shows it under one name."""
    name, type_ = next(iter(graph.inputs.items()))
    if not isinstance(type_.shape[0], int):
        graph.inputs[name] = TensorType(type_.dtype, (_BATCH, *type_.shape[1:]))
        graph.infer_types()
