"""What the quarantine's child computes, computed in this process: the child adds limits, and changes nothing."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import onnx
import pytest
from networks import small_classifier
from onnx import helper
from opset_networks import classifier

import fastcam
from fastcam.exporting.importers import quarantine


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every piece of the child's work in this process."""

    def call(self: Any, work: str, data: bytes, *, size: int | None = None) -> bytes:
        failed, answer = quarantine._answer(work, data)
        if failed:
            raise fastcam.ModelError(answer.decode())
        return answer

    monkeypatch.setattr(quarantine.Quarantine, "__call__", call)


@pytest.mark.parametrize("opset", [7, 9, 13, 18, 21, 23])
def test_files_are_the_same_byte_by_byte(opset: int, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model = classifier(opset)
    fastcam.export(model, tmp_path / "child.onnx")
    request.getfixturevalue("here")
    fastcam.export(model, tmp_path / "here.onnx")
    assert (tmp_path / "here.onnx").read_bytes() == (tmp_path / "child.onnx").read_bytes()


def _with_function(depth: int = 1) -> onnx.ModelProto:
    """A network in which a function computes the ReLU of the second block."""
    model = small_classifier().to_model()
    opsets = [helper.make_opsetid("", model.opset_import[0].version), helper.make_opsetid("own", 1)]
    calls = [helper.make_node("Relu", ["x"], ["y"])]
    functions = [helper.make_function("own", "act0", ["x"], ["y"], calls, opsets)]
    for level in range(1, depth):
        values = ["x", *(f"x{index}" for index in range(9)), "y"]
        calls = [
            helper.make_node(f"act{level - 1}", [one], [other], domain="own")
            for one, other in itertools.pairwise(values)
        ]
        functions.append(helper.make_function("own", f"act{level}", ["x"], ["y"], calls, opsets))
    node = next(node for node in model.graph.node if "block2" in node.output)
    node.CopyFrom(helper.make_node(f"act{depth - 1}", list(node.input), list(node.output), domain="own"))
    model.opset_import.append(helper.make_opsetid("own", 1))
    model.functions.extend(functions)
    return model


def test_functions_are_inlined(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    fastcam.export(_with_function(), tmp_path / "child.onnx")
    request.getfixturevalue("here")
    fastcam.export(_with_function(), tmp_path / "here.onnx")
    assert (tmp_path / "here.onnx").read_bytes() == (tmp_path / "child.onnx").read_bytes()


@pytest.mark.usefixtures("here")
def test_what_the_child_refuses(tmp_path: Path) -> None:
    with pytest.raises(fastcam.ModelError, match="expands to"):
        fastcam.export(_with_function(depth=8), tmp_path / "no.onnx")
    model = small_classifier().to_model()
    model.opset_import[0].version = 999
    with pytest.raises(fastcam.ModelError, match="opset 999"):
        fastcam.export(model, tmp_path / "no.onnx")
    assert not list(tmp_path.iterdir())
