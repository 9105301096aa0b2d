"""Replaces nodes of a model by custom ops, with transposes where the layout changes.

The kernels write channels-last maps. Ops that work in any layout follow in that layout, so that a whole network can
stay in it; a map is transposed once, for the first node that needs the other layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from .planning import TO_FIRST, TO_LAST, Layer, Network, attributes

if TYPE_CHECKING:
    import onnx

DOMAIN = "fastcam"
# Elementwise ops of one map.
_UNARY = frozenset("Abs Clip Elu HardSigmoid HardSwish Identity LeakyRelu Neg Relu Sigmoid Softplus Sqrt Tanh".split())
# Elementwise ops of two maps.
_BINARY = frozenset("Add Div Mul Sub".split())


class Rewriter:
    """Copies the nodes of a model, replacing some of them by layers.

    Parameters
    ----------
    network : Network
    layers : sequence of Layer
        The convolutions to replace.
    emit : callable
        Returns the node of a layer; it gets the layer and the name of the output, and the inputs are added later.
    replaced : dict, optional
        Further replacements by the id of the original node; None drops a node.

    Attributes
    ----------
    nodes : list of onnx.NodeProto
    layers : list of Layer
        As they were emitted, with the layout of their inputs.
    transposed : list of str
        Values that had to be transposed.
    """

    def __init__(
        self,
        network: Network,
        layers: Sequence[Layer],
        emit: Callable[[Layer, str], onnx.NodeProto],
        replaced: Mapping[int, onnx.NodeProto | None] | None = None,
    ) -> None:
        self._network = network
        replaced = replaced or {}
        self._emit = emit
        self.nodes: list[onnx.NodeProto] = []
        self.layers: list[Layer] = []
        self.transposed: list[str] = []
        # Names of the channels-last copies by value, and the values that have no other copy yet.
        self._last: dict[str, str] = {}
        self._missing: set[str] = set()
        whole = {id(layer.nodes[-1]): layer for layer in layers}
        parts = {id(node) for layer in layers for node in layer.nodes[:-1]}
        for node in network.nodes:
            if id(node) in whole:
                self._add_layer(whole[id(node)])
            elif id(node) not in parts and not self._carry(node):
                stand_in = replaced.get(id(node), node)
                if stand_in is not None:
                    for name in stand_in.input:
                        self._give_first(name)
                    self.nodes.append(stand_in)
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
        """Emit a node in channels-last layout if it works in any layout and its maps are available in that layout."""
        if node.domain not in ("", "ai.onnx") or len(node.output) != 1:
            return False
        permutation = tuple(attributes(node).get("perm", ())) if node.op_type == "Transpose" else None
        if permutation == TO_FIRST:
            # Usually the input of a model that takes channels-last pictures: layers can read it as it is.
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
        """Return the name of the channels-last copy of a map; transpose the map if there is none."""
        if value not in self._last:
            self._last[value] = f"{value}/channels_last"
            self._transpose(value, self._last[value], TO_LAST)
            self.transposed.append(value)
        return self._last[value]

    def _give_first(self, value: str) -> None:
        """Transpose a map back to its own layout and name, unless that has been done."""
        if value in self._missing:
            self._missing.remove(value)
            self._transpose(self._last[value], value, TO_FIRST)
            self.transposed.append(value)

    def _transpose(self, source: str, result: str, permutation: Sequence[int]) -> None:
        from onnx import helper

        self.nodes.append(
            helper.make_node("Transpose", [source], [result], name=f"{result}/transpose", perm=permutation)
        )
