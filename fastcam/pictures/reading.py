"""Read pictures to uint8 RGB, from files, PIL images and arrays."""

from __future__ import annotations

import os
import stat
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import ImageError

if TYPE_CHECKING:
    from PIL import Image


Pixels = NDArray[np.uint8]


_Read = TypeVar("_Read")


# What Pillow decodes by itself, the usual ones first. It goes by a file's content, whatever its name: a ".jpg" that
# holds PostScript would otherwise run Ghostscript.
_READ_FORMATS = "JPEG PNG BMP GIF PPM WEBP AVIF TIFF JPEG2000 TGA DIB ICO ICNS PCX PSD QOI SGI DDS XBM XPM".split()


# What is taken from folders and patterns. Pillow's own list holds formats that run other programs, and .h5.
PICTURE_SUFFIXES = frozenset(
    ".avif .bmp .dib .gif .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tga .tif .tiff .webp".split()
)

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
