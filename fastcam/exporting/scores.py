"""Find the scores before the activation that turns them into probabilities, however the network expresses it.

Grad-CAM explains the score before the softmax: gradients of probabilities saturate, and mix the classes. Frameworks
write the activation as one node; people expand it, clip it, scale it, or reorder its results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import numpy as np
import onnx
from onnx import helper

from ..errors import ModelError
from ..graph import Dim, Graph, attribute, dependents, operator
from .ops import QUANTIZATION_OPS

# "mixture": probabilities without a single row of scores behind them. "selection": some classes of a softmax.
Activation = Literal["softmax", "sigmoid", "mixture", "selection"]

_ACTIVATION_OPS: Mapping[str, Activation] = {"Softmax": "softmax", "LogSoftmax": "softmax", "Sigmoid": "sigmoid"}

_DETECTION_OPS = ("NonMaxSuppression", "EfficientNMS_TRT", "RoiAlign")


class Found(NamedTuple):
    """What is behind a value that is a probability, or the logarithm of one.

    Attributes
    ----------
    scores : str
        The value before the activation; for a mixture, one of the probabilities that were mixed.
    activation : {"softmax", "sigmoid", "mixture", "selection"}
    is_log : bool
        Whether the value is the logarithm of the probability.
    plain : str
        The activation's own output, where nothing but reshaping follows it.
    """

    scores: str
    activation: Activation
    is_log: bool = False
    plain: str = ""


def remove_score_activation(graph: Graph) -> str:
    """Make the scores before the final softmax or sigmoid the graph's output, as rows (N,classes).

    Ops after the activation that keep the order of the classes, or only reshape, are removed with it.

    Parameters
    ----------
    graph : Graph
        Changed in place.

    Returns
    -------
    str
        "softmax" or "sigmoid", the activation that was removed; "mixture", where the outputs are probabilities without
        a row of scores behind them; "selection", where some classes of a softmax were selected; else "none".

    Raises
    ------
    ModelError
        The output is not one row of scores per image.
    """
    found = _find(graph, graph.producers(), graph.outputs[0])
    if found is not None and found.activation != "mixture":
        _read_from(graph, found)
    # The search may have appended nodes that it did not use.
    graph.prune()
    graph.infer_types()
    make_rows(graph)
    return "none" if found is None else found.activation


def _read_from(graph: Graph, found: Found) -> None:
    """Make the scores the output; ops that reshaped probabilities to rows are kept where the scores need them."""
    if graph.rank(found.scores) == 2 or not found.plain:
        graph.outputs = [found.scores]
        return
    for node in dependents(graph, found.plain):
        # The quantisation steps of probabilities are too fine for scores.
        if operator(node) in QUANTIZATION_OPS:
            graph.replace_uses(node.output[0], node.input[0])
    graph.replace_uses(found.plain, found.scores)


def make_rows(graph: Graph) -> None:
    """Reshape the output to (N,classes), or raise ModelError."""
    scores = graph.outputs[0]
    rank = graph.rank(scores)
    if rank == 1:
        axis = graph.emit_integers(1)
        graph.outputs = [graph.emit("Unsqueeze", scores, axis, stem=f"{scores}/rows")]
    elif rank is not None and rank > 2 and len(_without_ones(graph.shape(scores))) <= 1:
        graph.outputs = [graph.emit("Flatten", scores, axis=1, stem=f"{scores}/rows")]
    if graph.outputs != [scores]:
        graph.infer_types()
    rows = graph.outputs[0]
    if graph.rank(rows) != 2 or not isinstance(graph.shape(rows)[1], int):
        raise ModelError(_no_rows(graph, rows))


def _no_rows(graph: Graph, scores: str) -> str:
    if graph.rank(scores) is None:
        return f"the scores {scores!r} have a shape of unknown rank: a classifier gives (N, classes)"
    shape = graph.shape(scores)
    what = f"the scores {scores!r} have shape {shape}: a classifier gives (N, classes)"
    if any(operator(node).rpartition("::")[2] in _DETECTION_OPS for node in graph.nodes):
        return f'{what}. This is a detector: export it with score="boxes"'
    if len(shape) == 4:
        return (
            f'{what}. For a segmentation network, which gives one score per pixel, pass score="segmentation"; else '
            "name a value with one row of scores per image as output=..."
        )
    if len(shape) == 3:
        return (
            f'{what}. For a detector, which gives several boxes per image, pass score="boxes"; else name a value with '
            "one row of scores per image as output=..."
        )
    return what


def ends_in_weighted_sum(graph: Graph) -> bool:
    """Return whether the outputs are weighted sums, which are unbounded: scores, not probabilities."""
    producers = graph.producers()
    node = producers.get(graph.outputs[0])
    while node is not None and (_passes_scores(graph, node) or operator(node) == "GlobalAveragePool"):
        node = producers.get(node.input[0])
    return node is not None and operator(node) in ("Conv", "Gemm", "MatMul")


_Producers = Mapping[str, onnx.NodeProto]


def _find(graph: Graph, producers: _Producers, value: str) -> Found | None:
    """Return what is behind ``value`` if it is a probability or its logarithm."""
    node = producers.get(value)
    if node is None:
        return None
    op = operator(node)
    if op in _ACTIVATION_OPS:
        runs = _runs_over_classes(graph, node)
        activation = _ACTIVATION_OPS[op]
        return Found(node.input[0], activation, op == "LogSoftmax", plain=node.output[0]) if runs else None
    if _passes_scores(graph, node):
        return _find(graph, producers, node.input[0])
    reader = _READERS.get(op)
    found = None if reader is None else reader(graph, producers, node)
    return found._replace(plain="") if found else None


def _clip(graph: Graph, producers: _Producers, node: onnx.NodeProto) -> Found | None:
    """Clipping keeps the order."""
    bounded = [name for name in node.input if name and _number(graph, name) is None]
    return _find(graph, producers, bounded[0]) if len(bounded) == 1 else None


def _exp(graph: Graph, producers: _Producers, node: onnx.NodeProto) -> Found | None:
    found = _find(graph, producers, node.input[0])
    return found._replace(is_log=False) if found and found.is_log else None


def _log(graph: Graph, producers: _Producers, node: onnx.NodeProto) -> Found | None:
    found = _find(graph, producers, node.input[0])
    return found._replace(is_log=True) if found and not found.is_log and found.activation != "mixture" else None


def _div(graph: Graph, producers: _Producers, node: onnx.NodeProto) -> Found | None:
    """An expanded softmax, an expanded sigmoid, or a division by one positive number."""
    over, under = node.input
    if _number(graph, over) == 1:
        return _written_out_sigmoid(graph, producers, under)
    return _written_out_softmax(graph, producers, over, under) or _scaled(graph, producers, over, _number(graph, under))


def _reciprocal(graph: Graph, producers: _Producers, node: onnx.NodeProto) -> Found | None:
    return _written_out_sigmoid(graph, producers, node.input[0])


def _mul(graph: Graph, producers: _Producers, node: onnx.NodeProto) -> Found | None:
    for first, second in (node.input, node.input[::-1]):
        scaled = _scaled(graph, producers, first, _number(graph, second))
        if scaled is not None:
            return scaled
        divisor = producers.get(second)
        if divisor is not None and operator(divisor) == "Reciprocal":
            found = _written_out_softmax(graph, producers, first, divisor.input[0])
            if found is not None:
                return found
    return _mixture(graph, producers, node)


def _add(graph: Graph, producers: _Producers, node: onnx.NodeProto) -> Found | None:
    for first, second in (node.input, node.input[::-1]):
        if _number(graph, second) is not None:
            return _find(graph, producers, first)
    return _mixture(graph, producers, node)


def _sub(graph: Graph, producers: _Producers, node: onnx.NodeProto) -> Found | None:
    """An expanded logarithm of a softmax, a shift by one number, or 1 - p."""
    first, second = node.input
    if _number(graph, second) is not None:
        return _find(graph, producers, first)
    if _number(graph, first) == 1:
        found = _find(graph, producers, second)
        if found is None or found.activation != "sigmoid" or found.is_log:
            return None
        # 1 - sigmoid(z) is sigmoid(-z).
        return Found(_emit_typed(graph, "Neg", found.scores), "sigmoid")
    if _is_log_of_sum(graph, producers, second, first):
        return Found(_without_row_shift(graph, producers, first), "softmax", is_log=True)
    return None


def _gather(graph: Graph, producers: _Producers, node: onnx.NodeProto) -> Found | None:
    """Classes in another order, or some of them."""
    indices = graph.constants.get(node.input[1])
    if attribute(node, "axis", 0) not in (1, -1) or indices is None or indices.ndim != 1:
        return None
    return _selected(graph, producers, node)


def _slice(graph: Graph, producers: _Producers, node: onnx.NodeProto) -> Found | None:
    axes = graph.constants.get(node.input[3]) if len(node.input) > 3 else None
    if axes is None or axes.tolist() not in ([1], [-1]) or any(name not in graph.constants for name in node.input[1:3]):
        return None
    return _selected(graph, producers, node)


def _selected(graph: Graph, producers: _Producers, node: onnx.NodeProto) -> Found | None:
    found = _find(graph, producers, node.input[0])
    if found is None or found.activation in ("mixture", "selection") or graph.rank(found.scores) != 2:
        return None
    before, after = graph.shape(found.scores)[1], graph.shape(node.output[0])[1]
    if not isinstance(before, int) or not isinstance(after, int):
        return None
    if found.activation == "sigmoid":
        return found._replace(scores=_emit_like(graph, node, found.scores))
    if after == before and _is_permutation(graph, node, before):
        return found._replace(scores=_emit_like(graph, node, found.scores))
    if before == 2 and after == 1 and not found.is_log:
        # With two classes, the softmax of one is the sigmoid of its score minus the other's.
        signs = graph.emit_constant(np.array([[1, -1], [-1, 1]], np.float32))
        differences = _emit_typed(graph, "MatMul", found.scores, signs)
        return Found(_emit_like(graph, node, differences), "sigmoid")
    return found._replace(scores=_emit_like(graph, node, found.scores), activation="selection")


def _is_permutation(graph: Graph, node: onnx.NodeProto, count: int) -> bool:
    if operator(node) != "Gather":
        # A slice of all classes may reverse them, and repeats none.
        return True
    return sorted(graph.constants[node.input[1]] % count) == list(range(count))


def _concat(graph: Graph, producers: _Producers, node: onnx.NodeProto) -> Found | None:
    if attribute(node, "axis") not in (1, -1) or graph.rank(node.output[0]) != 2:
        return None
    parts = [_find(graph, producers, name) for name in node.input]
    found = [part for part in parts if part is not None and not part.is_log]
    if len(found) != len(parts):
        return None
    if all(part.activation == "sigmoid" and graph.rank(part.scores) == 2 for part in found):
        return Found(_emit_typed(graph, "Concat", *(part.scores for part in found), axis=1), "sigmoid")
    return found[0]._replace(activation="mixture")


def _mixture(graph: Graph, producers: _Producers, node: onnx.NodeProto) -> Found | None:
    """A sum, mean or product of probabilities of several branches."""
    parts = [_find(graph, producers, name) for name in node.input if _number(graph, name) is None]
    sound = [part for part in parts if part is not None and not part.is_log]
    return sound[0]._replace(activation="mixture") if len(sound) == len(parts) > 0 else None


def _scaled(graph: Graph, producers: _Producers, value: str, factor: float | None) -> Found | None:
    if factor is None or factor <= 0:
        return None
    return _find(graph, producers, value)


def _written_out_softmax(graph: Graph, producers: _Producers, over: str, under: str) -> Found | None:
    """``exp(z) / sum(exp(z))``, with or without the row's maximum subtracted from z."""
    exponent = _exponent(producers, over)
    if exponent is None or not _is_row_sum_of_exp(graph, producers, under, exponent):
        return None
    return Found(_without_row_shift(graph, producers, exponent), "softmax")


