"""Pictures in and out: reading to uint8 RGB, the model's input batch, colour maps, writing."""

from __future__ import annotations

import difflib
import io
import json
import math
import os
import stat
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from . import kernels
from .errors import ArgumentError, ImageError, WriteError
from .files import check_writable, replacing
from .kernels.reference import resized_picture

if TYPE_CHECKING:
    from PIL import Image

Pixels = NDArray[np.uint8]
Layout = Literal["NHWC", "NCHW"]
_Read = TypeVar("_Read")

# What Pillow decodes by itself, the usual ones first. It goes by a file's content, whatever its name: a ".jpg" that
# holds PostScript would otherwise run Ghostscript.
_READ_FORMATS = "JPEG PNG BMP GIF PPM WEBP AVIF TIFF JPEG2000 TGA DIB ICO ICNS PCX PSD QOI SGI DDS XBM XPM".split()

_ACCEPTED = "Accepted: a path, a PIL image, or a uint8 array (H,W), (H,W,1), (H,W,3) RGB or (H,W,4) RGBA"


def read_image(source: str | os.PathLike[str] | Image.Image | NDArray[Any]) -> Pixels:
    """Read a picture, whatever its file format and colour mode, as 8-bit RGB the right way up.

    Transparent pixels are laid on white, the page that transparent pictures are drawn for: on black, dark drawings
    would vanish. 16-bit values 0..65535 are scaled to 0..255. The EXIF orientation is applied. Of an animation or a
    multi-page file the first frame is read.

    Parameters
    ----------
    source
        Path of a picture, PIL image (its current frame is read), or uint8 array: (H,W) or (H,W,1) greyscale,
        (H,W,3) RGB, (H,W,4) RGBA.

    Returns
    -------
    ndarray
        uint8 (H,W,3), RGB, 0..255, C-contiguous. Not to be written to: it may be the source's own memory.

    Raises
    ------
    ImageError
        The file is missing, damaged, empty or too large, or the source is of another kind, dtype or shape.
    """
    from PIL import Image

    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _guarded("the PIL image", lambda: _from_pil(source))
    if isinstance(source, str | os.PathLike):
        return read_picture(source).pixels
    raise ImageError(f"cannot read a picture from a {type(source).__name__}. {_ACCEPTED}")


class Picture(NamedTuple):
    """A picture that was read from a file.

    Attributes
    ----------
    pixels : ndarray
        uint8 (H,W,3).
    is_first_of_several : bool
        Whether the file holds further frames or pages.
    """

    pixels: Pixels
    is_first_of_several: bool


def read_picture(path: str | os.PathLike[str]) -> Picture:
    """Read a file as `read_image` does, and say whether it holds more than was read."""
    name = os.fspath(path)
    return _guarded(f"'{name}'", lambda: _from_file(name))


def _from_array(array: NDArray[Any]) -> Pixels:
    shape = array.shape[2:] if array.ndim == 3 else (1,)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or shape[0] not in (1, 3, 4) or array.size == 0:
        raise ImageError(f"cannot read a picture from an array of {array.dtype} {array.shape}. {_ACCEPTED}")
    if shape == (4,):
        return _on_white(array)
    return np.ascontiguousarray(np.broadcast_to(array.reshape(*array.shape[:2], -1), (*array.shape[:2], 3)))


def _on_white(rgba: Pixels) -> Pixels:
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(rgba))
    page = Image.new("RGBA", picture.size, "white")
    return np.asarray(Image.alpha_composite(page, picture).convert("RGB"))


def _from_file(path: str) -> Picture:
    from PIL import Image

    mode = os.stat(path).st_mode  # noqa: PTH116 - keeps names that Path would change
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        # Opening a pipe would wait for its writer.
        raise ImageError("is no regular file but a pipe, device or socket. Save the picture as a file first")
    with _no_warnings():
        opened = Image.open(path, formats=_known_formats())
    with opened as image:
        return Picture(_from_pil(image), _has_more(image))


@cache
def _known_formats() -> list[str]:
    """Return those of `_READ_FORMATS` that this version of Pillow has."""
    from PIL import Image

    Image.init()
    return [name for name in _READ_FORMATS if name in Image.OPEN]


def _has_more(image: Image.Image) -> bool:
    # Damage behind the first frame, which is all that is used, must not count.
    with suppress(Exception):
        return bool(getattr(image, "is_animated", False))
    return False


