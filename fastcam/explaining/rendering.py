"""`render`: heatmaps from activations and gradients that come from somewhere else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np

from .. import kernels
from ..arrays import Array, Pixels
from ..errors import ArgumentError
from ..kernels.boundary import Normalize, Rendered, Weighting, check_alpha, check_normalize, check_size, not_finite
from ..kernels.cuda.interface import DeviceArray, DeviceKernels, DeviceOverlay, DeviceRender, DeviceType
from ..pictures.writing import palette
from . import devices
from .devices import Device
from .devices.exchange import DeviceTensor, Foreign, HasDLPack, HasInterface, borrow, device_number, is_on_device
from .explained_model import DEFAULT_METHOD, LARGEST_HEATMAP
from .methods import FORMULAS, FUSED, find_method

AnyArray: TypeAlias = "Array | HasDLPack | HasInterface"

_FLOATS: tuple[DeviceType, ...] = ("float32", "float16", "bfloat16")

# Axes from the outermost to the innermost in memory, of an array with the channels before the map.
_ORDERS: dict[int, dict[bool, tuple[int, ...]]] = {
    4: {False: (0, 1, 2, 3), True: (0, 2, 3, 1)},
    5: {False: (0, 1, 2, 3, 4), True: (0, 1, 3, 4, 2)},
}


def render(
    activations: AnyArray,
    weights_or_gradients: AnyArray,
    *,
    method: str = DEFAULT_METHOD,
    channels_last: bool = False,
    size: Sequence[int] | None = None,
    normalize: Normalize = "max",
    images: AnyArray | None = None,
    colormap: str = "jet",
    alpha: float = 0.5,
    threads: int | None = None,
) -> Rendered:
    """Draw class activation maps from activations and gradients that you have already.

    They may come, for example, from torch hooks, from TensorFlow's GradientTape, or from your own CUDA code. The map of
    a target is ReLU(sum over channels of weight * activation) (Selvaraju et al. 2017, Grad-CAM, eq. 2).

    Parameters
    ----------
    activations
        (N,C,h,w) float32, float16 or bfloat16: a NumPy array, a torch tensor, or anything with ``__dlpack__``,
        ``__cuda_array_interface__`` or ``__array__``. On the host, or on a CUDA device, where it is read in place and
        in the order of its stream. Channels last in memory are read in place, too.
    weights_or_gradients
        On the same side as the activations, of any of their types:

        - (N,K,C): the weights of K targets, pooled already; (N,C): of one target per image.
        - (N,K,C,h,w): the full gradients of K targets with respect to the activations; (N,C,h,w): of one target.
    method
        With full gradients: "gradcam" pools them over the map (eq. 1), "hirescam" weighs element by element; on the
        host also every other method of `Explainer`. With pooled weights: "gradcam", and on the host "eigencam".
    channels_last
        Whether the shapes are (N,h,w,C), (N,h,w,C) and (N,K,h,w,C), as in TensorFlow.
    size
        (H,W) of the heatmaps; by default that of ``images``, or else (h,w). Bilinear, half-pixel centres.
    normalize
        "max" divides each map by its maximum; "minmax" maps its range to 0..1; None leaves it raw. A map without
        positive evidence is all zeros.
    images
        (N,H,W,3) uint8 RGB, to blend the heatmaps over; None for no overlays.
    colormap
        Name of a colour map of the cmap library.
    alpha
        Opacity of the colours, 0..1.
    threads
        Threads on the host; by default all processors.

    Returns
    -------
    Rendered
        ``maps`` (N,K,h,w) float32, ``heatmaps`` (N,K,H,W) float32, ``overlays`` (N,K,H,W,3) uint8 or None. NumPy arrays
        for arrays on the host; `DeviceTensor` on the device for arrays there, complete, which ``torch.from_dlpack``
        takes without a copy.

    Raises
    ------
    ArgumentError
        The shapes do not fit each other or the method, or some arrays are on the host and some on a device.
    KernelError
        An array has the wrong dtype, or another argument is wrong.
    ImageError
        An array on the device cannot be taken: it is on another device, or not dense.
    NonFiniteError
        NaN or infinity in the activations or weights of an image.
    DeviceError
        The device cannot be used.

    Examples
    --------
    >>> import numpy as np, fastcam
    >>> activations = np.ones((1, 2, 3, 3), np.float32)
    >>> fastcam.render(activations, np.array([[1.0, 0.5]], np.float32), normalize=None).maps[0, 0, 0]
    array([1.5, 1.5, 1.5], dtype=float32)
    """
    if find_method(method).reruns is not None:
        raise ArgumentError(f"method={method!r} runs the model again: use Explainer, or choose {', '.join(FORMULAS)}")
    on_device = {name: is_on_device(array) for name, array in _named(activations, weights_or_gradients, images)}
    if on_device["activations"] != on_device["weights_or_gradients"]:
        raise ArgumentError("activations and weights_or_gradients: one is on a GPU, one on the host; move one of them")
    if not on_device["activations"] and on_device.get("images"):
        raise ArgumentError("images are on a GPU, the activations on the host; move one of them")
    drawing = _Drawing(method, channels_last, size, normalize, colormap, alpha)
    if on_device["activations"]:
        return _render_on_device(drawing, activations, weights_or_gradients, images)
    return _render_on_host(drawing, activations, weights_or_gradients, images, threads)


class _Drawing(NamedTuple):
    """The arguments of `render` that are not arrays."""

    method: str
    channels_last: bool
    size: Sequence[int] | None
    normalize: Normalize
    colormap: str
    alpha: float

    @property
    def palette(self) -> Pixels:
        if not isinstance(self.colormap, str):
            raise ArgumentError(f"colormap={self.colormap!r}: give the name of a colour map")
        return palette(self.colormap)

    def size_for(self, maps: tuple[int, int], images: tuple[int, ...] | None) -> tuple[int, int]:
        """Return (H,W) of the heatmaps, from the sizes of maps and images."""
        if images is not None and len(images) != 4:
            raise ArgumentError(f"images: shape {images}; give (N, H, W, 3)")
        own = maps if images is None else (images[1], images[2])
        height, width = own if self.size is None else check_size(self.size)
        if height * width > LARGEST_HEATMAP:
            raise ArgumentError(f"size={(height, width)}: at most 2**28 pixels")
        return height, width


def _named(activations: Any, weights: Any, images: Any) -> Iterator[tuple[str, Any]]:
    yield "activations", activations
    yield "weights_or_gradients", weights
    if images is not None:
        yield "images", images


def _channels_first(shape: tuple[int, ...], *, channels_last: bool) -> tuple[int, ...]:
    """Return the axes of an array with its map at the end, for an array with its channels at the end."""
    axes = tuple(range(len(shape)))
    return (*axes[:-3], axes[-1], *axes[-3:-1]) if channels_last and len(shape) > 3 else axes


def _targets_first(activations: tuple[int, ...], weights: tuple[int, ...], method: str) -> tuple[int, ...]:
    """Return the shape of the weights with their axis of targets; channels come before the map in both.

    Raises
    ------
    ArgumentError
        They do not fit each other or the method.
    """
    if len(activations) != 4:
        raise ArgumentError(f"activations: shape {activations}; give (N, C, h, w), or (N, h, w, C) with channels_last")
    n, *rest = activations
    shape = weights if len(weights) in (3, 5) else (*weights[:1], 1, *weights[1:])
    expected = rest[:1] if len(shape) == 3 else rest
    if len(shape) not in (3, 5) or shape[0] != n or list(shape[2:]) != expected:
        raise ArgumentError(
            f"weights_or_gradients: shape {weights}; activations {activations} need weights {(n, 'K', rest[0])} or "
            f"{(n, rest[0])}, or gradients {(n, 'K', *rest)} or {activations} (channels first)".replace("'K'", "K")
        )
    if len(shape) == 3 and "gradients" in find_method(method).reads:
        raise ArgumentError(f"method={method!r} needs the full gradients, but weights {weights} are pooled")
    return shape


def _weighting(shape: tuple[int, ...], method: str) -> Weighting:
    return "channel" if len(shape) == 3 else FUSED[method]


def _render_on_host(drawing: _Drawing, activations: Any, weights: Any, images: Any, threads: int | None) -> Rendered:
    values, factors = (
        array.transpose(_channels_first(array.shape, channels_last=drawing.channels_last))
        for array in map(_on_host, (activations, weights))
    )
    shape = _targets_first(values.shape, factors.shape, drawing.method)
    factors = factors if factors.ndim in (3, 5) else factors[:, None]
    pictures = None if images is None else np.ascontiguousarray(_on_host(images))
    size = drawing.size_for(values.shape[2:], None if pictures is None else pictures.shape)
    if drawing.method not in FUSED:
        row = find_method(drawing.method)
        weighting: Weighting
        with np.errstate(over="ignore", invalid="ignore"):  # found and reported by the kernel
            values, factors, weighting = row.weigh(values.astype(np.float32), factors.astype(np.float32))
    else:
        weighting = _weighting(shape, drawing.method)
    values, factors = _alike(values, factors)
    return kernels.render(
        values,
        factors,
        weighting=weighting,
        normalize=drawing.normalize,
        size=size,
        images=pictures,
        palette=None if pictures is None else drawing.palette,
        alpha=drawing.alpha,
        threads=threads,
    )


def _on_host(value: Any) -> Array:
    """Return another library's array as a NumPy array, without a copy if possible."""
    if hasattr(value, "detach"):  # a tensor of torch, which may belong to a gradient graph
        value = value.detach()
        if "bfloat16" in str(value.dtype):
            value = value.float()
        value = value.resolve_conj().resolve_neg() if hasattr(value, "resolve_neg") else value
    try:
        array = np.asarray(value)
    except Exception as error:  # each library refuses in its own way
        raise ArgumentError(f"cannot take the {type(value).__name__} as an array: {error}") from error
    # NumPy supports bfloat16 only through an extension; every bfloat16 number is also a float32 number.
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def _alike(values: Array, factors: Array) -> tuple[Array, Array]:
    """Return activations and weights dense, aligned and in one order, copying only where necessary."""
    last = _is_dense(values, _ORDERS[4][True]) and not _is_dense(values, _ORDERS[4][False])
    if not last:
        values = np.require(values, requirements=["C", "A"])
        return values, np.require(factors, requirements=["C", "A"])
    if factors.ndim == 5:
        # As a transposed view, like the activations.
        factors = np.require(factors.transpose(_ORDERS[5][True]), requirements=["C", "A"]).transpose(0, 1, 4, 2, 3)
    return values, factors if factors.ndim == 5 else np.require(factors, requirements=["C", "A"])


