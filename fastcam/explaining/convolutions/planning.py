"""Which convolutions of a model our kernels take, and what each of them takes along.

A layer is a `Conv` with what follows it and can be computed while its results are at hand: the sum with a residual, ReLU
or Clip, 2x2 max pooling. Everything else stays with ONNX Runtime: groups, dilation, padding that depends on the size,
weights that are computed, and whatever the rule of `costs` expects to gain nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .stored import StoredModel

if TYPE_CHECKING:
    import onnx

    from ...kernels import _cpu

TO_LAST, TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)


@dataclass(frozen=True)
class Layer:
    """A convolution with what is fused into it.

    Attributes
    ----------
    nodes : tuple of onnx.NodeProto
        The Conv first; the last one makes ``output``.
    input, weights, output : str
        Values.
    bias, residual : str or None
        Values.
    channels, kernel : (int, int)
        Inputs and outputs; height and width.
    stride : int
    pads : tuple of int
        Top, left, bottom, right.
    low, high : float
        Bounds of the result.
    pool : bool
        Whether 2x2 max pooling follows.
    size : (int, int)
        Height and width of the input.
    result_size : (int, int)
        Height and width before the pooling.
    channels_first : bool
        Order of the input's axes; the output's channels are last always.
    """

    nodes: tuple[onnx.NodeProto, ...]
    input: str
    weights: str
    output: str
    bias: str | None
    channels: tuple[int, int]
    kernel: tuple[int, int]
    stride: int
    pads: tuple[int, int, int, int]
    size: tuple[int, int]
    result_size: tuple[int, int]
    residual: str | None = None
    low: float = -math.inf
    high: float = math.inf
    pool: bool = False
    channels_first: bool = False

    @property
    def name(self) -> str:
        """What the layer is called: its value after the activation, as the source model named it."""
        return self.output

    def native(self) -> _cpu.ConvolutionLayer:
        """Return the layer as the kernels know it."""
        from ...kernels import _cpu

        return _cpu.ConvolutionLayer(
            channels=self.channels,
            kernel=self.kernel,
            stride=self.stride,
            pads=self.pads,
            channels_first=self.channels_first,
            residual=self.residual is not None,
            pool=self.pool,
            low=self.low,
            high=self.high,
        )

    def algorithm(self) -> _cpu.Algorithm | None:
        """Return how our kernels would compute it, None where they cannot."""
        from ...kernels import _cpu

        return _cpu.choose_algorithm(self.native(), *self.size)


@dataclass
class Network:
    """A model's nodes with what has to be known of their values.

    Attributes
    ----------
    nodes : sequence of onnx.NodeProto
        In topological order.
    shapes : dict of str to tuple
        Of the values; an open dimension is a text, or None.
    outputs : set of str
        The graph's.
    constants : dict of str to tuple of int
        Shapes of the float32 weights by name.
    small : dict of str to ndarray
        The constants that the message holds.
    """

    nodes: Sequence[onnx.NodeProto]
    shapes: Mapping[str, tuple[int | str | None, ...]]
    outputs: set[str]
    constants: Mapping[str, tuple[int, ...]]
    small: Mapping[str, np.ndarray[Any, Any]]
    readers: dict[str, list[int]] = field(init=False)
    positions: dict[str, int] = field(init=False)  # of the node that makes a value

    def __post_init__(self) -> None:
        self.readers, self.positions = {}, {}
        for position, node in enumerate(self.nodes):
            for name in node.input:
                self.readers.setdefault(name, []).append(position)
            self.positions.update(dict.fromkeys(node.output, position))

    def only_reader(self, value: str) -> onnx.NodeProto | None:
        """Return the node that alone reads a value; None where there are several, or the caller reads it."""
        readers = self.readers.get(value, [])
        return self.nodes[readers[0]] if len(readers) == 1 and value not in self.outputs else None


def read_network(model: onnx.ModelProto, stored: StoredModel) -> Network:
    """Look at a model whose large weights are stored elsewhere."""
    import onnx
    from onnx import numpy_helper

    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    small = {item.name: item for item in model.graph.initializer if item.name not in stored.tensors}
    held = {name: numpy_helper.to_array(item) for name, item in small.items() if not item.external_data}
    floats = {name: tensor.shape for name, tensor in stored.tensors.items() if tensor.dtype == np.float32}
    inputs = {item.name for item in model.graph.input}
    return Network(
        nodes=list(model.graph.node),
        shapes={value.name: _shape(value) for value in values},
        outputs={value.name for value in model.graph.output},
        constants=floats | {name: array.shape for name, array in held.items() if array.dtype == np.float32},
        # A default that a caller may replace is no constant.
        small={name: array for name, array in held.items() if name not in inputs},
    )


def _shape(value: onnx.ValueInfoProto) -> tuple[int | str | None, ...]:
    dims = value.type.tensor_type.shape.dim
    return tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in dims)


def find_layers(network: Network) -> list[Layer]:
    """Return the layers that our kernels can compute, in the order of their last nodes."""
    layers: list[Layer] = []
    taken: set[int] = set()
    plain = [layer for node in network.nodes if (layer := _layer(network, node)) is not None]
    for layer in plain:
        whole = layer
        for fuse in (_with_residual, _with_bounds, _with_pool):
            candidate = fuse(network, whole, taken)
            if candidate is not None and candidate.algorithm() is not None:
                whole = candidate
                taken.add(id(whole.nodes[-1]))
        if whole.algorithm() is not None:
            layers.append(whole)
    return sorted(layers, key=lambda layer: network.positions[layer.output])


def _layer(network: Network, node: onnx.NodeProto) -> Layer | None:
    """Read a Conv; None where it is another node, or one that our kernels do not know."""
    if node.op_type != "Conv" or node.domain not in ("", "ai.onnx"):
        return None
    source, weights, *rest = node.input
    bias = rest[0] if rest and rest[0] else None
    shape, kernel = network.shapes.get(source, ()), network.constants.get(weights, ())
    if len(shape) != 4 or len(kernel) != 4 or (bias is not None and bias not in network.constants):
        return None
    found = attributes(node)
    strides = found.get("strides", [1, 1])
    dilations, group = found.get("dilations", [1, 1]), found.get("group", 1)
    if group != 1 or set(dilations) != {1} or len(set(strides)) != 1:
        return None
    size = (shape[2], shape[3])
    pads = _pads(found)
    if pads is None or not all(isinstance(side, int) and side > 0 for side in size) or shape[1] != kernel[1]:
        return None
    height, width = (int(side) for side in size if isinstance(side, int))
    rows = (height + pads[0] + pads[2] - kernel[2]) // strides[0] + 1
    columns = (width + pads[1] + pads[3] - kernel[3]) // strides[0] + 1
    if rows < 1 or columns < 1:
        return None
    layer = Layer(
        nodes=(node,),
        input=source,
        weights=weights,
        output=node.output[0],
        bias=bias,
        channels=(kernel[1], kernel[0]),
        kernel=(kernel[2], kernel[3]),
        stride=strides[0],
        pads=pads,
        size=(height, width),
        result_size=(rows, columns),
    )
    return layer if layer.algorithm() is not None else None


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Return a node's attributes by name."""
    from onnx import helper

    return {item.name: helper.get_attribute_value(item) for item in node.attribute}