def _from_pil(image: Image.Image) -> Pixels:
    image.load()
    image = _upright(image)
    if 0 in image.size:
        raise ImageError(f"has no pixels (size {image.size})")
    if image.mode[0] in "IF":
        return _from_array(_to_8_bits(np.asarray(image), image.mode))
    if image.has_transparency_data:
        return _on_white(np.asarray(image.convert("RGBA")))
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation (EXIF 2.32, table 6) and no other tag.

    `PIL.ImageOps.exif_transpose` also writes the other tags back, and fails where one of them is damaged.
    """
    from PIL import ExifTags
    from PIL.Image import Transpose

    turns: dict[Any, Transpose] = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    with _no_warnings():
        turn = turns.get(image.getexif().get(ExifTags.Base.Orientation))
    return image if turn is None else image.transpose(turn)


def _to_8_bits(values: NDArray[Any], mode: str) -> Pixels:
    """Scale the integer modes from 0..65535, and take floats as 0..255."""
    low, high = values.min(), values.max()
    if mode == "F":
        if not 0 <= low <= high <= 255 or 0 < high <= 1:
            raise ImageError(f"holds floats {low:g}..{high:g}, not 0..255. Convert the picture to 8 bits first")
        rounded: Pixels = np.rint(values).astype(np.uint8)
        return rounded
    if low < 0 or high > 65535:
        raise ImageError(f"holds integers {low}..{high}, not 16 bits. Convert the picture to 8 bits first")
    scaled: Pixels = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return scaled


# The interpreter's warning filters are global: two readers must not change them at once.
_warning_filters = threading.Lock()


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Turn Pillow's warning of a decompression bomb into its error and silence the rest; for short work only."""
    from PIL import Image

    with _warning_filters, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _guarded(name: str, read: Callable[[], _Read]) -> _Read:
    """Run `read` and say of whatever it raises which picture it was and what to do."""
    from PIL import Image, UnidentifiedImageError

    too_large = f"has more than {Image.MAX_IMAGE_PIXELS} pixels. Resize it first"
    # First match wins: subclasses before their bases.
    reasons: list[tuple[type[BaseException] | tuple[type[BaseException], ...], str]] = [
        (ImageError, "{error}"),
        (FileNotFoundError, "does not exist. Check the path"),
        (IsADirectoryError, "is a directory. Pass the pictures in it"),
        (PermissionError, "may not be read. Check its permissions"),
        (UnidentifiedImageError, "is empty or no picture of a known format. Convert it to PNG or JPEG"),
        ((Image.DecompressionBombError, Image.DecompressionBombWarning), too_large),
        (Exception, "is damaged, truncated or of an unknown kind ({error}). Save it again as PNG or JPEG"),
    ]
    try:
        return read()
    except Exception as error:  # noqa: BLE001 - Pillow's readers raise nearly anything on damaged files
        reason = next(text for kind, text in reasons if isinstance(error, kind))
        raise ImageError(f"{name} {reason.format(error=error)}") from None


