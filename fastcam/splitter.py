"""Where to cut the network: the logits, the layers that can be explained, and the two halves.

The explained layer of Grad-CAM is the last one that still has a spatial map (Selvaraju et al. 2017, section 3): the
activation after its normalisation and non-linearity, before pooling.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import onnx
from onnx import helper

from .batching import open_batch
from .errors import LayerError, ModelError, offer, suggest
from .graph import Dim, Graph, attribute, dependents, needed_nodes, operator
from .importers import ImportedModel, ImportOptions, ModelSource, import_model
from .simplifier import simplify
from .tokens import is_token_block, patches_reach_outputs, put_tokens_on_grid, token_grid

# Ops that end a convolutional block: their outputs are what "the output of a conv layer" means.
_ACTIVATION_OPS = frozenset(
    "Relu Clip LeakyRelu PRelu Elu Selu Celu Gelu Mish HardSwish HardSigmoid Sigmoid Tanh Softplus Softsign".split()
)
# What an activation becomes in a quantised network: the map is what the second one gives.
_QUANTIZATION_OPS = frozenset(["QuantizeLinear", "DequantizeLinear"])
_NORMALIZATION_OPS = frozenset("BatchNormalization LayerNormalization InstanceNormalization GroupNormalization".split())
_BLOCK_OPS = _ACTIVATION_OPS | _NORMALIZATION_OPS | frozenset("Conv ConvTranspose Add Mul Concat Sum".split())

_SCORE_ACTIVATIONS = {"Softmax": "softmax", "LogSoftmax": "softmax", "Sigmoid": "sigmoid"}

# Order of the axes of every map (N,C,h,w), where it is known: "NCHW" or "NHWC".
Orders: TypeAlias = "dict[str, str]"

_SPATIAL_FIRST_OPS = frozenset(
    """
    Conv ConvTranspose MaxPool AveragePool LpPool GlobalAveragePool GlobalMaxPool BatchNormalization
    InstanceNormalization GroupNormalization LRN DepthToSpace SpaceToDepth
    """.split()
)
_ORDER_KEEPING_OPS = _ACTIVATION_OPS | frozenset("Add Concat Div Identity Mul Pad Split Sub".split())
_CHANNELS_LAST = [0, 2, 3, 1]
_CHANNELS_FIRST = [0, 3, 1, 2]


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
        quantized += [node] if operator(node) in _QUANTIZATION_OPS else []
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
        return op == "Identity" or op in _QUANTIZATION_OPS
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


def list_candidates(graph: Graph) -> list[str]:
    """Return the values that can be explained, from the last to the first.

    A candidate is a map of several channels and more than one pixel, on the way from the image to the logits, that ends
    a convolutional block; or the tokens of a transformer, if their patches count for the logits.
    """
    image = next(iter(graph.inputs))
    on_the_way = {id(node) for node in dependents(graph, image)}
    nodes = [node for node in needed_nodes(graph, graph.outputs) if id(node) in on_the_way]
    consumers = graph.consumers()
    orders = _axis_orders(graph)
    producers = graph.producers()

    def is_candidate(node: onnx.NodeProto) -> bool:
        value = node.output[0]
        if graph.rank(value) == 3:
            return is_token_block(graph, node) and _has_tokens(graph, value)
        ends_block = _ends_block(_dequantized(node, producers), consumers.get(value, []))
        return ends_block and _has_map(graph, value, orders)

    return [node.output[0] for node in reversed(nodes) if is_candidate(node)]


def _has_tokens(graph: Graph, value: str) -> bool:
    grid = token_grid(graph, value)
    return grid is not None and patches_reach_outputs(graph, value, grid)


def _dequantized(node: onnx.NodeProto, producers: Mapping[str, onnx.NodeProto]) -> onnx.NodeProto:
    """Return the node whose result DequantizeLinear gives back; any other node itself."""
    if operator(node) != "DequantizeLinear":
        return node
    quantized = producers.get(node.input[0], node)
    return producers.get(quantized.input[0], node)


def _ends_block(node: onnx.NodeProto, readers: Sequence[onnx.NodeProto]) -> bool:
    """The op ends a block, and no activation reads the result directly (x * sigmoid(x) counts as one)."""
    if operator(node) not in _BLOCK_OPS:
        return False
    if operator(node) == "Sigmoid" and any(operator(reader) == "Mul" for reader in readers):
        return False
    following = _ACTIVATION_OPS | _NORMALIZATION_OPS | {"QuantizeLinear"}
    return not any(operator(reader) in following for reader in readers)


def _axis_orders(graph: Graph) -> Orders:
    """Tell for every value of rank 4 whether its channels come first or last, as far as the ops show it.

    Convolution and pooling have them first. A Transpose moves them, a Reshape leaves nothing to go by, and any other op
    has them where its inputs have them. Sizes of framework layers, and what reads a value, settle what is left.
    """
    orders = {name: order for name in graph.inputs if (order := _image_order(graph, name)) is not None}
    asked = _asked_orders(graph)
    for node in graph.nodes:
        known = {orders[name] for name in node.input if name in orders}
        order = known.pop() if len(known) == 1 else None
        if operator(node) in _SPATIAL_FIRST_OPS:
            order = "NCHW"
        elif operator(node) == "Transpose":
            order = _MOVED.get((order, tuple(attribute(node, "perm", ()))))
        elif operator(node) == "Reshape":
            order = None
        for output in node.output:
            known_order = order or _named_order(graph, output) or asked.get(output)
            if known_order is not None and graph.rank(output) == 4:
                orders[output] = known_order
    return orders


def _asked_orders(graph: Graph) -> Orders:
    """Tell the order of values by what reads them: a convolution takes the channels first."""
    asked: Orders = {}
    for node in reversed(graph.nodes):
        if operator(node) in _SPATIAL_FIRST_OPS:
            asked[node.input[0]] = "NCHW"
        elif operator(node) in _ORDER_KEEPING_OPS:
            order = next((asked[output] for output in node.output if output in asked), None)
            asked.update({name: order for name in node.input if order and graph.rank(name) == 4})
    return asked


def _named_order(graph: Graph, name: str) -> str | None:
    """Tell the order of a framework layer's map by its sizes, if only one fits."""
    if name not in graph.maps or graph.rank(name) != 4:
        return None
    sizes = dict(zip("HWC", graph.maps[name], strict=True))
    fits = [order for order in ("NCHW", "NHWC") if [sizes[axis] for axis in order[1:]] == list(graph.shape(name)[1:])]
    return fits[0] if len(fits) == 1 else None


