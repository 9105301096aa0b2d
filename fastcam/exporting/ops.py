"""Facts about ONNX ops: one table with a row per op, from which every part of the exporter reads what it needs.

To add an op, add a row here; its gradient rule goes into `gradients.rules`. No other module lists ops by a property:
where several ops are treated alike, the property is a column of this table.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass


class Fact(enum.Flag):
    """Properties that an op may have.

    Attributes
    ----------
    ELEMENTWISE
        An element of the output depends only on the inputs' elements at the same position, after broadcasting.
    ACTIVATION
        Ends a convolutional block: its output is what "the output of a conv layer" means.
    NORMALIZATION
        Normalises its input by statistics, computed or learnt.
    ENDS_BLOCK
        Can be the last op of a block without an activation.
    SPATIAL_FIRST
        Reads and writes (N,C,h,w), with the channels on axis 1.
    KEEPS_ORDER
        Preserves the order of the axes without being element-wise.
    PRODUCT
        Multiplies and accumulates: the ops in which networks spend their time, worth float16 on tensor cores.
    QUANTIZES
        Represents the identity on real numbers; in a quantised network the map is the dequantised value.
    MOVES
        Copies elements of its first input (Concat: of all) to other places, without changing them.
    KEEPS_ZERO
        Returns zeros where all its inputs are zeros.
    READS_SHAPE
        Reads the shape of its input, not its values.
    JUMPS
        The output is a step function of the input or constant: its derivative is 0 where it exists.
    EMITTED
        Gradient graphs may contain it: the CUDA provider of ONNX Runtime (opset 18 to 20) and TensorRT's parser both
        run it. Left out on purpose: MaxUnpool, Col2Im, OneHot with a computed depth, ScatterND with a reduction,
        MaxPool with its indices, Elu, Selu, InstanceNormalization, and Reciprocal, which older parsers reject.
    """

    NONE = 0
    ELEMENTWISE = enum.auto()
    ACTIVATION = enum.auto()
    NORMALIZATION = enum.auto()
    ENDS_BLOCK = enum.auto()
    SPATIAL_FIRST = enum.auto()
    KEEPS_ORDER = enum.auto()
    PRODUCT = enum.auto()
    QUANTIZES = enum.auto()
    MOVES = enum.auto()
    KEEPS_ZERO = enum.auto()
    READS_SHAPE = enum.auto()
    JUMPS = enum.auto()
    EMITTED = enum.auto()


class Rows(enum.Enum):
    """When an op treats the images of a batch, the rows of axis 0, independently."""

    NEVER = "not known to"
    ELEMENTWISE = "where rows meet rows of the same image"
    OWN_ROWS = "always, over its first input"
    ALONG_FIRST = "unless its attribute axis, 0 by default, is 0"
    ALONG_LAST = "unless its attribute axis, -1 by default, is 0"
    OVER_AXES = "unless 0 is among the axes of its second input"
    OVER_SLICED_AXES = "unless 0 is among the axes of its fourth input"
    BY_OP = "by a rule of its own"


class Size(enum.Enum):
    """How the size of an op's result follows from its constant inputs, for the limit on constant folding."""

    INPUTS = "at most the elements of all inputs"
    BROADCAST = "the inputs, broadcast"
    TARGET = "the shape that its last input holds, broadcast with the others"
    REPEATS = "its first input, repeated as its second says"
    RANGE = "the numbers from start to limit"
    DEPTH = "its first input, times the depth"
    PADS = "its first input and the pads around it"
    GATHER = "a slice of its first input for each index"
    RANK = "its input, times the rank"
    PRODUCT = "a matrix product"


