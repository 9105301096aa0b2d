"""`Explanation`: scores and heatmaps of pictures, series or volumes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays import Floats, Indices, Pixels
from ..errors import MissingExtraError
from ..pictures.letterbox import Frame
from .boxes import Boxes
from .devices.exchange import DeviceTensor
from .image_explanation import ImageExplanation
from .notebook import MOST_SHOWN, to_html
from .probabilities import probabilities_of
from .signal_explanation import SignalExplanation

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Explanation(Sequence[ImageExplanation]):
    """Scores and heatmaps of N images; a sequence of `ImageExplanation`.

    Attributes
    ----------
    heatmaps : ndarray
        (N,K,H,W) float32. In 0..1 with normalize "max" or "minmax", in -1..1 with "signed"; a map without positive
        evidence is all zeros.
    maps : ndarray
        (N,K,h,w) float32, the same at the size of the explained layer.
    targets : ndarray
        (N,K) int64.
    logits : ndarray
        (N,classes) float32, before softmax or sigmoid.
    images : list
        The pictures, uint8 (H0,W0,3); None where the model's input was passed directly.
    classes : tuple of str or None
        Class names by index.
    score_activation : {"softmax", "sigmoid", "probabilities", "none"}
        What turns the logits into probabilities; "probabilities" where they are probabilities already, "none" where
        the file does not say.
    evidence : ndarray
        (N,K) float32 in 0..1, the share of positive evidence of each map: see `ImageExplanation`.
    boxes : Boxes or None
        For a detector: ``corners`` (N,K,4) float32 in pixels of the model's input, ``scores`` (N,K) float32 and
        ``classes`` (N,K) int64. Where fewer boxes than K are above the threshold, ``targets`` is -1 and the maps are
        zeros; the `ImageExplanation` leaves them out.
    frames : list
        Where each picture lies in the model's input; None where it fills it.
    signed : bool
        Whether the maps keep the evidence against a target, below 0.
    similarity : ndarray or None
        For an embedding, (N,K) float32: the cosine to each reference.
    signals : ndarray or None
        For series and volumes: the model's input, (N,C,T) or (N,C,D,H,W) float32. The maps then have as many axes.
    sources : list
        The nibabel image of each volume that was given as one; else None.
    """

    heatmaps: Floats
    maps: Floats
    targets: Indices
    logits: Floats
    images: list[Pixels | None]
    classes: tuple[str, ...] | None
    score_activation: str
    evidence: Floats
    boxes: Boxes | None = None
    frames: list[Frame | None] = field(default_factory=list)
    signed: bool = False
    similarity: Floats | None = None
    signals: Floats | None = None
    sources: list[Any] = field(default_factory=list)

    @cached_property
    def probabilities(self) -> Floats | None:
        """(N,classes) float32, as in the source model; None if the file does not say how to compute them."""
        return probabilities_of(self.logits, self.score_activation)

    @cached_property
    def labels(self) -> list[list[str]]:
        """Class names of `targets`, one list per image; the index as text if the model has no names."""
        if self.similarity is not None:
            return [[f"reference {index + 1}" for index in row] for row in self.targets.tolist()]
        name = str if self.classes is None else self.classes.__getitem__
        classes = self.targets if self.boxes is None else self.boxes.classes
        return [[name(index) for index in row] for row in classes.tolist()]

    def __len__(self) -> int:
        return len(self.heatmaps)

    def __getitem__(self, index: Any) -> Any:
        """Return one image's part; a slice returns a list of them."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        found = slice(None) if self.boxes is None else self.targets[position] >= 0
        image, frame = self.images[position], self.frames[position] if self.frames else None
        boxes, scores = None, None
        if self.boxes is not None:
            corners = self.boxes.corners[position][found]
            boxes = corners if image is None or frame is None else frame.on_picture(corners)
            scores = self.boxes.scores[position][found]
        kind: type[ImageExplanation] = ImageExplanation
        signal: dict[str, Any] = {}
        if self.signals is not None:
            kind = SignalExplanation
            signal = {"signal": self.signals[position], "source": self.sources[position]}
        return kind(
            heatmaps=self.heatmaps[position][found],
            maps=self.maps[position][found],
            targets=self.targets[position][found],
            labels=np.array(self.labels[position], object)[found].tolist(),
            logits=self.logits[position],
            probabilities=None if self.probabilities is None else self.probabilities[position],
            image=image,
            evidence=self.evidence[position][found],
            boxes=boxes,
            box_scores=scores,
            frame=frame,
            signed=self.signed,
            similarity=None if self.similarity is None else self.similarity[position],
            **signal,
        )

    def __iter__(self) -> Iterator[ImageExplanation]:
        return (self[i] for i in range(len(self)))

    def to_dataframe(self) -> pd.DataFrame:
        """Return a table with one row per image and target.

        Returns
        -------
        pandas.DataFrame
            Columns ``image`` (its number), ``target``, ``label``, ``logit``, ``probability`` (missing where the
            file does not say how to compute it) and ``evidence``, see `ImageExplanation`; for a detector also
            ``left``, ``top``, ``right`` and ``bottom``, with one row per box found.

        Raises
        ------
        MissingExtraError
            pandas is not installed.
        """
        pd = import_pandas()
        images, count = self.targets.shape
        columns = {
            "image": np.repeat(np.arange(images), count),
            "target": self.targets.ravel(),
            "label": [label for row in self.labels for label in row],
            "logit": np.take_along_axis(self.logits, self.targets, axis=1).ravel(),
            "evidence": self.evidence.ravel(),
        }
        table = pd.DataFrame(columns)
        probabilities = np.full(images * count, np.nan, np.float32)
        if self.probabilities is not None:
            probabilities = np.take_along_axis(self.probabilities, self.targets, axis=1).ravel()
        table.insert(4, "probability", probabilities)
        if self.boxes is None:
            return table
        table = table[table["target"] >= 0].reset_index(drop=True)
        sides = [image.boxes for image in self]
        table[["left", "top", "right", "bottom"]] = np.concatenate([side for side in sides if side is not None])
        return table

    def _repr_html_(self) -> str:
        """Show the first images in a notebook."""
        if self.signals is not None:
            return "".join(one._repr_html_() for one in self[:MOST_SHOWN])
        return to_html([image.view() for image in self[:MOST_SHOWN]], more=max(0, len(self) - MOST_SHOWN))