def _written_out_sigmoid(graph: Graph, producers: _Producers, under: str) -> Found | None:
    """``1 / (1 + exp(-z))``."""
    total = producers.get(under)
    if total is None or operator(total) != "Add":
        return None
    for one, other in (total.input, total.input[::-1]):
        exponent = _exponent(producers, other)
        if _number(graph, one) == 1 and exponent is not None:
            return Found(_negated(graph, producers, exponent), "sigmoid")
    return None


def _negated(graph: Graph, producers: _Producers, value: str) -> str:
    node = producers.get(value)
    if node is not None and operator(node) == "Neg":
        return str(node.input[0])
    return _emit_typed(graph, "Neg", value)


def _exponent(producers: _Producers, value: str) -> str | None:
    node = producers.get(value)
    return str(node.input[0]) if node is not None and operator(node) == "Exp" else None


def _is_row_sum_of_exp(graph: Graph, producers: _Producers, value: str, exponent: str) -> bool:
    node = producers.get(value)
    if node is None or operator(node) != "ReduceSum" or not _reduces_rows(graph, node):
        return False
    return _exponent(producers, node.input[0]) == exponent


def _is_log_of_sum(graph: Graph, producers: _Producers, value: str, exponent: str) -> bool:
    node = producers.get(value)
    if node is not None and operator(node) == "ReduceLogSumExp":
        return node.input[0] == exponent and _reduces_rows(graph, node)
    if node is None or operator(node) != "Log":
        return False
    return _is_row_sum_of_exp(graph, producers, node.input[0], exponent)


