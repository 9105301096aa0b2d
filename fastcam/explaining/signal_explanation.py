"""`SignalExplanation`: scores and heatmaps of a series or volume, ready to view."""

from __future__ import annotations

import base64
import gzip
import importlib
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arguments import check_path, checked, shown
from ..arrays import Floats
from ..errors import ArgumentError
from ..files import check_writable, replacing
from .image_explanation import ImageExplanation, is_whole, new_axes
from .signals import NIFTI

if TYPE_CHECKING:
    import matplotlib.axes

_FIGURES = (".png", ".svg", ".pdf")


@dataclass(frozen=True, eq=False)
class SignalExplanation(ImageExplanation):
    """Scores of one series or volume, and the heatmaps that explain them.

    Attributes
    ----------
    heatmaps : ndarray
        (K,T) or (K,D,H,W) float32, one per target.
    maps : ndarray
        (K,t) or (K,d,h,w) float32, the same at the size of the explained layer.
    signal : ndarray
        The model's input, (C,T) or (C,D,H,W) float32.
    source : nibabel image or None
        What it was read from.
    """

    signal: Floats = field(kw_only=True)
    source: Any = None

    @checked(path=check_path)
    def save(
        self, path: str | os.PathLike[str], k: int = 0, *, colormap: str | None = None, alpha: float = 0.5
    ) -> None:
        """Write one heatmap as numbers, .npy, .nii or .nii.gz, or as a figure, .png, .svg or .pdf.

        A NIfTI file has the shape, affine and space of the image that was explained, so that viewers lay one over
        the other.

        Raises
        ------
        ArgumentError
            Another suffix; ``k`` is out of range; or NIfTI without an image whose affine it could have.
        WriteError
            The file cannot be written; nothing is left behind.
        """
        path = Path(path)
        name = path.name.lower()
        self._check_target(k)
        if name.endswith(NIFTI):
            content = self._nifti(k, compressed=name.endswith(".gz"))
        elif name.endswith(".npy"):
            content = _encoded(lambda file: np.save(file, self.heatmaps[k]))
        elif name.endswith(_FIGURES):
            content = self._figure(path.suffix[1:].lower(), colormap=colormap, alpha=alpha, k=k)
        else:
            allowed = ", ".join((*NIFTI, ".npy", *_FIGURES))
            raise ArgumentError(f"cannot write '{path}': unknown suffix {path.suffix!r}. Allowed: {allowed}")
        check_writable(path)
        with replacing(path) as file:
            file.write(content)

    def _figure(self, form: str, **look: Any) -> bytes:
        figure: Any = self.plot(**look)[0].figure
        return _encoded(lambda file: figure.savefig(file, format=form))

    def _nifti(self, k: int, *, compressed: bool) -> bytes:
        if self.source is None or self.heatmaps[k].shape != self.source.shape[:3]:
            raise ArgumentError(
                "a NIfTI file needs the affine of the volume: explain a nibabel image or .nii file at size='input', or "
                "save .npy"
            )
        nibabel: Any = importlib.import_module("nibabel")
        image = nibabel.Nifti1Image(self.heatmaps[k], self.source.affine, self.source.header)
        image.set_data_dtype(np.float32)
        image.header.set_slope_inter(1, 0)
        content: bytes = image.to_bytes()
        return gzip.compress(content, mtime=0) if compressed else content

    def plot(
        self,
        *,
        colormap: str | None = None,
        alpha: float = 0.5,
        axes: Sequence[matplotlib.axes.Axes] | None = None,
        k: int | None = None,
        spacing: Sequence[float] | None = None,
    ) -> list[matplotlib.axes.Axes]:
        """Draw a series over its evidence, or three slices of a volume through the voxel with the most evidence.

        Parameters
        ----------
        colormap, alpha
            As in `ImageExplanation.overlay`.
        axes : sequence of matplotlib Axes, optional
            Where to draw: one per target, or three for a volume. By default those of a new figure.
        k : int, optional
            The only target to draw; by default all.
        spacing : three floats, optional
            Size of a voxel along the three axes, in any unit. By default that of the NIfTI image, or 1.

        Returns
        -------
        list of matplotlib Axes

        Raises
        ------
        ArgumentError
            The number of ``axes``, ``k`` or ``spacing`` is wrong.
        MissingExtraError
            matplotlib is not installed.
        """
        targets = range(len(self.maps)) if k is None else [self._check_target(k)]
        is_volume = self.heatmaps.ndim == 4
        per_target = 3 if is_volume else 1
        size = (8.0, (3.0 if is_volume else 2.2) * len(targets))
        drawn = new_axes(len(targets), per_target, size) if axes is None else list(axes)
        if len(drawn) != per_target * len(targets):
            raise ArgumentError(f"axes={shown(axes)}: give {per_target * len(targets)}, {per_target} per target")
        colors = colormap or ("bwr" if self.signed else "jet")
        for row, target in enumerate(targets):
            panels = drawn[row * per_target : (row + 1) * per_target]
            if is_volume:
                self._draw_slices(panels, target, self._spacing(spacing), colors, alpha)
            else:
                self._draw_series(panels[0], target, colors, alpha)
            panels[0].set_title(self.describe(target), fontsize=10)
        return drawn

    def _draw_series(self, panel: matplotlib.axes.Axes, k: int, colors: str, alpha: float) -> None:
        length = self.signal.shape[1]
        low, high = float(self.signal.min()), float(self.signal.max())
        margin = 0.05 * (high - low) or 1.0
        area = (-0.5, length - 0.5, low - margin, high + margin)
        panel.imshow(self.heatmaps[k][None], aspect="auto", extent=area, cmap=colors, alpha=alpha, **self._limits(k))
        for channel in self.signal:
            panel.plot(np.arange(length), channel, color="black", linewidth=0.8)

    def _draw_slices(
        self, panels: Sequence[matplotlib.axes.Axes], k: int, spacing: Sequence[float], colors: str, alpha: float
    ) -> None:
        heatmap = self.heatmaps[k]
        peak = np.unravel_index(int(np.abs(heatmap).argmax()), heatmap.shape)
        # The same place in the volume, where the heatmap has another size.
        scale = np.array(self.signal.shape[1:]) / heatmap.shape
        within = ((np.array(peak) + 0.5) * scale).astype(int)
        for axis, panel in enumerate(panels):
            rows, columns = [other for other in range(3) if other != axis]
            height, width = self.signal.shape[1 + rows], self.signal.shape[1 + columns]
            area = (-0.5, width - 0.5, height - 0.5, -0.5)
            look: dict[str, Any] = {"extent": area, "aspect": spacing[rows] / spacing[columns]}
            panel.imshow(self.signal[0].take(within[axis], axis=axis), cmap="gray", **look)
            panel.imshow(heatmap.take(peak[axis], axis=axis), cmap=colors, alpha=alpha, **look, **self._limits(k))
            panel.set_xlabel(f"axis {columns}")
            panel.set_ylabel(f"axis {rows}")

    def _limits(self, k: int) -> dict[str, Any]:
        top = float(np.abs(self.heatmaps[k]).max()) or 1.0
        return {"vmin": -top if self.signed else 0.0, "vmax": top}

    def _spacing(self, given: Sequence[float] | None) -> Sequence[float]:
        if given is None and self.source is not None:
            return [float(side) for side in self.source.header.get_zooms()[:3]]
        if given is None:
            return (1.0, 1.0, 1.0)
        try:
            spacing = [float(side) for side in given]
        except (TypeError, ValueError):
            spacing = []
        if len(spacing) != 3 or not all(0 < side < math.inf for side in spacing):
            raise ArgumentError(f"spacing={shown(given)}: give three numbers above 0")
        return spacing

    def _check_target(self, k: Any) -> int:
        if not is_whole(k) or not -len(self.maps) <= k < len(self.maps):
            raise ArgumentError(f"k={shown(k)}: there are {len(self.maps)} heatmaps, 0..{len(self.maps) - 1}")
        return int(k) % len(self.maps)

    def overlay(self, k: int = 0, **_: Any) -> Any:
        """Raise ArgumentError: there is no picture.

        Raises
        ------
        ArgumentError
            Always.
        """
        raise ArgumentError("this is no picture: use plot(), or heatmaps")

    def _repr_png_(self) -> bytes:
        """Show the plot in a notebook."""
        return self._figure("png")

    def _repr_html_(self) -> str:
        """Show the plot in a notebook."""
        return f'<img alt="heatmaps" src="data:image/png;base64,{base64.b64encode(self._repr_png_()).decode()}">'


def _encoded(write: Any) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()
