"""Files that draw their own heatmaps: nodes before and after the network.

The tail turns raw outputs into heatmaps and overlays; the picture side turns uint8 pixels into the model's input.
Everything here is float32 arithmetic in ops that ONNX Runtime (CPU, CUDA, WebAssembly, WebGPU), TensorRT and OpenVINO
all run. Resizing is a product with constant matrices: faster than the Resize op for small maps and identical in every
runtime; several runtimes lack antialiased Resize.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError, suggest
from ..graph import Graph, TensorType, static_dims
from ..metadata import PICTURES, layer_outputs
from ..preprocessing import Layout, Preprocessing
from .outputs import name_output, reserve

_DRAWS = ("heatmaps", "overlays")
_TARGETS = ("default", "required")
_LUMA = (19595, 38470, 7471)  # ITU-R 601 in 16 bits, as Pillow rounds it
_OPACITY = 0.5
_COLORMAP = "jet"


@dataclass(frozen=True)
class DrawingPlan:
    """What the graph does besides scoring and differentiating: the arguments of `export` with these names, checked.

    Attributes
    ----------
    draw : {None, "heatmaps", "overlays"}
    method : str
        Name of a row of `_METHODS`.
    signed : bool
    picture : {None, "input", "any"}
    target : {"default", "required"}
    raw_outputs : bool
    contrast : bool

    Raises
    ------
    ArgumentError
        A value is unknown, or two do not go together.
    """

    draw: str | None = None
    method: str = "gradcam"
    signed: bool = False
    picture: str | None = None
    target: str = "default"
    raw_outputs: bool = False
    contrast: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("draw", _DRAWS), ("picture", PICTURES), ("target", _TARGETS), ("method", _METHODS)):
            value = getattr(self, name)
            if value not in tuple(allowed) and not (value is None and name in ("draw", "picture")):
                hint = suggest(str(value), allowed)
                raise ArgumentError(f"{name}={value!r}: {hint}choose one of {', '.join(map(repr, allowed))}")
        if self.draw is None:
            for name in ("method", "signed", "picture", "raw_outputs", "contrast"):
                if getattr(self, name) != getattr(DrawingPlan, name):
                    raise ArgumentError(
                        f"{name}={getattr(self, name)!r} applies to files that draw their own "
                        'heatmaps: add draw="heatmaps" or omit it'
                    )
        if self.draw == "overlays" and self.picture is None:
            raise ArgumentError('draw="overlays" blends heatmaps over the pictures: add picture="input" or "any"')
        if self.draw == "overlays" and self.signed:
            raise ArgumentError('signed maps have no overlays: use draw="heatmaps", or signed=False')
        if self.contrast and self.method not in _LINEAR:
            raise ArgumentError(
                f"contrast=True with method={self.method!r}: maps can be contrasted for methods linear in the "
                f"gradient: {', '.join(map(repr, _LINEAR))}"
            )

    @property
    def needs_gradients(self) -> bool:
        """Whether the method starts from full gradients, not pooled ones."""
        return self.draw is not None and _METHODS[self.method] is not _channel_weights

    def check(self, layers: Sequence[object], preprocessing: Preprocessing | None) -> None:
        """Raise ArgumentError if a model with these layers and this preprocessing cannot be drawn this way."""
        if self.draw is not None and len(layers) > 1:
            raise ArgumentError(f"draw={self.draw!r} draws one layer, but {len(layers)} were given: choose one")
        if self.picture is not None and preprocessing is None:
            raise ArgumentError(
                f"picture={self.picture!r} needs to know how pixels become the model's input: pass preprocess=..."
            )

    def apply(self, graph: Graph, layout: Layout, preprocessing: Preprocessing | None) -> None:
        """Append the tail and prepend the picture side; call `check` first.

        Parameters
        ----------
        graph : Graph
            Types inferred, with the outputs that `outputs.add_explanation` made; changed in place.
        layout : "NHWC" or "NCHW"
            Of the model's input.
        preprocessing : Preprocessing or None
            How pixels become the model's input; None only without a picture side.
        """
        if self.draw is None:
            return
        (image,) = (name for name in graph.inputs if name != "target")
        height, width = static_dims(graph, image, [layout.index("H"), layout.index("W")])
        size = height, width
        raw = [name for name in graph.outputs if name not in ("logits", "targets")]
        heatmaps = _add_heatmaps(graph, self, size)
        if self.picture is not None and preprocessing is not None:
            pixels = _add_picture_side(graph, image, layout, size, preprocessing, resizes=self.picture == "any")
            if self.draw == "overlays":
                name_output(graph, _blend(graph, heatmaps, pixels), "overlays")
        drawn = [name for name in graph.outputs if name not in raw]
        graph.outputs = [*drawn, *(raw if self.raw_outputs else [])]
        graph.prune()
        graph.infer_types()


def _add_heatmaps(graph: Graph, plan: DrawingPlan, size: tuple[int, int]) -> str:
    """Add the outputs ``maps`` (N,K,h,w), the weighted sum over channels, and ``heatmaps`` (N,K,H,W).

    With contrast the heatmaps are (N,1,H,W).
    """
    names = layer_outputs(0)
    channels, *sides = static_dims(graph, names.activations, [1, 2, 3])
    flat = graph.emit(
        "Reshape", names.activations, graph.emit_integers(0, channels, sides[0] * sides[1]), stem="draw/flat"
    )
    sums = _METHODS[plan.method](graph, flat)
    shaped = graph.emit("Reshape", sums, graph.emit_integers(0, 0, *sides), stem="draw/maps")
    maps = name_output(graph, shaped, "maps")
    evidence = _contrasted(graph, maps) if plan.contrast else maps
    zero, one = graph.emit_number(0), graph.emit_number(1)
    # Some runtimes turn NaN into 0 in Relu and Max; a comparison with NaN is false in all of them.
    kept = evidence if plan.signed else _positive(graph, evidence)
    magnitude = graph.emit("Abs", evidence, stem="draw/magnitude") if plan.signed else kept
    top = graph.emit("ReduceMax", magnitude, graph.emit_integers(2, 3), keepdims=1, stem="draw/maximum")
    # A map without evidence stays all zeros.
    divisor = graph.emit("Where", graph.emit("Greater", top, zero), top, one, stem="draw/divisor")
    normalized = graph.emit("Div", kept, divisor, stem="draw/normalized")
    rows, columns = (bilinear_matrix(before, after) for before, after in zip(sides, size, strict=True))
    high = graph.emit("MatMul", graph.emit_constant(rows, stem="draw/rows"), normalized, stem="draw/high")
    # Last, because runtimes pack a constant second factor once and multiply all rows by it together.
    both = graph.emit("MatMul", high, graph.emit_constant(columns.T.copy(), stem="draw/columns"), stem="draw/both")
    return name_output(graph, both, "heatmaps")


def _contrasted(graph: Graph, maps: str) -> str:
    """Return the first of the maps (N,K,h,w) minus the mean of the others, (N,1,h,w).

    That is the map of y_1 - mean(y_2 .. y_K), because the map is linear in the explained scalar. One map alone stays.
    """
    start, end, axis = graph.emit_integers(0), graph.emit_integers(1), graph.emit_integers(1)
    first = graph.emit("Slice", maps, start, end, axis, stem="draw/first")
    # No slice of the others: there may be none, and not every runtime has empty tensors.
    total = graph.emit("ReduceSum", maps, axis, keepdims=1, stem="draw/total")
    count = graph.emit("Cast", graph.emit("Shape", maps, start=1, end=2), to=1, stem="draw/count")
    one = graph.emit_number(1)
    others = graph.emit("Max", graph.emit("Sub", count, one), one, stem="draw/others")
    mean = graph.emit("Div", graph.emit("Sub", total, first), others, stem="draw/mean")
    return graph.emit("Sub", first, mean, stem="draw/contrast")


def bilinear_matrix(before: int, after: int) -> NDArray[np.float32]:
    """Return the matrix (after,before) of half-pixel-centre bilinear interpolation with repeated edges."""
    at = np.clip((np.arange(after) + 0.5) * (before / after) - 0.5, 0, before - 1)
    matrix: NDArray[np.float32] = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(before))).astype(np.float32)
    return matrix


def _channel_weights(graph: Graph, flat: str) -> str:
    """Selvaraju et al. 2017, eq. 1 and 2: the pooled gradients weight the channels."""
    return graph.emit("MatMul", layer_outputs(0).weights, flat, stem="draw/sums")


def _flat_gradients(graph: Graph) -> str:
    channels, *sides = static_dims(graph, layer_outputs(0).gradients, [2, 3, 4])
    shape = graph.emit_integers(0, 0, channels, sides[0] * sides[1])
    return graph.emit("Reshape", layer_outputs(0).gradients, shape, stem="draw/gradients")


def _positive(graph: Graph, value: str) -> str:
    zero = graph.emit_number(0)
    return graph.emit("Where", graph.emit("Less", value, zero), zero, value, stem="draw/positive")


def _second_order(graph: Graph, flat: str) -> str:
    """Chattopadhay et al. 2018, eq. 5 and 19: g^2 / (2 g^2 + S g^3) times the positive gradient g.

    For positive g this is g / (2 + S g), where S is the channel's sum of activations.
    """
    gradients = _positive(graph, _flat_gradients(graph))
    denominator = graph.emit(
        "Add", graph.emit("Mul", gradients, _channel_sums(graph, flat)), graph.emit_number(2), stem="draw/denominator"
    )
    weights = graph.emit("ReduceSum", _divided(graph, gradients, denominator), graph.emit_integers(3), keepdims=0)
    return graph.emit("MatMul", weights, flat, stem="draw/sums")


def _activation_share(graph: Graph, flat: str) -> str:
    """Fu et al. 2020, XGrad-CAM: gradients averaged with activations as weights, per channel."""
    products = graph.emit("Mul", _flat_gradients(graph), _beside_targets(graph, flat))
    totals = graph.emit("ReduceSum", products, graph.emit_integers(3), keepdims=1)
    share = _divided(graph, totals, _channel_sums(graph, flat))
    weights = graph.emit("Squeeze", share, graph.emit_integers(3), stem="draw/weights")
    return graph.emit("MatMul", weights, flat, stem="draw/sums")


def _each(graph: Graph, flat: str) -> str:
    """Draelos and Carin 2020, HiResCAM: gradient times activation, element-wise."""
    return _summed_products(graph, _flat_gradients(graph), flat)


def _each_positive(graph: Graph, flat: str) -> str:
    """Jiang et al. 2021, LayerCAM, eq. 5 and 6: positive gradient times activation, element-wise."""
    return _summed_products(graph, _positive(graph, _flat_gradients(graph)), flat)


def _summed_products(graph: Graph, gradients: str, flat: str) -> str:
    products = graph.emit("Mul", gradients, _beside_targets(graph, flat), stem="draw/products")
    return graph.emit("ReduceSum", products, graph.emit_integers(2), keepdims=0, stem="draw/sums")


def _beside_targets(graph: Graph, flat: str) -> str:
    """Return activations as (N,1,C,h*w)."""
    return graph.emit("Unsqueeze", flat, graph.emit_integers(1), stem="draw/activations")


def _channel_sums(graph: Graph, flat: str) -> str:
    """Return the sum of each channel's activations, (N,1,C,1)."""
    return graph.emit("ReduceSum", _beside_targets(graph, flat), graph.emit_integers(3), keepdims=1, stem="draw/totals")


