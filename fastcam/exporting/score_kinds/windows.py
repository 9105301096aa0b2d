"""Gradients of boxes in windows: the score of a box depends on few cells of the map that its head reads.

A head of convolutions sees a window around the cell of its anchor, two cells to each side for a usual YOLO. For each
target, the head is run once more on that window alone, and differentiated there: the results are those of the whole
map, for thousandths of the work. Where a head is not made of convolutions, the whole map is differentiated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from ...graph import Graph, TensorType, attribute, operator, static_dims
from ..gradients.autodiff import backpropagate
from ..ops import Fact, op_row
from .detectors import Part, leaf_parts


class Level(NamedTuple):
    """One size of map, and the head that reads it.

    Attributes
    ----------
    layer : str
        The map, (N,C,h,w).
    scores : str
        The head's class logits, (N,.,h,w); those of the table are the channels from ``start`` on.
    start : int
    nodes : list of onnx.NodeProto
        The head, in topological order.
    first : int
        The anchor of its first cell.
    radius : int
        Cells that a score depends on, to each side of its own.
    """

    layer: str
    scores: str
    start: int
    nodes: list[onnx.NodeProto]
    first: int
    radius: int


def find_levels(graph: Graph, scores: Part, layers: Sequence[str]) -> list[Level] | None:
    """Return the level of each layer, or None if some head is not made of convolutions.

    Parameters
    ----------
    graph : Graph
    scores : Part
        The class logits of all anchors.
    layers : sequence of str
        (N,C,h,w).
    """
    levels: dict[str, Level] = {}
    first = 0
    for leaf in leaf_parts(graph, scores):
        level = _level(graph, leaf, layers, first)
        if level is None or level.layer in levels:
            return None
        levels[level.layer] = level
        height, width = static_dims(graph, leaf.value, [2, 3])
        first += height * width
    anchors = graph.shape(scores.value)[3 - scores.axis]
    if first != anchors or levels.keys() != set(layers) or not _are_in_rows(graph, scores, list(levels.values())):
        return None
    return [levels[layer] for layer in layers]


def _are_in_rows(graph: Graph, scores: Part, levels: Sequence[Level]) -> bool:
    """Return whether the anchors are the cells of each level, row by row, found by moving their numbers."""
    nodes, starts = _moving_nodes(graph, scores.value, [level.scores for level in levels])
    shapes = {name: (1, *static_dims(graph, name, range(1, graph.rank(name) or 0))) for name in starts}
    # What is joined with the scores, such as boxes, keeps a number that is none of theirs.
    feeds = {name: np.full(shape, -1, np.float32) for name, shape in shapes.items()}
    for level in levels:
        height, width = shapes[level.scores][2:]
        feeds[level.scores][:] = (level.first + np.arange(height * width, dtype=np.float32)).reshape(height, width)
    types = {name: TensorType(np.dtype(np.float32), shape) for name, shape in shapes.items()}
    moving = graph.copy(nodes=nodes, inputs=types, outputs=[scores.value])
    moving.prune()
    try:
        found: Any = ReferenceEvaluator(moving.to_model()).run(None, feeds)
    except Exception:  # noqa: BLE001 - the evaluator raises its own; a doubt is settled by the whole map
        return False
    by_class = np.moveaxis(np.asarray(found[0])[0], scores.axis - 1, 0)
    return bool((by_class == np.arange(by_class.shape[1])).all())


def _moving_nodes(graph: Graph, value: str, starts: Sequence[str]) -> tuple[list[onnx.NodeProto], list[str]]:
    """Return the nodes that only move numbers, back from ``value``, and the values that they start from."""
    found: dict[int, onnx.NodeProto] = {}
    begins = dict.fromkeys(starts)
    stack = [value]
    while stack:
        name = stack.pop()
        node = graph.producer(name)
        if name in begins or name in graph.constants:
            continue
        moves = node is not None and (op_row(operator(node)).facts & Fact.MOVES or operator(node) == "Identity")
        if node is None or not moves:
            begins[name] = None
        elif id(node) not in found:
            found[id(node)] = node
            stack.extend(node.input)
    return [node for node in graph.nodes if id(node) in found], list(begins)


def _level(graph: Graph, leaf: Part, layers: Sequence[str], first: int) -> Level | None:
    if graph.rank(leaf.value) != 4 or leaf.axis != 1:
        return None
    nodes = _nodes_up_to(graph, leaf.value, layers)
    radii: dict[str, int] = {}
    for node in nodes:
        read = [name for name in node.input if name and name not in graph.constants]
        own = _radius(graph, node)
        if own is None or not all(name in radii or name in layers for name in read):
            return None
        radius = own + max((radii.get(name, 0) for name in read), default=0)
        radii.update(dict.fromkeys(node.output, radius))
    reached = {name for node in nodes for name in node.input if name in layers}
    if len(reached) != 1 or graph.shape(next(iter(reached)))[2:] != graph.shape(leaf.value)[2:]:
        return None
    return Level(next(iter(reached)), leaf.value, leaf.start, nodes, first, radii[leaf.value])


def _nodes_up_to(graph: Graph, value: str, layers: Sequence[str]) -> list[onnx.NodeProto]:
    """Return the nodes behind ``value``, back to the layers, in topological order."""
    found: dict[int, onnx.NodeProto] = {}
    stack = [value]
    while stack:
        name = stack.pop()
        node = None if name in layers else graph.producer(name)
        if node is not None and id(node) not in found:
            found[id(node)] = node
            stack.extend(node.input)
    return [node for node in graph.nodes if id(node) in found]


def _radius(graph: Graph, node: onnx.NodeProto) -> int | None:
    """Return how many cells to each side an op reads; None for one that does not treat all cells alike."""
    op = operator(node)
    if op == "Conv":
        return _conv_radius(graph, node)
    constants = [graph.constants[name] for name in node.input if name in graph.constants]
    if op in ("Concat", "Split", "Slice"):
        axes = graph.constants.get(node.input[3]) if op == "Slice" and len(node.input) > 3 else None
        chosen = [attribute(node, "axis", 0)] if op != "Slice" else [] if axes is None else axes.tolist()
        return 0 if chosen == [1] else None
    if op == "BatchNormalization":
        return 0
    is_uniform = all(array.size == 1 or (array.ndim >= 3 and array.shape[-2:] == (1, 1)) for array in constants)
    return 0 if op_row(op).facts & Fact.ELEMENTWISE and is_uniform else None


def _conv_radius(graph: Graph, node: onnx.NodeProto) -> int | None:
    shape = graph.shape(node.input[1])[2:]
    sizes = [size for size in shape if isinstance(size, int)]
    dilations = attribute(node, "dilations", [1, 1])
    if len(sizes) != 2 or list(attribute(node, "strides", [1, 1])) != [1, 1]:
        return None
    radii = [dilation * (size - 1) // 2 for dilation, size in zip(dilations, sizes, strict=True)]
    is_same = all(size % 2 for size in sizes) and list(attribute(node, "pads", [0] * 4)) == [*radii, *radii]
    return max(radii) if is_same and node.input[1] in graph.constants and radii[0] == radii[1] else None


class Targets(NamedTuple):
    """The targets of all images, as values.

    Attributes
    ----------
    anchors, classes : str
        (N,K) int64.
    slopes : str
        (N,K) float32: the gradient of the explained scalar in the class logit.
    """

    anchors: str
    classes: str
    slopes: str


def window_gradients(graph: Graph, level: Level, targets: Targets, class_count: int) -> str:
    """Append the gradient of the targets' scores in a level's map, (N,K,C,h,w); zeros for boxes of other levels."""
    channels, height, width = static_dims(graph, level.layer, [1, 2, 3])
    side = 2 * level.radius + 1
    cell, belongs = _cells(graph, level, targets.anchors, height * width)
    rows, columns = _sides(graph, cell, width, level.radius)
    places, inside = _places(graph, rows, columns, (height, width))
    window = _cut_windows(graph, level.layer, places, targets.anchors, side)
    mask = graph.emit("Reshape", inside, graph.emit_integers(-1, 1, side, side), stem="window/inside")
    scores = _copied(graph, level, graph.emit("Mul", window, mask, stem="window/cells"), mask)
    graph.infer_types()
    seed = _seed(graph, level, targets, belongs, class_count, *static_dims(graph, scores, [1]))
    (gradient,) = backpropagate(graph, {scores: seed}, [window])
    leading = graph.emit("Shape", targets.anchors)
    shape = graph.emit("Concat", leading, graph.emit_integers(channels, side, side), axis=0)
    windows = graph.emit("Reshape", gradient, shape, stem="window/gradient")
    return _placed(graph, windows, (rows, columns), leading, (height, width))


def _cells(graph: Graph, level: Level, anchors: str, count: int) -> tuple[str, str]:
    """Return the cell of every target in this level, (R,), R = N K, clipped to it, and whether it belongs to it."""
    flat = graph.emit("Reshape", anchors, graph.emit_integers(-1))
    cell = graph.emit("Sub", flat, graph.emit_integer(level.first))
    low = graph.emit("Max", cell, graph.emit_integer(0))
    clipped = graph.emit("Min", low, graph.emit_integer(count - 1), stem="window/cell")
    return clipped, graph.emit("Equal", clipped, cell, stem="window/belongs")


def _sides(graph: Graph, cell: str, width: int, radius: int) -> tuple[str, str]:
    """Return the rows and the columns of each window, (R,p) each; some may lie outside of the map."""
    offsets = graph.emit_constant(np.arange(-radius, radius + 1, dtype=np.int64)[None])
    row = graph.emit("Div", cell, graph.emit_integer(width))
    column = graph.emit("Sub", cell, graph.emit("Mul", row, graph.emit_integer(width)))
    last = graph.emit_integers(1)
    rows, columns = (graph.emit("Add", graph.emit("Unsqueeze", one, last), offsets) for one in (row, column))
    return rows, columns


def _places(graph: Graph, rows: str, columns: str, size: tuple[int, int]) -> tuple[str, str]:
    """Return the cells of each window, (R,p*p), clipped to the map, and 1 where they lie inside of it, else 0."""
    clipped, inside = [], []
    for one, limit, axis in ((rows, size[0], 2), (columns, size[1], 1)):
        bounded = graph.emit("Min", graph.emit("Max", one, graph.emit_integer(0)), graph.emit_integer(limit - 1))
        clipped.append(graph.emit("Unsqueeze", bounded, graph.emit_integers(axis)))
        inside.append(graph.emit("Unsqueeze", graph.emit("Equal", bounded, one), graph.emit_integers(axis)))
    index = graph.emit("Add", graph.emit("Mul", clipped[0], graph.emit_integer(size[1])), clipped[1])
    flags = graph.emit("Cast", graph.emit("And", *inside), to=1)
    # Shape (R,p,p) to (R,p*p).
    places, flags = (graph.emit("Flatten", value, axis=1, stem="window/places") for value in (index, flags))
    return places, flags


def _cut_windows(graph: Graph, layer: str, places: str, anchors: str, side: int) -> str:
    """Return the windows of a map, (R,C,p,p)."""
    channels, height, width = static_dims(graph, layer, [1, 2, 3])
    rows = graph.emit("Reshape", graph.emit("Transpose", layer, perm=[0, 2, 3, 1]), graph.emit_integers(-1, channels))
    # R = N K: the image of each target.
    images = graph.emit("Squeeze", graph.emit("Shape", anchors, start=0, end=1))
    numbers = graph.emit("Range", graph.emit_integer(0), images, graph.emit_integer(1))
    each = graph.emit("Expand", graph.emit("Unsqueeze", numbers, graph.emit_integers(1)), graph.emit("Shape", anchors))
    first = graph.emit(
        "Mul", graph.emit("Reshape", each, graph.emit_integers(-1, 1)), graph.emit_integer(height * width)
    )
    gathered = graph.emit("Gather", rows, graph.emit("Add", places, first), axis=0)
    planes = graph.emit("Transpose", gathered, perm=[0, 2, 1])
    return graph.emit("Reshape", planes, graph.emit_integers(-1, channels, side, side), stem="window/values")


def _copied(graph: Graph, level: Level, start: str, mask: str) -> str:
    """Append a copy of the head that reads windows; what lies outside of the map is zero before each convolution."""
    names = {level.layer: start}
    bounded = {start}
    for node in list(level.nodes):
        inputs = [names.get(name, name) for name in node.input]
        if operator(node) == "Conv" and inputs[0] not in bounded:
            inputs[0] = graph.emit("Mul", inputs[0], mask, stem="window/bounded")
        names.update(zip(node.output, graph.append_copy(node, inputs, "window"), strict=True))
    return names[level.scores]


def _seed(graph: Graph, level: Level, targets: Targets, belongs: str, class_count: int, channels: int) -> str:
    """Return the gradient in the copied head's scores, (1,R,.,p,p): the slope at the class, in the middle."""
    classes = graph.emit("Reshape", targets.classes, graph.emit_integers(-1, 1))
    numbers = np.full((1, channels), -1, np.int64)
    numbers[0, level.start : level.start + class_count] = np.arange(class_count)
    chosen = graph.emit("Equal", classes, graph.emit_constant(numbers))
    kept = graph.emit("And", chosen, graph.emit("Unsqueeze", belongs, graph.emit_integers(1)))
    slopes = graph.emit("Reshape", targets.slopes, graph.emit_integers(-1, 1))
    values = graph.emit("Mul", graph.emit("Cast", kept, to=1), slopes)
    middle = graph.emit("Unsqueeze", values, graph.emit_integers(0, 3, 4))
    r = level.radius
    return graph.emit("Pad", middle, graph.emit_integers(0, 0, 0, r, r, 0, 0, 0, r, r), stem="window/seed")


