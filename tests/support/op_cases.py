"""One row for every variant of every op in the gradient table: how the op is called, and its inputs.

An input that is a tuple of numbers is a variable of that shape (its first axis is the batch where `batched`); an array
is a constant (float64: in the graph's type), None an omitted optional input. Values are drawn so that no two elements
of a variable are closer than 0.01: finite differences then never step over a kink or a tie.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

Input = tuple[int, ...] | npt.NDArray[Any] | float | None

_rng = np.random.default_rng(7)


def weights(*shape: int) -> npt.NDArray[np.float64]:
    return _rng.normal(size=shape)


def _mask(*shape: int) -> npt.NDArray[np.bool_]:
    return _rng.random(shape) < 0.5


def _scales(*factors: float) -> npt.NDArray[np.float32]:
    return np.array(factors, np.float32)


def ints(*numbers: int) -> npt.NDArray[np.int64]:
    return np.array(numbers, np.int64)


@dataclass(frozen=True)
class OpCase:
    """One call of an op.

    `positive`: variables are drawn from 0.5..2.5 instead of -2..2. `opset`: a later one for an op that is younger than
    18. `outputs`: how many the op has; `unread`: those on which nothing depends.
    """

    name: str
    op: str
    inputs: tuple[Input, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    batched: bool = True
    positive: bool = False
    opset: int = 18
    outputs: int = 1
    unread: tuple[int, ...] = ()

    @property
    def variables(self) -> list[int]:
        return [index for index, item in enumerate(self.inputs) if isinstance(item, tuple)]

    @property
    def read(self) -> list[int]:
        return [index for index in range(self.outputs) if index not in self.unread]


def _case(
    name: str,
    op: str,
    *inputs: Input,
    batched: bool = True,
    positive: bool = False,
    opset: int = 18,
    outputs: int = 1,
    unread: tuple[int, ...] = (),
    **attributes: Any,
) -> OpCase:
    return OpCase(name, op, inputs, attributes, batched, positive, opset, outputs, unread)


_MAP = (2, 3, 5, 6)

CASES = [
    _case("identity", "Identity", _MAP),
    _case("dropout", "Dropout", _MAP),
    _case("relu", "Relu", _MAP),
    _case("sigmoid", "Sigmoid", _MAP),
    _case("tanh", "Tanh", _MAP),
    _case("neg", "Neg", _MAP),
    _case("ceil", "Ceil", _MAP),
    _case("floor", "Floor", _MAP),
    _case("round", "Round", _MAP),
    _case("sign", "Sign", _MAP),
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
    _case("add-gate-left", "Add", (2, 1, 4, 4), (2, 3, 4, 4)),
    _case("sub-broadcast-right", "Sub", (2, 3, 4, 4), (2, 1, 4, 4)),
    _case("sub-broadcast-left", "Sub", (2, 3, 1, 1), (2, 3, 4, 4)),
    _case("mul-gate", "Mul", (2, 3, 4, 4), (2, 3, 1, 1)),
    _case("mul-gate-left", "Mul", (2, 3, 1, 1), (2, 3, 4, 4)),
    _case("mul-constant-row", "Mul", (2, 3, 4, 4), weights(4)),
    _case("mul-lower-rank", "Mul", (2, 3, 4), (3, 4), batched=False),
    _case("div-gate", "Div", (2, 3, 4, 4), (2, 3, 1, 1), positive=True),
    _case("div-gate-left", "Div", (2, 1, 4, 4), (2, 3, 4, 4), positive=True),
    _case("div-constant", "Div", _MAP, 3.0),
    _case("pow-square", "Pow", _MAP, 2.0),
    _case("pow-cube", "Pow", _MAP, 3.0),
    _case("pow-whole-exponent", "Pow", _MAP, ints(0, 1, 2, 3, 4, 5)),
    _case("pow-computed", "Pow", (2, 3, 4, 4), (2, 3, 1, 1), positive=True),
    _case("pow-broadcast-left", "Pow", (2, 3, 1), (2, 1, 4), positive=True),
    _case("where-right", "Where", _mask(3, 1, 6), (2, 3, 1, 6), (2, 3, 5, 6)),
    _case("where-left", "Where", _mask(2, 3, 5, 6), (2, 3, 5, 6), (1, 1, 6), batched=False),
    _case("max-three", "Max", (2, 3, 4), (2, 1, 4), (2, 3, 1)),
    _case("max-broadcast-left", "Max", (2, 1, 4), (2, 3, 1)),
    _case("max-constant", "Max", _MAP, 0.25),
    _case("min-lower-rank", "Min", (2, 3, 4), (3, 4), batched=False),
    _case("min-broadcast-left", "Min", (2, 1, 4), (2, 3, 4)),
    _case("mean-three", "Mean", (2, 3, 4), (2, 1, 4), (2, 3, 1)),
    _case("sum-broadcast-left", "Sum", (2, 3, 1), (2, 1, 4)),
    _case("sum-three", "Sum", (2, 3, 4), (2, 1, 4), (2, 3, 1)),
    _case("matmul-dense", "MatMul", (3, 5), weights(5, 4)),
    _case("matmul-dense-tokens", "MatMul", (2, 3, 5), weights(5, 4)),
    _case("matmul-batched", "MatMul", (2, 3, 4, 5), (2, 3, 5, 2)),
    _case("matmul-broadcast-left", "MatMul", (2, 1, 4, 5), (2, 3, 5, 2)),
    _case("matmul-broadcast-right", "MatMul", (2, 3, 4, 5), (2, 1, 5, 2)),
    _case("matmul-constant-left", "MatMul", weights(4, 3), (2, 3, 5)),
    _case("gemm", "Gemm", (3, 5), weights(5, 4), weights(4)),
    _case("gemm-transposed", "Gemm", (3, 5), weights(4, 5), weights(4), transB=1),
    _case("gemm-computed-bias", "Gemm", (3, 5), weights(5, 4), (3, 4), beta=0.5),
    _case("gemm-scaled", "Gemm", (3, 5), weights(5, 4), weights(4), alpha=0.5, beta=2.0),
    _case("einsum-product", "Einsum", (2, 3, 4), weights(4, 5), equation="bij,jk->bik"),
    _case("einsum-both", "Einsum", (2, 3, 4), (2, 5, 4), equation="nac, nbc -> nab"),
    _case("einsum-attention", "Einsum", (2, 3, 2, 4), (2, 5, 2, 4), equation="bqhd,bkhd->bhqk"),
    _case("einsum-three", "Einsum", (2, 3), (2, 4), weights(3, 4, 5), equation="ni,nj,ijk->nk"),
    _case("einsum-sums", "Einsum", (2, 3, 4), (2, 3), equation="nij,ni->n"),
    _case("einsum-implicit", "Einsum", (2, 3, 4), equation="bca", batched=False),
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
    _case(
        "conv-transpose-same-padded",
        "ConvTranspose",
        (2, 2, 3, 3),
        weights(2, 2, 4, 5),
        strides=[2, 2],
        auto_pad="SAME_UPPER",
    ),
    _case(
        "conv-transpose-same-lower",
        "ConvTranspose",
        (2, 2, 3, 3),
        weights(2, 2, 3, 5),
        strides=[2, 2],
        auto_pad="SAME_LOWER",
    ),
    _case(
        "conv-transpose-output-shape",
        "ConvTranspose",
        (2, 2, 3, 3),
        weights(2, 2, 4, 5),
        strides=[2, 2],
        output_shape=[5, 7],
        auto_pad="SAME_LOWER",
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
    _case("reduce-min", "ReduceMin", _MAP, ints(2, 3), keepdims=0),
    _case("reduce-l1", "ReduceL1", _MAP, ints(1, 2), keepdims=0),
    _case("reduce-l1-kept", "ReduceL1", _MAP, ints(-1)),
    _case("reduce-sum-square", "ReduceSumSquare", _MAP, ints(2, 3), keepdims=0),
    _case("reduce-log-sum", "ReduceLogSum", _MAP, ints(2, 3), keepdims=0, positive=True),
    _case("reduce-log-sum-kept", "ReduceLogSum", _MAP, ints(1), positive=True),
    _case("reduce-log-sum-exp", "ReduceLogSumExp", _MAP, ints(2, 3), keepdims=0),
    _case("reduce-log-sum-exp-kept", "ReduceLogSumExp", _MAP, ints(-2)),
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
    _case("split", "Split", (2, 7, 3), ints(2, 4, 1), axis=1, outputs=3),
    _case("split-evenly", "Split", (2, 3, 5), axis=-1, num_outputs=3, outputs=3),
    _case("split-evenly-last-unread", "Split", (2, 3, 5), axis=-1, num_outputs=3, outputs=3, unread=(2,)),
    _case("split-first-unread", "Split", (2, 7, 3), ints(2, 4, 1), axis=1, outputs=3, unread=(0,)),
    _case("split-middle-unread", "Split", (2, 7, 3), ints(2, 4, 1), axis=1, outputs=3, unread=(1,)),
    _case("split-one-read", "Split", (2, 7, 3), ints(2, 4, 1), axis=1, outputs=3, unread=(0, 2)),
    _case("slice", "Slice", _MAP, ints(1, 0), ints(4, -2), ints(2, 3)),
    _case("slice-all-axes", "Slice", (2, 5, 6), ints(0, 1, 2), ints(2**31 - 1, 4, 2**31 - 1)),
    _case("slice-steps", "Slice", _MAP, ints(0, 1), ints(2**31 - 1, 6), ints(-2, -1), ints(2, 3)),
    _case("slice-backwards", "Slice", _MAP, ints(-1, 4), ints(-(2**31), 0), ints(1, 3), ints(-1, -2)),
    _case("gather-row", "Gather", (2, 5, 3), np.array(-2), axis=1),
    _case("gather", "Gather", (2, 5, 3), ints(4, 0, 2), axis=1),
    _case("gather-repeated", "Gather", (2, 5, 3), ints(4, 0, 4, 4, -1), axis=1),
    _case("gather-shuffle", "Gather", (2, 4, 3), ints(0, 2, 1, 3), axis=1),
    _case("gather-two-axes", "Gather", (2, 5, 3, 2), np.array([[1, 0, 2], [3, -4, 4]]), axis=-3),
    _case("gather-default-axis", "Gather", (5, 3), ints(1, 3), batched=False),
    _case("expand", "Expand", (2, 3, 1), ints(1, 1, 4)),
    _case("expand-new-axes", "Expand", (3, 1), ints(2, 3, 4), batched=False),
    _case("tile", "Tile", (2, 3, 4), ints(1, 2, 3)),
    _case("depth-to-space", "DepthToSpace", (2, 12, 2, 3), blocksize=2),
    _case("depth-to-space-crd", "DepthToSpace", (2, 12, 2, 3), blocksize=2, mode="CRD"),
    _case("space-to-depth", "SpaceToDepth", (2, 2, 4, 6), blocksize=2),
    _case(
        "resize-nearest", "Resize", (2, 3, 3, 4), None, _scales(1, 1, 2, 3), coordinate_transformation_mode="asymmetric"
    ),
    _case("resize-nearest-default", "Resize", (2, 3, 3, 4), None, _scales(1, 1, 2, 1.5)),
    _case("resize-nearest-down", "Resize", (2, 2, 6, 6), None, _scales(1, 1, 0.5, 0.75), nearest_mode="floor"),
    _case(
        "resize-nearest-ceil",
        "Resize",
        (2, 2, 5, 4),
        None,
        None,
        ints(7, 6),
        axes=[2, 3],
        nearest_mode="ceil",
        coordinate_transformation_mode="align_corners",
    ),
    _case(
        "resize-nearest-prefers-ceil",
        "Resize",
        (2, 2, 4, 4),
        None,
        _scales(1, 1, 0.5, 0.5),
        nearest_mode="round_prefer_ceil",
    ),
    _case("resize-linear", "Resize", (2, 3, 3, 4), None, _scales(1, 1, 2, 2), mode="linear"),
    _case("resize-linear-fraction", "Resize", (2, 2, 4, 6), None, _scales(1, 1, 1.75, 0.625), mode="linear"),
    _case("resize-linear-channels-last", "Resize", (2, 3, 4, 2), None, _scales(1, 2, 1.5, 1), mode="linear"),
    _case("resize-linear-sizes", "Resize", (2, 2, 5, 4), None, None, ints(7, 3), mode="linear", axes=[2, 3]),
    _case(
        "resize-linear-corners",
        "Resize",
        (2, 2, 3, 4),
        None,
        None,
        ints(1, 7),
        mode="linear",
        axes=[2, 3],
        coordinate_transformation_mode="align_corners",
    ),
    _case(
        "resize-linear-asymmetric",
        "Resize",
        (2, 2, 3, 4),
        None,
        _scales(1, 1, 2, 1.25),
        mode="linear",
        coordinate_transformation_mode="asymmetric",
    ),
    _case(
        "resize-linear-pytorch",
        "Resize",
        (2, 2, 4, 4),
        None,
        _scales(1, 1, 0.25, 2),
        mode="linear",
        coordinate_transformation_mode="pytorch_half_pixel",
    ),
    _case(
        "resize-linear-symmetric",
        "Resize",
        (2, 2, 5, 4),
        None,
        _scales(1, 1, 1.5, 0.625),
        mode="linear",
        coordinate_transformation_mode="half_pixel_symmetric",
        opset=19,
    ),
    _case("pad-axes", "Pad", (2, 3, 4, 5), ints(1, 0, 0, 2), None, ints(3, -2)),
    _case("pad-nothing", "Pad", (2, 3, 4), ints(0, 0, 0, 0, 0, 0)),
    _case("pad-reflect", "Pad", (2, 3, 4, 5), ints(0, 0, 1, 0, 0, 0, 2, 3), mode="reflect"),
    _case("pad-edge", "Pad", (2, 3, 4, 5), ints(0, 0, 1, 0, 0, 0, 2, 3), mode="edge"),
    _case("pad", "Pad", (2, 3, 4, 5), ints(0, 0, 1, 0, 0, 0, 2, 3)),
    _case("pad-value", "Pad", (2, 3, 4, 5), ints(0, 1, 1, 0, 0, 0, 2, 3), 1.5),
]