def _divided(graph: Graph, value: str, divisor: str) -> str:
    """Return value / divisor, or 0 where the divisor is 0."""
    zero, one = graph.emit_number(0), graph.emit_number(1)
    vanishes = graph.emit("Equal", divisor, zero)
    quotient = graph.emit("Div", value, graph.emit("Where", vanishes, one, divisor))
    return graph.emit("Where", vanishes, zero, quotient, stem="draw/quotient")


_METHODS: dict[str, Callable[[Graph, str], str]] = {
    "gradcam": _channel_weights,
    "gradcam++": _second_order,
    "xgradcam": _activation_share,
    "hirescam": _each,
    "layercam": _each_positive,
}
METHODS = tuple(_METHODS)
# Their maps are linear in the gradient.
_LINEAR = ("gradcam", "xgradcam", "hirescam")


def _add_picture_side(
    graph: Graph, image: str, layout: Layout, size: tuple[int, int], preprocessing: Preprocessing, *, resizes: bool
) -> str:
    """Replace the input by ``pictures`` uint8 (N,H,W,3) RGB; return the pictures at the model's size, float32."""
    batch, *shape = graph.inputs[image].shape
    channels = shape[layout.index("C") - 1]
    if image == "pictures":
        graph.rename(image, graph.unused_name("model/pictures"))
        (image,) = (name for name in graph.inputs if name != "target")
    reserve(graph, "pictures")
    sides: Sequence[Any] = ("height", "width") if resizes else size
    graph.inputs = {"pictures": TensorType(np.dtype(np.uint8), (batch, *sides, 3)), **graph.inputs}
    del graph.inputs[image]
    source = graph.emit("Cast", "pictures", to=1, stem="picture/levels")
    pixels = _resized(graph, source, size) if resizes else source
    if channels == 1:
        luma = _luma(graph, source)
        values = _resized(graph, luma, size) if resizes else luma
    else:
        values = pixels
    if channels == 3 and preprocessing.order == "BGR":
        values = graph.emit("Gather", values, graph.emit_integers(2, 1, 0), axis=3, stem="picture/bgr")
    mean, scale = (np.array(numbers, np.float32)[:channels] for numbers in (preprocessing.mean, preprocessing.scale))
    if layout == "NCHW":
        values = graph.emit("Transpose", values, perm=[0, 3, 1, 2], stem="picture/planar")
        mean, scale = mean[:, None, None], scale[:, None, None]
    if mean.any():
        values = graph.emit("Sub", values, graph.emit_constant(mean), stem="picture/centred")
    if (scale != 1).any():
        values = graph.emit("Mul", values, graph.emit_constant(scale), stem="picture/scaled")
    graph.replace_uses(image, values)
    return pixels


