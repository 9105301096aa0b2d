"""Which values of a graph can be explained, and how a requested one is found.

The explained layer of Grad-CAM is the last one that still has a spatial map (Selvaraju et al. 2017, section 3): the
activation after its normalisation and non-linearity, before pooling.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import onnx
from onnx import helper

from ..errors import LayerError, offer, suggest
from ..graph import Graph, attribute, dependents, needed_nodes, operator, static_dims
from ..notes import Note
from ..preprocessing import LAYOUTS
from .ops import ACTIVATION_OPS, Fact, op_row, ops_with
from .paths import Demand, varying_values
from .tokens import TokenGrids, is_token_block, patches_count, put_tokens_on_grid

# Order of the axes of every map, where it is known: one of `LAYOUTS`, "NCHW" or "NHWC" for (N,C,h,w).
Orders: TypeAlias = "dict[str, str]"

# Ranks of the maps in networks whose inputs have this rank. Converters compute the maps of series as pictures of one
# row.
_MAP_RANKS = {3: (3, 4), 4: (4,), 5: (5,)}

# Number of branches that a note names.
_LISTED = 3

_ENDS_BLOCK = ops_with(Fact.ACTIVATION | Fact.NORMALIZATION | Fact.ENDS_BLOCK)
# Ops that belong to the same block as the op before them.
_FOLLOWS = ACTIVATION_OPS | ops_with(Fact.NORMALIZATION) | {"QuantizeLinear"}
_KEEPS_ORDER = ops_with(Fact.ELEMENTWISE | Fact.KEEPS_ORDER)


def list_candidates(graph: Graph) -> list[str]:
    """Return the values that can be explained, from the last to the first.

    A candidate is a map of several channels and more than one pixel, on the way from the image to the logits, that ends
    a convolutional block; or the tokens of a transformer, if the logits depend on their patches. Its values change
    with the picture.
    """
    varying, demand = varying_values(graph), Demand(graph)
    orders, grids = _axis_orders(graph), TokenGrids(graph)

    def is_candidate(node: onnx.NodeProto) -> bool:
        value = node.output[0]
        if value not in varying or not demand.reaches(value):
            return False
        if _holds_tokens(graph, value):
            grid = grids.find(value) if is_token_block(graph, node) else None
            return grid is not None and patches_count(demand, value, grid)
        return _ends_block(_dequantized(graph, node), graph.readers(value)) and _has_map(graph, value, orders)

    return [node.output[0] for node in reversed(needed_nodes(graph, graph.outputs)) if is_candidate(node)]


def map_sizes(graph: Graph, values: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Return height and width of those of the values that are maps (N,C,h,w) or (N,h,w,C)."""
    orders = _axis_orders(graph)
    maps = [value for value in values if _has_map(graph, value, orders)]
    return {value: _height_and_width(graph, value, orders[value]) for value in maps}


def _height_and_width(graph: Graph, value: str, order: str) -> tuple[int, int]:
    height, width = static_dims(graph, value, [order.index("H"), order.index("W")])
    return height, width


def unexplained_branches(graph: Graph, values: Sequence[str], candidates: Sequence[str]) -> list[str]:
    """Return the candidates through which the scores depend on the picture without passing the explained values.

    For each branch of the network that runs parallel to all ``values``, the last candidate.
    """
    related = {id(node) for value in values for node in dependents(graph, value)}
    for value in values:
        _add_ancestors(graph, value, related)
    branches: list[str] = []
    for name in candidates:
        node = graph.producer(name)
        if node is not None and id(node) not in related:
            branches.append(name)
            _add_ancestors(graph, name, related)
    return branches


def branch_notes(graph: Graph, values: Sequence[str], candidates: Sequence[str]) -> list[Note]:
    """Return a note about the branches that the explained values leave out, if there are any."""
    branches = unexplained_branches(graph, values, candidates)
    if not branches:
        return []
    listed = ", ".join(map(repr, branches[:_LISTED])) + (" ..." if len(branches) > _LISTED else "")
    text = f"The scores also depend on the picture through {listed}, past the explained layer; the heatmap leaves out "
    text += f"that evidence. Name several layers to explain them all: layer={[*values, branches[0]]!r}."
    return [Note("layer", text)]


