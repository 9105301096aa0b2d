from .errors import (
    ArgumentError,
    DeviceError,
    FastcamError,
    FileFormatError,
    ImageError,
    KernelError,
    LayerError,
    MissingExtraError,
    ModelError,
    NonFiniteError,
    TargetError,
    UnsupportedOpError,
    WriteError,
)
from .explainer import Explainer, Explanation, ImageExplanation
from .exporter import ExportResult, export
from .imaging import Preprocessing
from .splitter import split
from .vjps import Step, defvjp

__all__ = [
    "ArgumentError",
    "DeviceError",
    "Explainer",
    "Explanation",
    "ExportResult",
    "FastcamError",
    "FileFormatError",
    "ImageError",
    "ImageExplanation",
    "KernelError",
    "LayerError",
    "MissingExtraError",
    "ModelError",
    "NonFiniteError",
    "Preprocessing",
    "Step",
    "TargetError",
    "UnsupportedOpError",
    "WriteError",
    "defvjp",
    "export",
    "split",
]

__version__: str
