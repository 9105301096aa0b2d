"""What a method is: a row that says what it reads, and a function that weighs activations or makes maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import numpy as np

from ...arguments import check_integer, check_number, shown
from ...arrays import Doubles, Floats
from ...errors import ArgumentError, suggest
from ...preprocessing import Layout

if TYPE_CHECKING:
    from ...kernels.boundary import Weighting

Reads: TypeAlias = str
"""What a method starts from: "weights", the pooled gradients of a layer, "gradients", its full ones, "activations",
nothing but these, "scores", nothing else; or an output of its own, a name of `metadata.EVIDENCE`."""

_OF_A_LAYER = frozenset(["weights", "gradients", "activations"])

Rows: TypeAlias = Callable[[slice], Floats]
"""Makes rows of a batch only when they are needed: all of them may not fit into memory."""

Settings: TypeAlias = Mapping[str, Any]


class Evidence(Protocol):
    """What methods that run the model again may ask, for one image with K targets.

    Attributes
    ----------
    image : ndarray
        The model's input without its batch, float32.
    layout : {"NHWC", "NCHW"}
    size : (int, int)
        Height and width of the image.
    scores : ndarray
        (K,) float64, of the whole image.
    activations : ndarray
        (C,h,w) float32, of the explained layer.
    weights : ndarray
        (K,C) float32, its pooled gradients.
    position : int
        Number of the explained layer.
    """

    image: Floats
    layout: Layout
    size: tuple[int, int]
    scores: Doubles
    activations: Floats
    weights: Floats
    position: int

    @property
    def background(self) -> Floats:
        r"""Images to compare with, (B,\*image) float32; raises ArgumentError if there are none."""

    def resize(self, maps: Floats, size: tuple[int, int]) -> Floats:
        """Return maps (M,h,w) at another size, bilinear."""

    def score(self, images: Rows, count: int, *, probabilities: bool = False) -> Doubles:
        """Return the scores (M,K) of M changed images, as `score_masked` does."""

    def score_masked(self, masks: Rows, count: int, *, probabilities: bool = False) -> Doubles:
        """Return the scores (M,K) of the image times each of M masks (h,w), which are resized to the image's size.

        With ``probabilities`` the probabilities of the targets, if the file says how to compute them.
        """

    def score_without_channels(self) -> Doubles:
        """Return the scores (C,K) with each channel of the activations set to 0."""

    def has_linear_head(self) -> bool:
        """Return whether the scores are an affine function of the means of the activations over the map."""

    def image_gradients(self, images: Rows, count: int, weights: Doubles) -> Doubles:
        r"""Return the sum of M images' gradients of the scores, (K,\*image), with weights (M,) or (M,\*image)."""

    def output(self, name: str) -> Doubles:
        r"""Return an output for single methods, (K,\*shape), of the image."""

    def layer_gradients(self, images: Rows, count: int) -> tuple[Doubles, Doubles, Doubles]:
        """Return the means over M images of the gradients (K,C,h,w) in the activations, of their squares and cubes."""


@dataclass(frozen=True)
class Setting:
    """A number that a method lets its caller choose.

    Attributes
    ----------
    default : int or float
    low, high : int or float
        Bounds, which are allowed values.
    meaning : str
    """

    default: int | float
    low: int | float
    high: int | float
    meaning: str

    def check(self, name: str, value: Any) -> int | float:
        """Return a value, or raise ArgumentError."""
        bounds = f"from {self.low} to {self.high}: {self.meaning}"
        if isinstance(self.default, int):
            return check_integer(f"settings: {name}", value, int(self.low), int(self.high))
        return check_number(f"settings: {name}", value, lambda x: self.low <= x <= self.high, f"a number {bounds}")


@dataclass(frozen=True)
class Method:
    """A row of `METHODS`.

    Attributes
    ----------
    source : str
        Paper, and equation.
    reads : tuple of str
        What the method starts from, see `Reads`.
    weights : callable or None
        Of activations (N,C,h,w) and gradients (N,K,C,h,w), both float32.
    weighting : {"channel", "element"}
        Whether ``weights`` gives one weight per channel, (N,K,C), or one per activation, (N,K,C,h,w).
    maps : callable or None
        Instead of ``weights``: of activations and what the method reads, the maps before their ReLU, (N,K,h,w).
    reruns : callable or None
        Instead of ``weights``, for methods that run the model again: of the `Evidence` of one image and the settings,
        the maps before their ReLU, (K,h,w).
    settings : mapping of str to Setting
        What a caller may choose.
    fused : {"pooled", "element"} or None
        Weighting with which the kernels compute the map directly from the gradients, on the host and on a device; None
        if the weights come from ``weights``, on the host.
    linear : bool
        Whether the weights are linear in the gradients, so that maps of several scores can be added and subtracted.
    merge : {"mean", "product"}
        How the maps of several layers become one.
    """

    source: str
    reads: tuple[Reads, ...] = ("gradients",)
    weights: Callable[[Floats, Floats], Floats] | None = None
    weighting: Literal["channel", "element"] = "channel"
    maps: Callable[[Floats, Floats], Floats] | None = None
    reruns: Callable[[Evidence, Settings], Doubles] | None = None
    settings: Mapping[str, Setting] = field(default_factory=dict)
    fused: Weighting | None = None
    linear: bool = False
    merge: Literal["mean", "product"] = "mean"

    @property
    def of_image(self) -> bool:
        """Whether the method looks at the image alone, and at no layer."""
        return _OF_A_LAYER.isdisjoint(self.reads)

    def weigh(self, activations: Floats, second: Floats) -> tuple[Floats, Floats, Literal["channel", "element"]]:
        """Return activations, weights and weighting whose weighted sums are the maps before their ReLU.

        Parameters
        ----------
        activations : ndarray
            (N,C,h,w) float32.
        second : ndarray
            What the method reads: pooled gradients (N,K,C), or full ones (N,K,C,h,w).
        """
        if self.maps is not None:
            return as_weighted(self.maps(activations, second))
        if self.weights is None:
            return activations, second, "channel"
        return activations, self.weights(activations, second), self.weighting

    def rerun(self, evidence: Evidence, settings: Settings) -> Doubles:
        """Return the maps (K,h,w) before their ReLU, of a method that runs the model again."""
        if self.reruns is None:
            raise TypeError("this method does not run the model again")
        return self.reruns(evidence, settings)

    def chosen(self, settings: Mapping[str, Any] | None) -> Settings:
        """Return all settings: those of the caller, checked, and defaults.

        Raises
        ------
        ArgumentError
            The method has no such setting, or not with that value.
        """
        given = dict(settings or {})
        for name in given:
            if name not in self.settings:
                known = ", ".join(self.settings) or "none"
                raise ArgumentError(
                    f"settings: {shown(name)}: {suggest(str(name), self.settings)}the method has these: {known}"
                )
        return {name: row.check(name, given.get(name, row.default)) for name, row in self.settings.items()}


def as_weighted(maps: Floats | Doubles) -> tuple[Floats, Floats, Literal["channel", "element"]]:
    """Return maps (N,K,h,w) as activations whose weighted sums they are."""
    single = np.ascontiguousarray(maps, np.float32)
    count = single.shape[1]
    each = np.broadcast_to(np.eye(count, dtype=np.float32), (len(single), count, count))
    return single, np.ascontiguousarray(each), "channel"
