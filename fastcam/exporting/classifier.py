"""A model made ready to be cut: imported, simplified, its score activation taken off, its layers chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx

from ..errors import LayerError, ModelError
from ..graph import Dim, Graph, attribute, operator
from .importers import ImportedModel, ImportOptions, ModelSource, import_model
from .layers import branch_notes, choose_layer, find_value, list_candidates, put_on_map
from .ops import QUANTIZATION_OPS
from .passes.open_batch import open_batch
from .passes.simplify import simplify

_SCORE_ACTIVATIONS = {"Softmax": "softmax", "LogSoftmax": "softmax", "Sigmoid": "sigmoid"}


@dataclasses.dataclass
class Classifier:
    """A classifier made ready to be cut.

    Attributes
    ----------
    graph : Graph
        Image -> logits, simplified.
    imported : ImportedModel
        Where it came from.
    layers : list of str
        The explained values, (N,C,h,w).
    candidates : list of str
        Values that could be explained, from the last to the first.
    score_activation : {"softmax", "sigmoid", "none"}
        What the source made of its logits.
    """

    graph: Graph
    imported: ImportedModel
    layers: list[str]
    candidates: list[str]
    score_activation: str


def open_classifier(
    model: ModelSource,
    layers: Sequence[str | None],
    options: ImportOptions | None = None,
    grid: tuple[int, int] | None = None,
) -> Classifier:
    """Import a model, clean it, take its score activation off and choose the layers; raises as `fastcam.export` does.

    A layer that is None is the last one with a map.
    """
    imported = import_model(model, options)
    graph = imported.graph
    # Looked up before the clean-up, which keeps the value but not every node's name.
    asked = [find_value(graph, layer, imported.layers) if layer is not None else None for layer in layers]
    simplify(graph, keep=[value for value in asked if value])
    note = open_batch(graph)
    imported.notes.extend([note] if note else [])
    score_activation = remove_score_activation(graph)
    candidates = list_candidates(graph)
    values = [choose_layer(graph, value, layer, grid) for value, layer in zip(asked, layers, strict=True)]
    _check_distinct(values, layers)
    imported.notes.extend(branch_notes(graph, values, candidates))
    for value in values:
        put_on_map(graph, value, grid)
    return Classifier(graph, imported, values, candidates, score_activation)


def _check_distinct(values: Sequence[str], layers: Sequence[str | None]) -> None:
    for position, value in enumerate(values):
        first = values.index(value)
        if first != position:
            raise LayerError(f"layers {layers[first]!r} and {layers[position]!r} are one value: name it once")


def remove_score_activation(graph: Graph) -> str:
    """Make the logits the graph's output: take the final softmax or sigmoid off.

    Gradients of probabilities saturate, and mix the classes; Grad-CAM takes the score before the softmax.

    Parameters
    ----------
    graph : Graph
        Changed in place.

    Returns
    -------
    str
        What turned logits into probabilities: "softmax", "sigmoid", or "none".

    Raises
    ------
    ModelError
        When the output is not a matrix of one row an image.
    """
    producers = graph.producers()
    node = producers.get(graph.outputs[0])
    quantized = []
    while node is not None and _hands_scores_on(graph, node):
        quantized += [node] if operator(node) in QUANTIZATION_OPS else []
        node = producers.get(node.input[0])
    activation = "none"
    if node is not None and operator(node) in _SCORE_ACTIVATIONS and _runs_over_classes(graph, node):
        activation = _SCORE_ACTIVATIONS[operator(node)]
        # The steps of probabilities are too fine for logits.
        for step in quantized:
            graph.replace_uses(step.output[0], step.input[0])
        if graph.rank(node.input[0]) == 2:
            graph.outputs = [node.input[0]]
        else:
            graph.replace_uses(node.output[0], node.input[0])
        graph.prune()
        graph.infer_types()
    _flatten_scores(graph)
    logits = graph.outputs[0]
    if graph.rank(logits) != 2 or not isinstance(graph.shape(logits)[1], int):
        shape = graph.shape(logits) if graph.rank(logits) is not None else "of unknown rank"
        raise ModelError(f"the scores {logits!r} have shape {shape}: a classifier gives (N, classes)")
    return activation


def _flatten_scores(graph: Graph) -> None:
    """Turn scores (N,classes,1,1), the end of a fully convolutional network, into rows."""
    scores = graph.outputs[0]
    if graph.rank(scores) == 4 and graph.shape(scores)[2:] == (1, 1):
        graph.outputs = [graph.emit("Flatten", scores, axis=1, stem=f"{scores}/rows")]
        graph.infer_types()


def _hands_scores_on(graph: Graph, node: onnx.NodeProto) -> bool:
    """The node leaves every image its row of scores: only axes of size 1 come and go."""
    op = operator(node)
    if op == "Cast":
        return all(graph.rank(name) and graph.type(name).dtype.kind == "f" for name in (node.input[0], node.output[0]))
    if op not in ("Reshape", "Flatten", "Squeeze"):
        return op == "Identity" or op in QUANTIZATION_OPS
    if graph.rank(node.input[0]) is None or graph.rank(node.output[0]) is None:
        return False
    before, after = graph.shape(node.input[0]), graph.shape(node.output[0])
    return len(before) > 1 and before[0] == after[0] and _without_ones(before) == _without_ones(after)


def _without_ones(shape: tuple[Dim, ...]) -> list[Dim]:
    return [size for size in shape[1:] if size != 1]


def _runs_over_classes(graph: Graph, node: onnx.NodeProto) -> bool:
    """An element-wise op always; a softmax over axis 1, which must hold all that an image has."""
    if operator(node) == "Sigmoid":
        return True
    rank = graph.rank(node.input[0])
    if rank is None:
        return False
    axis = attribute(node, "axis", -1) % rank
    return axis == 1 and len(_without_ones(graph.shape(node.input[0]))) <= 1
