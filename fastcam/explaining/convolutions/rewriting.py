"""A model's nodes with layers that our kernels compute, and transposes where the order of the axes changes.

Our kernels write maps with the channels last. Ops that keep the order of axes are carried along in that order, so that a
whole network stays in it; a map is transposed when the first node needs it in the other order, once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from .planning import TO_FIRST, TO_LAST, Layer, Network, attributes

if TYPE_CHECKING:
    import onnx

DOMAIN, OP = "fastcam", "Convolution"
# Ops of one map that compute each element by itself.
_UNARY = frozenset("Abs Clip Elu HardSigmoid HardSwish Identity LeakyRelu Neg Relu Sigmoid Softplus Sqrt Tanh".split())
# Ops of two maps of one shape.
_BINARY = frozenset("Add Div Mul Sub".split())


class Rewriter:
    """Emits the nodes of a model once more, some of them as layers.

    Attributes
    ----------
    nodes : list of onnx.NodeProto
    layers : list of Layer
        As they were emitted: those that read the channels first say so.
    transposed : list of str
        Values that are transposed.
    """

    def __init__(self, network: Network, layers: Sequence[Layer], emit: Callable[[Layer, str], onnx.NodeProto]) -> None:
        self._network = network
        self._emit = emit
        self.nodes: list[onnx.NodeProto] = []
        self.layers: list[Layer] = []
        self.transposed: list[str] = []
        # Values with the channels last, by the name of the model's value; and which of these are there as such.
        self._last: dict[str, str] = {}
        self._missing: set[str] = set()
        whole = {id(layer.nodes[-1]): layer for layer in layers}
        parts = {id(node) for layer in layers for node in layer.nodes[:-1]}
        for node in network.nodes:
            if id(node) in whole:
                self._add_layer(whole[id(node)])
            elif id(node) not in parts and not self._carry(node):
                for name in node.input:
                    self._give_first(name)
                self.nodes.append(node)
        for name in sorted(network.outputs):
            self._give_first(name)

    def _add_layer(self, layer: Layer) -> None:
        first = replace(layer, channels_first=True)
        reads_first = layer.input not in self._last and first.algorithm() is not None
        chosen = first if reads_first else layer
        source = layer.input if reads_first else self._give_last(layer.input)
        residual = [] if layer.residual is None else [self._give_last(layer.residual)]
        node = self._emit(chosen, self._put_last(layer.output))
        node.input.extend([source, *residual])
        self.nodes.append(node)
        self.layers.append(chosen)

    def _carry(self, node: onnx.NodeProto) -> bool:
        """Emit a node with the channels last where that is possible and its maps are there in that order."""
        if node.domain not in ("", "ai.onnx") or len(node.output) != 1:
            return False
        permutation = tuple(attributes(node).get("perm", ())) if node.op_type == "Transpose" else None
        if permutation == TO_FIRST:
            # A model that takes pictures as they are: whoever can read them so does.
            self._last[node.output[0]] = node.input[0]
            self._missing.add(node.output[0])
            return True
        maps = [name for name in node.input if len(self._network.shapes.get(name, ())) == 4]
        if not maps or not all(name in self._last for name in maps):
            return False
        if permutation == TO_LAST:
            self._copy(node, "Identity", [self._last[maps[0]]], [node.output[0]])
            return True
        if not self._keeps_axes(node, maps):
            return False
        copy = self._copy(
            node, node.op_type, [self._last.get(name, name) for name in node.input], [self._put_last(node.output[0])]
        )
        copy.attribute.extend(node.attribute)
        for item in copy.attribute:
            if node.op_type == "Concat" and item.name == "axis":
                item.i = 3
        return True

    def _keeps_axes(self, node: onnx.NodeProto, maps: Sequence[str]) -> bool:
        shapes = {self._network.shapes[name] for name in maps}
        if node.op_type in _UNARY:
            return maps == [node.input[0]]
        if node.op_type in _BINARY:
            return len(maps) == 2 and len(shapes) == 1 and None not in next(iter(shapes))
        return node.op_type == "Concat" and attributes(node)["axis"] in (1, -3) and len(maps) == len(node.input)

    def _copy(self, node: onnx.NodeProto, op: str, inputs: Iterable[str], outputs: Iterable[str]) -> onnx.NodeProto:
        from onnx import helper

        copy = helper.make_node(op, list(inputs), list(outputs), name=node.name)
        self.nodes.append(copy)
        return copy

    def _put_last(self, value: str) -> str:
        self._last[value] = f"{value}/channels_last"
        self._missing.add(value)
        return self._last[value]

    def _give_last(self, value: str) -> str:
        """Return the name of a map with the channels last, transposed if need be."""
        if value not in self._last:
            self._last[value] = f"{value}/channels_last"
            self._transpose(value, self._last[value], TO_LAST)
            self.transposed.append(value)
        return self._last[value]

    def _give_first(self, value: str) -> None:
        """See to it that a map is there under its own name, with the channels first."""
        if value in self._missing:
            self._missing.remove(value)
            self._transpose(self._last[value], value, TO_FIRST)
            self.transposed.append(value)

    def _transpose(self, source: str, result: str, permutation: Sequence[int]) -> None:
        from onnx import helper

        self.nodes.append(helper.make_node("Transpose", [source], [result], name=f"{result}/transpose", perm=permutation))
