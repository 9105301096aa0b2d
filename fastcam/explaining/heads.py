"""The head of an explained model: what turns the activations of a layer into scores, as a session of its own.

Setting one channel to zero is cheap for most heads. They start with ops that keep channels apart, pooling and
reshaping, and then a dense layer. Up to there the head is a sum over channels: W p + b = sum of W_k p_k + b. So the
results without each of the channels are differences of parts of one product, and only what follows runs for every
channel. For a VGG16 that is a fifth of the work, and the largest weights are read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..arrays import Array, Floats
from ..errors import LayerError, ModelError
from ..metadata import layer_outputs
from .providers import import_onnxruntime
from .runs import NO_LIMIT, TimeLimit, run, wait_for

if TYPE_CHECKING:
    import onnx
    import onnxruntime

    from ..graph import Graph

# Ops that compute every pixel of a map from its own channel.
_CHANNELWISE = frozenset(
    "AveragePool Clip Dropout GlobalAveragePool GlobalMaxPool HardSigmoid HardSwish Identity LeakyRelu MaxPool Relu "
    "Sigmoid Tanh".split()
)
# Ops that move numbers and do not change them.
_MOVING = frozenset("Dropout Flatten Identity Reshape Squeeze Transpose Unsqueeze".split())
_AVERAGES = frozenset(["GlobalAveragePool", "ReduceMean"])
# Ops behind the dense layer that leave a score an affine function of its results.
_AFFINE = frozenset("Add Concat Flatten Identity Neg Reshape Squeeze".split())


@dataclass(frozen=True)
class WholeHead:
    """A head that has to run for every channel: activations (n,C,h,w) -> scores."""

    session: onnxruntime.InferenceSession

    def score(self, activations: Floats) -> Floats:
        """Return the scores (N,classes) of activations (N,C,h,w)."""
        return _answer(self.session, activations, NO_LIMIT)

    def without_channels(self, activations: Floats, batch: int, limit: TimeLimit) -> Floats:
        """See `Head`."""
        return np.concatenate([self._ablated(activations, rows, limit) for rows in _chunks(len(activations), batch)])

    def _ablated(self, activations: Floats, rows: slice, limit: TimeLimit) -> Floats:
        copies = np.repeat(activations[None], rows.stop - rows.start, axis=0)
        copies[np.arange(len(copies)), np.arange(rows.start, rows.stop)] = 0
        return _answer(self.session, copies, limit)


@dataclass(frozen=True)
class _Dense:
    """A head that starts with a dense layer, behind ops that keep channels apart.

    Attributes
    ----------
    pool : InferenceSession
        Activations (1,C,h,w) -> what the dense layer reads, (1,F).
    parts : ndarray
        The dense layer's weights by channel, (C,F/C,U).
    order : ndarray
        Positions (C,F/C) in F of each channel's numbers.
    empty : ndarray
        (F,): what it reads for activations of 0.
    constant : ndarray
        (U,): what it gives then.
    rest : InferenceSession or None
        Its results (n,U) -> scores; None if they are the scores.
    """

    pool: onnxruntime.InferenceSession
    parts: Floats
    order: Array
    empty: Floats
    constant: Floats
    rest: onnxruntime.InferenceSession | None

    def without_channels(self, activations: Floats, batch: int, limit: TimeLimit) -> Floats:
        """See `Head`."""
        pooled = _answer(self.pool, activations[None], limit)[0]
        # (C,1,F/C) times (C,F/C,U): each channel's part of the product.
        parts = np.matmul((pooled - self.empty)[self.order][:, None], self.parts)[:, 0]
        whole = parts.sum(axis=0, dtype=np.float64) + self.constant
        results = np.asarray(whole - parts, np.float32)
        if self.rest is None:
            return results
        rows = _chunks(len(results), max(batch, _ROWS))
        return np.concatenate([_answer(self.rest, results[chunk], limit) for chunk in rows])


class Head:
    """Scores activations of one layer.

    Parameters
    ----------
    path : Path
        The explained model's file.
    position : int
        Number of the layer.
    threads : int or None

    Attributes
    ----------
    is_linear : bool
        Whether the scores are an affine function of the means of the activations over the map.

    Raises
    ------
    LayerError
        The head reads other values than the layer.
    ModelError
        The file cannot be read.
    """

    def __init__(self, path: Path, position: int, threads: int | None) -> None:
        name = layer_outputs(position).activations
        head = _read_head(path, name)
        pooling, moving, dense = _before_dense(head, name)
        before = {id(node) for node in (*pooling, *moving, dense)}
        self.is_linear = (
            dense is not None
            and [node.op_type in _AVERAGES for node in pooling] == [True]
            and all(node.op_type in _AFFINE for node in head.nodes if id(node) not in before)
        )
        self._ablation: _Dense | WholeHead = (
            None if dense is None else _open_dense(head, name, pooling, moving, dense, threads)
        ) or WholeHead(_open(head, threads))

    def without_channels(self, activations: Floats, batch: int, limit: TimeLimit) -> Floats:
        """Return the scores (C,classes) with each channel of the activations (C,h,w) set to 0.

        Parameters
        ----------
        activations : ndarray
        batch : int
            Largest number of copies of the activations given to the model at once.
        limit : TimeLimit
        """
        return self._ablation.without_channels(activations, batch, limit)


def open_head(path: Path, position: int, threads: int | None) -> WholeHead:
    """Return the head of a file's layer as it is; raises as `Head` does."""
    return WholeHead(_open(_read_head(path, layer_outputs(position).activations), threads))