@dataclass(frozen=True)
class Preprocessing:
    """How pixels become the model's input: ``(pixels[order] - mean) * scale``.

    Parameters
    ----------
    order
        "RGB" or "BGR", the channel order of the model's input.
    mean, scale
        Three floats each, in the channel order of the model's input; pixels are float32 0..255.

    Raises
    ------
    ArgumentError
        Another order, not three finite numbers, or a scale of 0.
    """

    order: Literal["RGB", "BGR"]
    mean: tuple[float, float, float]
    scale: tuple[float, float, float]

    def __post_init__(self) -> None:
        if self.order not in ("RGB", "BGR"):
            raise ArgumentError(f"order must be 'RGB' or 'BGR', not {self.order!r}")
        for field in ("mean", "scale"):
            object.__setattr__(self, field, _three_floats(field, getattr(self, field)))
        if 0 in self.scale:
            raise ArgumentError(f"scale {self.scale} would erase a channel. Give non-zero numbers")

    @property
    def name(self) -> str | None:
        """Name in the table of known ones, or None."""
        return next((name for name, known in _KNOWN.items() if known == self), None)

    @classmethod
    def of(cls, spec: str | Preprocessing | Mapping[str, Any]) -> Preprocessing:
        """Make a preprocessing from a name, a mapping, or one that is already made.

        Parameters
        ----------
        spec
            One of the names below, a Preprocessing, or a mapping with the keys "order", "mean" and "scale".

            ==============  =======================================================================================
            "vgg16"         BGR minus (103.939, 116.779, 123.68): Keras' VGG and ResNet ("caffe")
            "imagenet"      RGB / 255, minus (.485, .456, .406), over (.229, .224, .225): torchvision, Keras' "torch"
            "scale"         RGB to 0..1
            "symmetric"     RGB to -1..1: Keras' "tf"
            "none"          RGB 0..255 as it is
            ==============  =======================================================================================

        Raises
        ------
        ArgumentError
            Unknown name, missing or unknown keys, or values that Preprocessing refuses.
        """
        if isinstance(spec, Preprocessing):
            return spec
        if isinstance(spec, str) and spec in _KNOWN:
            return _KNOWN[spec]
        if isinstance(spec, Mapping) and set(spec) == {"order", "mean", "scale"}:
            return cls(**spec)
        raise ArgumentError(
            f"unknown preprocessing {spec!r}. Allowed: {', '.join(map(repr, _KNOWN))}, "
            "or a mapping {'order': 'RGB' or 'BGR', 'mean': 3 numbers, 'scale': 3 numbers}"
        )

    def to_json(self) -> str:
        """Write as JSON: the same text for the same preprocessing, every float exact, with its name where known."""
        return json.dumps({"name": self.name, **asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Preprocessing:
        """Read what `to_json` wrote; the numbers count, not the name.

        Raises
        ------
        ArgumentError
            The text is not such JSON.
        """
        try:
            fields = json.loads(text)
            return cls.of({key: fields[key] for key in ("order", "mean", "scale")})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ArgumentError(f"no preprocessing in {text!r} ({type(error).__name__}: {error})") from None


def _three_floats(field: str, values: Any) -> tuple[float, float, float]:
    try:
        first, second, third = (float(value) for value in values)
    except (TypeError, ValueError):
        raise ArgumentError(f"{field} must be three numbers, not {values!r}") from None
    if not all(map(math.isfinite, (first, second, third))):
        raise ArgumentError(f"{field} must be finite, not {values!r}")
    return first, second, third


_KNOWN: dict[str, Preprocessing] = {
    "vgg16": Preprocessing("BGR", (103.939, 116.779, 123.68), (1, 1, 1)),
    "imagenet": Preprocessing(
        "RGB", (255 * 0.485, 255 * 0.456, 255 * 0.406), (1 / (255 * 0.229), 1 / (255 * 0.224), 1 / (255 * 0.225))
    ),
    "scale": Preprocessing("RGB", (0, 0, 0), (1 / 255, 1 / 255, 1 / 255)),
    "symmetric": Preprocessing("RGB", (127.5, 127.5, 127.5), (1 / 127.5, 1 / 127.5, 1 / 127.5)),
    "none": Preprocessing("RGB", (0, 0, 0), (1, 1, 1)),
}


def prepare(
    images: Sequence[Pixels],
    preprocessing: Preprocessing,
    size: tuple[int, int],
    layout: Layout = "NHWC",
    channels: int = 3,
) -> NDArray[np.float32]:
    """Resize and normalise pictures into one input batch.

    The whole picture is squashed to `size`, without cropping and whatever its aspect ratio, so that a heatmap
    stretched over the picture covers all of it. Resizing is Pillow's bilinear filter, antialiased when shrinking, to
    the width first.

    Parameters
    ----------
    images
        N uint8 arrays (H0,W0,3), RGB, as from `read_image`; their sizes may differ.
    preprocessing
        Normalisation after resizing.
    size
        (H, W) of the model's input, pixels.
    layout
        "NHWC" or "NCHW".
    channels
        3, or 1 for a greyscale model: the ITU-R 601 luma, normalised by three equal means and scales.

    Returns
    -------
    ndarray
        float32 (N,H,W,channels) or (N,channels,H,W), C-contiguous.

    Raises
    ------
    ArgumentError
        Unknown layout, other channels than 1 and 3, or a greyscale model with different means or scales.
    """
    if layout not in ("NHWC", "NCHW"):
        raise ArgumentError(f"layout must be 'NHWC' or 'NCHW', not {layout!r}")
    if channels not in (1, 3):
        raise ArgumentError(f"pictures fit models of 1 or 3 input channels, not {channels}. Pass a float batch instead")
    if channels == 1 and (len(set(preprocessing.mean)) > 1 or len(set(preprocessing.scale)) > 1):
        raise ArgumentError(f"a greyscale model needs three equal means and three equal scales, not {preprocessing}")
    shape = (*size, channels) if layout == "NHWC" else (channels, *size)
    batch = np.empty((len(images), *shape), np.float32)
    levels = _levels(preprocessing)
    for image, place in zip(images, batch, strict=True):
        if channels == 1:
            place.reshape(size)[...] = levels[0][resize_image(image, size, 1)[..., 0]]
        else:
            kernels.prepare(
                np.ascontiguousarray(image),
                levels,
                place,
                reversed_order=preprocessing.order == "BGR",
                channels_last=layout == "NHWC",
            )
    return batch


def _levels(preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Return what each pixel value becomes, float32 (3,256), by channel of the model's input."""
    mean, scale = (np.array(values, np.float32)[:, None] for values in (preprocessing.mean, preprocessing.scale))
    levels: NDArray[np.float32] = (np.arange(256, dtype=np.float32) - mean) * scale
    return levels


def resize_image(image: Pixels, size: tuple[int, int], channels: int = 3) -> Pixels:
    """Resize a picture to (H, W), antialiased bilinear; uint8 (H,W,channels), 1 channel being its luma."""
    from PIL import Image

    height, width = size
    picture = Image.fromarray(image)
    if channels == 1:
        picture = picture.convert("L")
    return np.asarray(resized_picture(picture, size)).reshape(height, width, channels)


def shrink_image(image: Pixels, factor: int) -> Pixels:
    """Shrink a picture by a whole factor, averaging; a factor below 2 changes nothing."""
    from PIL import Image

    return np.asarray(Image.fromarray(image).reduce(factor)) if factor > 1 else image


@cache
def palette(name: str = "jet") -> Pixels:
    """Colour map as a table of 256 colours.

    Parameters
    ----------
    name
        Any name of the cmap library's catalogue ("jet", "turbo", "viridis", "cividis", ...), with "_r" for reversed.

    Returns
    -------
    ndarray
        uint8 (256,3), RGB, read-only; row 0 for heat 0, row 255 for heat 1.

    Raises
    ------
    ArgumentError
        Unknown name; the message lists similar ones.
    """
    import cmap

    catalogue = cmap.Catalog()
    try:
        catalogue[name.removesuffix("_r")]
    except (AttributeError, ValueError):
        near = difflib.get_close_matches(str(name), catalogue.short_keys(), n=5) or [
            "jet",
            "turbo",
            "viridis",
            "cividis",
        ]
        raise ArgumentError(f"unknown colour map {name!r}. Did you mean one of {', '.join(near)}?") from None
    table: Pixels = np.rint(cmap.Colormap(name).lut(256)[:, :3] * 255).astype(np.uint8)
    table.flags.writeable = False
    return table


_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 92}),
    ".jpeg": ("JPEG", {"quality": 92}),
    ".webp": ("WEBP", {"quality": 92}),
}


