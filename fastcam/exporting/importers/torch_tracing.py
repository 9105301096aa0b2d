"""The state of a torch module while it is traced: in inference mode, without foreign hooks, with ops that ONNX has."""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ...notes import Note
from .imported import logging_from


@contextlib.contextmanager
def evaluating(module: Any) -> Iterator[None]:
    """Put a module and all its parts into inference mode, and restore each afterwards."""
    training = [(part, part.training) for part in module.modules()]
    # Not module.eval(), which modules of exported programs reject.
    for part, _ in training:
        part.training = False
    try:
        yield
    finally:
        for part, flag in training:
            part.training = flag


@contextlib.contextmanager
def restored_attributes(module: Any) -> Iterator[None]:
    """Undo what a module's forward stores in its attributes: under a tracer, numbers become the tracer's tensors."""
    kept = [(part, dict(part.__dict__)) for part in module.modules()]
    try:
        yield
    finally:
        for part, attributes in kept:
            for name in part.__dict__.keys() - attributes.keys():
                del part.__dict__[name]
            part.__dict__.update(attributes)


@contextlib.contextmanager
def quiet(torch: Any) -> Iterator[None]:
    """Keep the messages of torch's exporters out of the user's log, warnings and terminal."""
    loggers = ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir")
    with logging_from(logging.CRITICAL, *loggers), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # The tracer prints the graph that it could not export.
        printed = torch._C._jit_is_onnx_log_enabled()  # noqa: SLF001  # there is no public name for it
        torch._C._jit_set_onnx_log_enabled(False)  # noqa: SLF001  # there is no public name for it
        try:
            yield
        finally:
            torch._C._jit_set_onnx_log_enabled(printed)  # noqa: SLF001  # there is no public name for it


_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


@contextlib.contextmanager
def without_spectators(torch: Any, module: Any, example: Any, outputs: Any, notes: list[Note]) -> Iterator[None]:
    """Remove forward hooks while a module is traced, unless they change its result.

    Hooks that other tools left there, to store activations for example, would see the tracer's tensors. Hooks before a
    module's forward compute its weights (weight_norm, pruning) and stay.

    Parameters
    ----------
    torch : module
    module : torch.nn.Module
    example : torch.Tensor
    outputs : structure of tensors
        What the module returned for the example.
    notes : list of Note
        Receives a note about hooks that stay.
    """
    hooked = {name: part for name, part in module.named_modules() if getattr(part, "_forward_hooks", None)}
    kept = [{name: getattr(part, name) for name in _HOOKS if hasattr(part, name)} for part in hooked.values()]
    try:
        for part, hooks in zip(hooked.values(), kept, strict=True):
            part.__dict__.update({name: OrderedDict() for name in hooks})
        if hooked and not _same(torch, module(example), outputs):
            _put_back(hooked, kept)
            names = ", ".join(name or "the model itself" for name in hooked)
            notes.append(Note("checks", f"Forward hooks change the scores and are part of the export: on {names}."))
        yield
    finally:
        _put_back(hooked, kept)


def _put_back(hooked: dict[str, Any], kept: list[dict[str, Any]]) -> None:
    for part, hooks in zip(hooked.values(), kept, strict=True):
        part.__dict__.update(hooks)


def _same(torch: Any, left: Any, right: Any) -> bool:
    pairs = zip(tensors_of(torch, left), tensors_of(torch, right), strict=False)
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def tensors_of(torch: Any, outputs: Any) -> list[Any]:
    """Return the tensors of a structure of outputs, in the order of the exporters."""
    leaves = torch.utils._pytree.tree_leaves(outputs)  # noqa: SLF001  # there is no public name for it
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


@contextlib.contextmanager
def rewritten_ops(torch: Any) -> Iterator[None]:
    """While a module is captured, replace functions that torch exports in a form without gradient rules."""

    class Rewriting(torch.overrides.TorchFunctionMode):  # type: ignore[misc]  # torch is not imported here: Any
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            rewrite = _REWRITES.get(getattr(function, "__name__", ""))
            result = rewrite(torch, *args, **(kwargs or {})) if rewrite else None
            return function(*args, **(kwargs or {})) if result is None else result

    with Rewriting():
        yield


