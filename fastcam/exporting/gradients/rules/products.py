"""Gradient rules of matrix products."""

from __future__ import annotations

import string

from ....graph import Dim, static_dims
from ..table import Step, defvjp
from .common import stretched


# Matrix products
def _matmul_left(s: Step) -> str:
    """G B^T; a constant matrix is read in place, transposed by Gemm, so that the file does not hold it twice."""
    if s.x[1] in s.graph.constants and s.rank(s.x[1]) == 2:
        return _times_matrix(s, s.gradient, s.x[1], transposed=True)
    return s.emit("MatMul", s.gradient, _swapped(s, s.x[1]))


def _matmul_right(s: Step) -> str:
    return s.emit("MatMul", _swapped(s, s.x[0]), s.gradient)


def _gemm(s: Step) -> str:
    """Alpha * G B'^T, where B' is B as Gemm uses it, transposed or not."""
    if s.attribute("transA", 0):
        s.refuse("its first input is transposed")
    gradient = _times_matrix(s, s.gradient, s.x[1], transposed=not s.attribute("transB", 0))
    alpha = s.attribute("alpha", 1.0)
    return gradient if alpha == 1 else s.emit("Mul", gradient, s.constant(alpha))


def _gemm_bias(s: Step) -> str:
    if s.shape(s.x[2]) != s.shape(s.y):
        s.refuse("its addend is computed and its shape differs from the output's")
    beta = s.attribute("beta", 1.0)
    return s.gradient if beta == 1 else s.times(s.constant(beta))


def _times_matrix(s: Step, value: str, matrix: str, *, transposed: bool) -> str:
    """Return ``value`` (K,N,...,U) times a matrix (U,V), or the transpose of a (V,U) one."""
    if not transposed:
        return s.emit("MatMul", value, matrix)
    rows, columns = static_dims(s.graph, matrix, (0, 1))
    flat = s.emit("Reshape", value, s.integers(-1, columns))
    product = s.emit("Gemm", flat, matrix, transB=1)
    lead = s.emit("Shape", value, start=0, end=-1)
    return s.emit("Reshape", product, s.emit("Concat", lead, s.integers(rows), axis=0))


def _swapped(s: Step, matrix: str) -> str:
    rank = s.rank(matrix)
    if rank < 2:
        s.refuse("it multiplies by a vector")
    return s.emit("Transpose", matrix, perm=[*range(rank - 2), rank - 1, rank - 2])


def _einsum(s: Step, index: int) -> str:
    """Swap the operand and the result; labels that only the operand has were summed: broadcast their gradient."""
    terms, result = _equation(s)
    operand, others = terms[index], [term for position, term in enumerate(terms) if position != index]
    lead = next(letter for letter in string.ascii_letters if letter not in "".join([*terms, result]))
    shared = set(result).union(*others)
    reached = "".join(label for label in operand if label in shared)
    equation = f"{','.join([lead + result, *others])}->{lead}{reached}"
    factors = [name for position, name in enumerate(s.x) if position != index]
    gradient = s.emit("Einsum", s.gradient, *factors, equation=equation)
    summed = [place - len(operand) for place, label in enumerate(operand) if label not in shared]
    if not summed:
        return gradient
    return stretched(s, s.emit("Unsqueeze", gradient, s.integers(*summed)), s.x[index], summed)


def _equation(s: Step) -> tuple[list[str], str]:
    """Return the labels of the operands and of the result."""
    left, arrow, right = s.attribute("equation").replace(" ", "").partition("->")
    terms = left.split(",")
    if "." in left or any(len(set(term)) < len(term) for term in terms):
        s.refuse(f"its equation {left!r} has an ellipsis or a diagonal")
    sizes: dict[str, Dim] = {}
    for term, name in zip(terms, s.x, strict=True):
        for label, size in zip(term, s.shape(name), strict=True):
            if 1 in {size, sizes.setdefault(label, size)} and sizes[label] != size:
                s.refuse(f"it broadcasts along {label!r}")
    labels = left.replace(",", "")
    return terms, right if arrow else "".join(sorted(label for label in set(labels) if labels.count(label) == 1))


defvjp("MatMul", _matmul_left, _matmul_right, broadcasts=True, core_axes=2)


defvjp("Gemm", _gemm, None, _gemm_bias)


defvjp("Einsum", variadic=_einsum)
