"""The public names, and what importing them costs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import fastcam
from fastcam import errors


def test_public_names() -> None:
    assert sorted(fastcam.__all__) == [
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
    for name in fastcam.__all__:
        value = getattr(fastcam, name)
        assert value.__doc__, name
        assert name in dir(fastcam)


def test_every_error_is_public_and_refines_a_builtin() -> None:
    classes = [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, Exception) and value is not errors.FastcamError
    ]
    for error in classes:
        assert issubclass(error, fastcam.FastcamError)
        assert len(error.__mro__) > len(fastcam.FastcamError.__mro__) + 1
        assert getattr(fastcam, error.__name__) is error


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="explain"):
        getattr(fastcam, "explain")  # noqa: B009  # mypy knows that it is not there


def test_the_version_is_the_packages() -> None:
    assert fastcam.__version__.count(".") == 2


def test_importing_loads_nothing_heavy() -> None:
    code = "import sys, json, fastcam; print(json.dumps(sorted(sys.modules)))"
    loaded = set(json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout))
    heavy = {"numpy", "onnx", "onnxruntime", "PIL", "cmap", "click", "matplotlib", "tensorflow", "tf2onnx", "torch"}
    assert not heavy & loaded


def test_explaining_needs_neither_onnx_nor_tensorflow(tmp_path: Path) -> None:
    """A service that only runs exported files loads ONNX Runtime, NumPy and the kernels."""
    code = "import sys, json, fastcam; fastcam.Explainer; print(json.dumps(sorted(sys.modules)))"
    loaded = set(json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout))
    assert "numpy" in loaded
    assert not {"onnx", "tensorflow", "tf2onnx", "matplotlib", "cmap"} & loaded


def test_modules_import_one_way() -> None:
    """Each module imports what stands to its left in the way of the data, and errors; nothing imports back."""
    order = [
        "errors",
        "files",
        "kernels",
        "imaging",
        "labels",
        "metadata",
        "tensorrt",
        "methods",
        "graph",
        "importers",
        "fusions",
        "simplifier",
        "batching",
        "tokens",
        "splitter",
        "vjps",
        "autodiff",
        "storage",
        "halving",
        "exporter",
        "devices",
        "explanation",
        "targets",
        "explained",
        "providers",
        "sessions",
        "engines",
        "explainer",
        "inspection",
        "sources",
        "photos",
        "backbones",
        "fitting",
        "figures",
        "training",
        "journal",
        "report",
        "jobs",
        "checkpoint",
        "demo",
        "cli",
    ]
    package = Path(fastcam.__file__).parent
    modules = {path.stem for path in package.glob("*.py")} | {"devices", "engines", "importers", "kernels"}
    assert modules - {"__init__"} == set(order)
    for position, name in enumerate(order):
        allowed = {*order[:position], *order[position : position + 1]}
        folder = package / name
        files = list(folder.glob("*.py")) if folder.is_dir() else [package / f"{name}.py"]
        above = ".." if folder.is_dir() else "."
        lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
        imported = {line.split()[1].removeprefix(above) for line in lines if line.strip().startswith(f"from {above}")}
        assert {item.split(".")[0] for item in imported if item} <= allowed - {name}, name