def _add_ancestors(graph: Graph, value: str, found: set[int]) -> None:
    """Add the nodes behind ``value`` by their identity; nodes already in the set are not visited again."""
    names = [value]
    while names:
        node = graph.producer(names.pop())
        if node is not None and id(node) not in found:
            found.add(id(node))
            names.extend(node.input)


def _dequantized(graph: Graph, node: onnx.NodeProto) -> onnx.NodeProto:
    """Return the node whose result DequantizeLinear restores; any other node itself."""
    if operator(node) != "DequantizeLinear":
        return node
    quantized = graph.producer(node.input[0]) or node
    return graph.producer(quantized.input[0]) or node


def _ends_block(node: onnx.NodeProto, readers: Sequence[onnx.NodeProto]) -> bool:
    """Return whether the op ends a block, and no activation reads the result directly (x * sigmoid(x) is one)."""
    if operator(node) not in _ENDS_BLOCK:
        return False
    if operator(node) == "Sigmoid" and any(operator(reader) == "Mul" for reader in readers):
        return False
    return not any(operator(reader) in _FOLLOWS for reader in readers)


def _axis_orders(graph: Graph) -> Orders:
    """Return, for every value that may be a map, whether its channels come first or last, as far as the ops tell.

    Convolution and pooling have them first. A Transpose moves them, a Reshape makes them unknown, and any other op has
    them where its inputs have them. The sizes of framework layers, and the readers of a value, decide the rest.
    """
    orders = {name: order for name in graph.inputs if (order := _image_order(graph, name)) is not None}
    asked, ranks = _asked_orders(graph), _map_ranks(graph)
    for node in graph.nodes:
        known = {orders[name] for name in node.input if name in orders}
        order = known.pop() if len(known) == 1 else None
        rank = graph.rank(node.output[0])
        if op_row(operator(node)).facts & Fact.SPATIAL_FIRST and rank in ranks:
            order = LAYOUTS[rank][0]
        elif operator(node) == "Transpose":
            order = _MOVED.get((order, tuple(attribute(node, "perm", ()))))
        elif operator(node) in ("Squeeze", "Unsqueeze"):
            order = None if order is None else _through_row(graph, node, order)
        elif operator(node) == "Reshape":
            order = None
        for output in node.output:
            known_order = order or _named_order(graph, output) or asked.get(output)
            if known_order is not None and graph.rank(output) == len(known_order) and graph.rank(output) in ranks:
                orders[output] = known_order
    return orders


def _asked_orders(graph: Graph) -> Orders:
    """Return the order of values by their readers: a convolution reads channels first."""
    asked: Orders = {}
    ranks = _map_ranks(graph)
    for node in reversed(graph.nodes):
        rank = graph.rank(node.input[0]) if node.input else None
        if op_row(operator(node)).facts & Fact.SPATIAL_FIRST and rank in ranks:
            asked[node.input[0]] = LAYOUTS[rank][0]
        elif operator(node) in _KEEPS_ORDER:
            order = next((asked[output] for output in node.output if output in asked), None)
            asked.update({name: order for name in node.input if order and graph.rank(name) == len(order)})
    return asked


def _named_order(graph: Graph, name: str) -> str | None:
    """Return the order of a framework layer's map by its sizes, if exactly one order fits."""
    if name not in graph.maps or graph.rank(name) != 4:
        return None
    sizes = dict(zip("HWC", graph.maps[name], strict=True))
    fits = [order for order in ("NCHW", "NHWC") if [sizes[axis] for axis in order[1:]] == list(graph.shape(name)[1:])]
    return fits[0] if len(fits) == 1 else None


def _image_order(graph: Graph, name: str) -> str | None:
    """Return the order of a picture by its channels: the axis of size 1 or 3, if there is only one."""
    if graph.rank(name) not in _map_ranks(graph):
        return None
    shape = graph.shape(name)
    fits = [order for order in LAYOUTS[len(shape)] if shape[order.index("C")] in (1, 3)]
    return fits[0] if len(fits) == 1 else None


