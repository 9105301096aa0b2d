"""Gradient rules of convolutions and pooling."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ....arrays import Array
from ....graph import static_dims
from ..table import Step, defvjp
from .common import first_equal, one_for_zero, with_lead


# Convolution and pooling
@dataclass(frozen=True)
class Window:
    """Geometry of a convolution or pooling over the spatial axes.

    Along each axis, output position o reads the inputs o * stride - begin + i * dilation, for i in the kernel.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begin: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @cached_property
    def overhang(self) -> tuple[int, ...]:
        """How far the last window reaches beyond the input; negative: how much of the input no window reads."""
        return tuple(
            (count - 1) * stride + (size - 1) * dilation + 1 - begin - length
            for count, stride, size, dilation, begin, length in zip(
                self.outputs, self.strides, self.kernel, self.dilations, self.begin, self.inputs, strict=True
            )
        )

    @property
    def end(self) -> tuple[int, ...]:
        """Padding after the input that the windows actually read."""
        return tuple(max(0, overhang) for overhang in self.overhang)

    def scatter_attributes(self) -> dict[str, Any]:
        """Return the attributes of the ConvTranspose that spreads the outputs back over the inputs."""
        return {
            "kernel_shape": list(self.kernel),
            "strides": list(self.strides),
            "dilations": list(self.dilations),
            "pads": [*self.begin, *self.end],
            "output_padding": [max(0, -overhang) for overhang in self.overhang],
        }

    def starts(self) -> list[tuple[int, ...]]:
        """Return the offset of every kernel element in row-major order, in the padded input."""
        return [
            tuple(index * dilation for index, dilation in zip(indices, self.dilations, strict=True))
            for indices in np.ndindex(*self.kernel)
        ]


def _window(s: Step, kernel: tuple[int, ...]) -> Window:
    axes = range(2, 2 + len(kernel))
    inputs, outputs = static_dims(s.graph, s.x[0], axes), static_dims(s.graph, s.y, axes)
    ones = [1] * len(kernel)
    strides, dilations = tuple(s.attribute("strides", ones)), tuple(s.attribute("dilations", ones))
    pads = s.attribute("pads", [0] * 2 * len(kernel))
    window = Window(kernel, strides, dilations, tuple(pads[: len(kernel)]), inputs, outputs)
    mode = s.attribute("auto_pad", "NOTSET")
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        window = _padded_to_same(s, window, mode)
    last = [(count - 1) * stride for count, stride in zip(outputs, strides, strict=True)]
    if any(start >= begin + size for start, begin, size in zip(last, window.begin, inputs, strict=True)):
        s.refuse("its last window starts past the end of the input, and runtimes drop it")
    return window


