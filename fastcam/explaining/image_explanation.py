"""`ImageExplanation`: scores and heatmaps of one picture, ready to view."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import kernels
from ..arguments import check_fraction, check_path, check_text, checked, optional, shown
from ..arrays import Floats, Indices, Pixels
from ..errors import ArgumentError, MissingExtraError
from ..pictures.captions import add_boxes, add_caption
from ..pictures.letterbox import Frame
from ..pictures.reading import ImageSource, read_image
from ..pictures.writing import palette, write_image
from .notebook import View, fit, to_html, to_png

if TYPE_CHECKING:
    import matplotlib.axes

# Below this share, a map normalised to its maximum presents a negligible remainder as if it were the reason.
WEAK_EVIDENCE = 0.05


@dataclass(frozen=True, eq=False)
class ImageExplanation:
    """Scores of one image, and the heatmaps that explain them.

    Attributes
    ----------
    heatmaps : ndarray
        (K,H,W) float32, one per target.
    maps : ndarray
        (K,h,w) float32, the same at the size of the explained layer.
    targets : ndarray
        (K,) int64, the explained classes.
    labels : list of str
        Their names; the index as text if the model has no names.
    logits : ndarray
        (classes,) float32.
    probabilities : ndarray or None
        (classes,) float32; None if the file does not say how the logits become probabilities.
    image : ndarray or None
        The picture, uint8 (H0,W0,3) RGB at its own size; None if the model's input was passed directly.
    evidence : ndarray
        (K,) float32 in 0..1: the share of the explained layer's evidence that supports each target. Before its
        ReLU, the map holds positive and negative evidence; this is the sum of the positive values divided by the sum
        of all magnitudes. Normalised heatmaps look alike at 0.9 and at 0.01. 0 means a blank map.
    boxes : ndarray or None
        For a detector, (K,4) float32: left, top, right and bottom in pixels of the picture, or of the model's input if
        that was passed directly. K is the number of boxes above the threshold, and may be 0.
    box_scores : ndarray or None
        (K,) float32, their probabilities.
    frame : Frame or None
        Where the picture lies in the model's input, and so in ``heatmaps`` and ``maps``; None where it fills it.
    signed : bool
        Whether the maps keep the evidence against a target, below 0.
    similarity : ndarray or None
        For an embedding, (K,) float32: the cosine to each reference.
    """

    heatmaps: Floats
    maps: Floats
    targets: Indices
    labels: list[str]
    logits: Floats
    probabilities: Floats | None
    image: Pixels | None
    evidence: Floats
    boxes: Floats | None = None
    box_scores: Floats | None = None
    frame: Frame | None = None
    signed: bool = False
    similarity: Floats | None = None

    @cached_property
    def picture_maps(self) -> Floats:
        """(K,h',w') float32, the part of ``maps`` that covers the picture: all of it, but for a letterbox."""
        frame = self.frame
        if frame is None or (frame.height, frame.width) == frame.size or not len(self.maps):
            return self.maps
        # At the size of the input, the picture's edges are whole pixels.
        return np.ascontiguousarray(frame.cut(kernels.resize(self.maps[None], frame.size)[0]))

    @property
    def blank(self) -> list[bool]:
        """For each target, whether its map is empty because nothing at the explained layer speaks for it."""
        return [not share for share in self.evidence.tolist()]

    def placed(self, frame: Frame) -> ImageExplanation:
        """Return the same for a picture that was prepared by the caller, and lies there in the model's input."""
        boxes = None if self.boxes is None else frame.on_picture(self.boxes)
        return replace(self, boxes=boxes, frame=frame)

    @checked(colormap=optional(check_text), alpha=check_fraction)
    def overlay(
        self, k: int = 0, *, colormap: str | None = None, alpha: float = 0.5, image: ImageSource | None = None
    ) -> Pixels:
        """Blend one heatmap over the picture.

        Parameters
        ----------
        k : int
            Index of the target among the image's targets.
        colormap : str, optional
            Name of a colour map of the cmap library, for example "viridis" or "inferno". By default "jet", or for
            signed maps "bwr": blue for evidence against the target, white for none, red for evidence for it.
        alpha : float
            Opacity of the heatmap, 0..1.
        image : optional
            Another picture to draw on; required if the model's input was passed directly.

        Returns
        -------
        ndarray
            uint8 (H0,W0,3) RGB at the picture's own size. A detector's box is outlined. If little evidence is
            positive, a caption says so;
            without any, the picture is not coloured.

        Raises
        ------
        ArgumentError
            ``k`` is out of range, the colour map unknown, or there is no picture.
        """
        if is_whole(k) and not len(self.maps):
            raise ArgumentError(f"k={k}: there is no heatmap, because no box was found in this image")
        if not is_whole(k) or not -len(self.maps) <= k < len(self.maps):
            raise ArgumentError(f"k={shown(k)}: this image has {len(self.maps)} heatmaps, 0..{len(self.maps) - 1}")
        picture = self.image if image is None else read_image(image)
        if picture is None:
            raise ArgumentError("the model's input was given directly, so there is no picture: pass overlay(image=...)")
        single = self.picture_maps[k]
        drawn = kernels.colorize(
            np.ascontiguousarray(_within_unit(single, signed=self.signed)[None, None]),
            picture[None],
            palette=palette(colormap or ("bwr" if self.signed else "jet")),
            alpha=alpha,
        )
        # The evidence against a target is shown as well.
        shown_picture = drawn[0, 0] if self.signed else captioned(drawn[0, 0], picture, float(self.evidence[k]))
        return shown_picture if self.boxes is None else add_boxes(shown_picture, self.boxes[k : k + 1 or None])

    @checked(path=check_path)
    def save(
        self, path: str | os.PathLike[str], k: int = 0, *, colormap: str | None = None, alpha: float = 0.5
    ) -> None:
        """Write one overlay as .png, .jpg or .webp.

        Raises
        ------
        ArgumentError
            As `overlay`, or an unknown suffix.
        WriteError
            The file cannot be written; nothing is left behind.
        """
        write_image(self.overlay(k, colormap=colormap, alpha=alpha), path)

    def plot(
        self, *, colormap: str | None = None, alpha: float = 0.5, axes: Sequence[matplotlib.axes.Axes] | None = None
    ) -> list[matplotlib.axes.Axes]:
        """Draw the picture and its overlays side by side, titled by class and probability (or logit).

        Parameters
        ----------
        colormap, alpha
            As in `overlay`.
        axes : sequence of matplotlib Axes, optional
            Where to draw: one for the picture, and one per target. By default those of a new figure.

        Returns
        -------
        list of matplotlib Axes
            Their figure is ``axes[0].figure``.

        Raises
        ------
        ArgumentError
            There is no picture: the model's input was given directly. Or the number of ``axes`` is wrong.
        MissingExtraError
            matplotlib is not installed.
        """
        if self.image is None:
            raise ArgumentError("the model's input was given directly, so there is no picture to plot")
        overlays = [self.overlay(k, colormap=colormap, alpha=alpha) for k in range(len(self.maps))]
        titles = [
            "\n".join(filter(None, [f"{label}  {self._score(k)}", caption(float(self.evidence[k]))]))
            for k, label in enumerate(self.labels)
        ]
        panels = [("image", self.image), *zip(titles, overlays, strict=True)]
        drawn = new_axes(1, len(panels), (3.2 * len(panels), 3.6)) if axes is None else list(axes)
        if len(drawn) != len(panels):
            raise ArgumentError(f"axes={shown(axes)}: give {len(panels)}, one for the picture and one per target")
        for panel, (title, picture) in zip(drawn, panels, strict=True):
            panel.imshow(picture)
            panel.set_title(title, fontsize=10)
            panel.set_axis_off()
        return drawn

    def _repr_html_(self) -> str:
        """Show the picture and its heatmaps in a notebook."""
        return to_html([self.view()])

    def _repr_png_(self) -> bytes:
        """Show the overlay of the first target where a notebook's viewer takes no HTML."""
        return to_png(self._small().overlay() if len(self.maps) else self._small_picture())

    def view(self) -> View:
        """Return what a notebook shows of it."""
        small = self._small()
        count = range(len(self.maps))
        heats = [small.overlay(k, alpha=1.0) for k in count]
        return View(self._small_picture(), heats, [self.describe(k) for k in count])

    def _small(self) -> ImageExplanation:
        """Return the same with the picture at the size of a notebook."""
        picture = self._small_picture()
        boxes = self.boxes
        if boxes is not None and self.image is not None:
            boxes = boxes * np.float32(picture.shape[1] / self.image.shape[1])
        return replace(self, image=picture, boxes=boxes)

    def _small_picture(self) -> Pixels:
        """Return the picture at the size of a notebook; black where the model's input was given directly."""
        return np.zeros((*self.heatmaps.shape[1:], 3), np.uint8) if self.image is None else fit(self.image)

    def describe(self, k: int = 0) -> str:
        """Return the name and probability of one target, or its logit if there is no probability.

        Examples
        --------
        >>> explanation[0].describe()  # doctest: +SKIP
        'beagle 93.1%'
        """
        return f"{self.labels[k]} {self._score(k)}"

    def _score(self, k: int) -> str:
        target = self.targets[k]
        if self.box_scores is not None:
            return f"{self.box_scores[k]:.1%}"
        if self.similarity is not None:
            return f"{self.similarity[k]:.3f}"
        return f"{self.logits[target]:.3g}" if self.probabilities is None else f"{self.probabilities[target]:.1%}"