def _pads(found: Mapping[str, Any]) -> tuple[int, int, int, int] | None:
    automatic = found.get("auto_pad", b"NOTSET")
    if automatic == b"VALID":
        return 0, 0, 0, 0
    top, left, bottom, right = found.get("pads", [0, 0, 0, 0])
    return (top, left, bottom, right) if automatic == b"NOTSET" else None


def _with_residual(network: Network, layer: Layer, taken: set[int]) -> Layer | None:
    """Fuse an Add of two maps of one shape. Of two layers that it adds, the later takes it: the other is done then."""
    node = network.only_reader(layer.output)
    if node is None or node.op_type != "Add" or id(node) in taken or node.input[0] == node.input[1]:
        return None
    (other,) = (name for name in node.input if name != layer.output)
    shape = network.shapes.get(other, ())
    if len(shape) != 4 or None in shape or shape != network.shapes.get(layer.output) or other in network.constants:
        return None
    if network.positions.get(other, -1) > network.positions[layer.output]:
        return None
    return replace(layer, nodes=(*layer.nodes, node), residual=other, output=node.output[0])


def _with_bounds(network: Network, layer: Layer, taken: set[int]) -> Layer | None:
    """Fuse ReLU, or Clip with constant bounds."""
    node = network.only_reader(layer.output)
    bounds = None if node is None else read_bounds(network, node)
    if node is None or bounds is None or id(node) in taken:
        return None
    return replace(layer, nodes=(*layer.nodes, node), low=bounds[0], high=bounds[1], output=node.output[0])


def read_bounds(network: Network, node: onnx.NodeProto) -> tuple[float, float] | None:
    """Return what a Relu or Clip bounds its values by; None for another node, and for bounds that are computed."""
    if node.op_type == "Relu":
        return 0.0, math.inf
    if node.op_type != "Clip":
        return None
    bounds = [-math.inf, math.inf]
    for index, name in enumerate(node.input[1:3]):
        if name and name not in network.small:
            return None
        if name:
            bounds[index] = float(network.small[name])
    return (bounds[0], bounds[1]) if bounds[0] <= bounds[1] else None


def _with_pool(network: Network, layer: Layer, taken: set[int]) -> Layer | None:
    """Fuse a max pooling of 2x2 windows that touch."""
    node = network.only_reader(layer.output)
    if node is None or node.op_type != "MaxPool" or len(node.output) != 1 or id(node) in taken:
        return None
    found = attributes(node)
    plain = {"kernel_shape": [2, 2], "strides": [2, 2], "pads": [0] * 4, "dilations": [1, 1], "ceil_mode": 0}
    expected = {**plain, "strides": [1, 1], **found}
    automatic = found.get("auto_pad", b"NOTSET")
    if automatic not in (b"NOTSET", b"VALID") or any(expected[key] != value for key, value in plain.items()):
        return None
    if min(layer.result_size) < 2:
        return None
    return replace(layer, nodes=(*layer.nodes, node), pool=True, output=node.output[0])

