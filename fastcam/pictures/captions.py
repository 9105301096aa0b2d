"""Text and outlines on a picture."""

from __future__ import annotations

from collections.abc import Sequence

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


def add_boxes(picture: Pixels, boxes: Floats, labels: Sequence[str] = ()) -> Pixels:
    """Return a copy of a picture with the outlines of boxes, white between black lines.

    Parameters
    ----------
    picture : ndarray
        uint8 (H,W,3) RGB.
    boxes : ndarray
        (K,4): left, top, right and bottom in pixels.
    labels : sequence of str, optional
        A line of text for each, in its upper left corner.
    """
    from PIL import Image, ImageDraw, ImageFont

    height, width = picture.shape[:2]
    line = max(1, round(min(height, width) / 200))
    font = ImageFont.load_default(int(np.clip(min(height, width) * _SHARE * 0.8, _SMALLEST, _LARGEST)))
    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas)
    places = np.clip(boxes, 0, [width - 1, height - 1] * 2).tolist()
    for left, top, right, bottom in places:
        draw.rectangle((left, top, max(left, right), max(top, bottom)), outline="black", width=3 * line)
        if right - left > 2 * line and bottom - top > 2 * line:
            draw.rectangle((left + line, top + line, right - line, bottom - line), outline="white", width=line)
    # Above all outlines.
    for (left, top, _, _), label in zip(places, labels, strict=False):
        bounds = draw.textbbox((left + 2 * line, top + line), label, font=font)
        draw.rectangle((left, top, bounds[2] + 2 * line, bounds[3] + line), fill="black")
        draw.text((left + 2 * line, top + line), label, fill="white", font=font)
    return np.asarray(canvas)