def new_axes(rows: int, columns: int, size: tuple[float, float]) -> list[matplotlib.axes.Axes]:
    """Return the axes of a new figure, row by row; ``size`` is its width and height in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(f'plot() needs matplotlib ({error}): pip install "fastcam[demo]"') from error
    figure = Figure(figsize=size, layout="constrained")
    return list(np.ravel(figure.subplots(rows, columns, squeeze=False)))


def caption(evidence: float) -> str | None:
    """Return a caption about an unusually small share of positive evidence; None otherwise."""
    if evidence == 0:
        return "no positive evidence at this layer"
    return (
        f"only {100 * evidence:.2g} % of the evidence at this layer is positive" if evidence < WEAK_EVIDENCE else None
    )


def captioned(overlay: Pixels, picture: Pixels, evidence: float) -> Pixels:
    """Return an overlay with its caption, if it needs one; the bare picture instead of a uniform tint."""
    text = caption(evidence)
    if text is None:
        return overlay
    return add_caption(picture if evidence == 0 else overlay, text)


def is_whole(number: Any) -> bool:
    """Return whether it is a Python or NumPy int."""
    return isinstance(number, int | np.integer) and not isinstance(number, bool)


def _within_unit(heatmap: Floats, *, signed: bool) -> Floats:
    """Scale a map to the 0..1 that colours need, 0.5 being the zero of a signed one; a normalised one is unchanged."""
    if signed:
        return np.asarray(0.5 + 0.5 * heatmap / max(np.abs(heatmap).max(), 1e-30), np.float32)
    top = heatmap.max()
    return heatmap / top if top > 0 else heatmap