def _map_ranks(graph: Graph) -> tuple[int, ...]:
    """Return the ranks of the network's maps, by that of its image."""
    rank = next((graph.rank(name) for name in graph.inputs if name != "target"), None)
    return _MAP_RANKS.get(rank or 4, (4,))


def _holds_tokens(graph: Graph, value: str) -> bool:
    """Return whether a value of three axes holds the tokens of a picture, rather than a series."""
    return graph.rank(value) == 3 and 3 not in _map_ranks(graph)


def _through_row(graph: Graph, node: onnx.NodeProto, order: str) -> str | None:
    """Return the order of a series that becomes a picture of one row or column, or the other way round."""
    axes = graph.constants.get(node.input[1]) if len(node.input) > 1 else None
    rank = graph.rank(node.output[0])
    if axes is None or axes.size != 1 or rank is None or rank not in LAYOUTS:
        return None
    letters = list(order)
    axis = int(axes.item())
    if operator(node) == "Squeeze":
        del letters[axis % len(letters)]
    else:
        letters.insert(axis % rank, "1")
    return next((known for known in LAYOUTS[rank] if _axis_of(letters, "C") == known.index("C")), None)


def _axis_of(letters: Sequence[str], letter: str) -> int | None:
    return letters.index(letter) if letters[:1] == ["N"] and letter in letters else None


def _last_to_first(rank: int) -> list[int]:
    return [0, rank - 1, *range(1, rank - 1)]


def _first_to_last(rank: int) -> list[int]:
    return [0, *range(2, rank), 1]


_MOVED: dict[tuple[str | None, tuple[int, ...]], str] = {
    # Swapping height and width leaves the channels where they are.
    ("NCHW", (0, 1, 3, 2)): "NCHW",
    ("NHWC", (0, 2, 1, 3)): "NHWC",
}
for _rank, (_first, _last) in LAYOUTS.items():
    _MOVED |= {
        (_first, tuple(_first_to_last(_rank))): _last,
        (_last, tuple(_last_to_first(_rank))): _first,
        (_first, tuple(range(_rank))): _first,
        (_last, tuple(range(_rank))): _last,
    }


def _has_map(graph: Graph, value: str, orders: Orders) -> bool:
    order = orders.get(value)
    if order is None or graph.rank(value) != len(order):
        return False
    sizes = [size for size in graph.shape(value)[1:] if isinstance(size, int) and size > 0]
    if len(sizes) != len(order) - 1:
        return False
    sides = _map_sides(graph, value, order)
    # A spectrogram has no place on a series.
    return math.prod(sides) > 1 and (len(order) != 4 or _map_ranks(graph) == (4,) or 1 in sides)


def _map_sides(graph: Graph, value: str, order: str) -> tuple[int, ...]:
    return tuple(static_dims(graph, value, [axis for axis, letter in enumerate(order) if letter not in "NC"]))


def choose_layer(graph: Graph, value: str | None, layer: str | None = None, grid: tuple[int, int] | None = None) -> str:
    """Return the value to explain.

    Parameters
    ----------
    graph : Graph
    value : str or None
        The requested value; None means the last candidate.
    layer : str, optional
        The name it was requested by, for messages.
    grid : (int, int), optional
        Height and width of the patches, for a layer of tokens.

    Raises
    ------
    LayerError
        It has no spatial map, or the logits do not depend on it.
    """
    if value is None:
        candidates = list_candidates(graph)
        if not candidates:
            raise LayerError(
                "the model has no convolutional map of fixed size with more than one pixel on the way to its scores: "
                "nothing to explain. A dynamic height or width counts as unknown: fix them in the model's input"
            )
        return candidates[0]
    name = layer or value
    demand = Demand(graph)
    if _holds_tokens(graph, value):
        _check_tokens(graph, demand, value, name, grid)
    elif not _has_map(graph, value, _axis_orders(graph)):
        shape = graph.shape(value) if graph.rank(value) is not None else "unknown"
        raise LayerError(
            f"layer {name!r} has shape {shape}: not a map of known, fixed axes (N,C,h,w) with more than one pixel; "
            f"candidates: {_list_names(list_candidates(graph))}"
        )
    if not demand.reaches(value):
        raise LayerError(
            f"the scores do not depend on layer {name!r}; candidates: {_list_names(list_candidates(graph))}"
        )
    if value not in varying_values(graph):
        raise LayerError(
            f"layer {name!r} is the same for every picture; candidates: {_list_names(list_candidates(graph))}"
        )
    return value