@contextlib.contextmanager
def plain_sizes(torch: Any) -> Iterator[None]:
    """Make a traced tensor report all its sizes except the first, the batch, as plain numbers.

    The tracer records each query of a size as nodes, and warns if a number is computed from the result.
    """
    getter, method = torch.Tensor.shape.__get__, torch.Tensor.size

    class Plain(torch.overrides.TorchFunctionMode):  # type: ignore[misc]  # torch is not imported here: Any
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            state = torch._C._get_tracing_state()  # noqa: SLF001  # there is no public name for it
            asks = state is not None and function in (getter, method)
            if not asks:
                return function(*args, **(kwargs or {}))
            torch._C._set_tracing_state(None)  # noqa: SLF001  # there is no public name for it
            try:
                sizes = [int(size) for size in args[0].shape]
            finally:
                torch._C._set_tracing_state(state)  # noqa: SLF001  # there is no public name for it
            axis = args[1] if len(args) > 1 else (kwargs or {}).get("dim")
            if axis is not None and axis % max(len(sizes), 1) != 0:
                return sizes[axis]
            answer = function(*args, **(kwargs or {}))
            return answer if axis is not None else (*answer[:1], *sizes[1:])

    with Plain():
        yield


def _adaptive_average(torch: Any, x: Any, output_size: Any, *_: Any) -> Any:
    """Average over windows of equal size with AvgPool, over others with products with two matrices.

    torch's own takes windows from floor(i * size / count) to ceil((i + 1) * size / count), and writes a stride into
    the result of a map that is channels-last in memory.
    """
    sizes = [int(size) for size in x.shape[-2:]]
    wanted = output_size if isinstance(output_size, tuple | list) else (output_size,) * 2
    counts = [size if count is None else int(count) for count, size in zip(wanted, sizes, strict=True)]
    if counts == [1, 1]:
        return x.mean((-2, -1), keepdim=True)
    if all(size % count == 0 for size, count in zip(sizes, counts, strict=True)):
        window = [size // count for size, count in zip(sizes, counts, strict=True)]
        return torch.nn.functional.avg_pool2d(x, window, window)
    rows, columns = (
        torch.from_numpy(_window_means(size, count)).to(device=x.device, dtype=x.dtype)
        for size, count in zip(sizes, counts, strict=True)
    )
    return torch.matmul(torch.matmul(rows, x), columns.t())


def _window_means(size: int, count: int) -> Any:
    means = np.zeros((count, size), np.float32)
    for row in range(count):
        start, end = row * size // count, math.ceil((row + 1) * size / count)
        means[row, start:end] = 1 / (end - start)
    return means


def _squeeze(torch: Any, x: Any, *dims: Any, **named: Any) -> Any:
    """Return x without its axes of size 1, except the batch, whose size may differ later."""
    if dims or named:
        return None
    for axis in range(x.ndim - 1, 0, -1):
        if isinstance(x.shape[axis], int) and x.shape[axis] == 1:
            x = x.squeeze(axis)
    return x


def _attention(torch: Any, query: Any, key: Any, value: Any, attn_mask: Any = None, *rest: Any, **options: Any) -> Any:
    """Give the tensors four axes, (merged, heads, tokens, channels): torch's exporter knows no others."""
    attend = torch.nn.functional.scaled_dot_product_attention
    if query.ndim == 3:
        mask = attn_mask if attn_mask is None or attn_mask.ndim < 3 else attn_mask.unsqueeze(1)
        return attend(query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1), mask, *rest, **options).squeeze(1)
    if query.ndim > 4 and attn_mask is None:
        merged = (one.flatten(0, one.ndim - 4) for one in (query, key, value))
        return attend(*merged, None, *rest, **options).reshape(*query.shape[:-1], value.shape[-1])
    return None


_REWRITES: dict[str, Callable[..., Any]] = {
    "adaptive_avg_pool2d": _adaptive_average,
    "scaled_dot_product_attention": _attention,
    "squeeze": _squeeze,
}
