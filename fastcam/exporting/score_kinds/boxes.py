"""Scores of a detector: the table of all anchors and classes, and the boxes that its entries stand for.

An entry is the probability that an anchor shows a class; the explained scalar is its logit, the class score before the
sigmoid. With an objectness, the probability p is the product of both, and the scalar is log(p / (1 - p)), which
saturates as little as the class score itself. A target is differentiated before any suppression or sorting of boxes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from onnx import helper

from ...arrays import Array
from ...errors import ArgumentError, ModelError
from ...graph import Graph, attribute, operator, static_dims
from ...metadata import MAXIMUM_RANK
from ...notes import Note
from ..gradients.autodiff import backpropagate
from ..trials import score_seeded_images
from .detectors import Detector, Part, find_detector, input_sides, leaf_parts
from .explained import context_layer, head_inputs
from .table import Scored, ScoreRequest, ScoreTable, opened_batch
from .windows import Targets, find_levels, window_gradients

BOX_OUTPUTS = ("boxes", "box_scores", "box_classes")

# Non-maximum suppression: candidates per image, overlap (intersection over union), and lowest probability.
_CANDIDATES = 1024
_OVERLAP = 0.5
_LOWEST = 0.001
# p (1 - p) of a score so certain that float32 no longer tells it from 1.
_SMALLEST_SLOPE = 1e-12


class _Probabilities(NamedTuple):
    """The probabilities of all anchors and classes.

    Attributes
    ----------
    probabilities : str
        (N,A,C) or (N,C,A).
    source : str
        A value of the same shape, whose gradient is known.
    axis : int
        Of the classes.
    is_logit : bool
        Whether ``source`` holds the scores before the activation; else ``source`` is ``probabilities``.
    background : int or None
        The class that means none.
    """

    probabilities: str
    source: str
    axis: int
    is_logit: bool
    background: int | None = None


def open_boxes(graph: Graph, request: ScoreRequest) -> Scored:
    """Make the probabilities of all anchors and classes the table; see `KINDS`.

    Raises
    ------
    ModelError
        The outputs are not those of a detector.
    ArgumentError
        ``score_activation`` is needed, or contradicts the model.
    """
    try:
        detector = find_detector(graph, request.names)
    except ArgumentError:
        # Names that the model itself holds may be those of another head.
        if request.are_given:
            raise
        detector, request = find_detector(graph, None), request._replace(names=None)
    # Only now: suppression of boxes mixes images.
    parts = [part for part in (detector.scores, detector.boxes, detector.objectness) if part is not None]
    graph.outputs = list(dict.fromkeys(part.value for part in parts))
    graph.prune()
    graph.infer_types()
    notes = opened_batch(graph)
    scores = _probabilities(graph, detector, request)
    corners = _corners(graph, detector)
    graph.outputs = [graph.emit("Flatten", scores.probabilities, axis=1, stem="table")]
    graph.infer_types()
    # Names that the file format defines would be taken from these values later.
    names = {
        scores.source: graph.unused_name("table/source"),
        scores.probabilities: graph.unused_name("table/likely"),
        corners: graph.unused_name("table/corners"),
    }
    graph.rename_all(names)
    corners = names[corners]
    scores = scores._replace(source=names[scores.source], probabilities=names[scores.probabilities])
    boxes = _Boxes(graph, scores, corners, overlaps=detector.overlaps)
    table = ScoreTable(boxes.rank, boxes.differentiate, boxes.describe, BOX_OUTPUTS, boxes.localize)
    notes.append(_note(detector, scores))
    return Scored(
        "sigmoid",
        table,
        lambda graph, candidates: head_inputs(graph, candidates, corners, graph.outputs[0]),
        notes,
        class_count=boxes.class_count,
        context=lambda graph, candidates: context_layer(graph, candidates, corners),
    )


def _note(detector: Detector, found: _Probabilities) -> Note:
    kinds = {"cxcywh": "centres and sizes", "xyxy": "corners (x, y, x, y)", "yxyx": "corners (y, x, y, x)"}
    units = {
        "pixels": "in pixels",
        "share": "as shares of the input",
        "cells": "in cells, decoded by this file",
        "bins": "as distributions of distances in cells, decoded by this file",
    }
    suppression = (
        f"Boxes of one class that overlap by more than {_OVERLAP} are suppressed."
        if detector.overlaps
        else "None are suppressed."
    )
    scores = "classes and an objectness" if detector.objectness is not None else "classes"
    count = detector.scores.stop - detector.scores.start
    text = f"The boxes were read as {kinds[detector.corners]} {units[detector.unit]}, with scores of {count} {scores}. "
    text += suppression
    if detector.is_guess:
        text += " The order of the corners is a guess."
    if found.background is not None:
        text += f" Class {found.background} of the model was taken for the background, and left out."
    return Note("scores", text)


# Scores


def _probabilities(graph: Graph, detector: Detector, request: ScoreRequest) -> _Probabilities:
    if detector.objectness is None:
        return _before_activation(graph, detector, request)
    objectness, classes = _active_parts(graph, (detector.objectness, detector.scores), request)
    scores = _before_activation(graph, detector._replace(scores=classes), request)
    factor = _cut(graph, objectness)
    if graph.rank(factor) == 3 and objectness.axis != scores.axis:
        factor = graph.emit("Transpose", factor, perm=[0, 2, 1], stem="objectness")
    product = graph.emit("Mul", scores.probabilities, factor, stem="boxes/likely")
    graph.infer_types()
    return _Probabilities(product, product, scores.axis, is_logit=False)


def _active_parts(graph: Graph, parts: tuple[Part, Part], request: ScoreRequest) -> tuple[Part, Part]:
    """Return the objectness and the class scores, columns of one value, as probabilities.

    Raises
    ------
    ArgumentError
        They are not, and the caller does not say that a sigmoid makes them so.
    """
    if all(_is_sigmoid(graph, leaf) for part in parts for leaf in leaf_parts(graph, part)):
        return parts
    values = score_seeded_images(graph, parts[0].value)
    columns = [] if values is None else [np.moveaxis(values, one.axis, -1)[..., one.start : one.stop] for one in parts]
    if all(((found >= 0) & (found <= 1)).all() for found in columns):
        return parts
    if request.activation != "sigmoid":
        raise ArgumentError(
            "the detector's objectness and class scores, or what looks like them, leave 0..1: give "
            'score_activation="sigmoid" if they are raw. If it has no objectness, give classes=, whose number tells'
        )
    active = graph.emit("Sigmoid", parts[0].value, stem="boxes/active")
    graph.infer_types()
    return parts[0]._replace(value=active), parts[1]._replace(value=active)


def _before_activation(graph: Graph, detector: Detector, request: ScoreRequest) -> _Probabilities:
    """Return the class scores, and the logits behind them where one activation made all of them."""
    leaves = leaf_parts(graph, detector.scores)
    part = leaves[0] if len(leaves) == 1 and graph.rank(leaves[0].value) == 3 else detector.scores
    node = graph.producer(part.value)
    op = "" if node is None else operator(node)
    is_softmax = op == "Softmax" and node is not None and attribute(node, "axis", -1) % 3 == part.axis
    if node is not None and (op == "Sigmoid" or is_softmax):
        kept, background = _without_background(graph, part, detector, request, is_softmax=is_softmax)
        behind = _cut(graph, kept._replace(value=node.input[0]))
        return _Probabilities(_cut(graph, kept), behind, part.axis, is_logit=True, background=background)
    if detector.objectness is not None or all(_is_sigmoid(graph, leaf) for leaf in leaves):
        activation = "probabilities"
    else:
        activation = request.activation or _guessed_activation(graph, part, request)
    if activation == "probabilities":
        likely = _cut(graph, part)
        return _Probabilities(likely, likely, part.axis, is_logit=False)
    kept, background = _without_background(graph, part, detector, request, is_softmax=activation == "softmax")
    attributes = {"axis": part.axis} if activation == "softmax" else {}
    active = graph.emit("Softmax" if attributes else "Sigmoid", part.value, stem="boxes/active", **attributes)
    graph.infer_types()
    return _Probabilities(
        _cut(graph, kept._replace(value=active)), _cut(graph, kept), part.axis, is_logit=True, background=background
    )


def _is_sigmoid(graph: Graph, leaf: Part) -> bool:
    node = graph.producer(leaf.value)
    return node is not None and operator(node) == "Sigmoid"


def _guessed_activation(graph: Graph, part: Part, request: ScoreRequest) -> str:
    """Return the activation that scores still need: one more than names means a softmax with a class for none."""
    values = score_seeded_images(graph, part.value)
    if values is not None and ((values >= 0) & (values <= 1)).all():
        return "probabilities"
    count = part.stop - part.start
    if request.names == count:
        return "sigmoid"
    if request.names == count - 1:
        return "softmax"
    raise ArgumentError(
        f'the detector ends in raw scores of {count} classes: give score_activation="softmax" if one of them means '
        '"no object" (DETR, SSD), or "sigmoid" if none does (RetinaNet)'
    )


def _without_background(
    graph: Graph, part: Part, detector: Detector, request: ScoreRequest, *, is_softmax: bool
) -> tuple[Part, int | None]:
    """Leave out the class of a softmax that means no object: the first of anchors (SSD), the last of queries (DETR)."""
    size = graph.shape(part.value)[part.axis]
    count = part.stop - part.start
    if not is_softmax or count != size or request.names == count or count < 2:
        return part, None
    if detector.overlaps:
        return part._replace(start=part.start + 1), 0
    return part._replace(stop=part.stop - 1), count - 1


def _cut(graph: Graph, part: Part) -> str:
    """Return a part as a value."""
    if (part.start, part.stop) == (0, graph.shape(part.value)[part.axis]):
        return part.value
    cut = graph.emit(
        "Slice",
        part.value,
        *(graph.emit_integers(number) for number in (part.start, part.stop, part.axis)),
        stem="boxes/part",
    )
    graph.infer_types()
    return cut


# Boxes


def _corners(graph: Graph, detector: Detector) -> str:
    """Return the boxes as (left, top, right, bottom) in pixels of the input, (N,A,4)."""
    values = _cut(graph, detector.boxes)
    if detector.boxes.axis == 1:
        values = graph.emit("Transpose", values, perm=[0, 2, 1], stem="boxes/rows")
    decode = _DECODERS.get(detector.unit)
    if decode is not None:
        values = decode(graph, values)
    if detector.corners == "yxyx":
        values = graph.emit("Gather", values, graph.emit_integers(1, 0, 3, 2), axis=2, stem="boxes/xyxy")
    if detector.corners == "cxcywh":
        # (cx, cy, w, h) times this matrix is (cx - w/2, cy - h/2, cx + w/2, cy + h/2).
        matrix = np.array([[1, 0, 1, 0], [0, 1, 0, 1], [-0.5, 0, 0.5, 0], [0, -0.5, 0, 0.5]], np.float32)
        values = graph.emit("MatMul", values, graph.emit_constant(matrix), stem="boxes/corners")
    if detector.unit == "share":
        height, width = input_sides(graph)
        sides = np.array([width, height, width, height], np.float32)
        values = graph.emit("Mul", values, graph.emit_constant(sides), stem="boxes/pixels")
    values = graph.emit("Identity", values, stem="boxes/all")
    graph.infer_types()
    if graph.rank(values) != 3 or not isinstance(graph.shape(values)[1], int):
        raise ModelError(f"the boxes have shape {graph.shape(values)}: the number of anchors must be fixed")
    return values


def _grid(graph: Graph, values: str) -> tuple[Array, Array]:
    """Return the cell (column, row) of every anchor, (A,2), and the side of its cells in pixels, (A,1)."""
    graph.infer_types()
    (anchors,) = static_dims(graph, values, [1])
    sides = input_sides(graph)
    strides = next((found for found in _STRIDES if sum(map(math.prod, _cells(sides, found))) == anchors), None)
    if strides is None:
        raise ModelError(
            f"the boxes are not decoded, and {anchors} anchors fit no known grid of an input of {sides}: export the "
            "detector with its boxes decoded (for YOLOX, --decode_in_inference)"
        )
    grids = [np.argwhere(np.ones(cells))[:, ::-1] for cells in _cells(sides, strides)]
    steps = [np.full((len(grid), 1), step) for grid, step in zip(grids, strides, strict=True)]
    return np.concatenate(grids).astype(np.float32), np.concatenate(steps).astype(np.float32)


def _cells(sides: tuple[int, int], strides: Sequence[int]) -> list[tuple[int, int]]:
    return [(-(-sides[0] // step), -(-sides[1] // step)) for step in strides]


def _from_cells(graph: Graph, values: str) -> str:
    """Decode boxes in cells (Ge et al. 2021, YOLOX): centres from the cell's corner, logarithms of the sizes."""
    grid, step = _grid(graph, values)
    bounds = [graph.emit_integers(number) for number in (0, 2, 4)]
    centres = graph.emit("Slice", values, bounds[0], bounds[1], graph.emit_integers(2))
    sizes = graph.emit("Slice", values, bounds[1], bounds[2], graph.emit_integers(2))
    centres = graph.emit("Add", centres, graph.emit_constant(grid[None]))
    both = graph.emit("Concat", centres, graph.emit("Exp", sizes), axis=2)
    return graph.emit("Mul", both, graph.emit_constant(step[None]), stem="boxes/decoded")