@dataclass(frozen=True, eq=False)
class DeviceExplanation:
    """Scores and heatmaps of N images in device memory, the result of ``Explainer(...)(..., on_device=True)``.

    The arrays are complete and own their memory. Other libraries use them without a copy: ``torch.from_dlpack``.

    Attributes
    ----------
    heatmaps : DeviceTensor
        (N,K,H,W) float32.
    maps : DeviceTensor
        (N,K,h,w) float32, the same at the size of the explained layer.
    targets : DeviceTensor
        (N,K) int64.
    logits : DeviceTensor
        (N,classes) float32, before softmax or sigmoid.
    evidence : DeviceTensor
        (N,K) float32 in 0..1, the share of positive evidence of each map: see `ImageExplanation`.
    classes : tuple of str or None
        Class names by index.
    score_activation : {"softmax", "sigmoid", "probabilities", "none"}
        What turns the logits into probabilities; "probabilities" where they are probabilities already, "none" where
        the file does not say.
    """

    heatmaps: DeviceTensor
    maps: DeviceTensor
    targets: DeviceTensor
    logits: DeviceTensor
    evidence: DeviceTensor
    classes: tuple[str, ...] | None
    score_activation: str

    def __len__(self) -> int:
        return len(self.heatmaps)

    def to_host(self) -> Explanation:
        """Copy everything to the host."""
        return Explanation(
            heatmaps=self.heatmaps.numpy(),
            maps=self.maps.numpy(),
            targets=self.targets.numpy(),
            logits=self.logits.numpy(),
            images=[None] * len(self),
            classes=self.classes,
            score_activation=self.score_activation,
            evidence=self.evidence.numpy(),
        )


def import_pandas() -> Any:
    """Return pandas; raises MissingExtraError if it is not installed."""
    try:
        import pandas as pd
    except ImportError as error:
        raise MissingExtraError(f"to_dataframe() needs pandas ({error}): pip install pandas") from error
    return pd
