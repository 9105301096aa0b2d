"""Work against the number of nodes: every pass, and the whole of an export, is linear.

Work is counted, not timed: lines of this package that Python executes, plus the nodes that graphs return in bulk.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import numpy as np
import pytest

import fastcam
from bench.export_scaling import CHAINS, chain
from fastcam.exporting.classifier import open_classifier
from fastcam.exporting.layers import list_candidates
from fastcam.exporting.outputs import add_explanation
from fastcam.exporting.passes.simplify import simplify
from fastcam.graph import Graph, _NodeOrder

_PACKAGE = fastcam.__file__.removesuffix("__init__.py")
_SIZES = (300, 1200)
# Constant parts, which both sizes have, only lower it. A pass that scans all nodes for each node has 2.
_LARGEST_EXPONENT = 1.15


class _Counter:
    def __init__(self) -> None:
        self.work = 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(_PACKAGE) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        self.work += 1
        return self._line


@contextmanager
def _counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Counter]:
    counter, snapshot, before = _Counter(), _NodeOrder.snapshot, sys.gettrace()

    def counted_snapshot(order: _NodeOrder) -> Any:
        counter.work += len(order)
        return snapshot(order)

    with monkeypatch.context() as patch:
        patch.setattr(_NodeOrder, "snapshot", counted_snapshot)
        sys.settrace(counter)
        try:
            yield counter
        finally:
            sys.settrace(before)


def _exponent(work: list[int]) -> float:
    return float(np.log(work[1] / work[0]) / np.log(_SIZES[1] / _SIZES[0]))


@pytest.mark.parametrize("name", sorted(CHAINS))
def test_simplifying_and_choosing_is_linear(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    work = []
    for size in _SIZES:
        graph = chain(CHAINS[name], size)
        graph.infer_types()
        with _counted(monkeypatch) as counter:
            simplify(graph)
            list_candidates(graph)
        work.append(counter.work)
    assert _exponent(work) <= _LARGEST_EXPONENT


@pytest.mark.parametrize("name", ["affines", "layer_normalizations"])
def test_the_reverse_pass_is_linear(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    work = []
    for size in _SIZES:
        classifier = open_classifier(chain(CHAINS[name], size).to_model(), [None])
        graph = classifier.graph
        first = next(node.output[0] for node in graph.nodes if node.op_type == "Conv")
        with _counted(monkeypatch) as counter:
            add_explanation(graph, [first], full=True)
            graph.prune()
        work.append(counter.work)
    assert _exponent(work) <= _LARGEST_EXPONENT


def _rename_everything(graph: Graph) -> None:
    for node in graph.nodes:
        graph.rename(node.output[0], graph.unused_name("renamed"))


def _redirect_everything(graph: Graph) -> None:
    for node in graph.nodes:
        graph.replace_uses(node.output[0], node.input[0])


def _insert_everywhere(graph: Graph) -> None:
    for node in graph.nodes:
        graph.insert_after(node, *[])
        graph.set_input(node, 0, node.input[0])


@pytest.mark.parametrize("edit", [_rename_everything, _redirect_everything, _insert_everywhere])
@pytest.mark.parametrize("name", ["identities", "joins"])
def test_edits_take_time_in_proportion_to_what_they_change(
    edit: Callable[[Graph], None], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = []
    for size in _SIZES:
        graph = chain(CHAINS[name], size)
        with _counted(monkeypatch) as counter:
            edit(graph)
        work.append(counter.work)
    assert _exponent(work) <= _LARGEST_EXPONENT


def test_the_counter_sees_a_quadratic_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    work = []
    for size in _SIZES:
        graph = chain(CHAINS["identities"], size)
        with _counted(monkeypatch) as counter:
            for node in graph.nodes:
                graph.set_input(node, 0, node.input[0])
                assert graph.nodes
        work.append(counter.work)
    assert _exponent(work) > 1.5
