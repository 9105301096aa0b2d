"""Colour maps, and writing pictures completely or not at all."""

from __future__ import annotations

import difflib
import io
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import Pixels
from ..errors import ArgumentError, ImageError, WriteError
from ..files import check_writable, replacing


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
    # A fifth of the default level's time, for files a seventh larger.
    ".png": ("PNG", {"compress_level": 1}),
    ".jpg": ("JPEG", {"quality": 92}),
    ".jpeg": ("JPEG", {"quality": 92}),
    ".webp": ("WEBP", {"quality": 92}),
}


def write_image(array: Pixels, path: str | os.PathLike[str]) -> None:
    """Write a picture, in the format of the path's suffix, completely or not at all.

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
        The folder is missing or not writable, or the format cannot hold the picture; nothing is left behind.
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
        The format cannot hold the picture: JPEG is limited to 65,500 pixels per side, WebP to 16,383.
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
    # A view of the file's own buffer makes Python 3.13 complain when both end in a cycle.
    return memoryview(encoded.getvalue())
