"""`POST /explain`: a picture in, an overlay, JSON or an array out."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..arguments import check_integer, shown
from ..errors import ArgumentError, ImageError
from ..explaining.explainer import Explainer
from ..explaining.image_explanation import ImageExplanation, caption
from ..explaining.methods import METHODS
from ..pictures.reading import picture_size, read_image
from ..pictures.writing import encode_image, palette

JPEG = "image/jpeg"
_MOST_CLASSES = 100


class TooLargeError(ImageError):
    """The picture has more pixels than the server allows."""


class PictureRequest(NamedTuple):
    """What a client asks about a picture; requests with equal ones can share a batch."""

    model: str | None
    target: str | None
    top_k: int | None
    method: str | None
    settings: tuple[tuple[str, int | float], ...]
    colormap: str
    media: str
    map: bool


def read_request(query: Mapping[str, str], accept: str, setting_names: Sequence[str]) -> PictureRequest:
    """Read the query of a request.

    Raises
    ------
    ArgumentError
        A parameter is unknown or wrong, or no media type is offered that the client accepts.
    """
    known = {"model", "target", "top_k", "method", "colormap", "map", *setting_names}
    for name in query:
        if name not in known:
            raise ArgumentError(f"parameter {shown(name)} is not known: choose from {', '.join(sorted(known))}")
    if "target" in query and "top_k" in query:
        raise ArgumentError("target and top_k both choose the classes: give one of them")
    method = query.get("method")
    if method is not None and method not in METHODS:
        raise ArgumentError(f"method={shown(method)}: choose one of {', '.join(METHODS)}")
    top_k = None if "top_k" not in query else check_integer("top_k", _number(query["top_k"]), 1, _MOST_CLASSES)
    palette(query.get("colormap", "jet"))
    if query.get("map", "false") not in ("true", "false"):
        raise ArgumentError(f"map={shown(query['map'])}: give true or false")
    chosen = tuple((name, _number(query[name])) for name in setting_names if name in query)
    return PictureRequest(
        query.get("model"),
        query.get("target"),
        top_k,
        method,
        chosen,
        query.get("colormap", "jet"),
        choose_media(accept),
        query.get("map") == "true",
    )


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise ArgumentError(f"{shown(text)} is not a number") from None


def choose_media(accept: str) -> str:
    """Return the media type of the answer: of those that the client accepts the one that it likes most, else JPEG.

    Raises
    ------
    ArgumentError
        It accepts none that is offered.
    """
    wishes = []
    for position, part in enumerate(accept.split(",")):
        name, *parameters = (piece.strip().lower() for piece in part.split(";"))
        quality = next((piece[2:] for piece in parameters if piece.startswith("q=")), "1")
        try:
            wishes.append((-float(quality), position, name))
        except ValueError:
            continue
    for wish, _, name in sorted(wishes):
        if wish < 0:
            found = next((media for media in ANSWERS if _matches(media, name)), None)
            if found is not None:
                return found
    raise ArgumentError(f"Accept: {shown(accept)}: the answers are {', '.join(ANSWERS)}")


def _matches(media: str, pattern: str) -> bool:
    kind, _, subtype = pattern.partition("/")
    return pattern in ("", "*/*", media) or (subtype == "*" and media.startswith(f"{kind}/"))


def decode(body: bytes, most_pixels: int) -> Any:
    """Return a picture as uint8 (H,W,3).

    Raises
    ------
    TooLargeError
        It has more pixels than allowed; it was not decoded.
    ImageError
        It is not a picture.
    """
    height, width = picture_size(body)
    if height * width > most_pixels:
        raise TooLargeError(f"the picture has {width} x {height} pixels, and {most_pixels} are allowed")
    return read_image(body)


def explain(explainer: Explainer, request: PictureRequest, pictures: Sequence[Any], timeout: float) -> list[Any]:
    """Return an `ImageExplanation` for each picture."""
    target: Any = request.target if request.top_k is None else f"top{min(request.top_k, explainer.class_count)}"
    found = explainer(list(pictures), target, method=request.method, settings=dict(request.settings), timeout=timeout)
    return list(found)


def _json(image: ImageExplanation, request: PictureRequest) -> dict[str, Any]:
    """Return scores as JSON, with the maps of the layer as bytes in row-major order if they are asked for."""
    classes = []
    for k, label in enumerate(image.labels):
        target = int(image.targets[k])
        row: dict[str, Any] = {
            "index": target,
            "label": label,
            "score": float(image.logits[target]),
            "probability": None if image.probabilities is None else float(image.probabilities[target]),
            "evidence": float(image.evidence[k]),
            "caption": caption(float(image.evidence[k])),
        }
        if image.boxes is not None:
            row["box"] = [float(side) for side in image.boxes[k]]
        if request.map:
            scaled = np.rint(np.clip(image.maps[k], 0, 1) * 255).astype(np.uint8)
            row["map"] = {"size": list(scaled.shape), "data": b64encode(scaled.tobytes()).decode()}
        classes.append(row)
    size = None if image.image is None else list(image.image.shape[:2])
    return {"image_size": size, "classes": classes}


def _array(image: ImageExplanation, request: PictureRequest) -> bytes:
    """Return the heatmaps (K,H,W) float32 of the model's input size as a .npy file."""
    file = io.BytesIO()
    np.save(file, image.heatmaps, allow_pickle=False)
    return file.getvalue()


def _overlay(suffix: str) -> Callable[[ImageExplanation, PictureRequest], bytes]:
    def draw(image: ImageExplanation, request: PictureRequest) -> bytes:
        return bytes(encode_image(image.overlay(0, colormap=request.colormap), Path(f"overlay{suffix}")))

    return draw


# By media type; the first one where the client does not care.
ANSWERS: dict[str, Callable[[ImageExplanation, PictureRequest], Any]] = {
    JPEG: _overlay(".jpg"),
    "application/json": _json,
    "image/webp": _overlay(".webp"),
    "image/png": _overlay(".png"),
    "application/x-npy": _array,
}