@dataclass(frozen=True)
class Op:
    """The facts about one op.

    Attributes
    ----------
    facts : Fact
    rows : Rows
    folds : Size or None
        Set for the ops that constant folding may run in this process: cheap ones, without loops in Python. None keeps
        a node in the graph even if all its inputs are constants.
    cost : int
        Rough work of folding per element of the result, in additions of NumPy.
    float32 : str
        Why it stays in float32 in a float16 network; empty if it need not.
    cuda, tensorrt : str
        Element types that ONNX Runtime's CUDA provider has a kernel for, and that TensorRT's parser takes, one letter
        each: f float32, h float16, i int32 or int64, b bool, q int8 or uint8.
        Sources: ONNX Runtime, docs/OperatorKernels.md, opset 18 to 20 (MaxPool: up to 21); onnx-tensorrt,
        docs/operators.md (TensorRT 8.5), and from later versions LayerNormalization, GroupNormalization, Gelu, Mish.
    """

    facts: Fact
    rows: Rows = Rows.NEVER
    folds: Size | None = None
    cost: int = 1
    float32: str = ""
    cuda: str = ""
    tensorrt: str = ""


_SUMS = "sums many numbers, whose partial sums exceed float16's 11 bits or its range"
_EXPONENTS = "leaves float16's range for small arguments: exp(12) is beyond 65504, 257 squared too"
_SQUARES = "squares its input, and 257 squared is beyond 65504"
_QUOTIENTS = "turns what float16 rounds to 0, below 3e-8, into infinity"
_TYPED = "names the type of its result, or converts it"

NONE, ELEMENTWISE, ACTIVATION, NORMALIZATION = Fact.NONE, Fact.ELEMENTWISE, Fact.ACTIVATION, Fact.NORMALIZATION
ENDS_BLOCK, SPATIAL_FIRST, KEEPS_ORDER, PRODUCT = Fact.ENDS_BLOCK, Fact.SPATIAL_FIRST, Fact.KEEPS_ORDER, Fact.PRODUCT
QUANTIZES, MOVES, KEEPS_ZERO, READS_SHAPE, JUMPS, EMITTED = (
    Fact.QUANTIZES,
    Fact.MOVES,
    Fact.KEEPS_ZERO,
    Fact.READS_SHAPE,
    Fact.JUMPS,
    Fact.EMITTED,
)

