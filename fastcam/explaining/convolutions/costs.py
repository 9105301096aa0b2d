"""Decides which convolutions to replace: by a rule of estimated times, without timing anything when a file is opened.

The unit of time is a multiply-accumulate of ONNX Runtime's convolution. A network gains what its layers save, minus the
transposes where the layout changes. The rule keeps a margin, so that no network becomes slower.
"""

from __future__ import annotations

import math

from ..stored import StoredModel
from .planning import Layer, Network, find_layers
from .rewriting import Rewriter

# Time of a layer relative to ONNX Runtime's, by instruction set and algorithm: estimates, fitted to VGG16 and
# ResNet50. ONNX Runtime's kernels gain more from AVX-512 than Winograd's transforms do. The "avx512" row comes from
# profiles against ONNX Runtime 1.32 on a Sapphire Rapids under load, the other one from an earlier version of the
# kernels on AVX2.
_AVX512 = {"winograd_4x4": 0.6, "winograd_6x6": 0.5, "pointwise": 1.2, "gathered": 1.3}
_OTHERS = {"winograd_4x4": 0.42, "winograd_6x6": 0.4, "pointwise": 1.05, "gathered": 1.3}
# Time to read one byte of weights, which a single image does not reuse; and bytes per byte of the original weights.
_READ = 4
_GROWTH = {"winograd_4x4": 36 / 9, "winograd_6x6": 64 / 9, "pointwise": 1, "gathered": 1}
# Time to transpose one value.
_TRANSPOSE = 60
# Winograd's products are narrow with few channels.
_LEAST_CHANNELS = 16
# A network is rewritten if its convolutions are expected to take at most this share of their time.
_WORTH = 0.92


def may_gain(stored: StoredModel) -> bool:
    """Return whether a model may have convolutions that gain, judging only by the shapes of its weights."""
    shapes = (tensor.shape for tensor in stored.tensors.values())
    return any(len(shape) == 4 and shape[2:] == (3, 3) and min(shape[:2]) >= _LEAST_CHANNELS for shape in shapes)


def choose(network: Network) -> list[Layer]:
    """Return the layers to replace; none if the network as a whole would gain too little."""
    every = find_layers(network)
    winograd = [layer for layer in every if _algorithm(layer).startswith("winograd")]
    if not winograd:
        return []
    plans = [every, [layer for layer in every if _algorithm(layer) != "gathered"], winograd]
    before = sum(map(_time_before, every))
    times = [time(network, plan) + before - sum(map(_time_before, plan)) for plan in plans]
    best = min(range(len(plans)), key=times.__getitem__)
    return plans[best] if times[best] <= _WORTH * before else []


def time(network: Network, layers: list[Layer]) -> float:
    """Return the expected time of the layers and of the transposes around them."""
    from onnx import NodeProto

    def emit(layer: Layer, output: str) -> NodeProto:
        return NodeProto(output=[output])

    already = len(Rewriter(network, [], emit).transposed)
    rewriter = Rewriter(network, layers, emit)
    moved = sum(_elements(network, name) for name in rewriter.transposed[already:])
    return sum(map(_time_after, rewriter.layers)) + _TRANSPOSE * moved


def _time_before(layer: Layer) -> float:
    return _macs(layer) + _READ * _weight_bytes(layer)


def _time_after(layer: Layer) -> float:
    from ...kernels import _cpu

    relative = _AVX512 if _cpu.instruction_set() == "avx512" else _OTHERS
    algorithm = _algorithm(layer)
    return relative[algorithm] * _macs(layer) + _READ * _GROWTH[algorithm] * _weight_bytes(layer)


def _algorithm(layer: Layer) -> str:
    found = layer.algorithm()
    return "" if found is None else str(found.name)


def _macs(layer: Layer) -> int:
    """Multiply-accumulates of a layer for one image."""
    return math.prod((*layer.channels, *layer.kernel, *layer.result_size))


def _weight_bytes(layer: Layer) -> int:
    return 4 * math.prod((*layer.channels, *layer.kernel))


def _elements(network: Network, value: str) -> int:
    return math.prod(side for side in network.shapes.get(value, ())[1:] if isinstance(side, int))