def _is_dense(array: Array, order: tuple[int, ...]) -> bool:
    return bool(array.transpose(order).flags.c_contiguous and array.flags.aligned)


def _render_on_device(drawing: _Drawing, activations: Any, weights: Any, images: Any) -> Rendered:
    if drawing.method not in FUSED:
        raise ArgumentError(
            f"method={drawing.method!r} is computed on the host: give arrays on the host, or use "
            f"{' or '.join(map(repr, FUSED))}"
        )
    check_normalize(drawing.normalize, has_images=images is not None)
    device, device_kernels = devices.open_device(device_number(activations))
    device.activate()
    with _stream(device) as stream:
        desk = _Desk(device, device_kernels, stream)
        values, factors = (
            _Borrowed(name, borrow(_detached(array), device, stream, dense=False), drawing.channels_last)
            for name, array in (("activations", activations), ("weights_or_gradients", weights))
        )
        return desk.render(drawing, values, factors, images)


@contextmanager
def _stream(device: Device) -> Iterator[int]:
    stream = device.stream_create()
    try:
        yield stream
    finally:
        # Whatever happened, no work on the stream may use the arrays when they are freed.
        device.stream_synchronize(stream)
        device.stream_destroy(stream)


def _detached(value: Any) -> Any:
    return value.detach() if hasattr(value, "detach") else value