def _check_tokens(graph: Graph, demand: Demand, value: str, name: str, given: tuple[int, int] | None) -> None:
    grid = TokenGrids(graph).find(value, given)
    if grid is None:
        reason = f"token_grid={given} does not fit it" if given else "pass token_grid=(height, width)"
        raise LayerError(f"layer {name!r} has the shape {graph.shape(value)}, (N,tokens,channels): {reason}")
    if demand.reaches(value) and not patches_count(demand, value, grid):
        raise LayerError(
            f"the scores read only the first {grid.prefix} tokens of layer {name!r}, and no patch: explain the tokens "
            f"before the last attention; candidates: {_list_names(list_candidates(graph))}"
        )


def find_value(graph: Graph, layer: str, layers: Mapping[str, str]) -> str:
    """Return the value that a layer, value or node name refers to; raise LayerError with similar names."""
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


def put_on_map(graph: Graph, value: str, grid: tuple[int, int] | None = None) -> tuple[int, ...] | None:
    """Turn ``value`` into (N,C,h,w), whatever its axes are in the model; its readers see the original values.

    The map of a series becomes (N,C,1,t), that of a volume (N,C,d*h,w): one plane below the other.

    Returns
    -------
    tuple of int or None
        The shape of the map of a series or volume; None for the map of a picture.
    """
    tokens = TokenGrids(graph).find(value, grid) if _holds_tokens(graph, value) else None
    if tokens is not None:
        put_tokens_on_grid(graph, value, tokens)
        return None
    order = _axis_orders(graph)[value]
    ranks, sides = _map_ranks(graph), _map_sides(graph, value, order)
    put_channels_first(graph, value)
    if len(order) == 4:
        return None if ranks == (4,) else (math.prod(sides),)
    _put_on_plane(graph, value, sides)
    return sides


def put_channels_first(graph: Graph, value: str) -> None:
    """Move the channels of ``value`` to axis 1: if they are last it is transposed, and transposed back for readers."""
    order = _axis_orders(graph)[value]
    rank = len(order)
    if order == LAYOUTS[rank][0]:
        return
    before, after = graph.unused_name(f"{value}/channels_last"), graph.unused_name(f"{value}/restored")
    graph.insert_after(
        graph.detach(value, made=before, read=after),
        helper.make_node("Transpose", [before], [value], name=f"{value}/turned", perm=_last_to_first(rank)),
        helper.make_node("Transpose", [value], [after], name=after, perm=_first_to_last(rank)),
    )
    graph.infer_types()


def _put_on_plane(graph: Graph, value: str, sides: tuple[int, ...]) -> None:
    """Lay out the map of a series or volume, (N,C,...), as rows and columns; its readers see the original axes."""
    (channels,) = static_dims(graph, value, [1])
    shapes = ((0, channels, math.prod(sides[:-1]), sides[-1]), (0, channels, *sides))
    plane, whole = (graph.emit_constant(np.array(shape, np.int64), stem="shape") for shape in shapes)
    before, after = graph.unused_name(f"{value}/whole"), graph.unused_name(f"{value}/restored")
    graph.insert_after(
        graph.detach(value, made=before, read=after),
        helper.make_node("Reshape", [before, plane], [value], name=f"{value}/plane"),
        helper.make_node("Reshape", [value, whole], [after], name=after),
    )
    graph.infer_types()
