"""Fitting a picture into the model's input without changing its proportions, and back."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..arrays import Floats, Pixels
from .preparing import resize_image

# The grey that surrounds pictures when detectors of the YOLO family are trained.
_GREY = 114


class Frame(NamedTuple):
    """Where a picture lies in the model's input.

    Attributes
    ----------
    top, left, height, width : int
        In pixels of the input.
    size : (int, int)
        Height and width of the input.
    picture : (int, int)
        Height and width of the picture.
    """

    top: int
    left: int
    height: int
    width: int
    size: tuple[int, int]
    picture: tuple[int, int]

    def cut(self, maps: Floats) -> Floats:
        """Return the part of maps (K,H,W) of the input's size that covers the picture."""
        return maps[:, self.top : self.top + self.height, self.left : self.left + self.width]

    def on_picture(self, boxes: Floats) -> Floats:
        """Return boxes (K,4), left, top, right and bottom in pixels of the input, in pixels of the picture.

        They are clipped to the picture.
        """
        height, width = self.picture
        offset = np.array([self.left, self.top] * 2, np.float32)
        scale = np.array([width / self.width, height / self.height] * 2, np.float32)
        limits = np.array([width, height] * 2, np.float32)
        return np.asarray(np.clip((boxes - offset) * scale, 0, limits), np.float32)


def stretched(picture: tuple[int, int], size: tuple[int, int]) -> Frame:
    """Return the frame of a picture that is stretched to the whole input."""
    return Frame(0, 0, *size, size, picture)


def letterboxed(picture: tuple[int, int], size: tuple[int, int]) -> Frame:
    """Return the frame of a picture that is scaled as a whole and centred.

    Examples
    --------
    >>> letterboxed((480, 640), (320, 320))[:4]
    (40, 0, 240, 320)
    """
    scale = min(size[0] / picture[0], size[1] / picture[1])
    height, width = (max(1, round(side * scale)) for side in picture)
    # Half a pixel goes to the lower and right edges.
    return Frame((size[0] - height) // 2, (size[1] - width) // 2, height, width, size, picture)


def letterbox(image: Pixels, size: tuple[int, int]) -> Pixels:
    """Fit a picture uint8 (H0,W0,3) into (H,W): scaled as a whole, centred, and surrounded by grey."""
    frame = letterboxed(image.shape[:2], size)
    canvas = np.full((*size, 3), _GREY, np.uint8)
    canvas[frame.top : frame.top + frame.height, frame.left : frame.left + frame.width] = resize_image(
        image, (frame.height, frame.width)
    )
    return canvas
