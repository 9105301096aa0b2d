"""Read pictures to uint8 RGB, from files, PIL images and arrays."""

from __future__ import annotations

import io
import math
import os
import stat
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import cache
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..arrays import Pixels
from ..errors import ArgumentError, ImageError

if TYPE_CHECKING:
    from PIL import Image


_Read = TypeVar("_Read")


# Formats that Pillow decodes by itself, common ones first. The content of a file counts, not its name: a ".jpg" that
# holds PostScript would otherwise run Ghostscript.
_READ_FORMATS = "JPEG PNG BMP GIF PPM WEBP AVIF TIFF JPEG2000 TGA DIB ICO ICNS PCX PSD QOI SGI DDS XBM XPM".split()


# Suffixes that folders and patterns include. Pillow's own list includes formats that run other programs, and .h5.
PICTURE_SUFFIXES = frozenset(
    ".avif .bmp .dib .gif .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tga .tif .tiff .webp".split()
)

_ACCEPTED = (
    "Accepted: a path, the bytes of a file, a PIL image, or a uint8 array (H,W), (H,W,1), (H,W,3) RGB or (H,W,4) RGBA; "
    "without alpha also uint16, and floats of 0..1 or with value_range=(black, white)"
)

# Integers up to this value leave the top bits of 16 unused: 12-bit data, which 0..65535 would turn almost black.
_LARGEST_OF_12_BITS = 4095
_FULL_RANGE = 65535

ValueRange: TypeAlias = "tuple[float, float] | None"


ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | NDArray[Any]"


def read_image(source: ImageSource, *, value_range: ValueRange = None) -> Pixels:
    """Read a picture, whatever its file format and colour mode, as 8-bit RGB the right way up.

    Transparent pixels are composited on white: on black, dark drawings would vanish. The EXIF orientation is applied.
    For an animation or a multi-page file, the first frame is read.

    Parameters
    ----------
    source
        Path of a picture, the bytes of its file, PIL image (its current frame is read), or array: (H,W) or (H,W,1)
        greyscale, (H,W,3) RGB, (H,W,4) RGBA. uint8; without alpha also uint16, and floats of 0..1 or whose
        ``value_range`` is stated.
    value_range
        The values of black and white in pictures of more than 8 bits, such as (0, 4095) for 12-bit radiographs or
        (0, 1) for floats. They become 0 and 255, linearly; values outside are clipped. 8-bit pictures are read
        unchanged. None: (0, 65535) for 16-bit pictures that use more than 12 bits, (0, 1) for arrays of floats, which
        must lie within, (0, 255) for files and PIL images of floats above 1; others are rejected, because their range
        is ambiguous.

    Returns
    -------
    ndarray
        uint8 (H,W,3), RGB, 0..255, C-contiguous. Do not write to it: it may be the source's own memory.

    Raises
    ------
    ImageError
        The file is missing, damaged, empty or too large, the source is of another kind, dtype or shape, or the range
        of its values must be stated.
    ArgumentError
        ``value_range`` is not two finite numbers, the smaller one first.
    """
    from PIL import Image

    value_range = _checked_range(value_range)
    if isinstance(source, np.ndarray):
        return _guarded("the array", lambda: _from_array(source, value_range))
    if isinstance(source, Image.Image):
        return _guarded("the PIL image", lambda: _from_pil(source, value_range))
    if isinstance(source, bytes | bytearray | memoryview):
        return _guarded("the picture in memory", lambda: _from_stream(io.BytesIO(source), value_range).pixels)
    if isinstance(source, str | os.PathLike):
        return read_picture(source, value_range=value_range).pixels
    raise ImageError(f"cannot read a picture from a {type(source).__name__}. {_ACCEPTED}")


def picture_size(content: bytes) -> tuple[int, int]:
    """Return height and width of the bytes of a picture's file, without decoding it.

    Raises
    ------
    ImageError
        They are not a picture that `read_image` reads.
    """
    from PIL import Image

    def size() -> tuple[int, int]:
        with _no_warnings(), Image.open(io.BytesIO(content), formats=_known_formats()) as picture:
            return picture.height, picture.width

    return _guarded("the picture in memory", size)


def _checked_range(value_range: Any) -> ValueRange:
    if value_range is None:
        return None
    try:
        low, high = map(float, value_range)
    except (TypeError, ValueError, OverflowError):
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ArgumentError(f"value_range={value_range!r}: give the values of black and white, such as (0, 4095)")
    return low, high


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


def read_picture(path: str | os.PathLike[str], *, value_range: ValueRange = None) -> Picture:
    """Read a file as `read_image` does, and also return whether it holds further frames."""
    name = os.fspath(path)
    return _guarded(f"'{name}'", lambda: _from_file(name, value_range))


def _from_array(array: NDArray[Any], value_range: ValueRange) -> Pixels:
    channels = array.shape[2] if array.ndim == 3 else 1
    is_deep = array.dtype == np.uint16 or array.dtype.kind == "f"
    if array.ndim not in (2, 3) or channels not in (1, 3, 4) or array.size == 0:
        raise _unknown_array(array)
    if is_deep and channels != 4:
        if array.dtype.kind == "f" and value_range is None:
            value_range = _unit_range(array)
        array = _to_8_bits(array, value_range)
    elif array.dtype != np.uint8:
        raise _unknown_array(array)
    if channels == 4:
        return _on_white(array)
    return np.ascontiguousarray(np.broadcast_to(array.reshape(*array.shape[:2], -1), (*array.shape[:2], 3)))


