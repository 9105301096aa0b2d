"""How pictures become a network's input, as far as its graph shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx

from ..arrays import Doubles
from ..graph import Graph, attribute, operator
from ..notes import Note
from ..preprocessing import KNOWN, Guess, Preprocessing

# Ops that move pixels and leave their values alone.
_MOVING_OPS = frozenset(
    "Cast Dropout Gather Identity Pad Reshape Resize Slice Squeeze Transpose Unsqueeze Upsample".split()
)

# Ops that apply the first layer's weights to the result of the arithmetic before them.
_LAYER_OPS = ("Conv", "QuantizeLinear")

# Scaled by less than this, values of 0..1 would be indistinguishable: the pixels are 0..255.
_LARGEST_SCALE_OF_BYTES = 0.05
# Means within these bounds are those of pixels 0..255: pixels 0..1 or -1..1 have none beyond 1.
_MEANS_OF_BYTES = (20.0, 235.0)
# Red and blue means closer than this do not reveal the order of the channels.
_CLEAR_DIFFERENCE = 10.0
# Published constants are rounded to three digits or more.
_RELATIVE_TOLERANCE = 1e-3


class Arithmetic(NamedTuple):
    """What happens to the pixels before the first layer: ``scale * pixels + shift``.

    Attributes
    ----------
    scale, shift : ndarray
        One number, or one per channel, in the channel order seen by the arithmetic.
    reversed : bool
        Whether the channels were reversed before the arithmetic.
    complete : bool
        Whether a convolution follows, so that this is the whole arithmetic.
    """

    scale: Doubles
    shift: Doubles
    reversed: bool
    complete: bool

    @property
    def is_nothing(self) -> bool:
        """Whether the pixels reach the first layer unchanged."""
        return self.complete and not self.reversed and bool(np.all(self.scale == 1) and np.all(self.shift == 0))


def find_preprocessing(graph: Graph, channels: int, guess: Guess | None) -> tuple[Preprocessing | None, list[Note]]:
    """Return how pictures become the network's input, and a note where that is a guess.

    What the graph computes from its pixels determines it if only one range of pixels makes sense. Otherwise it
    is guessed from the architecture, if its published weights expect one preprocessing and the graph leaves the
    pixels unchanged. In all other cases the preprocessing is unknown.

    Parameters
    ----------
    graph : Graph
        Simplified.
    channels : int
        Channels of the input, 1 or 3.
    guess : Guess or None
        What the importer recognised.
    """
    arithmetic = _read_arithmetic(graph, channels)
    if arithmetic.is_nothing:
        if guess is None or channels != 3:
            return None, []
        return guess.preprocessing, [_note(guess.preprocessing, guess.reason, "x / 255")]
    if _takes_bytes(arithmetic):
        return Preprocessing(_order(arithmetic), (0, 0, 0), (1, 1, 1)), []
    name = _normalization_of_unit_range(arithmetic)
    if name is None:
        return None, []
    reason = f"the model itself normalises pixels of 0..1 as {name!r} does"
    return Preprocessing.of("scale"), [_note(Preprocessing.of("scale"), reason, "0..255")]


def _note(preprocessing: Preprocessing, reason: str, other: str) -> Note:
    return Note(
        "preprocessing",
        f"Preprocessing {preprocessing.name or preprocessing.to_json()!r} is a guess: {reason}. If the network was "
        f"trained on other pixels ({other}, for example), its scores and heatmaps for pictures are wrong: override it "
        "with preprocess=...",
    )


def _read_arithmetic(graph: Graph, channels: int) -> Arithmetic:
    """Follow the pixels from the input to the first op that is neither a move nor an affine function of each."""
    value = next(iter(graph.inputs))
    scale, shift, turned = np.ones(1), np.zeros(1), False
    met_arithmetic = False
    while True:
        node = graph.only_reader(value)
        if node is None:
            return Arithmetic(scale, shift, turned, complete=False)
        if operator(node) in _MOVING_OPS and node.input[0] == value:
            # The order of the channels matters up to the arithmetic, whose means reveal it.
            turned ^= not met_arithmetic and _reverses_channels(graph, node)
        else:
            step = _affine_step(graph, node, value, channels)
            if step is None:
                return Arithmetic(scale, shift, turned, complete=operator(node) in _LAYER_OPS)
            factor, offset = step
            scale, shift = scale * factor, shift * factor + offset
            met_arithmetic = True
        value = node.output[0]


def _affine_step(graph: Graph, node: onnx.NodeProto, value: str, channels: int) -> tuple[Doubles, Doubles] | None:
    """Return factor and offset of a node that computes an affine function of each pixel, or None."""
    op = operator(node)
    if op == "BatchNormalization":
        gain, bias, mean, variance = (_per_channel(graph, name, channels) for name in node.input[1:5])
        if gain is None or bias is None or mean is None or variance is None or attribute(node, "training_mode", 0):
            return None
        factor = gain / np.sqrt(variance + attribute(node, "epsilon", 1e-5))
        return factor, bias - mean * factor
    if op not in ("Add", "Sub", "Mul", "Div"):
        return None
    first = node.input[0] == value
    constant = _per_channel(graph, node.input[1 if first else 0], channels)
    if constant is None or (op == "Div" and (not first or not constant.all())):
        return None
    if op in ("Mul", "Div"):
        return (constant if op == "Mul" else 1 / constant), np.zeros(1)
    sign = np.ones(1) if op == "Add" or first else -np.ones(1)
    return sign, -constant if op == "Sub" and first else constant


def _per_channel(graph: Graph, name: str, channels: int) -> Doubles | None:
    """Return a constant with one number, or one per channel; None for any other value."""
    array = graph.constants.get(name)
    return None if array is None or array.size not in (1, channels) else array.astype(np.float64).reshape(-1)


def _reverses_channels(graph: Graph, node: onnx.NodeProto) -> bool:
    if graph.rank(node.input[0]) != 4:
        return False
    shape = graph.shape(node.input[0])
    if operator(node) == "Gather":
        indices = graph.constants.get(node.input[1], np.zeros(0))
        return shape[attribute(node, "axis", 0)] == 3 and indices.tolist() in ([2, 1, 0], [-1, -2, -3])
    if operator(node) == "Slice" and len(node.input) == 5:
        axes, steps = (graph.constants.get(name, np.zeros(0)).tolist() for name in node.input[3:5])
        return any(step == -1 and shape[axis] == 3 for axis, step in zip(axes, steps, strict=False))
    return False


def _takes_bytes(arithmetic: Arithmetic) -> bool:
    """Return whether the arithmetic makes sense for pixels of 0..255 only."""
    scale = np.abs(arithmetic.scale)
    if not scale.all():
        return False
    low, high = _MEANS_OF_BYTES
    means = -arithmetic.shift / arithmetic.scale
    return bool((scale < _LARGEST_SCALE_OF_BYTES).all() or ((means > low) & (means < high)).all())


def _order(arithmetic: Arithmetic) -> Any:
    """Return the order of the input's channels: photos are more red than blue, and ImageNet's means reflect that."""
    means = -arithmetic.shift / arithmetic.scale
    if means.size != 3 or abs(means[0] - means[2]) < _CLEAR_DIFFERENCE:
        return "RGB"
    return "RGB" if (means[0] > means[2]) != arithmetic.reversed else "BGR"


def _normalization_of_unit_range(arithmetic: Arithmetic) -> str | None:
    """Return the known preprocessing that the arithmetic does to RGB pixels of 0..1, or None."""
    if arithmetic.reversed:
        return None
    for name, known in KNOWN.items():
        scale, shift = 255 * np.array(known.scale), -np.array(known.mean) * known.scale
        does_something = name != "scale" and known.order == "RGB"
        if does_something and _close(arithmetic.scale, scale) and _close(arithmetic.shift, shift):
            return name
    return None


def _close(found: Doubles, known: Sequence[float] | Doubles) -> bool:
    return bool(np.allclose(found, known, rtol=_RELATIVE_TOLERANCE, atol=_RELATIVE_TOLERANCE))