class _Borrowed:
    """Activations or weights on a device, their channels before the map.

    Attributes
    ----------
    shape : tuple of int
    orders : set of bool
        Whether the channels are last in memory; both values for a shape where the two orders coincide.
    """

    def __init__(self, name: str, foreign: Foreign, channels_last: bool) -> None:
        axes = _channels_first(foreign.shape, channels_last=channels_last)
        self.shape = tuple(foreign.shape[axis] for axis in axes)
        self.foreign = foreign
        if foreign.dtype not in _FLOATS:
            raise ArgumentError(f"{name}: {foreign.dtype} on the device; convert it to {', '.join(_FLOATS)}")
        memory = {
            False: tuple(axes),
            True: (*axes[:-3], *axes[-2:], axes[-3]) if len(axes) > 3 else tuple(axes),
        }
        self.orders = {last for last, order in memory.items() if foreign.is_dense(order)}
        if not self.orders:
            raise ArgumentError(
                f"{name}: shape {foreign.shape} and strides {foreign.strides}, in elements; make it contiguous"
            )


class _Desk:
    """A device, its kernels, and a stream for one call."""

    def __init__(self, device: Device, device_kernels: DeviceKernels, stream: int) -> None:
        self._device = device
        self._kernels = device_kernels
        self._stream = stream
        # Must live as long as work on the stream.
        self._held: list[Any] = []

    def render(self, drawing: _Drawing, values: _Borrowed, factors: _Borrowed, images: Any) -> Rendered:
        """See `render`."""
        shape = _targets_first(values.shape, factors.shape, drawing.method)
        n, k = shape[:2]
        activations_shape = cast("tuple[int, int, int, int]", values.shape)
        orders = values.orders & factors.orders if len(shape) == 5 else values.orders
        if not orders:
            raise ArgumentError("activations and gradients have different channel orders in memory: copy one of them")
        channels_last = min(orders)
        weighting = _weighting(shape, drawing.method)
        pictures = None if images is None else self._pixels(images)
        size = drawing.size_for(activations_shape[2:], None if pictures is None else pictures.shape)
        maps, heatmaps, finite, evidence = (
            DeviceTensor(self._device, (n, k, *rest), dtype)
            for rest, dtype in (
                (activations_shape[2:], np.float32),
                (size, np.float32),
                ((), np.int32),
                ((), np.float32),
            )
        )
        overlay = None if pictures is None else self._overlay(drawing, pictures, (n, k, *size, 3))
        needed = self._kernels.workspace_bytes(activations_shape, k, weighting, channels_last=channels_last)
        workspace = DeviceTensor(self._device, (max(1, needed),), np.uint8)
        self._held += [values, factors, finite, workspace]
        self._kernels.render(
            DeviceRender(
                activations=self._aligned(values.foreign, activations_shape),
                channels_last=channels_last,
                weights=self._aligned(factors.foreign, shape),
                weighting=weighting,
                normalize=drawing.normalize,
                maps=_array(maps),
                heatmaps=_array(heatmaps),
                overlay=None if overlay is None else overlay[0],
                finite=_array(finite),
                evidence=_array(evidence),
                workspace=_array(workspace),
            ),
            self._stream,
        )
        self._device.stream_synchronize(self._stream)
        if n * k:
            _check_finite(finite.numpy())
        drawn = overlay and overlay[1]
        return Rendered(cast("Any", maps), cast("Any", heatmaps), cast("Any", drawn), cast("Any", evidence))

    def _pixels(self, images: Any) -> DeviceArray:
        """Return pictures on the device, uploading them if they are on the host."""
        if not is_on_device(images):
            return self._uploaded(_on_host(images))
        foreign = borrow(_detached(images), self._device, self._stream)
        self._held.append(foreign)
        return self._aligned(foreign, foreign.shape)

    def _overlay(
        self, drawing: _Drawing, images: DeviceArray, shape: tuple[int, ...]
    ) -> tuple[DeviceOverlay, DeviceTensor]:
        out = DeviceTensor(self._device, shape, np.uint8)
        colors = self._uploaded(drawing.palette)
        return DeviceOverlay(images, colors, check_alpha(drawing.alpha), _array(out)), out

    def _uploaded(self, values: Array) -> DeviceArray:
        tensor = DeviceTensor.upload(self._device, values, self._stream)
        self._held.append(tensor)
        return _array(tensor)

    def _aligned(self, foreign: Foreign, shape: tuple[int, ...]) -> DeviceArray:
        """Return an array that meets the kernels' alignment, copied if its address does not."""
        dtype = cast("DeviceType", foreign.dtype)
        if foreign.pointer % _ALIGNMENT == 0:
            return DeviceArray(foreign.pointer, shape, dtype)
        size = math.prod(shape) * (2 if dtype == "bfloat16" else np.dtype(dtype).itemsize)
        copy = DeviceTensor(self._device, (max(1, size),), np.uint8)
        self._device.copy_between(copy.pointer, foreign.pointer, size, self._stream)
        self._held.append(copy)
        return DeviceArray(copy.pointer, shape, dtype)


_ALIGNMENT = 16


def _array(tensor: DeviceTensor) -> DeviceArray:
    return DeviceArray(tensor.pointer, tensor.shape, cast("DeviceType", tensor.dtype.name))


def _check_finite(finite: Array) -> None:
    bad = np.flatnonzero(finite == 0)
    if bad.size:
        image, target = divmod(int(bad[0]), finite.shape[1])
        raise not_finite(image, target)