def _luma(graph: Graph, pixels: str) -> str:
    """Return the ITU-R 601 luma (N,H,W,1) of pixels, rounded as Pillow does; below 2^24, so exact in float32."""
    weighted = graph.emit("Mul", pixels, graph.emit_constant(np.array(_LUMA, np.float32)))
    total = graph.emit("ReduceSum", weighted, graph.emit_integers(3), keepdims=1)
    rounded = graph.emit("Add", total, graph.emit_number(2**15))
    return graph.emit("Floor", graph.emit("Mul", rounded, graph.emit_number(2.0**-16)), stem="picture/luma")


def _resized(graph: Graph, pixels: str, size: tuple[int, int]) -> str:
    """Resize (N,H0,W0,C) as Pillow's bilinear filter does: antialiased, to the width first, rounded after each step.

    Within one level of Pillow: it sums in fixed point, so a value close to a half may be rounded differently.
    """
    planes = graph.emit("Transpose", pixels, perm=[0, 3, 1, 2], stem="picture/planes")
    columns = graph.emit("Transpose", _triangle_matrix(graph, planes, 3, size[1]), perm=[1, 0], stem="picture/columns")
    wide = _rounded(graph, graph.emit("MatMul", planes, columns))
    high = _rounded(graph, graph.emit("MatMul", _triangle_matrix(graph, planes, 2, size[0]), wide))
    return graph.emit("Transpose", high, perm=[0, 2, 3, 1], stem="picture/resized")


