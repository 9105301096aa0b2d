"""The boundary of every CPU backend: arguments are validated here, once, and outputs allocated.

A backend is a subclass of `Kernels` that computes on validated arrays.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, SupportsIndex, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..arrays import Floats, HalfOrFloats, Pixels
from ..errors import KernelError, NonFiniteError

Weighting: TypeAlias = Literal["channel", "pooled", "element"]
Normalize: TypeAlias = Literal["max", "minmax"] | None

NORMALIZATIONS: tuple[Normalize, ...] = ("max", "minmax", None)

VIEW_LIMIT = float(np.finfo(np.float32).max) / 2
"""Largest magnitude that `resize` and `colorize` accept: the difference of two such values is a finite float32."""

_FLOAT32 = np.dtype(np.float32)
_FLOAT16 = np.dtype(np.float16)
_UINT8 = np.dtype(np.uint8)
_WEIGHTS_SHAPE = {"channel": "(N, K, C)", "pooled": "(N, K, C, h, w)", "element": "(N, K, C, h, w)"}


class Rendered(NamedTuple):
    """What `render` returns: arrays on the side of its inputs.

    Attributes
    ----------
    maps
        (N, K, h, w) float32 at the explained layer's size, normalised as asked.
    heatmaps
        (N, K, H, W) float32: the maps resized.
    overlays
        (N, K, H, W, 3) uint8, or None if no images were passed.
    evidence
        (N, K) float32 in 0..1: the share of positive evidence. That is the sum of the positive values of the map before
        the ReLU, divided by the sum of all its magnitudes; 0 for a map of zeros.
    """

    maps: Floats
    heatmaps: Floats
    overlays: Pixels | None
    evidence: Floats


@dataclass(frozen=True, slots=True)
class Overlay:
    """Images to blend with: `images` (N, H, W, 3), `palette` (256, 3), `alpha` in 0..1, `out` (N, K, H, W, 3)."""

    images: Pixels
    palette: Pixels
    alpha: float
    out: Pixels


@dataclass(frozen=True, slots=True)
class MapCall:
    """Validated arguments of the first half of `render`. Both arrays have the channels last when `channels_last`."""

    activations: HalfOrFloats
    weights: HalfOrFloats
    channels_last: bool
    weighting: Weighting
    normalize: Normalize
    maps: Floats
    evidence: Floats


class Kernels(ABC):
    """The kernels of one backend."""

    def render(
        self,
        activations: HalfOrFloats,
        weights: HalfOrFloats,
        *,
        weighting: Weighting = "channel",
        normalize: Normalize = "max",
        size: Sequence[int] | None = None,
        maps_out: Floats | None = None,
        heatmaps_out: Floats | None = None,
        images: Pixels | None = None,
        palette: Pixels | None = None,
        alpha: float = 0.5,
        overlays_out: Pixels | None = None,
        threads: int | None = None,
    ) -> Rendered:
        """Class activation maps of N images and K targets, and what is drawn from them.

        Parameters
        ----------
        activations
            (N, C, h, w) float32 or float16. Each image is dense in memory, either (C, h, w) or, as a transposed view,
            (h, w, C); the stride of the first axis is free. N and K may be 0, C, h and w not.
        weights
            float32 or float16, whatever the activations are; the stride of the first axis is free.
            With `weighting` "channel": (N, K, C), dense per image. Otherwise (N, K, C, h, w), dense per image and laid
            out as the activations.
        weighting
            "channel": `weights` holds alpha, one weight per channel. "pooled": `weights` holds gradients, and alpha is
            their mean over h, w (Selvaraju et al. 2017, Grad-CAM, eq. 1). "element": each activation has its own
            weight, as in LayerCAM (Jiang et al. 2021, eq. 6).
        normalize
            The map is ReLU(sum over channels of weight * activation) (Selvaraju et al. 2017, eq. 2).
            "max" divides it by its maximum; "minmax" takes (map - min) / (max - min); None leaves it raw.
            A map whose maximum (or max - min) is 0 becomes zeros.
        size
            (H, W) of the heatmaps; None for (h, w). Half-pixel-centre bilinear, edges repeated, no antialiasing.
        maps_out, heatmaps_out, overlays_out
            C-contiguous arrays to write to, with the dtype and shape of the results.
        images
            (N, H, W, 3) uint8, dense per image, for overlays.
        palette
            (256, 3) uint8, C-contiguous: the colours of the values 0..1.
        alpha
            Weight of the colour in the overlay, 0..1: round((1 - alpha) * pixel + alpha * colour), ties to even,
            with colour = palette[round(255 * value)].
        threads
            Maximum number of threads; None for the number of processors. The result is bit-identical for any number.

        Returns
        -------
        Rendered
            The `*_out` arrays where given, else new ones.

        Raises
        ------
        KernelError
            An argument has a wrong dtype, shape, memory layout or value, or outputs overlap another argument.
        NonFiniteError
            NaN or infinity in activations or weights, or a sum (a partial one included) beyond float32. The outputs
            are then undefined.
        """
        _check_choice("weighting", weighting, tuple(_WEIGHTS_SHAPE))
        check_normalize(normalize, has_images=images is not None)
        channels_last = _check_activations(activations)
        n, _, h, w = activations.shape
        k = _check_weights(weights, activations.shape, weighting, channels_last)
        target_size = (h, w) if size is None else check_size(size)
        maps = _output("maps_out", maps_out, (n, k, h, w), _FLOAT32)
        heatmaps = _output("heatmaps_out", heatmaps_out, (n, k, *target_size), _FLOAT32)
        overlay = None
        if images is not None:
            _check_images(images, (n, *target_size, 3))
            overlay = Overlay(
                images,
                _check_palette(palette),
                check_alpha(alpha),
                _output("overlays_out", overlays_out, (n, k, *target_size, 3), _UINT8),
            )
        elif palette is not None or overlays_out is not None:
            name = "palette" if palette is not None else "overlays_out"
            raise KernelError(f"{name}: given without images; pass images too, or omit it")
        _check_apart(
            {"maps_out": maps_out, "heatmaps_out": heatmaps_out, "overlays_out": overlays_out},
            {"activations": activations, "weights": weights, "images": images, "palette": palette},
        )
        evidence = np.empty((n, k), np.float32)
        call = MapCall(activations, weights, channels_last, weighting, normalize, maps, evidence)
        _check_rendered(self._render(call, heatmaps, overlay, self._threads(threads)), k)
        return Rendered(maps, heatmaps, None if overlay is None else overlay.out, evidence)

    def render_outputs(
        self,
        activations: Floats,
        weights: Floats,
        normalize: Normalize,
        size: tuple[int, ...] | None,
        threads: int | None,
    ) -> Rendered:
        """Do what `render` does for a runtime's own outputs, which need no checks.

        After a forward pass the caches hold the network: executing all the checks of `render` in the interpreter then
        takes longer than the maps themselves (60 of 80 microseconds for 1x1280x7x7).

        Parameters
        ----------
        activations, weights
            (N, C, h, w) and (N, K, C), float32, C-contiguous.
        normalize, size, threads
            As in `render`; not checked here.

        Raises
        ------
        NonFiniteError
            As in `render`.
        """
        n, _, h, w = activations.shape
        k = weights.shape[1]
        maps = np.empty((n, k, h, w), np.float32)
        heatmaps = np.empty((n, k, h, w) if size is None else (n, k, *size), np.float32)
        evidence = np.empty((n, k), np.float32)
        call = MapCall(activations, weights, False, "channel", normalize, maps, evidence)
        _check_rendered(self._render(call, heatmaps, None, threads or self._default_threads()), k)
        return Rendered(maps, heatmaps, None, evidence)

    def resize(
        self,
        maps: Floats,
        size: Sequence[int],
        *,
        heatmaps_out: Floats | None = None,
        threads: int | None = None,
    ) -> Floats:
        """Maps at another size, half-pixel-centre bilinear, edges repeated, no antialiasing.

        Parameters
        ----------
        maps
            (N, K, h, w) float32, C-contiguous, magnitudes up to `VIEW_LIMIT`.
        size
            (H, W).
        heatmaps_out
            (N, K, H, W) float32, C-contiguous, to write to.
        threads
            As in `render`.

        Returns
        -------
        ndarray
            (N, K, H, W) float32: `heatmaps_out` where given.

        Raises
        ------
        KernelError
            An argument has a wrong dtype, shape, memory layout or value, or the output overlaps `maps`.
        NonFiniteError
            A map holds NaN, infinity or a larger magnitude.
        """
        n, k = _check_maps(maps)
        target_size = check_size(size)
        heatmaps = _output("heatmaps_out", heatmaps_out, (n, k, *target_size), _FLOAT32)
        _check_apart({"heatmaps_out": heatmaps_out}, {"maps": maps})
        _check_viewed(self._view(maps, target_size, heatmaps, None, self._threads(threads)), k)
        return heatmaps

    def colorize(
        self,
        maps: Floats,
        images: Pixels,
        *,
        palette: Pixels,
        alpha: float = 0.5,
        overlays_out: Pixels | None = None,
        threads: int | None = None,
    ) -> Pixels:
        """Overlays of maps on images, without heatmaps in between.

        Parameters
        ----------
        maps
            (N, K, h, w) float32, C-contiguous, in 0..1; values outside are clipped.
        images
            (N, H, W, 3) uint8, dense per image, of any size.
        palette, alpha, overlays_out, threads
            As in `render`.

        Returns
        -------
        ndarray
            (N, K, H, W, 3) uint8: `overlays_out` where given.

        Raises
        ------
        KernelError
            An argument has a wrong dtype, shape, memory layout or value, or the output overlaps another argument.
        NonFiniteError
            A map holds NaN, infinity or a magnitude above `VIEW_LIMIT`.
        """
        n, k = _check_maps(maps)
        _check_array("images", images, 4, (_UINT8,))
        height, width = images.shape[1:3]
        _check_images(images, (n, height, width, 3))
        overlay = Overlay(
            images,
            _check_palette(palette),
            check_alpha(alpha),
            _output("overlays_out", overlays_out, (n, k, height, width, 3), _UINT8),
        )
        _check_apart({"overlays_out": overlays_out}, {"maps": maps, "images": images, "palette": palette})
        _check_viewed(self._view(maps, (height, width), None, overlay, self._threads(threads)), k)
        return overlay.out

    def prepare(
        self,
        image: Pixels,
        levels: Floats,
        input_out: Floats,
        *,
        reversed_order: bool = False,
        channels_last: bool = True,
    ) -> None:
        """Write a picture to its place in a network's input: resize, order the channels, normalise.

        Parameters
        ----------
        image
            (H0, W0, 3) uint8, RGB, C-contiguous.
        levels
            (3, 256) float32, C-contiguous: what each pixel value becomes, by channel of the input.
        input_out
            (H, W, 3) float32, or (3, H, W) when not `channels_last`, C-contiguous, to write to. Resizing is Pillow's
            ``Resampling.BILINEAR``, to the width and then to the height, bit-identical: half-pixel centres,
            antialiased when shrinking, rounded to 8 bits after each step.
        reversed_order
            Whether the input's channels are blue, green, red.

        Raises
        ------
        KernelError
            An argument has a wrong dtype, shape or memory layout, the output overlaps another argument, or a side
            would shrink 2**21 times or more.
        """
        _check_array("image", image, 3, (_UINT8,))
        if image.shape[2] != 3 or 0 in image.shape or not image.flags.c_contiguous:
            raise KernelError(f"image: shape {image.shape}; it needs (H, W, 3), H and W at least 1, C-contiguous")
        _check_array("levels", levels, 2, (_FLOAT32,))
        if levels.shape != (3, 256) or not levels.flags.c_contiguous:
            raise KernelError(f"levels: shape {levels.shape}; it needs (3, 256), C-contiguous")
        _check_array("input_out", input_out, 3, (_FLOAT32,))
        height, width = input_out.shape[:2] if channels_last else input_out.shape[1:]
        shape = (height, width, 3) if channels_last else (3, height, width)
        if 0 in shape:
            raise KernelError(f"input_out: shape {input_out.shape}; H and W must be at least 1")
        _output("input_out", input_out, shape, _FLOAT32)
        _check_apart({"input_out": input_out}, {"image": image, "levels": levels})
        if max(image.shape[0] // height, image.shape[1] // width) >= 2**21:
            raise KernelError(f"image: shape {image.shape}; it is too large for an input of {height} x {width}")
        self._prepare(image, levels, input_out, reversed_order=reversed_order, channels_last=channels_last)

    @abstractmethod
    def first_not_finite(self, array: Floats) -> int | None:
        """Return the first row of a C-contiguous float32 array (N, ...) that holds NaN or infinity, or None."""

    @abstractmethod
    def describe(self) -> dict[str, str | int]:
        """Name of the backend, its instruction set, and the number of threads that it uses by default."""

    @abstractmethod
    def _render(self, call: MapCall, heatmaps: Floats, overlay: Overlay | None, threads: int) -> int | None:
        """Fill the outputs; return the first map (image * K + map) that is not finite."""

    @abstractmethod
    def _view(
        self, maps: Floats, size: tuple[int, int], heatmaps: Floats | None, overlay: Overlay | None, threads: int
    ) -> int | None:
        """Fill the given outputs; return the first map with a value that is NaN or beyond `VIEW_LIMIT`."""

    @abstractmethod
    def _prepare(
        self, image: Pixels, levels: Floats, input_out: Floats, *, reversed_order: bool, channels_last: bool
    ) -> None:
        """Fill the output."""

    @abstractmethod
    def _default_threads(self) -> int:
        """Default number of threads."""

    def _threads(self, threads: int | None) -> int:
        if threads is None:
            return self._default_threads()
        count = _index("threads", threads)
        if not 1 <= count <= 1024:
            raise KernelError(f"threads: {count}; give 1..1024, or None for as many as there are processors")
        return count


def _check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if not (value is None or isinstance(value, str)) or value not in allowed:
        raise KernelError(f"{name}: {value!r}; choose one of {', '.join(map(repr, allowed))}")


def check_normalize(normalize: Normalize, *, has_images: bool) -> None:
    """Refuse an unknown normalisation, and maps that cannot be coloured."""
    _check_choice("normalize", normalize, NORMALIZATIONS)
    if has_images and normalize is None:
        raise KernelError(
            "images: overlays need maps in 0..1, but normalize is None; use 'max' or 'minmax', or no images"
        )


def _index(name: str, value: SupportsIndex) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise KernelError(f"{name}: {value!r} is not a whole number") from None


def _check_array(name: str, array: object, axes: int, dtypes: tuple[np.dtype[Any], ...]) -> None:
    if not isinstance(array, np.ndarray):
        raise KernelError(f"{name}: {type(array).__name__}; give a NumPy array")
    if array.dtype not in dtypes:
        allowed = " or ".join(map(str, dtypes))
        raise KernelError(f"{name}: dtype {array.dtype.str!r}; convert it to {allowed} in native byte order")
    if array.ndim != axes:
        raise KernelError(f"{name}: shape {array.shape}; it needs {axes} axes")
    if not array.flags.aligned:
        raise KernelError(f"{name}: memory is not aligned to its dtype; copy it")


def _images_dense(array: NDArray[Any], order: Sequence[int]) -> bool:
    """Return whether the axes, outermost first, have the strides of a dense array."""
    expected = array.itemsize
    shape, strides = array.shape, array.strides
    for axis in reversed(order):
        if shape[axis] != 1 and strides[axis] != expected:
            return False
        expected *= shape[axis]
    return True


def _check_activations(activations: HalfOrFloats) -> bool:
    """Return whether the channels are last in memory."""
    _check_array("activations", activations, 4, (_FLOAT32, _FLOAT16))
    if 0 in activations.shape[1:]:
        raise KernelError(f"activations: shape {activations.shape}; C, h and w must be at least 1")
    if activations.flags.c_contiguous or _images_dense(activations, (1, 2, 3)):
        return False
    if _images_dense(activations, (2, 3, 1)):
        return True
    raise KernelError(
        f"activations: strides {activations.strides} for shape {activations.shape}; each image must be dense, channels "
        "first or last: use numpy.ascontiguousarray"
    )


def _check_weights(
    weights: HalfOrFloats, activations: tuple[int, int, int, int], weighting: Weighting, channels_last: bool
) -> int:
    """Return the number of maps."""
    n, *rest = activations
    expected = rest[:1] if weighting == "channel" else rest
    _check_array("weights", weights, 2 + len(expected), (_FLOAT32, _FLOAT16))
    k = int(weights.shape[1])
    if weights.shape != (n, k, *expected):
        raise KernelError(
            f"weights: shape {weights.shape}; weighting '{weighting}' with activations {activations} needs "
            f"{_WEIGHTS_SHAPE[weighting]} = {(n, 'K', *expected)}".replace("'K'", "K")
        )
    if weights.size == 0:
        return k
    order = (1, 2) if weighting == "channel" else (1, 3, 4, 2) if channels_last else (1, 2, 3, 4)
    if not _images_dense(weights, order):
        layout = "" if weighting == "channel" else ", laid out as the activations"
        raise KernelError(
            f"weights: strides {weights.strides} for shape {weights.shape}; each image must be dense{layout}: use "
            "numpy.ascontiguousarray on both"
        )
    return k


def _check_maps(maps: Floats) -> tuple[int, int]:
    """Return N and K."""
    _check_array("maps", maps, 4, (_FLOAT32,))
    n, k, h, w = maps.shape
    if not (h and w):
        raise KernelError(f"maps: shape {maps.shape}; h and w must be at least 1")
    if not maps.flags.c_contiguous:
        raise KernelError(f"maps: strides {maps.strides} for shape {maps.shape}; use numpy.ascontiguousarray")
    return n, k


def check_size(size: Sequence[int]) -> tuple[int, int]:
    """Return (H, W), checked."""
    try:
        height, width = (_index("size", value) for value in size)
    except (TypeError, ValueError):
        raise KernelError(f"size: {size!r}; give (height, width), two whole numbers") from None
    if not (0 < height < 2**31 and 0 < width < 2**31):
        raise KernelError(f"size: {size!r}; height and width must be at least 1 and below 2**31")
    return height, width


def _check_images(images: Pixels, shape: tuple[int, int, int, int]) -> None:
    _check_array("images", images, 4, (_UINT8,))
    if images.shape != shape or 0 in shape[1:]:
        raise KernelError(f"images: shape {images.shape}; it needs (N, H, W, 3) = {shape}, H and W at least 1")
    if images.size and not _images_dense(images, (1, 2, 3)):
        raise KernelError(
            f"images: strides {images.strides} for shape {images.shape}; each image must be dense: use "
            "numpy.ascontiguousarray"
        )


def _check_palette(palette: Pixels | None) -> Pixels:
    if palette is None:
        raise KernelError("palette: None; images need a palette of 256 colours, (256, 3) uint8")
    _check_array("palette", palette, 2, (_UINT8,))
    if palette.shape != (256, 3) or not palette.flags.c_contiguous:
        raise KernelError(f"palette: shape {palette.shape}; it needs (256, 3), C-contiguous")
    return palette


def check_alpha(alpha: float) -> float:
    """Return an opacity, checked."""
    try:
        value = float(alpha)
    except (TypeError, ValueError):
        raise KernelError(f"alpha: {alpha!r} is not a number") from None
    if not 0 <= value <= 1:
        raise KernelError(f"alpha: {value}; give 0 (the image) .. 1 (the colour)")
    return value


def _output(name: str, out: NDArray[Any] | None, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    if out is None:
        return np.empty(shape, dtype)
    _check_array(name, out, len(shape), (dtype,))
    if out.shape != shape:
        raise KernelError(f"{name}: shape {out.shape}; the result has shape {shape}")
    if not out.flags.c_contiguous:
        raise KernelError(f"{name}: strides {out.strides}; it must be C-contiguous")
    if not out.flags.writeable:
        raise KernelError(f"{name}: read-only; give a writeable array")
    return out


def _check_apart(outputs: dict[str, NDArray[Any] | None], inputs: dict[str, NDArray[Any] | None]) -> None:
    """Reject outputs whose memory may overlap an input or another output."""
    others = {name: array for name, array in inputs.items() if array is not None}
    for name, out in outputs.items():
        if out is None:
            continue
        for other, array in others.items():
            if np.may_share_memory(out, array):
                raise KernelError(f"{name}: shares memory with {other}; give it its own memory")
        others[name] = out


def not_finite(image: int, target: int) -> NonFiniteError:
    """Return the error for a map that is not finite."""
    return NonFiniteError(
        f"map {target} of image {image} is not finite: NaN or infinity in its activations or weights, or a sum beyond "
        "float32; check the model and its input",
        image=image,
    )


def _check_rendered(bad: int | None, k: int) -> None:
    if bad is not None:
        raise not_finite(bad // k, bad % k)


def _check_viewed(bad: int | None, k: int) -> None:
    if bad is not None:
        raise NonFiniteError(
            f"map {bad % k} of image {bad // k} holds NaN, infinity or a magnitude above {VIEW_LIMIT:.3g}; give finite "
            "maps",
            image=bad // k,
        )
