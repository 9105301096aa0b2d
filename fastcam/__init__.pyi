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
    TimeLimitError,
    UnsupportedOpError,
    WriteError,
)
from .evaluating.evaluation import Evaluation, evaluate
from .evaluating.verification import Verification, verify
from .explaining.explainer import Explainer
from .explaining.explanation import DeviceExplanation, Explanation
from .explaining.image_explanation import ImageExplanation
from .explaining.inspection import ModelInfo, inspect
from .explaining.rendering import render
from .explaining.signal_explanation import SignalExplanation
from .explaining.tensorrt import write_context
from .exporting.exporter import ExportResult, export
from .exporting.gradients.table import Step, defvjp
from .exporting.splitter import split
from .folders.drift import ClassDrift, Drift, compare_results
from .folders.jobs import JobProgress, JobResult, explain_files
from .folders.merging import MergeResult, merge_results
from .folders.report import write_report
from .kernels.boundary import Rendered
from .preprocessing import Preprocessing
from .serving.triton import TritonModel, write_triton_repository
from .training.finetune import finetune
from .training.results import TrainingProgress, TrainingResult

__all__ = [
    "ArgumentError",
    "ClassDrift",
    "DeviceError",
    "DeviceExplanation",
    "DeviceMemoryError",
    "Drift",
    "Evaluation",
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
    "MergeResult",
    "MissingExtraError",
    "ModelError",
    "ModelInfo",
    "NonFiniteError",
    "Preprocessing",
    "Rendered",
    "SignalExplanation",
    "Step",
    "TargetError",
    "TimeLimitError",
    "TrainingProgress",
    "TrainingResult",
    "TritonModel",
    "UnsupportedOpError",
    "Verification",
    "WriteError",
    "compare_results",
    "defvjp",
    "evaluate",
    "explain_files",
    "export",
    "finetune",
    "inspect",
    "merge_results",
    "render",
    "split",
    "verify",
    "write_context",
    "write_report",
    "write_triton_repository",
]

__version__: str
