from .errors import (
    ArgumentError,
    DeviceError,
    DeviceMemoryError,
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
from .explainer import Explainer
from .explanation import DeviceExplanation, Explanation, ImageExplanation
from .exporter import ExportResult, export
from .imaging import Preprocessing
from .inspection import ModelInfo, inspect
from .jobs import JobProgress, JobResult, explain_files
from .report import write_report
from .splitter import split
from .training import TrainingProgress, TrainingResult, finetune
from .vjps import Step, defvjp

__all__ = [
    "ArgumentError",
    "DeviceError",
    "DeviceExplanation",
    "DeviceMemoryError",
    "Explainer",
    "Explanation",
    "ExportResult",
    "FastcamError",
    "FileFormatError",
    "ImageError",
    "ImageExplanation",
    "JobProgress",
    "JobResult",
    "KernelError",
    "LayerError",
    "MissingExtraError",
    "ModelError",
    "ModelInfo",
    "NonFiniteError",
    "Preprocessing",
    "Step",
    "TargetError",
    "TrainingProgress",
    "TrainingResult",
    "UnsupportedOpError",
    "WriteError",
    "defvjp",
    "explain_files",
    "export",
    "finetune",
    "inspect",
    "split",
    "write_report",
]

__version__: str
