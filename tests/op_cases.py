"""One row for every variant of every op in the gradient table: how the op is called, and on what.

An input that is a tuple of numbers is a variable of that shape (its first axis is the batch where `batched`); an array
is a constant. Values are drawn so that no two elements of a variable are closer than 0.01: finite differences then
never step over a kink or a tie.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

Input = tuple[int, ...] | npt.NDArray[Any] | float

_rng = np.random.default_rng(7)


def weights(*shape: int) -> npt.NDArray[np.float64]:
    return _rng.normal(size=shape)


def _mask(*shape: int) -> npt.NDArray[np.bool_]:
    return _rng.random(shape) < 0.5


def ints(*numbers: int) -> npt.NDArray[np.int64]:
    return np.array(numbers, np.int64)


@dataclass(frozen=True)
class OpCase:
    """One call of an op.

    `positive`: variables are drawn from 0.5..2.5 instead of -2..2. `opset`: a later one for an op that is younger than
    18.
    """

    name: str
    op: str
    inputs: tuple[Input, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    batched: bool = True
    positive: bool = False
    opset: int = 18

    @property
    def variables(self) -> list[int]:
        return [index for index, item in enumerate(self.inputs) if isinstance(item, tuple)]


def _case(
    name: str,
    op: str,
    *inputs: Input,
    batched: bool = True,
    positive: bool = False,
    opset: int = 18,
    **attributes: Any,
) -> OpCase:
    return OpCase(name, op, inputs, attributes, batched, positive, opset)


_MAP = (2, 3, 5, 6)

CASES = [
    _case("identity", "Identity", _MAP),
    _case("dropout", "Dropout", _MAP),
    _case("relu", "Relu", _MAP),
    _case("sigmoid", "Sigmoid", _MAP),
    _case("tanh", "Tanh", _MAP),
    _case("neg", "Neg", _MAP),
    _case("exp", "Exp", _MAP),
    _case("sqrt", "Sqrt", _MAP, positive=True),
    _case("log", "Log", _MAP, positive=True),
    _case("abs", "Abs", _MAP),
    _case("reciprocal", "Reciprocal", _MAP, positive=True),
    _case("erf", "Erf", _MAP),
    _case("softplus", "Softplus", _MAP),
    _case("softsign", "Softsign", _MAP),
    _case("gelu", "Gelu", _MAP, opset=20),
    _case("gelu-tanh", "Gelu", _MAP, opset=20, approximate="tanh"),
    _case("mish", "Mish", _MAP),
    _case("cast", "Cast", _MAP, to=TensorProto.DOUBLE),
    _case("clip-relu6", "Clip", _MAP, 0.0, 1.1),
    _case("clip-low", "Clip", _MAP, -0.5),
    _case("leaky-relu", "LeakyRelu", _MAP, alpha=0.3),
    _case("leaky-relu-default", "LeakyRelu", _MAP),
    _case("thresholded-relu", "ThresholdedRelu", _MAP, alpha=0.4),
    _case("elu", "Elu", _MAP, alpha=0.7),
    _case("elu-default", "Elu", _MAP),
    _case("celu", "Celu", _MAP, alpha=0.7),
    _case("selu", "Selu", _MAP),
    _case("selu-own", "Selu", _MAP, alpha=1.2, gamma=0.8),
    _case("prelu", "PRelu", _MAP, weights(3, 1, 1)),
    _case("prelu-computed-slope", "PRelu", (2, 3, 4, 4), (3, 1, 1), batched=False),
    _case("hard-sigmoid", "HardSigmoid", _MAP, alpha=0.4, beta=0.45),
    _case("hard-sigmoid-default", "HardSigmoid", _MAP),
    _case("hard-swish", "HardSwish", (2, 3, 4, 4)),
    _case("add-same", "Add", _MAP, _MAP),
    _case("add-bias", "Add", _MAP, weights(3, 1, 1)),
    _case("add-constant-left", "Add", weights(3, 1, 1), _MAP),
    _case("add-channel-gate", "Add", (2, 3, 4, 4), (2, 3, 1, 1)),
    _case("sub-broadcast-right", "Sub", (2, 3, 4, 4), (2, 1, 4, 4)),
    _case("sub-broadcast-left", "Sub", (2, 3, 1, 1), (2, 3, 4, 4)),
    _case("mul-gate", "Mul", (2, 3, 4, 4), (2, 3, 1, 1)),
    _case("mul-constant-row", "Mul", (2, 3, 4, 4), weights(4)),
    _case("mul-lower-rank", "Mul", (2, 3, 4), (3, 4), batched=False),
    _case("div-gate", "Div", (2, 3, 4, 4), (2, 3, 1, 1), positive=True),
    _case("div-constant", "Div", _MAP, 3.0),
    _case("pow-square", "Pow", _MAP, 2.0),
    _case("pow-cube", "Pow", _MAP, 3.0),
    _case("pow-whole-exponent", "Pow", _MAP, ints(0, 1, 2, 3, 4, 5)),
    _case("pow-computed", "Pow", (2, 3, 4, 4), (2, 3, 1, 1), positive=True),
    _case("pow-broadcast-left", "Pow", (2, 3, 1), (2, 1, 4), positive=True),
    _case("where-right", "Where", _mask(3, 1, 6), (2, 3, 1, 6), (2, 3, 5, 6)),
    _case("where-left", "Where", _mask(2, 3, 5, 6), (2, 3, 5, 6), (1, 1, 6), batched=False),
    _case("max-three", "Max", (2, 3, 4), (2, 1, 4), (2, 3, 1)),
    _case("max-constant", "Max", _MAP, 0.25),
    _case("min-lower-rank", "Min", (2, 3, 4), (3, 4), batched=False),
    _case("mean-three", "Mean", (2, 3, 4), (2, 1, 4), (2, 3, 1)),
    _case("sum-three", "Sum", (2, 3, 4), (2, 1, 4), (2, 3, 1)),
    _case("matmul-dense", "MatMul", (3, 5), weights(5, 4)),
    _case("matmul-dense-tokens", "MatMul", (2, 3, 5), weights(5, 4)),
    _case("matmul-batched", "MatMul", (2, 3, 4, 5), (2, 3, 5, 2)),
    _case("matmul-broadcast-left", "MatMul", (2, 1, 4, 5), (2, 3, 5, 2)),
    _case("matmul-constant-left", "MatMul", weights(4, 3), (2, 3, 5)),
    _case("gemm", "Gemm", (3, 5), weights(5, 4), weights(4)),
    _case("gemm-transposed", "Gemm", (3, 5), weights(4, 5), weights(4), transB=1),
    _case("gemm-scaled", "Gemm", (3, 5), weights(5, 4), weights(4), alpha=0.5, beta=2.0),
    _case("conv-same", "Conv", (2, 3, 5, 6), weights(4, 3, 3, 3), weights(4), pads=[1, 1, 1, 1]),
    _case("conv-valid", "Conv", (2, 3, 5, 6), weights(4, 3, 3, 2)),
    _case("conv-1x1", "Conv", (2, 3, 4, 4), weights(5, 3, 1, 1)),
    _case("conv-stride", "Conv", (2, 3, 6, 7), weights(4, 3, 3, 3), strides=[2, 2], pads=[1, 1, 1, 1]),
    _case("conv-stride-leaves-a-rest", "Conv", (2, 2, 8, 7), weights(3, 2, 2, 2), strides=[3, 3]),
    _case("conv-asymmetric-pads", "Conv", (2, 3, 6, 6), weights(4, 3, 3, 3), strides=[2, 2], pads=[0, 0, 1, 1]),
    _case("conv-dilated", "Conv", (2, 2, 7, 7), weights(3, 2, 3, 3), dilations=[2, 2], pads=[2, 2, 2, 2]),
    _case("conv-dilated-stride", "Conv", (2, 2, 8, 9), weights(3, 2, 3, 2), dilations=[2, 3], strides=[2, 2]),
    _case("conv-groups", "Conv", (2, 4, 5, 5), weights(6, 2, 3, 3), group=2, pads=[1, 1, 1, 1]),
    _case("conv-depthwise", "Conv", (2, 3, 6, 6), weights(3, 1, 3, 3), group=3, strides=[2, 2]),
    _case("conv-same-upper", "Conv", (2, 3, 6, 6), weights(4, 3, 3, 3), auto_pad="SAME_UPPER", strides=[2, 2]),
    _case("conv-same-lower", "Conv", (2, 3, 6, 6), weights(4, 3, 3, 3), auto_pad="SAME_LOWER", strides=[2, 2]),
    _case("conv-auto-valid", "Conv", (2, 3, 5, 5), weights(4, 3, 3, 3), auto_pad="VALID"),
    _case("conv-transpose", "ConvTranspose", (2, 3, 4, 5), weights(3, 4, 3, 2), weights(4)),
    _case(
        "conv-transpose-stride",
        "ConvTranspose",
        (2, 3, 4, 5),
        weights(3, 4, 3, 3),
        strides=[2, 3],
        pads=[1, 0, 1, 2],
        output_padding=[1, 2],
    ),
    _case("conv-transpose-dilated", "ConvTranspose", (2, 3, 4, 4), weights(3, 2, 3, 3), dilations=[2, 1]),
    _case("conv-transpose-groups", "ConvTranspose", (2, 4, 3, 3), weights(4, 3, 2, 2), weights(6), group=2),
    _case(
        "conv-transpose-same",
        "ConvTranspose",
        (2, 2, 4, 4),
        weights(2, 3, 3, 3),
        strides=[2, 2],
        auto_pad="SAME_UPPER",
    ),
    _case("conv-transpose-one-axis", "ConvTranspose", (2, 3, 5), weights(3, 2, 4), strides=[2], pads=[1, 1]),
    _case("max-pool", "MaxPool", (2, 3, 6, 6), kernel_shape=[2, 2], strides=[2, 2]),
    _case("max-pool-rest", "MaxPool", (2, 3, 7, 5), kernel_shape=[2, 2], strides=[2, 2]),
    _case("max-pool-overlapping", "MaxPool", (2, 3, 7, 7), kernel_shape=[3, 3], strides=[2, 2]),
    _case("max-pool-padded", "MaxPool", (2, 3, 6, 6), kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    _case("max-pool-asymmetric", "MaxPool", (2, 3, 6, 6), kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1]),
    _case("max-pool-ceil", "MaxPool", (2, 3, 6, 6), kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    _case("max-pool-gaps", "MaxPool", (2, 3, 7, 7), kernel_shape=[2, 2], strides=[3, 3]),
    _case("max-pool-dilated", "MaxPool", (2, 2, 7, 7), kernel_shape=[2, 2], dilations=[2, 2]),
    _case("max-pool-same", "MaxPool", (2, 2, 5, 5), kernel_shape=[2, 2], strides=[2, 2], auto_pad="SAME_UPPER"),
    _case("average-pool", "AveragePool", (2, 3, 6, 6), kernel_shape=[2, 2], strides=[2, 2]),
    _case("average-pool-rest", "AveragePool", (2, 3, 7, 6), kernel_shape=[2, 3], strides=[2, 2]),
    _case("average-pool-padded", "AveragePool", (2, 3, 6, 6), kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    _case(
        "average-pool-counts-padding",
        "AveragePool",
        (2, 3, 6, 6),
        kernel_shape=[3, 3],
        strides=[2, 2],
        pads=[1, 1, 1, 1],
        count_include_pad=1,
    ),
    _case("average-pool-ceil", "AveragePool", (2, 3, 6, 6), kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    _case("average-pool-same", "AveragePool", (2, 2, 5, 5), kernel_shape=[3, 3], auto_pad="SAME_UPPER"),
    _case("lp-pool", "LpPool", (2, 3, 6, 6), kernel_shape=[2, 2], strides=[2, 2]),
    _case("lp-pool-3", "LpPool", (2, 3, 7, 6), kernel_shape=[3, 2], strides=[2, 1], p=3),
    _case("lp-pool-1", "LpPool", (2, 3, 6, 6), kernel_shape=[2, 2], strides=[2, 2], p=1),
    _case("lp-pool-padded", "LpPool", (2, 3, 6, 6), kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    _case("global-max-pool", "GlobalMaxPool", _MAP),
    _case("global-average-pool", "GlobalAveragePool", _MAP),
    _case("batch-normalization", "BatchNormalization", _MAP, weights(3), weights(3), weights(3), weights(3) ** 2 + 0.1),
    _case("layer-normalization", "LayerNormalization", (2, 5, 6), weights(6), weights(6)),
    _case("layer-normalization-no-bias", "LayerNormalization", (2, 5, 6), weights(6), axis=-1, epsilon=0.1),
    _case("layer-normalization-map", "LayerNormalization", _MAP, weights(3, 5, 6), weights(3, 5, 6), axis=1),
    _case("instance-normalization", "InstanceNormalization", _MAP, weights(3), weights(3), epsilon=0.01),
    _case("group-normalization", "GroupNormalization", (2, 6, 3, 4), weights(3), weights(3), num_groups=3),
    _case("lrn", "LRN", (5, 5, 3, 4), size=3, alpha=0.5, beta=0.6, bias=1.5),
    _case("lrn-default", "LRN", (6, 6, 2, 2), size=5),
    _case("softmax", "Softmax", (2, 3, 5)),
    _case("softmax-channels", "Softmax", _MAP, axis=1),
    _case("log-softmax", "LogSoftmax", (2, 3, 5)),
    _case("log-softmax-channels", "LogSoftmax", _MAP, axis=1),
    _case("reduce-max", "ReduceMax", _MAP, ints(2, 3), keepdims=0),
    _case("reduce-max-apart", "ReduceMax", (2, 3, 4, 5), ints(1, -1)),
    _case("reduce-max-all", "ReduceMax", (2, 3, 4), batched=False),
    _case("reduce-l2", "ReduceL2", _MAP, ints(1), keepdims=0),
    _case("reduce-l2-kept", "ReduceL2", _MAP, ints(-1, 1)),
    _case("reduce-sum", "ReduceSum", _MAP, ints(2, 3), keepdims=0),
    _case("reduce-sum-all", "ReduceSum", (2, 3, 4), batched=False),
    _case("reduce-mean-kept", "ReduceMean", _MAP, ints(2, 3), keepdims=1),
    _case("reduce-mean-negative-axes", "ReduceMean", _MAP, ints(-1, 1), keepdims=0),
    _case("reshape-flatten", "Reshape", _MAP, ints(0, -1)),
    _case("reshape-heads", "Reshape", (2, 6, 4), ints(-1, 2, 3, 4)),
    _case("reshape-merges-batch", "Reshape", (2, 3, 4), ints(-1, 4)),
    _case("flatten", "Flatten", _MAP),
    _case("squeeze", "Squeeze", (2, 3, 1, 1), ints(2, 3)),
    _case("unsqueeze", "Unsqueeze", (2, 3), ints(2, 3)),
    _case("transpose", "Transpose", (2, 3, 4, 5), perm=[0, 2, 3, 1]),
    _case("transpose-reversed", "Transpose", (2, 3, 4), batched=False),
    _case("concat", "Concat", (2, 3, 4, 4), (2, 2, 4, 4), (2, 1, 4, 4), axis=1),
    _case("concat-negative-axis", "Concat", (2, 3, 4), (2, 3, 2), axis=-1),
    _case("concat-constant", "Concat", weights(2, 1, 4), (2, 3, 4), axis=1, batched=False),
    _case("pad", "Pad", (2, 3, 4, 5), ints(0, 0, 1, 0, 0, 0, 2, 3)),
    _case("pad-value", "Pad", (2, 3, 4, 5), ints(0, 1, 1, 0, 0, 0, 2, 3), 1.5),
]
