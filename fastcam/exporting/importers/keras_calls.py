"""What a Keras model does while it is traced: its layers' calls and their outputs."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import ModelError, suggest


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer.

    Attributes
    ----------
    path : str
        The layer's name, prefixed with those of the layers and models around it except the outermost: "backbone/conv1".
    output : object
        What it returned: a tensor, or a structure of tensors.
    half_dtype : str or None
        "float16" or "bfloat16" for a layer that computes in one of them.
    """

    path: str
    output: Any
    half_dtype: str | None

    @property
    def name(self) -> str:
        """The layer's own name."""
        return self.path.rpartition("/")[2]


_ATTENTIONS = ("MultiHeadAttention", "GroupedQueryAttention")


@contextlib.contextmanager
def recorded_calls(keras: Any, calls: list[LayerCall]) -> Iterator[None]:
    """Record every layer call, including those inside nested and subclassed models; compute in float32."""
    original: Callable[..., Any] = keras.layers.Layer.__call__
    around: list[str] = []
    inside: set[str] = set()

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        around.append(layer.name)
        inside.update([layer.name] if type(layer).__name__ in _ATTENTIONS else [])
        try:
            with _computing_in_float32(keras, layer) as half_dtype:
                output = original(layer, *args, **kwargs)
        finally:
            path = "/".join(around[1:]) or around[0]
            around.pop()
        # The four axes of values inside an attention layer are not those of a picture.
        if not inside.intersection(around):
            calls.append(LayerCall(path, output, half_dtype))
        return output

    keras.layers.Layer.__call__ = call
    try:
        yield
    finally:
        keras.layers.Layer.__call__ = original


@contextlib.contextmanager
def _computing_in_float32(keras: Any, layer: Any) -> Iterator[str | None]:
    """Disable mixed precision, which would round a layer's constants to 16 bits; yield its usual compute type."""
    policy = layer.dtype_policy
    if type(policy) is not keras.DTypePolicy or policy.compute_dtype not in ("float16", "bfloat16"):
        yield None
        return
    layer.dtype_policy = "float32"
    try:
        with _unrounded_statistics(keras, layer):
            yield policy.compute_dtype
    finally:
        layer.dtype_policy = policy


@contextlib.contextmanager
def _unrounded_statistics(keras: Any, layer: Any) -> Iterator[None]:
    """Make an adapted Normalization read its statistics, which it caches in its compute type, from its weights."""
    if not isinstance(layer, keras.layers.Normalization) or layer.input_mean is not None:
        yield
        return
    rounded = layer.mean, layer.variance
    layer.finalize_state()
    try:
        yield
    finally:
        layer.mean, layer.variance = rounded


def name_tensors(calls: Sequence[LayerCall]) -> dict[str, Any]:
    """Return the output of every layer call by the layer's path, and by its name where that is unique.

    Several calls of one layer are numbered: "relu@1", "relu@2".
    """
    calls = [call for call in calls if hasattr(call.output, "op")]
    names, paths = Counter(call.name for call in calls), Counter(call.path for call in calls)
    count: Counter[str] = Counter()
    tensors: dict[str, Any] = {}
    for call in calls:
        count[call.path] += 1
        if names[call.name] == 1:
            tensors[call.name] = call.output
        tensors[call.path if paths[call.path] == 1 else f"{call.path}@{count[call.path]}"] = call.output
    return tensors


def choose_output(
    keras: Any, outputs: Any, calls: Sequence[LayerCall], declared: Sequence[str], wanted: str | None
) -> Any:
    """Return the output that is called ``wanted``.

    Parameters
    ----------
    keras : module
    outputs : structure of tensors
        What the model returned.
    calls : sequence of LayerCall
    declared : sequence of str
        The model's own names of its outputs, where it has them.
    wanted : str or None
        The key of an output in a dict, its declared name, the layer that computes it, or its position where it has none
        of these; None means the only one.

    Raises
    ------
    ModelError
        There is no such output, or there are several and none was asked for.
    """
    leaves = keras.tree.flatten_with_path(outputs)
    names = [
        [*_keys(path), *declared[index : index + 1], *_makers(calls, tensor), str(index)]
        for index, (path, tensor) in enumerate(leaves)
    ]
    known = ", ".join(repr(own[0]) for own in names)
    if wanted is None:
        if len(leaves) == 1:
            return leaves[0][1]
        raise ModelError(
            f"the Keras model has {len(leaves)} outputs, {known}: name the one that holds the scores, for example "
            f"output={names[0][0]!r}"
        )
    table = {name: tensor for own, (_, tensor) in zip(names, leaves, strict=True) for name in own}
    # One output's key may be the name of another one's layer: the key wins.
    table |= {own[0]: tensor for own, (_, tensor) in zip(names, leaves, strict=True)}
    # Any layer inside the model may be named, too.
    table = {call.name: call.output for call in calls[:-1] if hasattr(call.output, "op")} | table
    if wanted in table:
        return table[wanted]
    raise ModelError(f"the Keras model has no output {wanted!r}: {suggest(wanted, table)}Outputs: {known}")


def _keys(path: tuple[Any, ...]) -> list[str]:
    return ["/".join(map(str, path))] if any(isinstance(key, str) for key in path) else []


def _makers(calls: Sequence[LayerCall], tensor: Any) -> list[str]:
    """Return the layers that returned ``tensor``, outermost first, without the model itself, which comes last."""
    return [call.name for call in reversed(calls[:-1]) if call.output is tensor]