def _padded_to_same(s: Step, window: Window, mode: str) -> Window:
    """Return the window with the padding that "same" means: as much as the outputs need, half on either side."""
    bare = dataclasses.replace(window, begin=(0,) * len(window.kernel))
    # ONNX specifies neither, and runtimes differ.
    if max(window.dilations) > 1:
        s.refuse(f"auto_pad={mode} with dilations")
    if min(bare.overhang) < 0:
        s.refuse(f"auto_pad={mode} with strides that skip pixels")
    return dataclasses.replace(
        window, begin=tuple(size // 2 if mode == "SAME_UPPER" else (size + 1) // 2 for size in bare.overhang)
    )


def _conv(s: Step) -> str:
    kernel = static_dims(s.graph, s.x[1], range(2, s.rank(s.x[1])))
    channels = static_dims(s.graph, s.y, [1])
    window = _window(s, kernel)
    flat = s.emit("Reshape", s.gradient, s.integers(-1, *channels, *window.outputs))
    spread = s.emit("ConvTranspose", flat, s.x[1], group=s.attribute("group", 1), **window.scatter_attributes())
    return with_lead(s, spread, static_dims(s.graph, s.x[0], [1]) + window.inputs)


def _conv_transpose(s: Step) -> str:
    """The gradient of a transposed convolution is the convolution that it transposes."""
    kernel = static_dims(s.graph, s.x[1], range(2, s.rank(s.x[1])))
    window = _transposed_window(s, kernel)
    if any(-rest >= stride for rest, stride in zip(window.overhang, window.strides, strict=True)):
        s.refuse("output_padding is as long as a stride")
    flat = s.emit("Reshape", s.gradient, s.integers(-1, *static_dims(s.graph, s.y, [1]), *window.inputs))
    gathered = s.emit(
        "Conv",
        flat,
        s.x[1],
        group=s.attribute("group", 1),
        kernel_shape=list(kernel),
        strides=list(window.strides),
        dilations=list(window.dilations),
        pads=[*window.begin, *window.end],
    )
    return with_lead(s, gathered, static_dims(s.graph, s.x[0], [1]) + window.outputs)


def _transposed_window(s: Step, kernel: tuple[int, ...]) -> Window:
    """Return the geometry of the convolution that a ConvTranspose transposes: it reads y and computes x."""
    axes = range(2, 2 + len(kernel))
    large, small = static_dims(s.graph, s.y, axes), static_dims(s.graph, s.x[0], axes)
    ones, zeros = [1] * len(kernel), (0,) * len(kernel)
    strides, dilations = tuple(s.attribute("strides", ones)), tuple(s.attribute("dilations", ones))
    mode = s.attribute("auto_pad", "NOTSET")
    if mode == "VALID" or not (mode.startswith("SAME") or s.attribute("output_shape")):
        begin = tuple(s.attribute("pads", zeros)[: len(kernel)])
        return Window(kernel, strides, dilations, begin, large, small)
    added = s.attribute("output_padding", zeros)
    overhang = Window(kernel, strides, dilations, zeros, large, small).overhang
    total = [size + extra for size, extra in zip(overhang, added, strict=True)]
    begin = tuple(size // 2 if mode == "SAME_UPPER" else size - size // 2 for size in total)
    return Window(kernel, strides, dilations, begin, large, small)


def _max_pool(s: Step) -> str:
    """Each window's gradient goes to its first maximum in row-major order, as in TensorFlow and PyTorch."""
    if s.attribute("storage_order", 0):
        s.refuse("storage_order=1 is not row-major")
    window = _window(s, tuple(s.attribute("kernel_shape")))
    size = math.prod(window.kernel)
    first = s.emit("ArgMax", _stacked_windows(s, window), axis=2, keepdims=1)
    offsets = s.graph.emit_constant(np.arange(size, dtype=np.int64).reshape(-1, *[1] * len(window.kernel)))
    chosen = s.emit("Equal", first, offsets)
    gradient = s.emit("Unsqueeze", s.gradient, s.integers(3))
    routed = s.emit("Where", chosen, gradient, s.constant(0))
    one_hot = np.eye(size).reshape(size, 1, *window.kernel)
    return _scatter(s, routed, window, one_hot)


def _stacked_windows(s: Step, window: Window) -> str:
    """Return the input's windows as (N, C, kernel elements, *outputs)."""
    source = s.x[0]
    if any(window.begin) or any(window.end):
        lowest = s.constant(np.finfo(s.graph.type(source).dtype).min)
        source = s.emit("Pad", source, s.integers(0, 0, *window.begin, 0, 0, *window.end), lowest)
    axes = s.integers(*range(2, 2 + len(window.kernel)))
    slices = []
    for start in window.starts():
        stop = [
            first + (count - 1) * stride + 1
            for first, count, stride in zip(start, window.outputs, window.strides, strict=True)
        ]
        part = s.emit("Slice", source, s.integers(*start), s.integers(*stop), axes, s.integers(*window.strides))
        slices.append(s.emit("Unsqueeze", part, s.integers(2)))
    return s.emit("Concat", *slices, axis=2)


def _average_pool(s: Step) -> str:
    window = _window(s, tuple(s.attribute("kernel_shape")))
    shares = s.times(s.constant(1 / _window_counts(s, window)))
    return _scatter(s, shares, window, np.ones((1, 1, *window.kernel)))


def _window_counts(s: Step, window: Window) -> Array:
    """Return how many elements each window averages over, shape ``outputs``."""
    # Explicit padding may count; what ceil_mode adds beyond it never does.
    asked = list(s.attribute("pads", [0] * 2 * len(window.kernel)))[len(window.kernel) :]
    if s.attribute("auto_pad", "NOTSET") != "NOTSET":
        asked = list(window.end)
    counts = np.ones(())
    for axis, length in enumerate(window.inputs):
        low, high = 0, length
        if s.attribute("count_include_pad", 0):
            low, high = -window.begin[axis], length + asked[axis]
        read = (
            np.arange(window.outputs[axis])[:, None] * window.strides[axis]
            - window.begin[axis]
            + np.arange(window.kernel[axis]) * window.dilations[axis]
        )
        counts = np.multiply.outer(counts, ((read >= low) & (read < high)).sum(axis=1))
    return counts


def _scatter(s: Step, gradient: str, window: Window, kernel: Array) -> str:
    """Spread a gradient of the windows (..., kernel.shape[0], *outputs) over the input, channel by channel."""
    flat = s.emit("Reshape", gradient, s.integers(-1, kernel.shape[0], *window.outputs))
    spread = s.emit("ConvTranspose", flat, s.constant(kernel), **window.scatter_attributes())
    return with_lead(s, spread, static_dims(s.graph, s.x[0], [1]) + window.inputs)


def _lp_pool(s: Step) -> str:
    """Y = (sum |x|^p)^(1/p) has the slope sign(x) (|x|/y)^(p-1)."""
    window = _window(s, tuple(s.attribute("kernel_shape")))
    exponent = s.attribute("p", 2) - 1
    shares = s.emit("Div", s.gradient, _signed_power(s, one_for_zero(s, s.y), exponent))
    return s.emit(
        "Mul",
        _scatter(s, shares, window, np.ones((1, 1, *window.kernel))),
        _signed_power(s, s.x[0], exponent),
    )


def _signed_power(s: Step, value: str, exponent: int) -> str:
    """Sign(x) * |x|^exponent."""
    if exponent == 1:
        return value
    power = s.emit("Pow", s.emit("Abs", value), s.constant(exponent))
    return s.emit("Mul", s.emit("Sign", value), power)


def _global_max_pool(s: Step) -> str:
    axes = list(range(2 - s.rank(s.x[0]), 0))
    return s.emit("Where", first_equal(s, s.y, axes), s.gradient, s.constant(0))


def _global_average_pool(s: Step) -> str:
    spatial = static_dims(s.graph, s.x[0], range(2, s.rank(s.x[0])))
    return s.times(s.constant(np.full(spatial, 1 / math.prod(spatial))))


defvjp("Conv", _conv, None, None)


defvjp("ConvTranspose", _conv_transpose, None, None)


defvjp("MaxPool", _max_pool)


defvjp("AveragePool", _average_pool)


defvjp("LpPool", _lp_pool)


defvjp("GlobalAveragePool", _global_average_pool)


defvjp("GlobalMaxPool", _global_max_pool)
