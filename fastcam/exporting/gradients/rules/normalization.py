"""Gradient rules of normalisations and softmax."""

from __future__ import annotations

import numpy as np

from ....graph import static_dims
from ..table import Step, defvjp
from .common import matrix_along


def _batch_normalization(s: Step) -> str:
    if s.attribute("training_mode", 0):
        s.refuse("it is in training mode")
    gamma, variance = (s.fixed(name).astype(np.float64) for name in (s.x[1], s.x[4]))
    scale = gamma / np.sqrt(variance + s.attribute("epsilon", 1e-5))
    return s.times(s.constant(scale.reshape(-1, *[1] * (s.rank(s.x[0]) - 2))))


defvjp("BatchNormalization", _batch_normalization, None, None, None, None)


# Normalisation within one image
def _layer_normalization(s: Step) -> str:
    return _normalization(s, s.x[0], s.times(s.x[1]), list(range(s.axis(), 0)))


def _group_normalization(s: Step) -> str:
    if s.graph.opset > 20:
        s.refuse("from opset 21 on it scales channels instead of groups; convert the model to opset 20")
    return _normalization_of_groups(s, s.attribute("num_groups"))


def _instance_normalization(s: Step) -> str:
    """Every channel is its own group."""
    return _normalization_of_groups(s, *static_dims(s.graph, s.x[0], [1]))


def _normalization_of_groups(s: Step, groups: int) -> str:
    """Scale and bias have one number per group."""
    x = s.emit("Reshape", s.x[0], s.integers(0, groups, -1))
    gradient = s.emit("Reshape", s.gradient, s.integers(0, 0, groups, -1))
    scaled = s.emit("Mul", gradient, s.emit("Unsqueeze", s.x[1], s.integers(-1)))
    return s.emit("Reshape", _normalization(s, x, scaled, [-1]), s.emit("Shape", s.gradient))


def _normalization(s: Step, x: str, gradient: str, axes: list[int]) -> str:
    """Return the gradient of x in n = (x - mean) / deviation: (g - mean(g) - n mean(g n)) / deviation."""

    def mean(value: str) -> str:
        return s.emit("ReduceMean", value, s.integers(*axes), keepdims=1)

    centred = s.emit("Sub", x, mean(x))
    variance = mean(s.emit("Mul", centred, centred))
    deviation = s.emit("Sqrt", s.emit("Add", variance, s.constant(s.attribute("epsilon", 1e-5))))
    normal = s.emit("Div", centred, deviation)
    along = s.emit("Mul", normal, mean(s.emit("Mul", gradient, normal)))
    rest = s.emit("Sub", s.emit("Sub", gradient, mean(gradient)), along)
    return s.emit("Div", rest, deviation)


def _local_response_normalization(s: Step) -> str:
    """Y_j = x_j d_j^-beta with d = bias + alpha/size * W x^2, where row j of W marks the channels around j.

    Hence g_i d_i^-beta - 2 alpha beta / size * x_i * sum_j W_ji g_j y_j / d_j.
    """
    (channels,), size = static_dims(s.graph, s.x[0], [1]), s.attribute("size")
    alpha, beta = s.attribute("alpha", 1e-4) / size, s.attribute("beta", 0.75)
    distance = np.arange(channels) - np.arange(channels)[:, None]
    window = (-((size - 1) // 2) <= distance) & (distance <= size // 2)
    axis = 1 - s.rank(s.x[0])
    squares = matrix_along(s, s.emit("Mul", s.x[0], s.x[0]), window.T, axis)
    divisor = s.emit("Add", s.constant(s.attribute("bias", 1.0)), s.emit("Mul", s.constant(alpha), squares))
    through_divisor = matrix_along(s, s.times(s.emit("Div", s.y, divisor)), window, axis)
    neighbours = s.emit("Mul", s.emit("Mul", s.constant(2 * alpha * beta), s.x[0]), through_divisor)
    return s.emit("Sub", s.times(s.emit("Pow", divisor, s.constant(-beta))), neighbours)


def _softmax(s: Step) -> str:
    weighted = s.emit("ReduceSum", s.times(s.y), s.integers(s.axis()), keepdims=1)
    return s.emit("Mul", s.y, s.emit("Sub", s.gradient, weighted))


def _log_softmax(s: Step) -> str:
    total = s.emit("ReduceSum", s.gradient, s.integers(s.axis()), keepdims=1)
    return s.emit("Sub", s.gradient, s.emit("Mul", s.emit("Exp", s.y), total))


defvjp("LayerNormalization", _layer_normalization, None, None)


defvjp("InstanceNormalization", _instance_normalization, None, None)


defvjp("GroupNormalization", _group_normalization, None, None)


defvjp("LRN", _local_response_normalization)


defvjp("Softmax", _softmax)


defvjp("LogSoftmax", _log_softmax)
