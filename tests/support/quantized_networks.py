"""Networks quantised by ONNX Runtime's own tool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static


class _Photos(CalibrationDataReader):
    def __init__(self, shape: tuple[int, ...]) -> None:
        rng = np.random.default_rng(0)
        self._batches = iter([{"image": rng.normal(size=(4, *shape)).astype(np.float32)} for _ in range(8)])

    def get_next(self) -> Any:
        return next(self._batches, None)


def quantized(model: onnx.ModelProto, folder: Path, format_: str, activations: str = "QUInt8") -> onnx.ModelProto:
    """Quantise to "QDQ", "QOperator" or "dynamic", weights per channel in 8 bits."""
    onnx.save(model, folder / "float.onnx")
    options = {"per_channel": True, "weight_type": QuantType.QInt8}
    if format_ == "dynamic":
        quantize_dynamic(folder / "float.onnx", folder / "quantized.onnx", **options)
    else:
        shape = tuple(dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim[1:])
        quantize_static(
            folder / "float.onnx",
            folder / "quantized.onnx",
            _Photos(shape),
            quant_format=QuantFormat[format_],
            activation_type=QuantType[activations],
            **options,
        )
    return onnx.load(folder / "quantized.onnx")