def _read_head(path: Path, name: str) -> Graph:
    """Return the graph from the activations of that name to the scores."""
    import onnx

    from ..graph import from_model, split_graph

    try:
        message = onnx.load(path)
    except Exception as error:  # protobuf and the file system each raise their own
        raise ModelError(f"{path}: it cannot be read: {error}") from error
    graph = from_model(message, str(path.parent))
    del message
    graph.outputs = ["logits"]
    graph.prune()
    _, head = split_graph(graph, name)
    others = [value for value in head.inputs if value != name]
    if others:
        raise LayerError(
            f"{path}: the scores also depend on {', '.join(map(repr, others))}, not only on this layer: its channels "
            "cannot be taken away. Export a later layer"
        )
    head.infer_types()
    return head


def _open_dense(
    head: Graph,
    name: str,
    pooling: Sequence[onnx.NodeProto],
    moving: Sequence[onnx.NodeProto],
    dense: onnx.NodeProto,
    threads: int | None,
) -> _Dense | None:
    """Return the parts of a head with a dense layer; None if its channels do not read equal shares of the weights."""
    from ..graph import TensorType, attribute

    read, result = dense.input[0], dense.output[0]
    channels, *sides = (int(side or 0) for side in head.shape(name)[1:])
    pool = _open(head.copy(nodes=[*pooling, *moving], outputs=[read]), threads)
    empty = _answer(pool, np.zeros((1, channels, *sides), np.float32), NO_LIMIT)[0]
    owners = _owners(head, moving, channels, moving[0].input[0] if moving else read, threads)
    if owners.shape != empty.shape or (np.bincount(owners, minlength=channels) * channels != len(owners)).any():
        return None
    order = np.argsort(owners, kind="stable").reshape(channels, -1)
    weight = head.constants[dense.input[1]]
    by_row = weight.T if attribute(dense, "transB", 0) else weight
    bias = head.constants[dense.input[2]] if len(dense.input) > 2 and dense.input[2] else np.float32(0)
    in_order = (order.ravel() == np.arange(order.size)).all()
    parts = by_row.reshape(*order.shape, -1) if in_order else by_row[order]
    rest = None
    if result not in head.outputs:
        before = {id(node) for node in (*pooling, *moving, dense)}
        kind = TensorType(np.dtype(np.float32), (None, by_row.shape[1]))
        nodes = [node for node in head.nodes if id(node) not in before]
        rest = _open(head.copy(nodes=nodes, inputs={result: kind}), threads)
    return _Dense(pool, parts, order, empty, np.asarray(empty @ by_row + bias), rest)


def _owners(head: Graph, moving: Sequence[onnx.NodeProto], channels: int, value: str, threads: int | None) -> Array:
    """Return the channel (F,) of each number that the dense layer reads."""
    from ..graph import TensorType

    sides = [int(side or 0) for side in head.shape(value)[1:]]
    numbers = np.arange(channels, dtype=np.float32).reshape(1, channels, *[1] * (len(sides) - 1))
    whole = np.ascontiguousarray(np.broadcast_to(numbers, (1, *sides)))
    if moving:
        kind = TensorType(np.dtype(np.float32), (None, *sides))
        session = _open(head.copy(nodes=moving, inputs={value: kind}, outputs=[moving[-1].output[0]]), threads)
        whole = _answer(session, whole, NO_LIMIT)
    return whole.reshape(-1).astype(np.int64)


def _open(graph: Graph, threads: int | None) -> onnxruntime.InferenceSession:
    onnxruntime = import_onnxruntime()
    graph.prune()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    message = graph.to_model().SerializeToString()
    return wait_for(lambda: onnxruntime.InferenceSession(message, options, providers=["CPUExecutionProvider"]))


# Rows of a dense layer: enough to read its weights once for many of them.
_ROWS = 256


def _before_dense(head: Graph, value: str) -> tuple[list[onnx.NodeProto], list[onnx.NodeProto], onnx.NodeProto | None]:
    """Return the nodes that keep channels apart, those that only move numbers, and the dense layer that reads these."""
    pooling: list[onnx.NodeProto] = []
    moving: list[onnx.NodeProto] = []
    while (node := head.only_reader(value)) is not None and node.input[0] == value:
        if _is_dense(head, node):
            return pooling, moving, node
        if node.op_type in _MOVING and not node.domain:
            moving.append(node)
        elif not moving and _keeps_channels_apart(head, node):
            pooling.append(node)
        else:
            break
        value = node.output[0]
    return [], [], None


def _is_dense(head: Graph, node: onnx.NodeProto) -> bool:
    from ..graph import attribute

    if node.op_type not in ("Gemm", "MatMul") or node.domain or head.rank(node.input[0]) != 2:
        return False
    plain = not attribute(node, "transA", 0) and attribute(node, "alpha", 1.0) == attribute(node, "beta", 1.0) == 1
    return plain and all(name in head.constants for name in node.input[1:] if name) and head.rank(node.input[1]) == 2


def _keeps_channels_apart(head: Graph, node: onnx.NodeProto) -> bool:
    """Return whether a node whose input is (N,C,h,w) computes channel k of (N,C,...) from channel k alone."""
    from ..graph import attribute

    constant = all(name in head.constants for name in node.input[1:] if name)
    if node.domain or not constant or head.rank(node.input[0]) != 4:
        return False
    if node.op_type in _CHANNELWISE:
        return True
    if node.op_type != "ReduceMean":
        return False
    axes = head.constants[node.input[1]].tolist() if len(node.input) > 1 else attribute(node, "axes", [])
    return sorted(axis % 4 for axis in axes) == [2, 3]


def _answer(session: onnxruntime.InferenceSession, rows: Floats, limit: TimeLimit) -> Floats:
    name = session.get_inputs()[0].name
    return np.asarray(run(lambda options: session.run(None, {name: np.ascontiguousarray(rows)}, options), limit)[0])


def _chunks(count: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]