def _image_order(graph: Graph, name: str) -> str | None:
    """Tell where a picture's colours are: the axis of size 1 or 3, if only one can be it."""
    if graph.rank(name) != 4:
        return None
    shape = graph.shape(name)
    fits = [order for order in ("NCHW", "NHWC") if shape[order.index("C")] in (1, 3)]
    return fits[0] if len(fits) == 1 else None


_MOVED: dict[tuple[str | None, tuple[int, ...]], str] = {
    ("NCHW", tuple(_CHANNELS_LAST)): "NHWC",
    ("NHWC", tuple(_CHANNELS_FIRST)): "NCHW",
    ("NCHW", (0, 1, 2, 3)): "NCHW",
    ("NHWC", (0, 1, 2, 3)): "NHWC",
    # The swap of height and width leaves the channels where they are.
    ("NCHW", (0, 1, 3, 2)): "NCHW",
    ("NHWC", (0, 2, 1, 3)): "NHWC",
}


def _has_map(graph: Graph, value: str, orders: Orders) -> bool:
    if graph.rank(value) != 4 or value not in orders:
        return False
    sizes = dict(zip(orders[value], graph.shape(value), strict=True))
    numbers = [size for size in (sizes["C"], sizes["H"], sizes["W"]) if isinstance(size, int) and size > 0]
    return len(numbers) == 3 and numbers[1] * numbers[2] > 1


