"""How explanations show themselves in notebooks: the picture, a heatmap per class, and a slider for the opacity."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..arrays import Pixels
from ..pictures.preparing import shrink_image
from ..pictures.writing import encode_image

# Larger ones would make a notebook's file grow by megabytes, and do not fit beside each other.
_LARGEST_SIDE = 480

# Images that `Explanation` shows.
MOST_SHOWN = 12


class View(NamedTuple):
    """What is shown of one image.

    Attributes
    ----------
    picture : ndarray
        uint8 (H,W,3).
    heats : list of ndarray
        The heatmap of each target in colour, uint8, of the picture's size.
    titles : list of str
        Name and score of each target.
    """

    picture: Pixels
    heats: list[Pixels]
    titles: list[str]


def to_html(views: Sequence[View], more: int = 0) -> str:
    """Return HTML that shows images, with everything it needs inside.

    Parameters
    ----------
    views : sequence of View
    more : int
        How many are left out.
    """
    from jinja2 import Environment, PackageLoader

    loader = PackageLoader("fastcam.explaining")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("notebook.html").render(images=[_described(view) for view in views], more=more)


def fit(picture: Pixels) -> Pixels:
    """Shrink a picture to the size of a notebook."""
    return shrink_image(picture, max(picture.shape[:2]) // _LARGEST_SIDE)


def to_png(picture: Pixels) -> bytes:
    """Return a picture as PNG."""
    return bytes(encode_image(picture, Path("overlay.png")))


def _described(view: View) -> dict[str, Any]:
    return {
        # Another copy of the same output on the page must not share its radio buttons.
        "id": uuid.uuid4().hex[:12],
        "width": view.picture.shape[1],
        "picture": _encoded(view.picture),
        "alt": ", ".join(view.titles),
        "classes": [
            {"title": title, "heat": _encoded(heat)} for title, heat in zip(view.titles, view.heats, strict=True)
        ],
    }


def _encoded(picture: Pixels) -> str:
    encoded = base64.b64encode(encode_image(picture, Path("picture.jpg"))).decode("ascii")
    return f"data:image/jpeg;base64,{encoded}"
