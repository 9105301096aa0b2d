"""Text and outlines on a picture."""

from __future__ import annotations

import numpy as np

from ..arrays import Floats, Pixels

# Height of the letters as a share of the picture's shorter side, and its bounds in pixels.
_SHARE, _SMALLEST, _LARGEST = 0.05, 10, 48


def add_caption(picture: Pixels, text: str) -> Pixels:
    """Return a copy of a picture with a line of white text on a black bar at its lower edge.

    Parameters
    ----------
    picture : ndarray
        uint8 (H,W,3) RGB.
    text : str
        Shrunk until it fits into the width.

    Returns
    -------
    ndarray
        uint8 (H,W,3) RGB.
    """
    from PIL import Image, ImageDraw, ImageFont

    height, width = picture.shape[:2]
    wanted = int(np.clip(min(height, width) * _SHARE, _SMALLEST, _LARGEST))
    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas)
    for size in range(wanted, 0, -1):
        font = ImageFont.load_default(size)
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        if right - left + size <= width:
            break
    bar = bottom - top + size
    draw.rectangle((0, height - bar, width, height), fill="black")
    draw.text((size / 2 - left, height - bar + size / 2 - top), text, fill="white", font=font)
    return np.asarray(canvas)


def add_box(picture: Pixels, box: Floats) -> Pixels:
    """Return a copy of a picture with the outline of a box, white between black lines.

    Parameters
    ----------
    picture : ndarray
        uint8 (H,W,3) RGB.
    box : ndarray
        (4,): left, top, right and bottom in pixels.
    """
    from PIL import Image, ImageDraw

    height, width = picture.shape[:2]
    line = max(1, round(min(height, width) / 200))
    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas)
    left, top, right, bottom = (float(side) for side in np.clip(box, 0, [width - 1, height - 1] * 2))
    corners = (min(left, right), min(top, bottom), max(left, right), max(top, bottom))
    draw.rectangle(corners, outline="black", width=3 * line)
    inner = (corners[0] + line, corners[1] + line, corners[2] - line, corners[3] - line)
    if inner[0] < inner[2] and inner[1] < inner[3]:
        draw.rectangle(inner, outline="white", width=line)
    return np.asarray(canvas)
