"""Segmentation networks as ONNX graphs."""

from __future__ import annotations

import numpy as np
import onnx
from networks import NetworkBuilder


def segmenter(*, activation: str = "Softmax", last: bool = False, classes: int = 3) -> onnx.ModelProto:
    """A small U-Net: 12 x 12 pixels, a bottleneck of 3 x 3."""
    net = NetworkBuilder(("batch", 3, 12, 12))
    first = net.add("Relu", net.conv(net.input, (6, 3, 3, 3), pads=[1, 1, 1, 1]), name="first")
    second = net.add("MaxPool", first, kernel_shape=[4, 4], strides=[4, 4])
    bottom = net.add("Relu", net.conv(second, (8, 6, 3, 3), pads=[1, 1, 1, 1]), name="bottom")
    up = net.add("Resize", bottom, "", net.constant(np.array([1, 1, 4, 4], np.float32)), mode="linear")
    joined = net.add("Concat", first, up, axis=1)
    decoded = net.add("Relu", net.conv(joined, (8, 14, 3, 3), pads=[1, 1, 1, 1]), name="decoded")
    pixels = net.conv(decoded, (classes, 8, 1, 1), name="pixels")
    if last:
        pixels = net.add("Transpose", pixels, perm=[0, 2, 3, 1])
    attributes = {"axis": 3 if last else 1} if activation == "Softmax" else {}
    return net.build(net.add(activation, pixels, name="mask", **attributes)).to_model()