def _from_bins(graph: Graph, values: str) -> str:
    """Decode distributions of distances (Li et al. 2020, Generalized Focal Loss): means, from the cell's centre."""
    grid, step = _grid(graph, values)
    (columns,) = static_dims(graph, values, [2])
    bins = graph.emit("Reshape", values, graph.emit_integers(0, len(grid), 4, columns // 4), stem="boxes/bins")
    shares = graph.emit("Softmax", bins, axis=3)
    numbers = graph.emit_constant(np.arange(columns // 4, dtype=np.float32)[:, None])
    distances = graph.emit("Squeeze", graph.emit("MatMul", shares, numbers), graph.emit_integers(3))
    # Left and top are subtracted.
    signed = graph.emit("Mul", distances, graph.emit_constant(np.array([-1, -1, 1, 1], np.float32)))
    centres = graph.emit_constant(np.tile(grid + np.float32(0.5), 2)[None])
    cells = graph.emit("Add", signed, centres)
    return graph.emit("Mul", cells, graph.emit_constant(step[None]), stem="boxes/decoded")


_DECODERS = {"cells": _from_cells, "bins": _from_bins}
_STRIDES = ((8, 16, 32), (8, 16, 32, 64), (4, 8, 16, 32), (16, 32), (8, 16), (8,), (16,), (32,))


class _Boxes:
    """The functions of the `ScoreTable` of a detector."""

    def __init__(self, graph: Graph, scores: _Probabilities, corners: str, *, overlaps: bool) -> None:
        self._scores = scores
        self._corners = corners
        self._overlaps = overlaps
        self._axis = scores.axis
        self.class_count, self._anchors = static_dims(graph, scores.probabilities, [scores.axis, 3 - scores.axis])

    def rank(self, graph: Graph, table: str) -> str:
        """Return the entries of the best boxes, (N,R) int64; -1 where there are fewer."""
        likely = self._scores.probabilities
        axis = graph.emit_integers(self._axis)
        best = graph.emit("ReduceMax", likely, axis, keepdims=0, stem="rank/best")
        classes = graph.emit("ArgMax", likely, axis=self._axis, keepdims=0, stem="rank/classes")
        limit = _CANDIDATES if self._overlaps else MAXIMUM_RANK
        count = graph.emit_integers(min(limit, self._anchors))
        anchors = graph.unused_name("rank/anchors")
        node = helper.make_node("TopK", [best, count], [f"{anchors}/scores", anchors], name=anchors, axis=1)
        graph.append(node)
        chosen = graph.emit("GatherElements", classes, anchors, axis=1, stem="rank/chosen")
        entries = self._entries(graph, anchors, chosen)
        missing = MAXIMUM_RANK - min(MAXIMUM_RANK, self._anchors)
        if not self._overlaps and not missing:
            return entries
        if not self._overlaps:
            rows = graph.emit("Shape", anchors, start=0, end=1)
            shape = graph.emit("Concat", rows, graph.emit_integers(missing), axis=0)
            none = graph.emit("Expand", graph.emit_integer(-1), shape)
            return graph.emit("Concat", entries, none, axis=1, stem="rank/padded")
        return self._suppressed(graph, f"{anchors}/scores", anchors, chosen, entries)

    def _entries(self, graph: Graph, anchors: str, classes: str) -> str:
        """Return the entries of the flat table."""
        outer, inner, size = (
            (anchors, classes, self.class_count) if self._axis == 2 else (classes, anchors, self._anchors)
        )
        rows = graph.emit("Mul", outer, graph.emit_integer(size))
        return graph.emit("Add", rows, inner, stem="rank/entries")

    def _suppressed(self, graph: Graph, scores: str, anchors: str, classes: str, entries: str) -> str:
        """Keep the best of boxes of one class that overlap, greedily."""
        corners = self._gathered(graph, anchors)
        # Boxes of different classes are moved apart, so that they do not overlap.
        step = graph.emit_number(2 * max(input_sides(graph)))
        shift = graph.emit("Mul", graph.emit("Cast", classes, to=1), step)
        apart = graph.emit("Add", corners, graph.emit("Unsqueeze", shift, graph.emit_integers(2)), stem="rank/apart")
        by_class = graph.emit("Unsqueeze", scores, graph.emit_integers(1), stem="rank/by_class")
        limits = [graph.emit_integer(MAXIMUM_RANK), graph.emit_number(_OVERLAP), graph.emit_number(_LOWEST)]
        kept = graph.emit("NonMaxSuppression", apart, by_class, *limits, stem="rank/kept")
        image, candidate = (graph.emit("Gather", kept, graph.emit_integer(column), axis=1) for column in (0, 2))
        images = graph.emit("Shape", scores, start=0, end=1, stem="rank/images")
        # Rows are sorted by image: the rank is the distance from the first row of the image.
        zero, one = graph.emit_integer(0), graph.emit_integer(1)
        numbers = graph.emit("Range", zero, graph.emit("Squeeze", images), one)
        same = graph.emit("Equal", graph.emit("Unsqueeze", image, graph.emit_integers(1)), numbers)
        # In float32, exact for less than 2**24 boxes: TensorRT sums no integers.
        counts = graph.emit("ReduceSum", graph.emit("Cast", same, to=1), graph.emit_integers(0), keepdims=0)
        starts = graph.emit("Cast", graph.emit("CumSum", counts, zero, exclusive=1), to=7, stem="rank/starts")
        count = graph.emit("Squeeze", graph.emit("Shape", image))
        ranks = graph.emit("Sub", graph.emit("Range", zero, count, one), graph.emit("Gather", starts, image))
        pairs = [graph.emit("Unsqueeze", value, graph.emit_integers(1)) for value in (image, ranks, candidate)]
        places = graph.emit("Concat", pairs[0], pairs[1], axis=1, stem="rank/places")
        found = graph.emit("GatherND", entries, graph.emit("Concat", pairs[0], pairs[2], axis=1), stem="rank/found")
        shape = graph.emit("Concat", images, graph.emit_integers(MAXIMUM_RANK), axis=0)
        none = graph.emit("Expand", graph.emit_integer(-1), shape)
        return graph.emit("ScatterND", none, places, found, stem="rank/ranked")

    def _gathered(self, graph: Graph, anchors: str) -> str:
        """Return the corners (N,K,4) of anchors (N,K)."""
        rows = graph.emit("Unsqueeze", anchors, graph.emit_integers(2))
        shape = graph.emit("Concat", graph.emit("Shape", anchors), graph.emit_integers(4), axis=0)
        return graph.emit("GatherElements", self._corners, graph.emit("Expand", rows, shape), axis=1)

    def differentiate(self, graph: Graph, table: str, target: str) -> tuple[str, str]:
        """Return the gradient of the targets' logits in the scores: one number per target, zeros elsewhere."""
        entry = _entry(graph, target)
        slopes = _ones_like(graph, entry) if self._scores.is_logit else self._slopes(graph, table, entry)
        count = graph.emit_integers(self.class_count * self._anchors)
        shape = graph.emit("Concat", graph.emit("Shape", target), count, axis=0)
        zeros = graph.emit("Expand", graph.emit_number(0), shape)
        last = graph.emit_integers(2)
        rows = graph.emit(
            "ScatterElements",
            zeros,
            graph.emit("Unsqueeze", entry, last),
            graph.emit("Unsqueeze", slopes, last),
            axis=2,
            stem="gradient/table",
        )
        sizes = static_dims(graph, self._scores.probabilities, [1, 2])
        return self._scores.source, graph.emit(
            "Reshape", rows, graph.emit_integers(0, 0, *sizes), stem="gradient/scores"
        )

    def _slopes(self, graph: Graph, table: str, entry: str) -> str:
        """Return d log(p / (1 - p)) / dp = 1 / (p (1 - p)) of each target, (K,N)."""
        by_image = graph.emit("Transpose", entry, perm=[1, 0])
        likely = graph.emit("Transpose", graph.emit("GatherElements", table, by_image, axis=1), perm=[1, 0])
        one = graph.emit_number(1)
        variance = graph.emit("Mul", likely, graph.emit("Sub", one, likely))
        bounded = graph.emit("Max", variance, graph.emit_number(_SMALLEST_SLOPE))
        return graph.emit("Div", one, bounded, stem="gradient/slopes")

    def describe(self, graph: Graph, table: str, targets: str) -> Sequence[str]:
        """Return corners (N,K,4), probabilities (N,K) and classes (N,K) of the targets; see `BOX_OUTPUTS`."""
        entry = _entry(graph, targets)
        anchors, classes = self._anchors_and_classes(graph, entry)
        scores = graph.emit("GatherElements", table, entry, axis=1)
        return self._gathered(graph, anchors), scores, graph.emit("Identity", classes)

    def _anchors_and_classes(self, graph: Graph, entry: str) -> tuple[str, str]:
        """Return what entries of the flat table stand for."""
        size = graph.emit_integer(self.class_count if self._axis == 2 else self._anchors)
        outer = graph.emit("Div", entry, size)
        inner = graph.emit("Sub", entry, graph.emit("Mul", outer, size))
        return (outer, inner) if self._axis == 2 else (inner, outer)

    def localize(self, graph: Graph, targets: str, layers: Sequence[str]) -> list[str] | None:
        """Return the gradients in the inputs of the heads: partial ones, so that no evidence counts twice.

        A box is scored by one head, whose input depends on those of others in a pyramid of features. Where heads of
        convolutions give the class logits, the gradients are computed in windows. None for other layers.
        """
        if set(layers) != set(head_inputs(graph, layers, self._corners, self._scores.source)):
            return None
        whole = Part(self._scores.source, self._axis, 0, self.class_count)
        levels = find_levels(graph, whole, layers) if self._scores.is_logit else None
        if levels is None:
            by_target = graph.emit("Transpose", targets, perm=[1, 0])
            value, gradient = self.differentiate(graph, "logits", by_target)
            whole_maps = backpropagate(graph, {value: gradient}, layers, independent=True)
            return [graph.emit("Transpose", one, perm=[1, 0, 2, 3, 4], stem="gradients") for one in whole_maps]
        entry = _entry(graph, targets)
        chosen = Targets(*self._anchors_and_classes(graph, entry), slopes=_ones_like(graph, entry))
        return [window_gradients(graph, level, chosen, self.class_count) for level in levels]


def _entry(graph: Graph, targets: str) -> str:
    """Return the targets, and entry 0 for those that there are not, -1: what is computed of it is not used."""
    return graph.emit("Max", targets, graph.emit_integer(0), stem="boxes/entry")


def _ones_like(graph: Graph, integers: str) -> str:
    """Return float32 ones of the same shape."""
    return graph.emit("Expand", graph.emit_number(1), graph.emit("Shape", integers), stem="boxes/ones")
