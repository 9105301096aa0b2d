"""What the outputs of a detector mean: where its class scores and its boxes are, before any suppression of boxes.

Layouts, for A anchors or queries and C classes:

- one output (N,4+C,A): YOLOv8, v9, v11;
- one output (N,A,5+C), whose fifth column is the objectness: YOLOv5, v7, YOLOX, also before its boxes are decoded;
- one output (N,Q,4+C) of queries: transformers with one output;
- one output (N,R,6), sorted: YOLOv10, v26; the scores are found before the TopK that sorts them;
- two outputs (N,A,C) and (N,A,4), in any order: DETR, SSD, RetinaNet;
- two outputs for each size of map, (N,A,C) and (N,A,4 B), with B bins of distance per side: PicoDet;
- any of these with NonMaxSuppression at the end, whose inputs they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import onnx

from ...arrays import Array
from ...errors import ArgumentError, ModelError
from ...graph import Graph, attribute, needed_nodes, operator
from ..ops import Fact, op_row
from ..trials import score_seeded_images

Corners = Literal["cxcywh", "xyxy", "yxyx"]
Unit = Literal["pixels", "share", "cells", "bins"]

# Queries of a transformer, or boxes that a network has already selected: anchors are several thousand.
_MOST_QUERIES = 1000


class Part(NamedTuple):
    """Numbers ``start`` to ``stop`` of an axis of a value of rank 3."""

    value: str
    axis: int
    start: int
    stop: int


class Detector(NamedTuple):
    """Where a detector's scores and boxes are.

    Attributes
    ----------
    scores : Part
        (N,A,C) or (N,C,A): one score per class.
    boxes : Part
        Four coordinates per anchor or query.
    objectness : Part or None
        One more score per anchor, by which those of the classes are multiplied.
    corners : {"cxcywh", "xyxy", "yxyx"}
    unit : {"pixels", "share", "cells", "bins"}
        Pixels of the input, or shares of its sides. Not decoded yet: cells of a grid (YOLOX), or a distribution over
        bins of each side's distance from the cell's centre, in cells (PicoDet); ``boxes`` then has 4 B numbers.
    overlaps : bool
        Whether boxes of the same object still have to be suppressed.
    is_guess : bool
        Whether ``corners`` is a guess.
    """

    scores: Part
    boxes: Part
    objectness: Part | None
    corners: Corners
    unit: Unit
    overlaps: bool
    is_guess: bool = False


def find_detector(graph: Graph, names: int | None) -> Detector:
    """Return where the scores and boxes of a detector are.

    Parameters
    ----------
    graph : Graph
        With all of the model's outputs.
    names : int or None
        Number of class names, where it is known.

    Raises
    ------
    ModelError
        The outputs have none of the known layouts, or hold boxes that are not decoded.
    ArgumentError
        The number of class names does not fit the outputs.
    """
    found = (
        _before_suppression(graph)
        or _before_sorting(graph)
        or _outputs_by_level(graph)
        or _two_outputs(graph)
        or _one_output(graph, names)
    )
    if found is None:
        raise ModelError(_unknown(graph))
    return found


def _unknown(graph: Graph) -> str:
    shapes = ", ".join(
        f"{name!r} {graph.shape(name) if graph.rank(name) is not None else 'unknown'}" for name in graph.outputs
    )
    return (
        f'the outputs {shapes} have no layout of a detector that score="boxes" knows: (N,4+classes,anchors) as YOLOv8, '
        "(N,anchors,5+classes) as YOLOv5, (N,boxes,6) behind a TopK, scores (N,anchors,classes) and boxes "
        '(N,anchors,4) as DETR or SSD, or NonMaxSuppression at the end. For a classifier omit score="boxes"; for a '
        "detector export it with its boxes decoded"
    )


def _sizes(graph: Graph, value: str) -> tuple[int, int] | None:
    """Return the two static sizes of a float value (N,X,Y)."""
    if graph.rank(value) != 3 or graph.type(value).dtype.kind != "f":
        return None
    first, second = graph.shape(value)[1:]
    return (first, second) if isinstance(first, int) and isinstance(second, int) else None


def _whole(graph: Graph, value: str, axis: int) -> Part:
    size = graph.shape(value)[axis]
    return Part(value, axis, 0, int(size or 0))


def _coordinate_axis(sizes: tuple[int, int] | None) -> int | None:
    """Return the axis of four coordinates."""
    if sizes is None or 4 not in sizes:
        return None
    return 2 if sizes[1] == 4 else 1


def _before_suppression(graph: Graph) -> Detector | None:
    node = next((node for node in needed_nodes(graph, graph.outputs) if operator(node) == "NonMaxSuppression"), None)
    if node is None or _sizes(graph, node.input[0]) is None or _sizes(graph, node.input[1]) is None:
        return None
    scores, boxes = _whole(graph, node.input[1], 1), _whole(graph, node.input[0], 2)
    values = _values(graph, boxes)
    unit = _unit(values)
    if attribute(node, "center_point_box", 0):
        return Detector(scores, boxes, None, "cxcywh", unit, overlaps=True)
    corners = _corner_order(values, input_sides(graph)) if unit == "pixels" else None
    return Detector(scores, boxes, None, corners or "xyxy", unit, overlaps=True, is_guess=corners is None)


def _corner_order(values: Array | None, sides: tuple[int, int]) -> Corners | None:
    """Return the order of two corners in pixels, or None if it cannot be told: NonMaxSuppression treats both alike.

    In a picture that is wider than high, the larger coordinates are x.
    """
    height, width = sides
    if values is None or height == width:
        return None
    tops = values.reshape(-1, 4).max(axis=0)
    if tops[2] == tops[3]:
        return None
    return "yxyx" if (height > width) == (tops[2] > tops[3]) else "xyxy"


def input_sides(graph: Graph) -> tuple[int, int]:
    """Return height and width of the input."""
    shape = next(iter(graph.inputs.values())).shape
    height, width = (shape[2], shape[3]) if shape[1] in (1, 3) else (shape[1], shape[2])
    return int(height or 0), int(width or 0)


def _before_sorting(graph: Graph) -> Detector | None:
    """Find the scores and boxes that a TopK sorts, for one output (N,R,6) or for scores, boxes and labels."""
    for node in _sorting_nodes(graph):
        scores = _sorted_scores(graph, node.input[0])
        boxes = None if scores is None else _gathered_boxes(graph, graph.shape(scores)[1])
        if scores is not None and boxes is not None:
            part = _whole(graph, boxes, 2)
            values = _values(graph, part)
            return Detector(_whole(graph, scores, 2), part, None, _corners(values), _unit(values), overlaps=False)
    return None


def _sorting_nodes(graph: Graph) -> list[onnx.NodeProto]:
    """Return the TopK nodes whose results reach the outputs unchanged, or as numbers of rows, the first one first.

    A transformer's encoder selects its queries by a TopK, too: a decoder computes with those.
    """
    found: dict[int, onnx.NodeProto] = {}
    seen: set[str] = set()
    stack = list(graph.outputs)
    while stack:
        value = stack.pop()
        node = graph.producer(value)
        if node is None or value in seen:
            continue
        seen.add(value)
        op = operator(node)
        is_integer = graph.rank(value) is not None and graph.type(value).dtype.kind in "iu"
        if op == "TopK":
            found[id(node)] = node
        elif not is_integer and op not in ("Cast", "Identity") and not op_row(op).facts & Fact.MOVES:
            continue
        stack.extend(node.input)
    return [node for node in needed_nodes(graph, graph.outputs) if id(node) in found]


def _sorted_scores(graph: Graph, value: str) -> str | None:
    """Return scores (N,A,C) whose best, or all of which, are sorted."""
    node = graph.producer(value)
    while node is not None and operator(node) in ("ReduceMax", "Flatten", "Reshape", "Squeeze"):
        value = node.input[0]
        if _sizes(graph, value) is not None:
            return value
        node = graph.producer(value)
    return None


def _gathered_boxes(graph: Graph, anchors: object) -> str | None:
    """Return the boxes (N,A,4) of which the sorted ones are gathered."""
    for node in needed_nodes(graph, graph.outputs):
        if operator(node) in ("GatherElements", "GatherND", "Gather"):
            sizes = _sizes(graph, node.input[0])
            if sizes is not None and sizes == (anchors, 4):
                return str(node.input[0])
    return None


def _two_outputs(graph: Graph) -> Detector | None:
    """Read scores and boxes from two outputs with the same number of anchors."""
    sizes = {name: found for name in graph.outputs if (found := _sizes(graph, name)) is not None}
    pairs = [(boxes, scores) for boxes in sizes for scores in sizes if _may_pair(sizes, boxes, scores)]
    if not pairs:
        return None
    decoded = [pair for pair in pairs if not _is_undecoded(graph, pair[0])]
    if not decoded:
        raise ModelError(
            f"the boxes {pairs[0][0]!r} come from a layer without activation: they are offsets from anchors that the "
            "model does not hold. Export the detector with its boxes decoded"
        )
    boxes, scores = _likeliest(graph, decoded)
    axis = _coordinate_axis(sizes[boxes]) or 2
    anchors = sizes[boxes][0 if axis == 2 else 1]
    part, score_part = _whole(graph, boxes, axis), _whole(graph, scores, 2 if sizes[scores][0] == anchors else 1)
    # Anchors of several maps are joined; queries come from one decoder.
    overlaps = anchors > _MOST_QUERIES or _is_joined(graph, score_part)
    values = _values(graph, part)
    return Detector(score_part, part, None, _corners(values), _unit(values), overlaps=overlaps)


def _may_pair(sizes: Mapping[str, tuple[int, int]], boxes: str, scores: str) -> bool:
    axis = _coordinate_axis(sizes[boxes])
    return axis is not None and boxes != scores and sizes[boxes][0 if axis == 2 else 1] in sizes[scores]


_BOX_NAMES = re.compile("box|loc|coord", re.IGNORECASE)
_SCORE_NAMES = re.compile("score|logit|cls|class|conf|prob", re.IGNORECASE)


def _likeliest(graph: Graph, pairs: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """Return the boxes and scores among outputs that might be either, as four scores per anchor are.

    Raises
    ------
    ModelError
        Neither their names nor their values tell which is which.
    """
    kept = [pair for pair in pairs if not _all_active(graph, pair[:1])] or list(pairs)
    named = [pair for pair in kept if _BOX_NAMES.search(pair[0]) or _SCORE_NAMES.search(pair[1])]
    opposite = [pair for pair in kept if _SCORE_NAMES.search(pair[0]) or _BOX_NAMES.search(pair[1])]
    kept = [pair for pair in named or kept if pair not in opposite] or kept
    # Further outputs (hidden states) may have as many rows: the first is meant.
    if len({boxes for boxes, _ in kept}) == 1:
        return kept[0]
    plausible = [pair for pair in kept if _are_plausible(graph, pair[0])]
    if len({boxes for boxes, _ in plausible}) != 1:
        raise ModelError(
            f"the outputs {sorted({name for pair in kept for name in pair})} might all be boxes: rename them in the "
            "model, for example to 'boxes' and 'scores'"
        )
    return plausible[0]


def _are_plausible(graph: Graph, boxes: str) -> bool:
    """Return whether values are boxes with sizes that are not negative, for any picture."""
    axis = _coordinate_axis(_sizes(graph, boxes)) or 2
    values = _values(graph, _whole(graph, boxes, axis))
    if values is None:
        return False
    ordered = (values[..., 2:] >= values[..., :2]).all()
    return bool(ordered or (values[..., 2:] >= 0).all())


def _is_undecoded(graph: Graph, boxes: str) -> bool:
    """Return whether nothing but moving ops lies between weighted sums and the boxes."""
    node = graph.producer(boxes)
    if node is not None and operator(node) == "Add" and any(name in graph.constants for name in node.input):
        # A product and its bias.
        node = next((graph.producer(name) for name in node.input if name not in graph.constants), None)
        return node is not None and operator(node) == "MatMul"
    if node is None or operator(node) in ("Conv", "Gemm", "MatMul"):
        return node is not None
    moved = list(node.input) if operator(node) == "Concat" else list(node.input[:1])
    return bool(op_row(operator(node)).facts & Fact.MOVES) and all(_is_undecoded(graph, name) for name in moved)


def _is_joined(graph: Graph, scores: Part) -> bool:
    """Return whether scores of several maps are joined, one behind the other."""
    leaves = leaf_parts(graph, scores)
    node = graph.producer(leaves[0].value)
    if len(leaves) == 1 and node is not None and operator(node) in ("Sigmoid", "Softmax"):
        leaves = leaf_parts(graph, leaves[0]._replace(value=node.input[0]))
    width = scores.stop - scores.start
    return len([leaf for leaf in leaves if leaf.stop - leaf.start == width]) > 1


def _outputs_by_level(graph: Graph) -> Detector | None:
    """Join the outputs of all maps: class scores, and distributions over the bins of four distances."""
    sizes = {name: found for name in graph.outputs if (found := _sizes(graph, name)) is not None}
    by_columns: dict[int, dict[int, str]] = {}
    for name, (anchors, columns) in sizes.items():
        by_columns.setdefault(columns, {})[anchors] = name
    if len(by_columns) != 2 or 2 * len(next(iter(by_columns.values()))) != len(sizes) or len(sizes) < 4:
        return None
    first, second = by_columns.items()
    # Of 4 B bins, B is at least 2; distributions are raw, and scores are usually active.
    is_first = first[0] % 4 == 0 and not _all_active(graph, first[1].values())
    boxes, scores = (first, second) if is_first else (second, first)
    if boxes[0] % 4 or boxes[0] < 8 or boxes[1].keys() != scores[1].keys():
        return None
    joined = []
    for _, level in (scores, boxes):
        names = [level[anchors] for anchors in sorted(level, reverse=True)]
        joined.append(graph.emit("Concat", *names, axis=1, stem="boxes/levels"))
    graph.infer_types()
    parts = [_whole(graph, name, 2) for name in joined]
    return Detector(parts[0], parts[1], None, "xyxy", "bins", overlaps=True)


def _all_active(graph: Graph, values: Iterable[str]) -> bool:
    parts = (leaf for value in values for leaf in leaf_parts(graph, _whole(graph, value, 2)))
    nodes = [graph.producer(leaf.value) for leaf in parts]
    return all(node is not None and operator(node) in ("Sigmoid", "Softmax") for node in nodes)


def _one_output(graph: Graph, names: int | None) -> Detector | None:
    """Read boxes and scores from the columns of one output."""
    outputs = [(name, found) for name in graph.outputs if (found := _sizes(graph, name)) is not None]
    # A segmenting detector (YOLOv8-seg) also gives prototypes, of rank 4, and mask coefficients behind the classes.
    if len(outputs) != 1:
        return None
    name, sizes = outputs[0]
    axis = 1 if sizes[0] < sizes[1] else 2
    columns, anchors = min(sizes), max(sizes)
    # Queries of a transformer have no objectness, and do not overlap.
    are_queries = axis == 2 and anchors <= _MOST_QUERIES and len(leaf_parts(graph, Part(name, axis, 0, 4))) == 1
    masks = sum(_prototype_count(graph, other) for other in graph.outputs)
    has_objectness, count = _columns(columns - masks, names, may_have=axis == 2, has_by_default=not are_queries)
    if count < 1:
        return None
    first = 4 + has_objectness
    boxes, objectness = Part(name, axis, 0, 4), Part(name, axis, 4, 5)
    raw = all(_is_convolution(graph, leaf.value) for leaf in leaf_parts(graph, boxes))
    return Detector(
        Part(name, axis, first, first + count),
        boxes,
        objectness if has_objectness else None,
        "cxcywh",
        "cells" if raw else _unit(_values(graph, boxes)),
        overlaps=has_objectness or not are_queries,
    )


def _prototype_count(graph: Graph, output: str) -> int:
    """Return M of the prototype masks of a segmenting detector, (N,M,h,w); 0 for another output."""
    count = graph.shape(output)[1] if graph.rank(output) == 4 else 0
    return count if isinstance(count, int) else 0


def _columns(columns: int, names: int | None, *, may_have: bool, has_by_default: bool) -> tuple[bool, int]:
    """Return whether there is an objectness behind the four coordinates, and the number of classes.

    Raises
    ------
    ArgumentError
        The number of class names fits neither.
    """
    if names is None:
        has = may_have and has_by_default
        return has, columns - 4 - has
    if columns == 4 + names:
        return False, names
    if may_have and columns == 5 + names:
        return True, names
    fitting = f"{columns - 4}" + (f", or {columns - 5} with an objectness" if may_have else "")
    raise ArgumentError(f"{names} class names for a detector of {fitting} classes")


def _is_convolution(graph: Graph, value: str) -> bool:
    node = graph.producer(value)
    return node is not None and operator(node) == "Conv"


def _corners(values: Array | None) -> Corners:
    """Return whether boxes are corners: then the second is never above or left of the first, whatever the picture."""
    if values is None:
        return "xyxy"
    ordered = (values[..., 2] >= values[..., 0]).all() and (values[..., 3] >= values[..., 1]).all()
    return "xyxy" if ordered else "cxcywh"


def _unit(values: Array | None) -> Unit:
    """Return whether boxes are shares of the input: for one of the amplitudes of noise, all of them are small."""
    return "share" if values is not None and np.abs(values).max(axis=(1, 2)).min() <= 2 else "pixels"


def _values(graph: Graph, boxes: Part) -> Array | None:
    """Return boxes for seeded noise, (N,A,4), or None if the graph cannot be run here."""
    found = score_seeded_images(graph, boxes.value)
    if found is None:
        return None
    return np.moveaxis(found, boxes.axis, -1)[..., boxes.start : boxes.stop]


def leaf_parts(graph: Graph, part: Part) -> list[Part]:
    """Return the parts of values that a part was put together from, by ops that only move, join and cut.

    Their ranks may differ from 3; they are in no particular order of memory.
    """
    node = graph.producer(part.value)
    rule = _LEAVES.get("" if node is None else operator(node))
    behind = None if node is None or rule is None else rule(graph, node, part)
    if behind is None:
        return [part]
    return [leaf for other in behind for leaf in leaf_parts(graph, other)]


def _moved(graph: Graph, node: onnx.NodeProto, part: Part, axis: int | None) -> list[Part] | None:
    value = node.input[0]
    return None if axis is None else [part._replace(value=value, axis=axis)]


def _transpose_leaf(graph: Graph, node: onnx.NodeProto, part: Part) -> list[Part] | None:
    return _moved(graph, node, part, attribute(node, "perm", [])[part.axis])


def _reshape_leaf(graph: Graph, node: onnx.NodeProto, part: Part) -> list[Part] | None:
    """Follow an axis that keeps its size, with everything before it, or everything behind it, unchanged."""
    value, made = node.input[0], node.output[0]
    if graph.rank(value) is None or graph.rank(made) is None:
        return None
    before, after = graph.shape(value), graph.shape(made)
    if before[: part.axis + 1] == after[: part.axis + 1]:
        return _moved(graph, node, part, part.axis)
    behind = len(after) - part.axis
    if behind <= len(before) and before[-behind:] == after[-behind:]:
        return _moved(graph, node, part, len(before) - behind)
    return None


def _concat_leaf(graph: Graph, node: onnx.NodeProto, part: Part) -> list[Part] | None:
    inputs = list(node.input)
    axis = attribute(node, "axis", 0) % (graph.rank(part.value) or 1)
    if any(graph.rank(name) is None for name in inputs):
        return None
    if axis != part.axis:
        return [part._replace(value=name) for name in inputs]
    parts, offset = [], 0
    for name in inputs:
        size = graph.shape(name)[axis]
        if not isinstance(size, int):
            return None
        start, stop = max(part.start - offset, 0), min(part.stop - offset, size)
        if start < stop:
            parts.append(Part(name, axis, start, stop))
        offset += size
    return parts


def _split_leaf(graph: Graph, node: onnx.NodeProto, part: Part) -> list[Part] | None:
    axis = attribute(node, "axis", 0) % (graph.rank(part.value) or 1)
    offset = 0
    for name in node.output:
        if name == part.value:
            break
        size = graph.shape(name)[axis]
        offset += size if isinstance(size, int) else 0
    shift = offset if axis == part.axis else 0
    return [Part(node.input[0], part.axis, part.start + shift, part.stop + shift)]


def _slice_leaf(graph: Graph, node: onnx.NodeProto, part: Part) -> list[Part] | None:
    given = [graph.constants.get(name) for name in node.input[1:]]
    if len(given) < 3 or any(array is None for array in given):
        return None
    starts, _, axes, *steps = ([int(number) for number in array.ravel()] for array in given if array is not None)
    if steps and set(steps[0]) != {1}:
        return None
    rank = graph.rank(part.value) or 1
    size = graph.shape(node.input[0])[part.axis]
    by_axis = {axis % rank: start for axis, start in zip(axes, starts, strict=True)}
    shift = by_axis.get(part.axis, 0)
    if shift < 0:
        shift += size if isinstance(size, int) else 0
    return [Part(node.input[0], part.axis, part.start + shift, part.stop + shift)]


_LEAVES = {
    "Identity": lambda graph, node, part: _moved(graph, node, part, part.axis),
    "Transpose": _transpose_leaf,
    "Reshape": _reshape_leaf,
    "Flatten": _reshape_leaf,
    "Concat": _concat_leaf,
    "Split": _split_leaf,
    "Slice": _slice_leaf,
}
