"""Scores of a segmentation network: for each class, its mean logit over the pixels where it is predicted.

Vinogradova et al. 2020 (SEG-GRAD-CAM), eq. 2: the score of a class is the sum of its logits over a set of pixels.
Here it is the mean, so that scores do not grow with the region. The region does not move with the picture's gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from onnx import helper

from ...errors import ModelError
from ...graph import Graph, TensorType, attribute, operator, static_dims
from ...metadata import MASK, MAXIMUM_RANK
from ...notes import Note
from ..layers import map_sizes
from ..trials import score_seeded_images
from .table import Scored, ScoreRequest, ScoreTable, opened_batch

# Float32 softmax is off by 1e-6.
_SUM_TOLERANCE = 1e-3
_PROBABILITIES = (
    "The outputs look like probabilities, but no softmax or sigmoid was found at the end of the network: their mean is "
    "explained as it is. Name the scores before them as output=..."
)


def open_segmentation(graph: Graph, request: ScoreRequest) -> Scored:
    """Make the mean logit of each class over its predicted region the table; see `KINDS`.

    Raises
    ------
    ModelError
        The output is not one score per pixel and class.
    """
    notes = opened_batch(graph)
    # Frameworks with channels last turn the scores at the end, behind their activation.
    graph.outputs = [_before_turning(graph, graph.outputs[0])]
    axis = _class_axis(graph, graph.outputs[0], request.names)
    is_exclusive = _remove_activation(graph, axis)
    logits = graph.outputs[0]
    kind = _kind_of_values(graph, axis)
    notes += [Note("scores", _PROBABILITIES)] if kind != "scores" else []
    is_exclusive = is_exclusive and kind != "labels"
    (count,) = static_dims(graph, logits, [axis])
    region = _region(
        graph, logits, axis, count, exclusive=is_exclusive and count > 1, level=0 if kind == "scores" else 0.5
    )
    pixels = graph.emit_integers(*(i for i in (1, 2, 3) if i != axis))
    area = graph.emit("ReduceSum", region, pixels, keepdims=0, stem="region/area")
    inside = graph.emit("ReduceSum", graph.emit("Mul", logits, region), pixels, keepdims=0, stem="region/sum")
    at_least_one = graph.emit("Max", area, graph.emit_number(1), stem="region/pixels")
    graph.outputs = [graph.emit("Div", inside, at_least_one, stem="region/mean")]
    names = {name: graph.unused_name(f"region/{stem}") for name, stem in ((logits, "logits"), (area, "ranking"))}
    graph.rename_all(names)
    graph.infer_types()
    regions = _Regions(names[logits], region, names[area], axis, count)
    height, width = static_dims(graph, regions.logits, [i for i in (1, 2, 3) if i != axis])
    table = ScoreTable(regions.rank, regions.differentiate)
    return Scored("none", table, bottleneck, notes, mask_size=(height, width), end=regions.logits)


class _Regions(NamedTuple):
    """The functions of the `ScoreTable` of a segmentation network.

    Attributes
    ----------
    logits, region : str
        (N,C,H,W) or (N,H,W,C): the scores, and 1 where each class is predicted, else 0.
    area : str
        (N,C), the pixels of each region.
    axis, class_count : int
        The axis of the classes, and their number.
    """

    logits: str
    region: str
    area: str
    axis: int
    class_count: int

    def rank(self, graph: Graph, scores: str) -> str:
        """Return the classes by the size of their regions: a score of 0 says that a class is predicted nowhere."""
        best = graph.unused_name("target/largest")
        ranks = graph.emit_integers(min(self.class_count, MAXIMUM_RANK))
        graph.append(helper.make_node("TopK", [self.area, ranks], [f"{best}/area", best], name=best, axis=1))
        return best

    def differentiate(self, graph: Graph, scores: str, target: str) -> tuple[str, str]:
        """Return the gradient of each target's mean logit in the logits: 1 / pixels inside of its region, else 0.

        The region is where the target is predicted, or the input ``mask`` (N,K,H,W), if that is given.
        """
        sides = [axis for axis in (1, 2, 3) if axis != self.axis]
        height, width = static_dims(graph, self.logits, sides)
        region = self.region
        if self.axis == 3:
            region = graph.emit("Transpose", region, perm=[0, 3, 1, 2])
        indices = graph.emit("Unsqueeze", graph.emit("Transpose", target, perm=[1, 0]), graph.emit_integers(2))
        numbers = graph.emit_constant(np.arange(self.class_count, dtype=np.int64))
        chosen = graph.emit("Cast", graph.emit("Equal", indices, numbers), to=1, stem="region/chosen")
        flat = graph.emit("Reshape", region, graph.emit_integers(0, self.class_count, height * width))
        own = graph.emit("Reshape", graph.emit("MatMul", chosen, flat), graph.emit_integers(0, 0, height, width))
        graph.inputs[MASK] = TensorType(np.dtype(np.float32), ("mask_rows", "mask_count", "mask_height", "mask_width"))
        graph.defaults[MASK] = np.full((1, 1, 1, 1), -1, np.float32)
        zero, one = (graph.emit_number(number) for number in (0, 1))
        used = graph.emit("Where", graph.emit("Less", MASK, zero), own, MASK, stem="region/used")
        total = graph.emit("ReduceSum", used, graph.emit_integers(2, 3), keepdims=1)
        divisor = graph.emit("Where", graph.emit("Greater", total, zero), total, one)
        weights = graph.emit("Unsqueeze", graph.emit("Div", used, divisor), graph.emit_integers(2))
        seed = graph.emit("Mul", weights, graph.emit("Unsqueeze", chosen, graph.emit_integers(3, 4)))
        order = [1, 0, 2, 3, 4] if self.axis == 1 else [1, 0, 3, 4, 2]
        return self.logits, graph.emit("Transpose", seed, perm=order, stem="gradient/region")


def _class_axis(graph: Graph, scores: str, names: int | None) -> int:
    """Return the axis of the classes: that of the final softmax, else the one that is not a side of the input."""
    shape = graph.shape(scores) if graph.rank(scores) else ()
    if len(shape) != 4 or not all(isinstance(size, int) for size in shape[1:]):
        raise ModelError(
            f"the output {scores!r} has shape {shape or 'unknown'}: a segmentation network gives one score per pixel "
            'and class, (N,C,H,W) or (N,H,W,C). Omit score="segmentation" for a classifier, or name an output that has '
            "them as output=..."
        )
    node = graph.producer(scores)
    if node is not None and operator(node) == "Softmax":
        return int(attribute(node, "axis", -1)) % 4
    image = next(iter(graph.inputs.values())).shape
    sides = sorted(int(size) for size in image[1:] if isinstance(size, int))[-2:]
    found = {axis: sorted(int(shape[i] or 0) for i in (1, 2, 3) if i != axis) for axis in (1, 3)}
    # A decoder may round sizes: exact proportions first.
    for slack in (0, 2 * max(sides)):
        fits = [axis for axis in found if abs(found[axis][0] * sides[1] - found[axis][1] * sides[0]) <= slack]
        if len(fits) == 1:
            return fits[0]
    named = [axis for axis in (1, 3) if shape[axis] == names]
    if len(named) == 1:
        return named[0]
    size = map_sizes(graph, [scores]).get(scores)
    return 3 if size is not None and size == shape[1:3] and size != shape[2:] else 1


def _before_turning(graph: Graph, value: str) -> str:
    """Return the value of which ``value`` is a copy with its axes in another order."""
    node = graph.producer(value)
    while node is not None and operator(node) in ("Transpose", "Identity"):
        value, node = node.input[0], graph.producer(node.input[0])
    return value


def _kind_of_values(graph: Graph, axis: int) -> Literal["scores", "shares", "labels"]:
    """Return whether the output holds probabilities, from an activation that was not recognised.

    "shares" add up to 1 for each pixel; "labels" are independent of each other.
    """
    values = score_seeded_images(graph)
    if values is None or values.ndim != 4:
        return "scores"
    # Noise of large amplitude may overflow.
    values = values[np.isfinite(values).all(axis=(1, 2, 3))]
    if not len(values) or not ((values >= 0) & (values <= 1)).all():
        return "scores"
    sums = values.sum(axis=axis)
    return "shares" if values.shape[axis] > 1 and np.abs(sums - 1).max() <= _SUM_TOLERANCE else "labels"


def _remove_activation(graph: Graph, axis: int) -> bool:
    """Read the logits instead of a final softmax or sigmoid; return whether each pixel has exactly one class."""
    node = graph.producer(graph.outputs[0])
    op = "" if node is None else operator(node)
    if node is not None and op in ("Softmax", "LogSoftmax", "Sigmoid"):
        if op != "Sigmoid" and attribute(node, "axis", -1) % 4 != axis:
            raise ModelError(f"the final {op} does not run over the classes, axis {axis}")
        graph.outputs = [node.input[0]]
        graph.prune()
        graph.infer_types()
    return op != "Sigmoid"


def _region(graph: Graph, logits: str, axis: int, count: int, *, exclusive: bool, level: float) -> str:
    """Return where each class is predicted, float32 of the logits' shape: their maximum, or above the level."""
    if exclusive:
        best = graph.emit("ArgMax", logits, axis=axis, keepdims=1, stem="region/best")
        shape = [count if i == axis else 1 for i in range(4)]
        chosen = graph.emit("Equal", best, graph.emit_constant(np.arange(count, dtype=np.int64).reshape(shape)))
    else:
        chosen = graph.emit("Greater", logits, graph.emit_number(level))
    return graph.emit("Cast", chosen, to=1, stem="region")


def bottleneck(graph: Graph, candidates: Sequence[str]) -> list[str]:
    """Return the last of the smallest maps: later ones of a decoder only repeat the predicted mask."""
    sizes = map_sizes(graph, candidates)
    return [min(sizes, key=lambda name: math.prod(sizes[name]))] if sizes else []
