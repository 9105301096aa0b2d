"""The table of op facts: complete, consistent, and the only list of its kind."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import onnx
import pytest

import fastcam.exporting
from fastcam.explaining.inspection import _MACS
from fastcam.exporting.gradients import rules, table
from fastcam.exporting.ops import OPS, Fact, Rows, Size, ops_where, ops_with
from fastcam.exporting.passes.constants import _SIZES
from fastcam.exporting.passes.open_batch import _RULES_BY_OP

_SOURCE = Path(fastcam.exporting.__file__).parent
# A sequence with this many op names states a fact about ops that belongs in the table.
_MOST_NAMES = 3


def test_every_op_with_a_gradient_rule_has_a_row() -> None:
    assert rules.__name__ in sys.modules
    assert not set(table.VJPS) - set(OPS)


def test_every_row_is_an_op_of_onnx() -> None:
    assert [name for name in OPS if not onnx.defs.has(name)] == []


def test_the_ops_of_gradient_graphs_run_on_both_gpu_runtimes() -> None:
    assert [name for name in ops_with(Fact.EMITTED) if not (OPS[name].cuda and OPS[name].tensorrt)] == []


def test_multiply_accumulates_are_counted_for_the_ops_that_do_them() -> None:
    assert set(_MACS) == ops_with(Fact.PRODUCT)


def test_rules_exist_for_what_the_table_leaves_to_them() -> None:
    assert set(_RULES_BY_OP) == ops_where(lambda op: op.rows is Rows.BY_OP)
    assert set(_SIZES) == set(Size)


@pytest.mark.parametrize("op", sorted(ops_with(Fact.ELEMENTWISE)))
def test_elementwise_ops_keep_rows_apart(op: str) -> None:
    assert OPS[op].rows is Rows.ELEMENTWISE


@pytest.mark.parametrize("op", "Resize Conv Loop RoiAlign NonMaxSuppression ImageDecoder RegexFullMatch LSTM".split())
def test_expensive_ops_are_never_folded(op: str) -> None:
    assert op not in OPS or OPS[op].folds is None


@pytest.mark.parametrize("op", ["ThresholdedRelu", "HardSwish", "Mish", "Elu"])
def test_activations_end_a_block_wherever_they_count_as_elementwise(op: str) -> None:
    assert Fact.ACTIVATION | Fact.ELEMENTWISE in OPS[op].facts


def test_normalisations_have_one_home() -> None:
    row = OPS["GroupNormalization"]
    assert Fact.NORMALIZATION | Fact.SPATIAL_FIRST in row.facts
    assert (row.rows, row.float32 != "") == (Rows.OWN_ROWS, True)


def _lists_of_ops(path: Path, root: Path) -> list[str]:
    """Return the sequences of op names in a module; tables from an op to a function are dispatch, not facts."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[object] = []
        if isinstance(node, ast.List | ast.Tuple | ast.Set):
            names = [item.value for item in node.elts if isinstance(item, ast.Constant)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and path.name != "ops.py":
            names = list(node.value.split())
        ops = [name for name in names if isinstance(name, str) and onnx.defs.has(name)]
        if len(ops) >= _MOST_NAMES and len(ops) == len(names):
            found.append(f"{path.relative_to(root)}:{getattr(node, 'lineno', 0)}: {ops}")
    return found


def test_no_other_module_lists_ops_by_a_property() -> None:
    """Except in importers, which list what converters write, and loops that register one rule for several ops."""
    modules = [path for path in _SOURCE.rglob("*.py") if path.name != "ops.py" and "importers" not in path.parts]
    # Patterns: the nodes around a Shape's first size, around the scores of any kind, and around the pixels' arithmetic.
    kinds = {f"score_kinds/{name}.py" for name in ("detectors", "segmentation", "windows")}
    patterns = {"passes/reshapes.py", "scores.py", "pixels.py"} | kinds
    allowed = patterns | {"gradients/rules/elementwise.py", "gradients/rules/shapes.py"}
    found = [line for path in modules for line in _lists_of_ops(path, _SOURCE) if line.split(":")[0] not in allowed]
    assert found == []


def test_the_guard_sees_a_list(tmp_path: Path) -> None:
    module = tmp_path / "planted.py"
    module.write_text('X = "Relu Elu Selu".split()\nY = ("Conv", "Gemm", "MatMul")\n')
    assert len(_lists_of_ops(module, tmp_path)) == 2


_FIELDS = ("input", "output", "attribute", "nodes")
_EDITS = ("append", "extend", "insert", "remove", "pop", "clear", "CopyFrom")


def _is_field(expression: ast.expr) -> bool:
    """A field of a node, or the nodes of a graph."""
    return isinstance(expression, ast.Attribute) and expression.attr in _FIELDS


def _edits(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = [target.value if isinstance(target, ast.Subscript) else target for target in node.targets]
        elif isinstance(node, ast.AugAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _EDITS:
            targets = [node.func.value]
        if any(_is_field(target) for target in targets):
            found.append(f"{path.name}:{getattr(node, 'lineno', 0)}: {ast.unparse(node)}")
    return found


def test_no_module_but_graph_edits_nodes() -> None:
    """Writes to the fields of nodes would make the indices of `Graph` stale.

    Excepted are three modules that edit messages before a `Graph` is made of them.
    """
    readers = ("decisions.py", "opsets.py", "torch_exporters.py")
    modules = [path for path in _SOURCE.rglob("*.py") if path.name not in readers]
    assert [line for path in modules for line in _edits(path)] == []


def test_the_guard_sees_an_edit(tmp_path: Path) -> None:
    module = tmp_path / "planted.py"
    lines = ["node.input[0] = x", "del graph.nodes[3]", "graph.nodes.append(node)", "node.attribute.extend(items)"]
    module.write_text("\n".join(lines))
    assert len(_edits(module)) == len(lines)