def choose_layer(graph: Graph, value: str | None, layer: str | None = None, grid: tuple[int, int] | None = None) -> str:
    """Return the value to explain.

    Parameters
    ----------
    graph : Graph
    value : str or None
        The value that was asked for; None for the last candidate.
    layer : str, optional
        What it was called, for messages.
    grid : (int, int), optional
        Height and width of the patches, for a layer of tokens.

    Raises
    ------
    LayerError
        When it has no spatial map, or the logits do not depend on it.
    """
    if value is None:
        candidates = list_candidates(graph)
        if not candidates:
            raise LayerError(
                "the model has no convolutional map of fixed size with more than one pixel on the way to its scores: "
                "nothing to explain. An open height or width counts as unknown: give the model's input fixed ones"
            )
        return candidates[0]
    name = layer or value
    if graph.rank(value) == 3:
        _check_tokens(graph, value, name, grid)
    elif not _has_map(graph, value, _axis_orders(graph)):
        shape = graph.shape(value) if graph.rank(value) is not None else "unknown"
        raise LayerError(
            f"layer {name!r} has shape {shape}: not a map of known, fixed axes (N,C,h,w) with more than one pixel; "
            f"candidates: {_list_names(list_candidates(graph))}"
        )
    if value not in {read for node in needed_nodes(graph, graph.outputs) for read in node.input}:
        raise LayerError(
            f"the scores do not depend on layer {name!r}; candidates: {_list_names(list_candidates(graph))}"
        )
    return value


def _check_tokens(graph: Graph, value: str, name: str, given: tuple[int, int] | None) -> None:
    grid = token_grid(graph, value, given)
    if grid is None:
        reason = f"token_grid={given} does not fit it" if given else "give its patches as token_grid=(height, width)"
        raise LayerError(f"layer {name!r} has the shape {graph.shape(value)}, (N,tokens,channels): {reason}")
    if not patches_reach_outputs(graph, value, grid):
        raise LayerError(
            f"the scores read only the first {grid.prefix} tokens of layer {name!r}, and no patch: explain the tokens "
            f"before the last attention; candidates: {_list_names(list_candidates(graph))}"
        )


def find_value(graph: Graph, layer: str, layers: Mapping[str, str]) -> str:
    """Return the value that a layer, value or node name means; raises LayerError with the nearest names."""
    values = {name for node in graph.nodes for name in node.output if name}
    by_node = {node.name: node.output[0] for node in graph.nodes if node.name}
    for table in (layers, {name: name for name in values}, by_node):
        if layer in table and table[layer] in values:
            return table[layer]
    paths = [name for name in layers if name.endswith(f"/{layer}")]
    hint = offer(paths) or suggest(layer, [*layers, *values, *by_node])
    raise LayerError(f"the model has no layer {layer!r}: {hint}Candidates: {_list_names(list_candidates(graph))}")


def _list_names(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def put_on_map(graph: Graph, value: str, grid: tuple[int, int] | None = None) -> None:
    """Let ``value`` be (N,C,h,w), whatever it is in the model; those that read it read what they did."""
    tokens = token_grid(graph, value, grid)
    if tokens is not None:
        put_tokens_on_grid(graph, value, tokens)
    else:
        put_channels_first(graph, value)


def put_channels_first(graph: Graph, value: str) -> None:
    """Let ``value`` be (N,C,h,w): where its channels are last, it is transposed, and back for those that read it."""
    if _axis_orders(graph)[value] == "NCHW":
        return
    before, after = graph.unused_name(f"{value}/channels_last"), graph.unused_name(f"{value}/restored")
    position = next(index for index, node in enumerate(graph.nodes) if value in node.output)
    producer = graph.nodes[position]
    graph.replace_uses(value, after)
    producer.output[list(producer.output).index(value)] = before
    graph.nodes[position + 1 : position + 1] = [
        helper.make_node("Transpose", [before], [value], name=f"{value}/turned", perm=_CHANNELS_FIRST),
        helper.make_node("Transpose", [value], [after], name=after, perm=_CHANNELS_LAST),
    ]
    graph.infer_types()


def split(
    model: ModelSource,
    layer: str | None = None,
    *,
    output: str | None = None,
    input_size: tuple[int, int] | None = None,
    example_input: Any = None,
    token_grid: tuple[int, int] | None = None,
) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Cut a classifier at a layer.

    Parameters
    ----------
    model, layer, output, input_size, example_input, token_grid
        As `fastcam.export` takes them; one layer.

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
    options = ImportOptions(output, input_size, example_input)
    classifier = open_classifier(model, [layer], options, token_grid)
    features, head = split_graph(classifier.graph, classifier.layers[0])
    return features.to_model(name="features"), head.to_model(name="head")


def split_graph(graph: Graph, value: str) -> tuple[Graph, Graph]:
    """Cut a graph at ``value``; the halves share its arrays. See `split`."""
    needed = {id(node) for node in needed_nodes(graph, graph.outputs)}
    head_nodes = [node for node in dependents(graph, value) if id(node) in needed]
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