def _reduces_rows(graph: Graph, node: onnx.NodeProto) -> bool:
    """Return whether a reduction turns rows (N,classes) into one number per image, (N,1)."""
    return graph.rank(node.input[0]) == 2 and graph.rank(node.output[0]) == 2 and graph.shape(node.output[0])[1] == 1


def _without_row_shift(graph: Graph, producers: _Producers, value: str) -> str:
    """Return the scores without a number subtracted from the whole row, such as its maximum: softmax ignores it."""
    node = producers.get(value)
    while node is not None and operator(node) == "Sub":
        first, second = node.input
        if graph.rank(first) != 2 or graph.rank(second) != 2 or graph.shape(second)[1] != 1:
            break
        value, node = first, producers.get(first)
    return value


def _number(graph: Graph, name: str) -> float | None:
    """Return the single number that a constant holds, possibly repeated; None for any other value."""
    array = graph.constants.get(name)
    if array is None or not array.size or array.dtype.kind != "f" or not (array == array.flat[0]).all():
        return None
    return float(array.flat[0])


def _emit_typed(graph: Graph, op: str, *inputs: str, **attributes: object) -> str:
    value = graph.emit(op, *inputs, stem="scores", **attributes)
    graph.infer_types()
    return value


def _emit_like(graph: Graph, node: onnx.NodeProto, value: str) -> str:
    """Append the op of ``node``, applied to another value."""
    attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    return _emit_typed(graph, node.op_type, value, *node.input[1:], **attributes)