def write_image(array: Pixels, path: str | os.PathLike[str]) -> None:
    """Write a picture, in the format of the path's suffix, whole or not at all.

    Parameters
    ----------
    array
        uint8 (H,W,3) RGB or (H,W) greyscale.
    path
        Ends in .png, .jpg, .jpeg or .webp; an existing file is replaced.

    Raises
    ------
    ArgumentError
        Another suffix, or an array of another dtype or shape.
    WriteError
        The folder is missing or may not be written, or the format cannot hold the picture; nothing is left behind.
    """
    path = Path(path)
    try:
        encoded = encode_image(array, path)
    except ImageError as error:
        raise WriteError(str(error)) from None
    check_writable(path)
    with replacing(path) as file:
        file.write(encoded)


def encode_image(array: Pixels, path: Path) -> memoryview:
    """Encode a picture in the format of the path's suffix.

    Parameters and ArgumentError as in `write_image`.

    Raises
    ------
    ImageError
        The format cannot hold the picture: JPEG ends at 65,500 pixels a side, WebP at 16,383.
    """
    from PIL import Image

    if path.suffix.lower() not in _FORMATS:
        raise ArgumentError(f"cannot write '{path}': unknown suffix {path.suffix!r}. Allowed: {', '.join(_FORMATS)}")
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,)):
        raise ArgumentError(f"cannot write an array of {array.dtype} {array.shape}. Accepted: uint8 (H,W,3) or (H,W)")
    kind, options = _FORMATS[path.suffix.lower()]
    encoded = io.BytesIO()
    try:
        Image.fromarray(np.ascontiguousarray(array)).save(encoded, format=kind, **options)
    except (OSError, ValueError) as error:
        height, width = array.shape[:2]
        raise ImageError(
            f"{path}: {kind} cannot hold a picture of {width} x {height} pixels ({error}). "
            "Choose another format or a smaller size"
        ) from None
    return encoded.getbuffer()