def _unit_range(array: NDArray[Any]) -> tuple[float, float]:
    """Return (0, 1) for an array of floats within it, as libraries of image processing use them."""
    low, high = array.min(), array.max()
    if not 0 <= low <= high <= 1:
        raise ImageError(
            f"holds floats {low:g}..{high:g}, which are not 0..1. State the values of black and white, for example "
            "value_range=(0, 255); an image that is already preprocessed needs its batch axis, (1, ...)"
        )
    return 0, 1


def _unknown_array(array: NDArray[Any]) -> ImageError:
    return ImageError(f"cannot be read as a picture: {array.dtype} {array.shape}. {_ACCEPTED}")


def _on_white(rgba: Pixels) -> Pixels:
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(rgba))
    page = Image.new("RGBA", picture.size, "white")
    return np.asarray(Image.alpha_composite(page, picture).convert("RGB"))


def _from_file(path: str, value_range: ValueRange) -> Picture:
    _check_regular(os.stat(path).st_mode)  # noqa: PTH116 - keeps names that Path would change
    with _opened(path) as file:
        return _from_stream(file, value_range)


def _from_stream(file: BinaryIO, value_range: ValueRange) -> Picture:
    from PIL import Image

    with _no_warnings():
        image = Image.open(file, formats=_known_formats())
        _check_pixels(image)
        return Picture(_from_pil(image, value_range), _has_more(image))


@contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    """Open a regular file, without blocking on or reading whatever may have taken its place since it was checked."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
    with closing(os.fdopen(descriptor, "rb")) as file:
        _check_regular(os.fstat(descriptor).st_mode)
        yield file


def _check_regular(mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError
    if not stat.S_ISREG(mode):
        # Reading a pipe would wait for its writer.
        raise ImageError("is not a regular file but a pipe, device or socket. Save the picture as a file first")


def _check_pixels(image: Image.Image) -> None:
    """Reject what Pillow only warns about: a few bytes may unpack to gigabytes."""
    from PIL import Image

    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise Image.DecompressionBombError


@cache
def _known_formats() -> list[str]:
    """Return those of `_READ_FORMATS` that this version of Pillow has."""
    from PIL import Image

    Image.init()
    return [name for name in _READ_FORMATS if name in Image.OPEN]


def _has_more(image: Image.Image) -> bool:
    # Only the first frame is used: damage after it must not matter.
    with suppress(Exception):
        return bool(getattr(image, "is_animated", False))
    return False


def _from_pil(image: Image.Image, value_range: ValueRange) -> Pixels:
    image.load()
    image = _upright(image)
    if 0 in image.size:
        raise ImageError(f"has no pixels (size {image.size})")
    if image.mode[0] in "IF":
        return _from_array(_to_8_bits(np.asarray(image), value_range), value_range)
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


def _to_8_bits(values: NDArray[Any], value_range: ValueRange) -> Pixels:
    """Map the values of black and white to 0 and 255, linearly, and round; see `read_image`."""
    low, high = value_range or _known_range(values)
    with np.errstate(invalid="ignore", over="ignore"):
        scaled = np.clip((values.astype(np.float64) - low) * (255 / (high - low)), 0, 255)
    if np.isnan(scaled).any():
        raise ImageError("holds NaN. Replace it by a number first")
    rounded: Pixels = np.rint(scaled).astype(np.uint8)
    return rounded


def _known_range(values: NDArray[Any]) -> tuple[float, float]:
    """Return the range of values if only one range is likely.

    Raises
    ------
    ImageError
        The range is ambiguous.
    """
    low, high = values.min(), values.max()
    if values.dtype.kind == "f":
        if 0 <= low <= high <= 255 and not 0 < high <= 1:
            return 0, 255
        what, example = f"floats {low:g}..{high:g}, which are not 0..255", (0, 1) if high <= 1 else (0, 4095)
    else:
        if 0 <= low <= high <= _FULL_RANGE and not 0 < high <= _LARGEST_OF_12_BITS:
            return 0, _FULL_RANGE
        fewer = 0 < high <= _LARGEST_OF_12_BITS
        what = f"integers {low}..{high}, " + ("which use 12 of 16 bits at most" if fewer else "which are not 16 bits")
        example = (0, _LARGEST_OF_12_BITS)
    raise ImageError(
        f"holds {what}. State the values of black and white, for example value_range={example}, or convert the picture "
        "to 8 bits first"
    )


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Silence Pillow on the main thread.

    The interpreter's warning filters are global. If two threads changed them at once, they could stay changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _guarded(name: str, read: Callable[[], _Read]) -> _Read:
    """Run `read`, and turn exceptions into an ImageError that says which picture it was and what to do."""
    from PIL import Image, UnidentifiedImageError

    too_large = f"has more than {Image.MAX_IMAGE_PIXELS} pixels. Resize it first"
    # First match wins: subclasses before their bases.
    reasons: list[tuple[type[BaseException] | tuple[type[BaseException], ...], str]] = [
        (ImageError, "{error}"),
        (FileNotFoundError, "does not exist. Check the path"),
        (IsADirectoryError, "is a directory. Pass the pictures in it"),
        (PermissionError, "cannot be read. Check its permissions"),
        (UnidentifiedImageError, "is empty or not a picture of a known format. Convert it to PNG or JPEG"),
        (MemoryError, "needs more memory than is free. Resize it first"),
        ((Image.DecompressionBombError, Image.DecompressionBombWarning), too_large),
        (Exception, "is damaged, truncated or of an unknown kind ({error}). Save it again as PNG or JPEG"),
    ]
    try:
        return read()
    except Exception as error:  # noqa: BLE001 - Pillow's readers raise nearly anything on damaged files
        reason = next(text for kind, text in reasons if isinstance(error, kind))
        raise ImageError(f"{name} {reason.format(error=error)}") from None
