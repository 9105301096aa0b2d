"""One line of text on a picture."""

from __future__ import annotations

import numpy as np

from ..arrays import Pixels

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
