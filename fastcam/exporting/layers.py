"""Which values of a graph can be explained, and the one that was asked for.

The explained layer of Grad-CAM is the last one that still has a spatial map (Selvaraju et al. 2017, section 3): the
activation after its normalisation and non-linearity, before pooling.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import onnx
from onnx import helper

from ..errors import LayerError, offer, suggest
from ..graph import Graph, attribute, dependents, needed_nodes, operator
from .ops import ACTIVATION_OPS, BLOCK_OPS, NORMALIZATION_OPS, ORDER_KEEPING_OPS, SPATIAL_FIRST_OPS
from .tokens import is_token_block, patches_reach_outputs, put_tokens_on_grid, token_grid

# Order of the axes of every map (N,C,h,w), where it is known: "NCHW" or "NHWC".
Orders: TypeAlias = "dict[str, str]"


_CHANNELS_LAST = [0, 2, 3, 1]


_CHANNELS_FIRST = [0, 3, 1, 2]


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
    if operator(node) not in BLOCK_OPS:
        return False
    if operator(node) == "Sigmoid" and any(operator(reader) == "Mul" for reader in readers):
        return False
    following = ACTIVATION_OPS | NORMALIZATION_OPS | {"QuantizeLinear"}
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
        if operator(node) in SPATIAL_FIRST_OPS:
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
        if operator(node) in SPATIAL_FIRST_OPS:
            asked[node.input[0]] = "NCHW"
        elif operator(node) in ORDER_KEEPING_OPS:
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
