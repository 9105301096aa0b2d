"""Ops that both ONNX Runtime's CUDA provider runs on the GPU (opset 18..20) and TensorRT's ONNX parser accepts.

The subset that gradients are allowed to use. Left out on purpose: MaxUnpool, Col2Im, OneHot with a computed depth,
ScatterND with a reduction, MaxPool with its Indices output, Elu, Selu, InstanceNormalization.
"""

CUDA_AND_TENSORRT_OPS = frozenset(
    """
    Abs Add And ArgMax Cast Concat Conv ConvTranspose Div Einsum Equal Erf Exp Expand Gather GatherElements Gemm Greater
    GreaterOrEqual Identity Less LessOrEqual Log MatMul Max Mul Neg Not Or Pad Pow Reciprocal ReduceMax ReduceMean
    ReduceSum Relu Reshape Shape Sigmoid Sign Slice Softplus Sqrt Squeeze Sub Tanh TopK Transpose Unsqueeze Where
    """.split()
)