def _placed(graph: Graph, windows: str, places: tuple[str, str], leading: str, size: tuple[int, int]) -> str:
    """Return windows (N,K,C,p,p) at their places on the whole map, (N,K,C,h,w).

    By products with one-hot matrices, (h,p) from the left and (p,w) from the right: nothing is written twice.
    """
    rows, columns = (
        _one_hot(graph, one, limit, leading, before=before)
        for one, limit, before in ((places[0], size[0], True), (places[1], size[1], False))
    )
    wide = graph.emit("MatMul", windows, columns, stem="window/wide")
    return graph.emit("MatMul", rows, wide, stem="window/whole")


def _one_hot(graph: Graph, places: str, limit: int, leading: str, *, before: bool) -> str:
    """Return 1 where a place (R,p) is a row or column of the map: (N,K,1,limit,p) or (N,K,1,p,limit)."""
    numbers = np.arange(limit, dtype=np.int64).reshape((limit, 1) if before else (1, limit))
    spread = graph.emit("Unsqueeze", places, graph.emit_integers(1 if before else 2))
    chosen = graph.emit("Cast", graph.emit("Equal", spread, graph.emit_constant(numbers)), to=1)
    inner = graph.emit("Shape", chosen, start=1)
    shape = graph.emit("Concat", leading, graph.emit_integers(1), inner, axis=0)
    return graph.emit("Reshape", chosen, shape)
