"""What the exporter knows about each ONNX op."""

from __future__ import annotations

# Ops that end a convolutional block: their outputs are what "the output of a conv layer" means.
ACTIVATION_OPS = frozenset(
    "Relu Clip LeakyRelu PRelu Elu Selu Celu Gelu Mish HardSwish HardSigmoid Sigmoid Tanh Softplus Softsign".split()
)


# What an activation becomes in a quantised network: the map is what the second one gives.
QUANTIZATION_OPS = frozenset(["QuantizeLinear", "DequantizeLinear"])


NORMALIZATION_OPS = frozenset("BatchNormalization LayerNormalization InstanceNormalization GroupNormalization".split())


BLOCK_OPS = ACTIVATION_OPS | NORMALIZATION_OPS | frozenset("Conv ConvTranspose Add Mul Concat Sum".split())


SPATIAL_FIRST_OPS = frozenset(
    """
    Conv ConvTranspose MaxPool AveragePool LpPool GlobalAveragePool GlobalMaxPool BatchNormalization
    InstanceNormalization GroupNormalization LRN DepthToSpace SpaceToDepth
    """.split()
)


ORDER_KEEPING_OPS = ACTIVATION_OPS | frozenset("Add Concat Div Identity Mul Pad Split Sub".split())

ELEMENTWISE = """
    Abs Add Cast Ceil Clip Celu Div Elu Erf Exp Floor Gelu HardSigmoid HardSwish Identity LeakyRelu Log Max Min Mish Mul
    Neg Pow Reciprocal Relu Selu Sigmoid Softplus Softsign Sqrt Sub Sum Tanh Where
""".split()
