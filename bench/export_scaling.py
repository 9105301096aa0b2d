"""CPU time of an export against the number of nodes: ``python -m bench.export_scaling [CHAIN ...]``.

Every chain consists of the pattern of one pass. The exponent is computed from the last two sizes: 1 is linear, 2
quadratic.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import fastcam
from fastcam.graph import Graph, TensorType

SIZES = (1_000, 5_000, 25_000, 50_000)

Links = Callable[[Graph, str, int], str]


def _node(graph: Graph, op: str, *inputs: str, **attributes: object) -> str:
    return graph.emit(op, *inputs, stem=op.lower(), **attributes)


def identities(graph: Graph, value: str, count: int) -> str:
    """Nodes that are dropped."""
    for _ in range(count):
        value = _node(graph, "Identity", value)
    return value


def convolutions(graph: Graph, value: str, count: int) -> str:
    """Convolutions that absorb a factor per channel."""
    kernel = graph.emit_constant(np.eye(4, dtype=np.float32).reshape(4, 4, 1, 1))
    factor = graph.emit_constant(np.ones((1, 4, 1, 1), np.float32))
    for _ in range(count // 2):
        value = _node(graph, "Mul", _node(graph, "Conv", value, kernel), factor)
    return value


def transposes(graph: Graph, value: str, count: int) -> str:
    """Transposes that cancel."""
    for _ in range(count // 3):
        turned = _node(graph, "Relu", _node(graph, "Transpose", value, perm=[0, 2, 3, 1]))
        value = _node(graph, "Transpose", turned, perm=[0, 3, 1, 2])
    return value


def shapes(graph: Graph, value: str, count: int) -> str:
    """Targets of Reshape that are computed from shapes."""
    for _ in range(count // 3):
        value = _node(graph, "Relu", _node(graph, "Reshape", value, _node(graph, "Shape", value)))
    return value


def affines(graph: Graph, value: str, count: int) -> str:
    """Mul and Add that become a BatchNormalization."""
    row = graph.emit_constant(np.ones((1, 4, 1, 1), np.float32))
    value = _node(graph, "MaxPool", value, kernel_shape=[1, 1])
    for _ in range(count // 3):
        value = _node(graph, "Relu", _node(graph, "Add", _node(graph, "Mul", value, row), row))
    return value


def layer_normalizations(graph: Graph, value: str, count: int) -> str:
    """Token states, each of them a candidate."""
    tokens = _node(graph, "Reshape", value, graph.emit_constant(np.array([0, 4, 64])))
    tokens = _node(graph, "Transpose", tokens, perm=[0, 2, 1])
    ones = graph.emit_constant(np.ones(4, np.float32))
    for _ in range(count):
        tokens = _node(graph, "LayerNormalization", tokens, ones, axis=-1)
    tokens = _node(graph, "Transpose", tokens, perm=[0, 2, 1])
    return _node(graph, "Reshape", tokens, graph.emit_constant(np.array([0, 4, 8, 8])))


def joins(graph: Graph, value: str, count: int) -> str:
    """One Sum over many nodes that are dropped."""
    return _node(graph, "Sum", *(_node(graph, "Identity", value) for _ in range(count)))


CHAINS: dict[str, Links] = {
    links.__name__: links
    for links in (identities, convolutions, transposes, shapes, affines, layer_normalizations, joins)
}


def chain(links: Links, count: int) -> Graph:
    """Return a classifier with about ``count`` nodes between its convolution and its pooling."""
    rng = np.random.default_rng(0)
    graph = Graph([], {}, {"image": TensorType(np.dtype(np.float32), ("batch", 3, 8, 8))}, [], 18)
    kernel = graph.emit_constant(rng.normal(size=(4, 3, 3, 3)).astype(np.float32), stem="kernel")
    features = _node(graph, "Relu", _node(graph, "Conv", "image", kernel, pads=[1, 1, 1, 1]))
    rows = _node(graph, "Flatten", _node(graph, "GlobalAveragePool", links(graph, features, count)))
    weight = graph.emit_constant(rng.normal(size=(4, 100)).astype(np.float32), stem="weight")
    graph.outputs = [_node(graph, "MatMul", rows, weight)]
    return graph


def main() -> None:
    """Print one line per chain."""
    names = sys.argv[1:] or list(CHAINS)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            seconds = []
            for size in SIZES:
                model = chain(CHAINS[name], size).to_model()
                start = time.process_time()
                fastcam.export(model, Path(folder) / "chain.onnx")
                seconds.append(time.process_time() - start)
            exponent = math.log(seconds[-1] / seconds[-2]) / math.log(SIZES[-1] / SIZES[-2])
            print(f"{name}: {', '.join(f'{s:.2f}' for s in seconds)} s at {SIZES} nodes; exponent {exponent:.2f}")


if __name__ == "__main__":
    main()
