"""The layers of a model that fastcam's kernels support.

A layer is a `Conv` fused with the nodes after it: the sum with a residual, ReLU or Clip, 2x2 max pooling. ONNX Runtime
keeps everything else: groups, dilation, `auto_pad=SAME_*`, computed weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..stored import StoredModel

if TYPE_CHECKING:
    import onnx

    from ...kernels import _cpu

TO_LAST, TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)


@dataclass(frozen=True)
class Layer:
    """A convolution and the nodes that are fused into it.

    Attributes
    ----------
    nodes : tuple of onnx.NodeProto
        The Conv first; the last one computes ``output``.
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
        Layout of the input; the output is always channels-last.
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
        """Name of the layer: that of its output, which usually is the source model's name."""
        return self.output

    def native(self) -> _cpu.ConvolutionLayer:
        """Return the description that the kernels take."""
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
        """Return how the kernels would compute the layer, or None if they do not support it."""
        from ...kernels import _cpu

        return _cpu.choose_algorithm(self.native(), *self.size)


@dataclass(frozen=True)
class DenseLayer:
    """A dense layer after a ReLU, with the bounds of its own activation.

    Attributes
    ----------
    nodes : tuple of onnx.NodeProto
        The last one makes ``output``.
    input, weights, output : str
        Values; the weights are (inputs, outputs).
    bias : str or None
        Value.
    low, high : float
        Bounds of the result.
    """

    nodes: tuple[onnx.NodeProto, ...]
    input: str
    weights: str
    output: str
    bias: str | None
    low: float = -math.inf
    high: float = math.inf


@dataclass
class Network:
    """The nodes of a model, with the shapes and constants that the rewrite needs.

    Attributes
    ----------
    nodes : sequence of onnx.NodeProto
        In topological order.
    shapes : dict of str to tuple
        Shapes by value name; a dynamic dimension is a string or None.
    outputs : set of str
        The graph's.
    constants : dict of str to tuple of int
        Shapes of the float32 weights by name.
    small : dict of str to ndarray
        Constants stored in the message.
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
        """Return the only reader of a value, or None if there are several or it is an output of the model."""
        readers = self.readers.get(value, [])
        return self.nodes[readers[0]] if len(readers) == 1 and value not in self.outputs else None


def read_network(model: onnx.ModelProto, stored: StoredModel) -> Network:
    """Read a model whose large weights are stored elsewhere."""
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
        # The default of an input is not a constant.
        small={name: array for name, array in held.items() if name not in inputs},
    )


def _shape(value: onnx.ValueInfoProto) -> tuple[int | str | None, ...]:
    dims = value.type.tensor_type.shape.dim
    return tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in dims)


def find_layers(network: Network) -> list[Layer]:
    """Return the layers that the kernels support, in the order of their last nodes."""
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
    """Return the layer of a single node, or None if it is not a convolution that the kernels support."""
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
    """Fuse an Add of two maps of equal shape. If both come from layers, it goes to the later one."""
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


# Number of weights from which it pays to skip some.
_LARGE_DENSE = 2**20
# Ops that preserve the zeros of their inputs.
_ZEROS_KEPT = frozenset("Dropout Flatten Identity MaxPool Reshape Squeeze Transpose Unsqueeze".split())


def find_dense_layers(network: Network) -> list[DenseLayer]:
    """Return the large dense layers after a ReLU, where most inputs may be zeros."""
    layers = []
    for node in network.nodes:
        layer = _dense_layer(network, node)
        if layer is None:
            continue
        after = network.only_reader(layer.output)
        bounds = None if after is None else read_bounds(network, after)
        if after is not None and bounds is not None:
            layer = replace(layer, nodes=(node, after), low=bounds[0], high=bounds[1], output=after.output[0])
        layers.append(layer)
    return layers


def _dense_layer(network: Network, node: onnx.NodeProto) -> DenseLayer | None:
    if node.op_type not in ("Gemm", "MatMul") or node.domain not in ("", "ai.onnx"):
        return None
    source, weights, *rest = node.input
    bias = rest[0] if rest and rest[0] else None
    plain = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}
    shape = network.constants.get(weights, ())
    if len(shape) != 2 or math.prod(shape) < _LARGE_DENSE or {**plain, **attributes(node)} != plain:
        return None
    if len(network.shapes.get(source, ())) != 2 or not _behind_relu(network, source):
        return None
    if bias is not None and network.constants.get(bias) != shape[1:]:
        return None
    return DenseLayer((node,), source, weights, node.output[0], bias)


def _behind_relu(network: Network, value: str) -> bool:
    while value in network.positions:
        node = network.nodes[network.positions[value]]
        bounds = read_bounds(network, node)
        if bounds is not None:
            return bounds[0] == 0
        if node.op_type not in _ZEROS_KEPT:
            return False
        value = node.input[0]
    return False


def read_bounds(network: Network, node: onnx.NodeProto) -> tuple[float, float] | None:
    """Return the bounds of a Relu or Clip, or None for other nodes and for computed bounds."""
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
    """Fuse 2x2 max pooling with stride 2."""
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
