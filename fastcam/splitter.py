"""Where to cut the network: the logits, the layers that can be explained, and the two halves.

The explained layer of Grad-CAM is the last one that still has a spatial map (Selvaraju et al. 2017, section 3): the
activation after its normalisation and non-linearity, before pooling.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping

import onnx

from .errors import LayerError, ModelError
from .graph import Graph, attribute, dependents, needed_nodes
from .importer import ModelSource, import_model
from .simplifier import simplify

# Ops that end a convolutional block: their outputs are what "the output of a conv layer" means.
_ACTIVATION_OPS = frozenset(
    "Relu Clip LeakyRelu PRelu Elu Selu Celu Gelu Mish HardSwish HardSigmoid Sigmoid Tanh Softplus Softsign".split()
)
_BLOCK_OPS = _ACTIVATION_OPS | frozenset("Conv ConvTranspose BatchNormalization Add Mul Concat Sum".split())

_ACTIVATIONS_OF_SCORES = {"Softmax": "softmax", "LogSoftmax": "softmax", "Sigmoid": "sigmoid"}
_PASSES_SCORES_ON = frozenset({"Identity", "Reshape", "Flatten", "Squeeze", "Cast"})


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
    while node is not None and node.op_type in _PASSES_SCORES_ON:
        node = producers.get(node.input[0])
    activation = "none"
    if node is not None and node.op_type in _ACTIVATIONS_OF_SCORES and _runs_over_classes(graph, node):
        activation = _ACTIVATIONS_OF_SCORES[node.op_type]
        graph.outputs = [node.input[0]]
        graph.prune()
    logits = graph.outputs[0]
    if graph.rank(logits) != 2 or not isinstance(graph.shape(logits)[1], int):
        shape = graph.shape(logits) if graph.rank(logits) is not None else "of unknown rank"
        raise ModelError(f"the scores {logits!r} have shape {shape}: a classifier gives (N, classes)")
    return activation


def _runs_over_classes(graph: Graph, node: onnx.NodeProto) -> bool:
    """A Softmax over axis 1 of a matrix; an element-wise op always."""
    return node.op_type == "Sigmoid" or attribute(node, "axis", -1) in (-1, (graph.rank(node.input[0]) or 0) - 1)


def list_candidates(graph: Graph) -> list[str]:
    """Return the values that can be explained, from the last to the first.

    A candidate is a value (N,C,h,w) on the way from the image to the logits that ends a convolutional block and has a
    map of more than one pixel.
    """
    image = next(iter(graph.inputs))
    on_the_way = {id(node) for node in dependents(graph, image)}
    nodes = [node for node in needed_nodes(graph, graph.outputs) if id(node) in on_the_way]
    consumers = graph.consumers()
    found = [node for node in nodes if _ends_block(graph, node, consumers) and _has_map(graph, node.output[0])]
    return [node.output[0] for node in reversed(found)]


def _ends_block(graph: Graph, node: onnx.NodeProto, consumers: Mapping[str, list[onnx.NodeProto]]) -> bool:
    """The op ends a block, and no activation follows it directly (x * sigmoid(x) counts as one)."""
    if node.op_type not in _BLOCK_OPS:
        return False
    readers = consumers.get(node.output[0], [])
    if node.op_type == "Sigmoid" and any(_is_gate(reader, node) for reader in readers):
        return False
    return not any(reader.op_type in _ACTIVATION_OPS | {"BatchNormalization"} for reader in readers)


def _is_gate(reader: onnx.NodeProto, sigmoid: onnx.NodeProto) -> bool:
    return reader.op_type == "Mul" and sigmoid.output[0] in reader.input


def _has_map(graph: Graph, value: str) -> bool:
    if graph.rank(value) != 4:
        return False
    _, channels, *spatial = graph.shape(value)
    return isinstance(channels, int) and all(isinstance(size, int) for size in spatial) and spatial != [1, 1]


def choose_layer(graph: Graph, layer: str | None, layers: Mapping[str, str]) -> str:
    """Return the value to explain.

    Parameters
    ----------
    graph : Graph
    layer : str or None
        Name of a framework layer, an ONNX value or an ONNX node; None for the last candidate.
    layers : mapping of str to str
        Value of each framework layer.

    Raises
    ------
    LayerError
        When there is no such layer, it has no spatial map, or the logits do not depend on it.
    """
    if layer is None:
        candidates = list_candidates(graph)
        if not candidates:
            raise LayerError(
                "the model has no value (N,C,h,w) with a spatial map on the way to its scores: nothing to explain"
            )
        return candidates[0]
    value = find_value(graph, layer, layers)
    if not _has_map(graph, value):
        shape = graph.shape(value) if graph.rank(value) is not None else "unknown"
        raise LayerError(
            f"layer {layer!r} has shape {shape}, not a map (N,C,h,w) of fixed size with more than one pixel; "
            f"candidates: {_list_names(list_candidates(graph))}"
        )
    if value not in {name for node in needed_nodes(graph, graph.outputs) for name in node.input}:
        raise LayerError(
            f"the scores do not depend on layer {layer!r}; candidates: {_list_names(list_candidates(graph))}"
        )
    return value


def find_value(graph: Graph, layer: str, layers: Mapping[str, str]) -> str:
    """Return the value that a layer, value or node name means; raises LayerError with the nearest names."""
    values = {name for node in graph.nodes for name in node.output if name}
    by_node = {node.name: node.output[0] for node in graph.nodes if node.name}
    for table in (layers, {name: name for name in values}, by_node):
        if layer in table and table[layer] in values:
            return table[layer]
    near = difflib.get_close_matches(layer, [*layers, *values, *by_node], n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise LayerError(f"the model has no layer {layer!r}: {hint}Candidates: {_list_names(list_candidates(graph))}")


def _list_names(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def split(model: ModelSource, layer: str | None = None) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Cut a classifier at a layer.

    Parameters
    ----------
    model : keras.Model, onnx.ModelProto, or path
        As `fastcam.export` takes it.
    layer : str, optional
        Keras layer, ONNX value or node name; the last convolutional block by default.

    Returns
    -------
    features : onnx.ModelProto
        Image -> the layer's output (N,C,h,w) float32, and every other value that the head reads past it.
    head : onnx.ModelProto
        Those values -> logits (N,classes) float32, before softmax or sigmoid.

    Raises
    ------
    LayerError, ModelError
        As `fastcam.export` does.
    """
    imported = import_model(model)
    graph = imported.graph
    keep = [find_value(graph, layer, imported.layers)] if layer else []
    simplify(graph, keep)
    remove_score_activation(graph)
    value = choose_layer(graph, layer, imported.layers)
    features, head = split_graph(graph, value)
    return features.to_model(name="features"), head.to_model(name="head")


def split_graph(graph: Graph, value: str) -> tuple[Graph, Graph]:
    """Cut a graph at ``value``; the halves share its arrays. See `split`."""
    head_nodes = [node for node in dependents(graph, value) if node in needed_nodes(graph, graph.outputs)]
    made_in_head = {name for node in head_nodes for name in node.output}
    read = dict.fromkeys(name for node in head_nodes for name in node.input if name)
    crossing = [name for name in read if name not in made_in_head and name not in graph.constants and name != value]
    cut = [value, *crossing]
    features = dataclasses.replace(graph, nodes=list(graph.nodes), outputs=cut)
    head = dataclasses.replace(
        graph, nodes=head_nodes, inputs={name: graph.type(name) for name in cut}, outputs=list(graph.outputs)
    )
    for half in (features, head):
        half.prune()
    return features, head
