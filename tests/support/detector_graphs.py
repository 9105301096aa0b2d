"""Detectors as ONNX graphs, small enough to follow by hand."""

from __future__ import annotations

import numpy as np
import onnx
from networks import NetworkBuilder

SIDE = 16
CELLS = 4
STRIDE = SIDE // CELLS


def one_map_detector(*, suppressed: bool = False, batch: int | str = "batch") -> onnx.ModelProto:
    """A detector in YOLOv8's layout, (N,4+2,16): each cell of one map gives a box as large as the cell.

    The score of class 0 is high where the picture's first channel is bright, of class 1 where the second is:
    logits of 8 * brightness - 4. With ``suppressed``, NonMaxSuppression is part of the model.
    """
    net = NetworkBuilder((batch, 3, SIDE, SIDE))
    average = np.zeros((4, 3, STRIDE, STRIDE), np.float32)
    for channel in range(3):
        average[channel, channel] = 1 / STRIDE**2
    average[3] = 0.01
    cells = net.add("Conv", net.input, net.constant(average), strides=[STRIDE, STRIDE], name="average")
    features = net.add("Relu", cells, name="features")
    weights = np.zeros((2, 4, 1, 1), np.float32)
    weights[0, 0] = weights[1, 1] = 8
    logits = net.add("Conv", features, net.constant(weights), net.constant(np.full(2, -4, np.float32)))
    scores = net.add("Sigmoid", net.add("Reshape", logits, net.constant([0, 2, CELLS**2])), name="scores")
    y, x = np.mgrid[:CELLS, :CELLS]
    centres = [(x.ravel() + 0.5) * STRIDE, (y.ravel() + 0.5) * STRIDE]
    fixed = np.stack([*centres, *np.full((2, CELLS**2), STRIDE)]).astype(np.float32)[None]
    # Sizes that follow the picture a little.
    size = net.add("Conv", features, net.constant(np.full((4, 4, 1, 1), 1e-3, np.float32)))
    boxes = net.add("Add", net.add("Reshape", size, net.constant([0, 4, CELLS**2])), net.constant(fixed))
    if not suppressed:
        return net.build(net.add("Concat", boxes, scores, axis=1, name="output")).to_model()
    rows = net.add("Transpose", boxes, perm=[0, 2, 1])
    limits = (np.array([5], np.int64), np.array([0.5], np.float32), np.array([0.1], np.float32))
    kept = net.add(
        "NonMaxSuppression", rows, scores, *(net.constant(limit) for limit in limits), center_point_box=1, name="kept"
    )
    return net.build(kept).to_model()


def bright_cells(*cells: tuple[int, int, int]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """One image that is dark but for some cells (row, column, channel)."""
    image = np.zeros((1, 3, SIDE, SIDE), np.float32)
    for row, column, channel in cells:
        image[0, channel, row * STRIDE : (row + 1) * STRIDE, column * STRIDE : (column + 1) * STRIDE] = 1
    return image