OPS: dict[str, Op] = {
    "Abs": Op(
        ELEMENTWISE | EMITTED | KEEPS_ZERO, rows=Rows.ELEMENTWISE, folds=Size.BROADCAST, cuda="fhi", tensorrt="fhi"
    ),
    "Add": Op(
        ELEMENTWISE | ENDS_BLOCK | EMITTED | KEEPS_ZERO,
        rows=Rows.ELEMENTWISE,
        folds=Size.BROADCAST,
        cuda="fhi",
        tensorrt="fhi",
    ),
    "And": Op(ELEMENTWISE | JUMPS | EMITTED, rows=Rows.ELEMENTWISE, folds=Size.BROADCAST, cuda="b", tensorrt="b"),
    "ArgMax": Op(JUMPS | EMITTED, folds=Size.INPUTS, cuda="fh", tensorrt="fh"),
    "ArgMin": Op(JUMPS, folds=Size.INPUTS, cuda="fh", tensorrt="fh"),
    "AveragePool": Op(SPATIAL_FIRST, rows=Rows.OWN_ROWS, float32=_SUMS, cuda="fh", tensorrt="fh"),
    "BatchNormalization": Op(
        NORMALIZATION | SPATIAL_FIRST, rows=Rows.BY_OP, folds=Size.INPUTS, cuda="fh", tensorrt="fh"
    ),
    "Cast": Op(
        ELEMENTWISE | EMITTED | KEEPS_ZERO,
        rows=Rows.ELEMENTWISE,
        folds=Size.BROADCAST,
        float32=_TYPED,
        cuda="fhibq",
        tensorrt="fhibq",
    ),
    "CastLike": Op(NONE, float32=_TYPED),
    "Ceil": Op(ELEMENTWISE | JUMPS | KEEPS_ZERO, rows=Rows.ELEMENTWISE, folds=Size.BROADCAST, cuda="fh", tensorrt="fh"),
    "Celu": Op(ELEMENTWISE | ACTIVATION, rows=Rows.ELEMENTWISE, tensorrt="fh"),
    "Clip": Op(ELEMENTWISE | ACTIVATION, rows=Rows.ELEMENTWISE, folds=Size.BROADCAST, cuda="fhq", tensorrt="fh"),
    "Concat": Op(
        ENDS_BLOCK | KEEPS_ORDER | EMITTED | MOVES, rows=Rows.BY_OP, folds=Size.INPUTS, cuda="fhibq", tensorrt="fhibq"
    ),
    "ConstantOfShape": Op(JUMPS, folds=Size.TARGET, cuda="fhibq", tensorrt="f"),
    "Conv": Op(ENDS_BLOCK | SPATIAL_FIRST | PRODUCT | EMITTED, rows=Rows.OWN_ROWS, cuda="fh", tensorrt="fh"),
    "ConvTranspose": Op(ENDS_BLOCK | SPATIAL_FIRST | PRODUCT | EMITTED, rows=Rows.OWN_ROWS, cuda="fh", tensorrt="fh"),
    "Cos": Op(ELEMENTWISE, rows=Rows.ELEMENTWISE, folds=Size.BROADCAST, cuda="fh", tensorrt="fh"),
    "CumSum": Op(EMITTED, folds=Size.INPUTS, float32=_SUMS, cuda="fhi", tensorrt="fh"),
    "DepthToSpace": Op(SPATIAL_FIRST | MOVES, rows=Rows.OWN_ROWS, cuda="fh", tensorrt="fhi"),
    "DequantizeLinear": Op(QUANTIZES, rows=Rows.BY_OP, cuda="q", tensorrt="q"),
    "Div": Op(
        ELEMENTWISE | EMITTED,
        rows=Rows.ELEMENTWISE,
        folds=Size.BROADCAST,
        float32=_QUOTIENTS,
        cuda="fhi",
        tensorrt="fhi",
    ),
    "Dropout": Op(ELEMENTWISE, rows=Rows.ELEMENTWISE, cuda="fh", tensorrt="fh"),
    "Einsum": Op(PRODUCT | EMITTED, cuda="fh", tensorrt="fh"),
    "Elu": Op(
        ELEMENTWISE | ACTIVATION | KEEPS_ZERO, rows=Rows.ELEMENTWISE, folds=Size.BROADCAST, cuda="fh", tensorrt="fh"
    ),
    "Equal": Op(
        ELEMENTWISE | JUMPS | EMITTED, rows=Rows.ELEMENTWISE, folds=Size.BROADCAST, cuda="fhib", tensorrt="fhi"
    ),
    "Erf": Op(
        ELEMENTWISE | EMITTED | KEEPS_ZERO,
        rows=Rows.ELEMENTWISE,
        folds=Size.BROADCAST,
        cost=512,
        cuda="fh",
        tensorrt="fh",
    ),
    "Exp": Op(
        ELEMENTWISE | EMITTED, rows=Rows.ELEMENTWISE, folds=Size.BROADCAST, float32=_EXPONENTS, cuda="fh", tensorrt="fh"
    ),
    "Expand": Op(EMITTED | MOVES, rows=Rows.BY_OP, folds=Size.TARGET, cuda="fhibq", tensorrt="fhibq"),
    "EyeLike": Op(READS_SHAPE | JUMPS, float32=_TYPED, cuda="fi"),
    "Flatten": Op(MOVES, rows=Rows.BY_OP, folds=Size.INPUTS, cuda="fhibq", tensorrt="fhibq"),
    "Floor": Op(
        ELEMENTWISE | JUMPS | KEEPS_ZERO, rows=Rows.ELEMENTWISE, folds=Size.BROADCAST, cuda="fh", tensorrt="fh"
    ),
    "Gather": Op(EMITTED | MOVES, rows=Rows.ALONG_FIRST, folds=Size.GATHER, cuda="fhibq", tensorrt="fhibq"),
    "GatherElements": Op(EMITTED | MOVES, cuda="fhibq", tensorrt="fhibq"),
    "GatherND": Op(EMITTED | MOVES, cuda="fhi", tensorrt="fhib"),
    "Gelu": Op(ELEMENTWISE | ACTIVATION | KEEPS_ZERO, rows=Rows.ELEMENTWISE, cuda="fh", tensorrt="fh"),
    "Gemm": Op(PRODUCT | EMITTED, rows=Rows.BY_OP, folds=Size.PRODUCT, cuda="fh", tensorrt="fh"),
    "GlobalAveragePool": Op(SPATIAL_FIRST, rows=Rows.OWN_ROWS, float32=_SUMS, cuda="fh", tensorrt="fh"),
    "GlobalLpPool": Op(SPATIAL_FIRST, rows=Rows.OWN_ROWS, float32=_SQUARES),
    "GlobalMaxPool": Op(SPATIAL_FIRST, rows=Rows.OWN_ROWS, cuda="fh", tensorrt="fh"),
    "Greater": Op(
        ELEMENTWISE | JUMPS | EMITTED, rows=Rows.ELEMENTWISE, folds=Size.BROADCAST, cuda="fhi", tensorrt="fhi"
    ),
    "GreaterOrEqual": Op(
        ELEMENTWISE | JUMPS | EMITTED, rows=Rows.ELEMENTWISE, folds=Size.BROADCAST, cuda="fhi", tensorrt="fhi"
    ),
    "GridSample": Op(NONE, cuda="f", tensorrt="fh"),
    "GroupNormalization": Op(NORMALIZATION | SPATIAL_FIRST, rows=Rows.OWN_ROWS, float32=_SQUARES, tensorrt="fh"),
    "HardSigmoid": Op(ELEMENTWISE | ACTIVATION, rows=Rows.ELEMENTWISE, folds=Size.BROADCAST, cuda="fh", tensorrt="fh"),
    "HardSwish": Op(ELEMENTWISE | ACTIVATION | KEEPS_ZERO, rows=Rows.ELEMENTWISE, cuda="fh", tensorrt="fh"),
    "Identity": Op(
        ELEMENTWISE | EMITTED | KEEPS_ZERO, rows=Rows.ELEMENTWISE, folds=Size.BROADCAST, cuda="fhibq", tensorrt="fhibq"
    ),
    "InstanceNormalization": Op(
        NORMALIZATION | SPATIAL_FIRST, rows=Rows.OWN_ROWS, float32=_SQUARES, cuda="fh", tensorrt="fh"
    ),
    "LRN": Op(SPATIAL_FIRST, rows=Rows.OWN_ROWS, float32=_SQUARES, cuda="fh", tensorrt="fh"),
    "LayerNormalization": Op(NORMALIZATION, rows=Rows.ALONG_LAST, float32=_SQUARES, cuda="fh", tensorrt="fh"),
    "LeakyRelu": Op(
        ELEMENTWISE | ACTIVATION | KEEPS_ZERO, rows=Rows.ELEMENTWISE, folds=Size.BROADCAST, cuda="fh", tensorrt="fh"
    ),
    "Less": Op(ELEMENTWISE | JUMPS | EMITTED, rows=Rows.ELEMENTWISE, folds=Size.BROADCAST, cuda="fhi", tensorrt="fhi"),
    "LessOrEqual": Op(
        ELEMENTWISE | JUMPS | EMITTED, rows=Rows.ELEMENTWISE, folds=Size.BROADCAST, cuda="fhi", tensorrt="fhi"
    ),
    "Log": Op(
        ELEMENTWISE | EMITTED, rows=Rows.ELEMENTWISE, folds=Size.BROADCAST, float32=_EXPONENTS, cuda="fh", tensorrt="fh"
    ),
    "LogSoftmax": Op(NONE, rows=Rows.ALONG_LAST, float32=_EXPONENTS, cuda="fh", tensorrt="fh"),
    "LpNormalization": Op(NONE, rows=Rows.ALONG_LAST, float32=_SQUARES),
    "LpPool": Op(SPATIAL_FIRST, rows=Rows.OWN_ROWS, float32=_SQUARES, tensorrt="fh"),
    "MatMul": Op(PRODUCT | EMITTED, rows=Rows.BY_OP, folds=Size.PRODUCT, cuda="fh", tensorrt="fh"),
    "Max": Op(
        ELEMENTWISE | EMITTED | KEEPS_ZERO, rows=Rows.ELEMENTWISE, folds=Size.BROADCAST, cuda="fhi", tensorrt="fhi"
    ),
    "MaxPool": Op(SPATIAL_FIRST, rows=Rows.OWN_ROWS, cuda="fhq", tensorrt="fh"),
    "Mean": Op(ELEMENTWISE | KEEPS_ZERO, rows=Rows.ELEMENTWISE, folds=Size.BROADCAST, float32=_SUMS, tensorrt="fhi"),
    "MeanVarianceNormalization": Op(NONE, float32=_SQUARES),
    "Min": Op(ELEMENTWISE | KEEPS_ZERO, rows=Rows.ELEMENTWISE, folds=Size.BROADCAST, cuda="fhi", tensorrt="fhi"),
    "Mish": Op(ELEMENTWISE | ACTIVATION | KEEPS_ZERO, rows=Rows.ELEMENTWISE, tensorrt="fh"),
    "Mod": Op(ELEMENTWISE, rows=Rows.ELEMENTWISE, folds=Size.BROADCAST, cuda="fhi", tensorrt="fhi"),
    "Mul": Op(
        ELEMENTWISE | ENDS_BLOCK | EMITTED | KEEPS_ZERO,
        rows=Rows.ELEMENTWISE,
        folds=Size.BROADCAST,
        cuda="fhi",
        tensorrt="fhi",
    ),
    "Neg": Op(
        ELEMENTWISE | EMITTED | KEEPS_ZERO, rows=Rows.ELEMENTWISE, folds=Size.BROADCAST, cuda="fhi", tensorrt="fhi"
    ),
    "NonMaxSuppression": Op(JUMPS | EMITTED, cuda="f", tensorrt="fh"),
    "NonZero": Op(JUMPS, folds=Size.RANK),
    "Not": Op(ELEMENTWISE | JUMPS | EMITTED, rows=Rows.ELEMENTWISE, folds=Size.BROADCAST, cuda="b", tensorrt="b"),
    "OneHot": Op(JUMPS, folds=Size.DEPTH, tensorrt="fhibq"),
    "Or": Op(ELEMENTWISE | JUMPS | EMITTED, rows=Rows.ELEMENTWISE, folds=Size.BROADCAST, cuda="b", tensorrt="b"),
    "PRelu": Op(ELEMENTWISE | ACTIVATION | KEEPS_ZERO, rows=Rows.ELEMENTWISE, cuda="fh", tensorrt="fh"),
    "Pad": Op(KEEPS_ORDER | EMITTED | MOVES, rows=Rows.BY_OP, folds=Size.PADS, cuda="fhb", tensorrt="fhi"),
    "Pow": Op(
        ELEMENTWISE | EMITTED,
        rows=Rows.ELEMENTWISE,
        folds=Size.BROADCAST,
        float32=_EXPONENTS,
        cuda="fhi",
        tensorrt="fh",
    ),
    "QuantizeLinear": Op(QUANTIZES, rows=Rows.BY_OP, folds=Size.INPUTS, cuda="f", tensorrt="fh"),
    "Range": Op(JUMPS | EMITTED, folds=Size.RANGE, cuda="fi", tensorrt="fhi"),
    "Reciprocal": Op(
        ELEMENTWISE, rows=Rows.ELEMENTWISE, folds=Size.BROADCAST, float32=_QUOTIENTS, cuda="fh", tensorrt="fh"
    ),
    "ReduceL1": Op(NONE, rows=Rows.OVER_AXES, folds=Size.INPUTS, float32=_SUMS, cuda="fh", tensorrt="fh"),
    "ReduceL2": Op(NONE, rows=Rows.OVER_AXES, folds=Size.INPUTS, float32=_SQUARES, cuda="fh", tensorrt="fh"),
    "ReduceLogSum": Op(NONE, float32=_SUMS, cuda="fh", tensorrt="fh"),
    "ReduceLogSumExp": Op(NONE, rows=Rows.OVER_AXES, float32=_EXPONENTS, cuda="fh", tensorrt="fh"),
    "ReduceMax": Op(EMITTED, rows=Rows.OVER_AXES, folds=Size.INPUTS, cuda="fhi", tensorrt="fh"),
    "ReduceMean": Op(EMITTED, rows=Rows.OVER_AXES, folds=Size.INPUTS, float32=_SUMS, cuda="fhi", tensorrt="fh"),
    "ReduceMin": Op(NONE, rows=Rows.OVER_AXES, folds=Size.INPUTS, cuda="fhi", tensorrt="fh"),
    "ReduceProd": Op(NONE, rows=Rows.OVER_AXES, folds=Size.INPUTS, float32=_SUMS),
    "ReduceSum": Op(EMITTED, rows=Rows.OVER_AXES, folds=Size.INPUTS, float32=_SUMS, cuda="fhi", tensorrt="fh"),
    "ReduceSumSquare": Op(NONE, folds=Size.INPUTS, float32=_SQUARES, cuda="fh", tensorrt="fh"),
    "Relu": Op(
        ELEMENTWISE | ACTIVATION | EMITTED | KEEPS_ZERO,
        rows=Rows.ELEMENTWISE,
        folds=Size.BROADCAST,
        cuda="fh",
        tensorrt="fh",
    ),
    "Reshape": Op(EMITTED | MOVES, rows=Rows.BY_OP, folds=Size.INPUTS, cuda="fhibq", tensorrt="fhibq"),
    "Resize": Op(NONE, rows=Rows.BY_OP, cuda="fh", tensorrt="fh"),
    "Round": Op(
        ELEMENTWISE | JUMPS | KEEPS_ZERO, rows=Rows.ELEMENTWISE, folds=Size.BROADCAST, cuda="fh", tensorrt="fh"
    ),
    "ScatterElements": Op(EMITTED, cuda="fhibq", tensorrt="fhi"),
    "ScatterND": Op(EMITTED, cuda="fhibq", tensorrt="fhi"),
    "Selu": Op(ELEMENTWISE | ACTIVATION | KEEPS_ZERO, rows=Rows.ELEMENTWISE, cuda="fh", tensorrt="fh"),
    "Shape": Op(READS_SHAPE | JUMPS | EMITTED, folds=Size.INPUTS, cuda="fhibq", tensorrt="fhibq"),
    "Sigmoid": Op(
        ELEMENTWISE | ACTIVATION | EMITTED, rows=Rows.ELEMENTWISE, folds=Size.BROADCAST, cuda="fh", tensorrt="fh"
    ),
    "Sign": Op(
        ELEMENTWISE | JUMPS | EMITTED | KEEPS_ZERO,
        rows=Rows.ELEMENTWISE,
        folds=Size.BROADCAST,
        cuda="fhi",
        tensorrt="fhi",
    ),
    "Sin": Op(ELEMENTWISE | KEEPS_ZERO, rows=Rows.ELEMENTWISE, folds=Size.BROADCAST, cuda="fh", tensorrt="fh"),
    "Size": Op(READS_SHAPE | JUMPS, folds=Size.INPUTS, cuda="fhibq", tensorrt="fhibq"),
    "Slice": Op(EMITTED | MOVES, rows=Rows.OVER_SLICED_AXES, folds=Size.INPUTS, cuda="fhibq", tensorrt="fhibq"),
    "Softmax": Op(NONE, rows=Rows.ALONG_LAST, folds=Size.INPUTS, float32=_EXPONENTS, cuda="fh", tensorrt="fh"),
    "Softplus": Op(
        ELEMENTWISE | ACTIVATION | EMITTED,
        rows=Rows.ELEMENTWISE,
        folds=Size.BROADCAST,
        float32=_EXPONENTS,
        cuda="fh",
        tensorrt="fh",
    ),
    "Softsign": Op(ELEMENTWISE | ACTIVATION | KEEPS_ZERO, rows=Rows.ELEMENTWISE, cuda="fh", tensorrt="fh"),
    "SpaceToDepth": Op(SPATIAL_FIRST | MOVES, rows=Rows.OWN_ROWS, cuda="fh", tensorrt="fhi"),
    "Split": Op(KEEPS_ORDER | MOVES, rows=Rows.ALONG_FIRST, folds=Size.INPUTS, cuda="fhibq", tensorrt="fhibq"),
    "Sqrt": Op(
        ELEMENTWISE | EMITTED | KEEPS_ZERO,
        rows=Rows.ELEMENTWISE,
        folds=Size.BROADCAST,
        float32=_QUOTIENTS,
        cuda="fh",
        tensorrt="fh",
    ),
    "Squeeze": Op(EMITTED | MOVES, rows=Rows.OVER_AXES, folds=Size.INPUTS, cuda="fhibq", tensorrt="fhibq"),
    "Sub": Op(
        ELEMENTWISE | EMITTED | KEEPS_ZERO, rows=Rows.ELEMENTWISE, folds=Size.BROADCAST, cuda="fhi", tensorrt="fhi"
    ),
    "Sum": Op(
        ELEMENTWISE | ENDS_BLOCK | KEEPS_ZERO, rows=Rows.ELEMENTWISE, folds=Size.BROADCAST, cuda="fh", tensorrt="fhi"
    ),
    "Tanh": Op(
        ELEMENTWISE | ACTIVATION | EMITTED | KEEPS_ZERO,
        rows=Rows.ELEMENTWISE,
        folds=Size.BROADCAST,
        cuda="fh",
        tensorrt="fh",
    ),
    "ThresholdedRelu": Op(ELEMENTWISE | ACTIVATION, rows=Rows.ELEMENTWISE, cuda="fh", tensorrt="fh"),
    "Tile": Op(MOVES, rows=Rows.BY_OP, folds=Size.REPEATS, cuda="fhi", tensorrt="fhibq"),
    "TopK": Op(EMITTED, rows=Rows.ALONG_LAST, cuda="fhi", tensorrt="fh"),
    "Transpose": Op(EMITTED | MOVES, rows=Rows.BY_OP, folds=Size.INPUTS, cuda="fhibq", tensorrt="fhibq"),
    "Trilu": Op(NONE, folds=Size.INPUTS, cuda="fhibq", tensorrt="fhibq"),
    "Unsqueeze": Op(EMITTED | MOVES, rows=Rows.OVER_AXES, folds=Size.INPUTS, cuda="fhibq", tensorrt="fhibq"),
    "Where": Op(ELEMENTWISE | EMITTED, rows=Rows.ELEMENTWISE, folds=Size.BROADCAST, cuda="fhiq", tensorrt="fhibq"),
    "Xor": Op(ELEMENTWISE | JUMPS, rows=Rows.ELEMENTWISE, folds=Size.BROADCAST, cuda="b", tensorrt="b"),
}

_UNKNOWN = Op(Fact.NONE)


def op_row(op: str) -> Op:
    """Return the row of an op, named as by `graph.operator`; a row without facts for an unlisted op."""
    return OPS.get(op, _UNKNOWN)


def ops_where(condition: Callable[[Op], object]) -> frozenset[str]:
    """Return the ops whose row meets a condition."""
    return frozenset(name for name, op in OPS.items() if condition(op))


def ops_with(facts: Fact) -> frozenset[str]:
    """Return the ops that have any of the given properties."""
    return ops_where(lambda op: op.facts & facts)


ACTIVATION_OPS = ops_with(Fact.ACTIVATION)
ELEMENTWISE_OPS = ops_with(Fact.ELEMENTWISE)
QUANTIZATION_OPS = ops_with(Fact.QUANTIZES)