def _passes_scores(graph: Graph, node: onnx.NodeProto) -> bool:
    """Return whether the node preserves each image's row of scores, only adding or removing axes of size 1."""
    op = operator(node)
    if op == "Cast":
        return all(graph.rank(name) and graph.type(name).dtype.kind == "f" for name in (node.input[0], node.output[0]))
    if op not in ("Reshape", "Flatten", "Squeeze", "Unsqueeze"):
        return op == "Identity" or op in QUANTIZATION_OPS
    if graph.rank(node.input[0]) is None or graph.rank(node.output[0]) is None:
        return False
    before, after = graph.shape(node.input[0]), graph.shape(node.output[0])
    return len(before) > 0 and before[0] == after[0] and _without_ones(before) == _without_ones(after)


def _without_ones(shape: tuple[Dim, ...]) -> list[Dim]:
    return [size for size in shape[1:] if size != 1]


def _runs_over_classes(graph: Graph, node: onnx.NodeProto) -> bool:
    """Return whether the activation is element-wise, or a softmax over axis 1 that holds all scores of an image."""
    if operator(node) == "Sigmoid":
        return True
    rank = graph.rank(node.input[0])
    if rank is None:
        return False
    axis = attribute(node, "axis", -1) % rank
    return axis == 1 and len(_without_ones(graph.shape(node.input[0]))) <= 1


_READERS: Mapping[str, Callable[[Graph, _Producers, onnx.NodeProto], Found | None]] = {
    "Add": _add,
    "Clip": _clip,
    "Concat": _concat,
    "Div": _div,
    "Exp": _exp,
    "Gather": _gather,
    "Log": _log,
    "Max": _clip,
    "Mean": _mixture,
    "Min": _clip,
    "Mul": _mul,
    "Reciprocal": _reciprocal,
    "Slice": _slice,
    "Sub": _sub,
    "Sum": _mixture,
}