def _rounded(graph: Graph, value: str) -> str:
    return graph.emit("Floor", graph.emit("Add", value, graph.emit_number(0.5)), stem="picture/rounded")


def _triangle_matrix(graph: Graph, planes: str, axis: int, size: int) -> str:
    """Return the matrix (size,n) of Pillow's triangle filter, where n is the size of an axis of ``planes``.

    Pixel j of n and pixel i of ``size`` are |(2j+1) size - (2i+1) n| / (2 max(size, n)) filter widths apart. Both
    products are integers, exact in float32 below 2^24, that is for n below 8 million / ``size``.
    """
    length = graph.emit("Shape", planes, start=axis, end=axis + 1, stem="picture/side")
    count = graph.emit("Reshape", length, graph.emit_constant(np.zeros(0, np.int64)))
    start, step = (graph.emit_integer(number) for number in (0, 1))
    index = graph.emit("Cast", graph.emit("Range", start, count, step), to=1)
    n = graph.emit("Cast", length, to=1)
    source = graph.emit("Add", graph.emit("Mul", index, graph.emit_number(2 * size)), graph.emit_number(size))
    odd = graph.emit_constant((2 * np.arange(size, dtype=np.float32) + 1)[:, None])
    distance = graph.emit("Abs", graph.emit("Sub", source, graph.emit("Mul", odd, n)))
    support = graph.emit("Mul", graph.emit("Max", n, graph.emit_number(size)), graph.emit_number(2))
    weights = graph.emit("Relu", graph.emit("Sub", support, distance))
    total = graph.emit("ReduceSum", weights, graph.emit_integers(1), keepdims=1)
    return graph.emit("Div", weights, total, stem="picture/filter")


def _blend(graph: Graph, heatmaps: str, pixels: str) -> str:
    """Return the colours of heatmaps blended half and half over pictures, uint8 (N,K,H,W,3); NaN is black."""
    import cmap

    colors = np.rint(cmap.Colormap(_COLORMAP).lut(256)[:, :3] * 255)
    table = np.concatenate([colors, np.zeros((1, 3))]).astype(np.float32) * np.float32(_OPACITY)
    level = graph.emit("Round", graph.emit("Mul", heatmaps, graph.emit_number(255)))
    known = graph.emit("GreaterOrEqual", heatmaps, graph.emit_number(0))
    row = graph.emit("Cast", graph.emit("Where", known, level, graph.emit_number(256)), to=6, stem="overlay/row")
    color = graph.emit("Gather", graph.emit_constant(table, stem="overlay/colors"), row, axis=0, stem="overlay/color")
    dimmed = graph.emit("Mul", pixels, graph.emit_number(1 - _OPACITY))
    picture = graph.emit("Unsqueeze", dimmed, graph.emit_integers(1), stem="overlay/picture")
    blended = graph.emit("Round", graph.emit("Add", color, picture), stem="overlay/blended")
    return graph.emit("Cast", blended, to=2, stem="overlay/out")
