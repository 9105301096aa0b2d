"""Sessions without the gradients of the image: ONNX Runtime computes every output, whether it is fetched or not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..metadata import IMAGE_GRADIENTS
from .stored import read_stored

if TYPE_CHECKING:
    import onnx


def without_image_gradients(path: Path) -> bytes | None:
    """Return a file's model without that output, with its weights left in the file; None if it has no such output."""
    import onnx

    try:
        stored = read_stored(path)
        if IMAGE_GRADIENTS.encode() not in stored.message:
            return None
        model = onnx.ModelProto.FromString(stored.message)
    except Exception:  # noqa: BLE001 - ONNX Runtime opens the file, and says what is wrong with it
        return None
    drop_image_gradients(model)
    message: bytes = model.SerializeToString()
    return message


def drop_image_gradients(model: onnx.ModelProto) -> None:
    """Remove the output from a model, and all nodes and weights that only it needs."""
    graph = model.graph
    outputs = [item for item in graph.output if item.name != IMAGE_GRADIENTS]
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
