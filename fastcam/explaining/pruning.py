"""Sessions without the outputs for single methods: ONNX Runtime computes every output, whether it is fetched or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..metadata import EVIDENCE
from .stored import read_stored

if TYPE_CHECKING:
    import onnx


def without_evidence(path: Path) -> bytes | None:
    """Return a file's model without those outputs, with its weights left in the file; None if it has none."""
    return _pruned(path, drop_evidence)


def only_evidence(path: Path, name: str) -> bytes | None:
    """Return a file's model with that output alone, with its weights left in the file; None if it cannot be read."""
    return _pruned(path, lambda model: _keep_outputs(model, [name]))


def drop_evidence(model: onnx.ModelProto) -> None:
    """Remove the outputs for single methods from a model, and all nodes and weights that only they need."""
    _keep_outputs(model, [item.name for item in model.graph.output if item.name not in EVIDENCE])


def _pruned(path: Path, prune: Callable[[onnx.ModelProto], None]) -> bytes | None:
    import onnx

    try:
        stored = read_stored(path)
        if not any(name.encode() in stored.message for name in EVIDENCE):
            return None
        model = onnx.ModelProto.FromString(stored.message)
    except Exception:  # noqa: BLE001 - ONNX Runtime opens the file, and says what is wrong with it
        return None
    prune(model)
    message: bytes = model.SerializeToString()
    return message


def _keep_outputs(model: onnx.ModelProto, names: list[str]) -> None:
    graph = model.graph
    outputs = [item for item in graph.output if item.name in names]
    if len(outputs) == len(graph.output):
        return
    needed = {item.name for item in outputs}
    nodes = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            nodes.append(node)
    nodes.reverse()
    weights = [item for item in graph.initializer if item.name in needed]
    del graph.value_info[:]
    for field, kept in ((graph.node, nodes), (graph.initializer, weights), (graph.output, outputs)):
        # Copies: clearing a field destroys its messages.
        copies = [type(item).FromString(item.SerializeToString()) for item in kept]
        del field[:]
        field.extend(copies)
