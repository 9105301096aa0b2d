"""The public names, and the cost of importing them."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import fastcam
from fastcam import errors


def test_public_names() -> None:
    assert sorted(fastcam.__all__) == [
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


# From the ground up: each package may import those to its left.
_PACKAGES = (
    "ground kernels pictures exporting explaining evaluating folders ray training web serving demo cli __main__".split()
)
_GROUND = set(
    "errors arguments arrays files protobuf batch_sizes graph preprocessing notes metadata labels selftest".split()
)
# Packages that must stay separate although the order would allow an import.
_APART = {
    ("exporting", "kernels"),
    ("exporting", "pictures"),
    ("explaining", "exporting"),
    ("folders", "exporting"),
    ("ray", "exporting"),
    ("training", "exporting"),
    ("training", "explaining"),
    ("training", "folders"),
    ("web", "exporting"),
    ("web", "explaining"),
}
_ROOT = Path(fastcam.__file__).parent


def _package(module: Sequence[str]) -> str:
    """Return the package of ``fastcam.<module>``."""
    return "ground" if module[0] in _GROUND else module[0]


def _imports(path: Path) -> Iterator[list[str]]:
    """Yield every module of fastcam that a file imports, as a list of names."""
    here = list(path.relative_to(_ROOT).with_suffix("").parts)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = here[: len(here) - node.level] + (node.module.split(".") if node.module else [])
        # `from . import name` at the top names the module itself.
        yield from ([*base, *([alias.name] if not base else [])] for alias in node.names)


def test_packages_import_one_way() -> None:
    """Exporting and explaining do not know each other, and an export needs no compiled code."""
    names = {path.stem for path in _ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert names - {"__init__"} == {*_PACKAGES, *_GROUND} - {"ground"}
    for path in sorted(_ROOT.rglob("*.py")):
        package = _package(path.relative_to(_ROOT).with_suffix("").parts)
        if package == "__init__":
            continue
        for module in _imports(path):
            other = _package(module)
            assert _PACKAGES.index(other) <= _PACKAGES.index(package), f"{path} imports {module}"
            assert (package, other) not in _APART, f"{path} imports {module}"


def test_no_module_imports_itself_by_a_detour() -> None:
    modules = {".".join(path.relative_to(_ROOT).with_suffix("").parts): path for path in _ROOT.rglob("*.py")}
    imports = {
        name: {other for module in _imports(path) if (other := ".".join(module)) in modules}
        for name, path in modules.items()
    }
    TopologicalSorter(imports).prepare()


def test_the_ground_imports_one_way() -> None:
    order = (
        "errors arguments arrays files protobuf batch_sizes graph notes preprocessing labels metadata selftest".split()
    )
    assert set(order) == _GROUND
    for position, name in enumerate(order):
        assert {module[0] for module in _imports(_ROOT / f"{name}.py")} <= set(order[:position]), name


@pytest.mark.parametrize("package", sorted(path.parent for path in _ROOT.rglob("__init__.py") if path.parent != _ROOT))
def test_each_package_says_what_it_is_for(package: Path) -> None:
    """What comes in, what goes out, and what it may import."""
    docstring = ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8"))) or ""
    assert "Imports" in docstring or package.name == "rules", docstring
    assert "In: " in docstring or package.name == "rules", docstring


def test_exporting_loads_no_compiled_code() -> None:
    code = "import sys, fastcam; fastcam.export; print([name for name in sys.modules if 'kernels' in name])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.strip() == b"[]"
