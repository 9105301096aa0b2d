"""Which sizes are the batch size, or a multiple of it: ONNX's shape inference names those that it cannot compute anew.

Attention and windows merge the batch with other axes and split it again. Counting elements shows what became of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeAlias

import onnx

Dim: TypeAlias = "int | str | None"
Shape: TypeAlias = "tuple[Dim, ...]"

# Ops whose output has, along an axis, the size of the inputs that are not 1 there.
_BROADCASTING = frozenset("Add And Div Equal Greater Less MatMul Max Min Mod Mul Or Pow Sub Where".split())


# With spaces, which names that exporters give have not.
_MULTIPLE = re.compile(r"(\d+) \* (.+)")


def multiple_of(batch: str, times: int) -> str:
    """Return the name of a size that is so many times the batch size."""
    return batch if times == 1 else f"{times} * {batch}"


def factored(size: str) -> tuple[int, str]:
    """Return how many times which size a named size is."""
    match = _MULTIPLE.fullmatch(size)
    return (int(match[1]), match[2]) if match else (1, size)


def is_multiple(size: Dim) -> bool:
    """Return whether a size is named as a multiple of the batch size, 2 or more times."""
    return isinstance(size, str) and _MULTIPLE.fullmatch(size) is not None


def name_batch_sizes(nodes: Iterable[onnx.NodeProto], shapes: Mapping[str, Shape], batch: str) -> dict[str, str]:
    """Return better names for sizes that inference called "unk__..." and that are multiples of the batch size.

    Parameters
    ----------
    nodes : iterable of onnx.NodeProto
        In the order of computation.
    shapes : mapping of str to tuple
        Inferred shapes.
    batch : str
        The name of the batch size.

    Returns
    -------
    dict of str to str
        By `multiple_of`.
    """
    times: dict[Dim, int] = {batch: 1}
    for node in nodes:
        before = [shapes[name] for name in node.input if name in shapes]
        after = shapes.get(node.output[0])
        if after is None or not any(_is_unnamed(size, times) for size in after):
            continue
        if node.op_type == "Reshape" and before:
            times.update(_split(before[0], after, times))
        elif node.op_type in _BROADCASTING and len(before) == len(node.input):
            times.update(_broadcast(before, after, times))
        elif node.op_type == "Expand" and before:
            times.update(_broadcast(before[:1], after, times))
    return {str(size): multiple_of(batch, number) for size, number in times.items() if size != batch}


def _is_unnamed(size: Dim, times: Mapping[Dim, int]) -> bool:
    return isinstance(size, str) and size.startswith("unk__") and size not in times


def _split(before: Shape, after: Shape, times: Mapping[Dim, int]) -> Iterator[tuple[Dim, int]]:
    """Yield the only open size of a Reshape's output: the number of elements stays the same."""
    (inner, *more), (outer, *others) = (
        [size for size in one if not isinstance(size, int)] or [None] for one in (before, after)
    )
    rest = math.prod(size for size in after if isinstance(size, int))
    if more or others or inner not in times or not _is_unnamed(outer, times) or not rest:
        return
    elements = times[inner] * math.prod(size for size in before if isinstance(size, int))
    if elements % rest == 0:
        yield outer, elements // rest


def _broadcast(before: list[Shape], after: Shape, times: Mapping[Dim, int]) -> Iterator[tuple[Dim, int]]:
    for axis, size in enumerate(after):
        if not _is_unnamed(size, times):
            continue
        from_end = axis - len(after)
        sizes = {one[from_end] for one in before if len(one) >= -from_end} - {1}
        found = {times.get(one) for one in sizes}
        if len(found) == 1 and (number := found.pop()) is not None:
            yield size, number
