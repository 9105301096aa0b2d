"""`Explainer`: from pictures to scores and heatmaps, with an explained model in ONNX Runtime."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from . import kernels
from .errors import (
    ArgumentError,
    DeviceError,
    FileFormatError,
    ImageError,
    LayerError,
    MissingExtraError,
    ModelError,
    NonFiniteError,
    TargetError,
    suggest,
)
from .files import why_no_file
from .imaging import Layout, Preprocessing, palette, prepare, read_image, write_image
from .kernels.reference import normalized
from .metadata import LARGEST_BATCH, MAXIMUM_RANK, Metadata, layer_outputs
from .methods import METHODS, find_method

if TYPE_CHECKING:
    import matplotlib.figure
    import onnxruntime
    from PIL import Image

Floats: TypeAlias = npt.NDArray[np.float32]
Indices: TypeAlias = npt.NDArray[np.int64]
Pixels: TypeAlias = npt.NDArray[np.uint8]
ImageSource: TypeAlias = "str | os.PathLike[str] | Image.Image | Pixels"
Target: TypeAlias = "int | str | Sequence[int | str] | Sequence[Sequence[int | str]] | Indices | None"

_PROVIDERS = {"auto": ("CPUExecutionProvider",), "cpu": ("CPUExecutionProvider",)}
# Element type and rank of what the file gives: once, and of every layer.
_OUTPUTS = {"logits": ("float", 2), "targets": ("int64", 2)}
_LAYER_OUTPUTS = {"activations": ("float", 4), "weights": ("float", 3)}
_DEFAULT_METHOD = "gradcam"
# Pixels of one heatmap: a gigabyte of float32.
_LARGEST_HEATMAP = 2**28


@dataclass(frozen=True, eq=False)
class ImageExplanation:
    """What the model said about one image, and why.

    Attributes
    ----------
    heatmaps : ndarray
        (K,H,W) float32, one for each target.
    maps : ndarray
        (K,h,w) float32, the same at the size of the explained layer.
    targets : ndarray
        (K,) int64, the explained classes.
    labels : list of str
        Their names; the index as text where the model has no names.
    logits : ndarray
        (classes,) float32.
    probabilities : ndarray
        (classes,) float32.
    image : ndarray or None
        The picture, uint8 (H0,W0,3) RGB at its own size; None where the model's input was given directly.
    """

    heatmaps: Floats
    maps: Floats
    targets: Indices
    labels: list[str]
    logits: Floats
    probabilities: Floats
    image: Pixels | None

    def overlay(
        self, k: int = 0, *, colormap: str = "jet", alpha: float = 0.5, image: ImageSource | None = None
    ) -> Pixels:
        """Blend one heatmap over the picture.

        Parameters
        ----------
        k : int
            Which of the image's targets.
        colormap : str
            Name of a colour map of the cmap library, for example "jet", "viridis" or "inferno".
        alpha : float
            Opacity of the heatmap, 0..1.
        image : optional
            Another picture to draw on; needed where the model's input was given directly.

        Returns
        -------
        ndarray
            uint8 (H0,W0,3) RGB at the picture's own size.

        Raises
        ------
        ArgumentError
            ``k`` is out of range, the colour map unknown, or there is no picture.
        """
        if not _is_whole(k) or not -len(self.maps) <= k < len(self.maps):
            raise ArgumentError(f"k={k!r}: this image has {len(self.maps)} heatmaps, 0..{len(self.maps) - 1}")
        picture = self.image if image is None else read_image(image)
        if picture is None:
            raise ArgumentError("the model's input was given directly, so there is no picture: pass overlay(image=...)")
        drawn = kernels.colorize(
            np.ascontiguousarray(_within_unit(self.maps[k])[None, None]),
            picture[None],
            palette=palette(colormap),
            alpha=alpha,
        )
        overlay: Pixels = drawn[0, 0]
        return overlay

    def save(self, path: str | os.PathLike[str], k: int = 0, *, colormap: str = "jet", alpha: float = 0.5) -> None:
        """Write one overlay as .png, .jpg or .webp.

        Raises
        ------
        ArgumentError
            As `overlay`, or an unknown suffix.
        WriteError
            The file cannot be written; nothing is left behind.
        """
        write_image(self.overlay(k, colormap=colormap, alpha=alpha), path)

    def plot(self, *, colormap: str = "jet", alpha: float = 0.5) -> matplotlib.figure.Figure:
        """Draw the picture and its overlays side by side, titled by class and probability.

        Raises
        ------
        ArgumentError
            There is no picture: the model's input was given directly.
        MissingExtraError
            matplotlib is not installed.
        """
        if self.image is None:
            raise ArgumentError("the model's input was given directly, so there is no picture to plot")
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MissingExtraError(f'plot() needs matplotlib ({error}): pip install "fastcam[demo]"') from error
        overlays = [self.overlay(k, colormap=colormap, alpha=alpha) for k in range(len(self.maps))]
        panels = [("image", self.image), *zip(self._titles(), overlays, strict=True)]
        figure = Figure(figsize=(3.2 * len(panels), 3.6), layout="constrained")
        for axes, (title, picture) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
            axes.imshow(picture)
            axes.set_title(title, fontsize=10)
            axes.set_axis_off()
        return figure

    def _titles(self) -> list[str]:
        return [
            f"{label}  {self.probabilities[target]:.1%}"
            for label, target in zip(self.labels, self.targets, strict=True)
        ]


def _within_unit(heatmap: Floats) -> Floats:
    """Bring a raw map (normalize=None) into the 0..1 that colours need; normalised ones stay what they are."""
    top = heatmap.max()
    return heatmap / top if top > 0 else heatmap


@dataclass(frozen=True, eq=False)
class Explanation(Sequence[ImageExplanation]):
    """Scores and heatmaps of N images; a sequence of `ImageExplanation`.

    Attributes
    ----------
    heatmaps : ndarray
        (N,K,H,W) float32. With normalize "max" or "minmax" in 0..1; a map without positive evidence is all zeros.
    maps : ndarray
        (N,K,h,w) float32, the same at the size of the explained layer.
    targets : ndarray
        (N,K) int64.
    logits : ndarray
        (N,classes) float32, before softmax or sigmoid.
    images : list
        The pictures, uint8 (H0,W0,3), None where the model's input was given directly.
    classes : tuple of str or None
        Class names by index.
    score_activation : {"softmax", "sigmoid", "none"}
        What the source model made of its logits.
    """

    heatmaps: Floats
    maps: Floats
    targets: Indices
    logits: Floats
    images: list[Pixels | None]
    classes: tuple[str, ...] | None
    score_activation: str

    @cached_property
    def probabilities(self) -> Floats:
        """(N,classes) float32: the softmax or sigmoid of the source model; softmax where it ended in logits."""
        return _PROBABILITIES[self.score_activation](self.logits)

    @cached_property
    def labels(self) -> list[list[str]]:
        """Class names of `targets`, one list an image; the index as text where the model has no names."""
        name = str if self.classes is None else self.classes.__getitem__
        return [[name(index) for index in row] for row in self.targets.tolist()]

    def __len__(self) -> int:
        return len(self.heatmaps)

    def __getitem__(self, index: Any) -> Any:
        """Return one image's part; a slice gives a list of them."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        return ImageExplanation(
            heatmaps=self.heatmaps[position],
            maps=self.maps[position],
            targets=self.targets[position],
            labels=self.labels[position],
            logits=self.logits[position],
            probabilities=self.probabilities[position],
            image=self.images[position],
        )

    def __iter__(self) -> Iterator[ImageExplanation]:
        return (self[i] for i in range(len(self)))


class Explainer:
    """Runs a model written by `fastcam.export` and draws why it decided.

    One Explainer may be called from many threads at once; each call gives what it would give alone.

    Parameters
    ----------
    path : path
        The .onnx file.
    device : {"auto", "cpu"}
        Where to run; "auto" takes the CPU.
    providers : sequence, optional
        ONNX Runtime execution providers (names, or pairs of name and options) instead of ``device``. The first must
        really be in use.
    threads : int, optional
        Threads of the model and of the kernels; by default all processors.

    Raises
    ------
    FileFormatError
        The file was not made by `fastcam.export`.
    ModelError
        The file is missing, or ONNX Runtime cannot load it.
    DeviceError
        The device or provider is not available.
    MissingExtraError
        ONNX Runtime is not installed.

    Examples
    --------
    >>> explainer = fastcam.Explainer("dogs.onnx")  # doctest: +SKIP
    >>> explanation = explainer("dog.jpg", target="top3")  # doctest: +SKIP
    >>> explanation[0].save("why.png")  # doctest: +SKIP
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        device: str = "auto",
        providers: Sequence[Any] | None = None,
        threads: int | None = None,
    ) -> None:
        self._path = Path(path)
        self._threads = _checked_threads(threads)
        self._session = _open_session(self._path, _checked_providers(device, providers), self._threads)
        self._metadata = Metadata.from_properties(_properties(self._path, self._session), str(self._path))
        inputs, outputs = _signature(self._path, self._session)
        self._signature = tuple({name: value.shape for name, value in part.items()} for part in (inputs, outputs))
        self._layer_outputs = [layer_outputs(position) for position in range(len(self.layers))]
        self._first_layer = self._fetched([0], "weights")
        self._has_gradients = all(layer.gradients in outputs for layer in self._layer_outputs)
        self._check_outputs(outputs)
        if len(inputs) != 1:
            raise FileFormatError(
                f"{self._path}: it has {len(inputs)} inputs beside the target: export the model again"
            )
        self._input_name, image = next(iter(inputs.items()))
        self._input_shape = image.shape
        self._check_input(image)
        self._image_shape = tuple(self._input_shape[1:])
        self._fixed_batch = self._input_shape[0] if isinstance(self._input_shape[0], int) else None
        if self._fixed_batch is not None and not 0 < self._fixed_batch <= LARGEST_BATCH:
            raise FileFormatError(
                f"{self._path}: it takes batches of {self._fixed_batch} images: export the model again"
            )
        self._class_count = int(outputs["logits"].shape[1])
        if self.classes is not None and len(self.classes) != self._class_count:
            raise FileFormatError(
                f"{self._path}: its metadata entry 'fastcam.classes' holds {len(self.classes)} names for "
                f"{self._class_count} classes: export the model again"
            )

    def _check_input(self, image: _Value) -> None:
        sides = self._input_shape[1:]
        whole = len(sides) == 3 and all(isinstance(side, int) and side > 0 for side in sides)
        if image.type != "tensor(float)" or not whole or math.prod(sides) > _LARGEST_HEATMAP:
            raise FileFormatError(
                f"{self._path}: its input {image.name!r} is {image.type} {list(self._input_shape)}, "
                "not a batch of pictures: export the model again"
            )

    def _check_outputs(self, outputs: Mapping[str, _Value]) -> None:
        expected = dict(_OUTPUTS)
        for layer in self._layer_outputs:
            expected |= {getattr(layer, name): type_ for name, type_ in _LAYER_OUTPUTS.items()}
            if self._has_gradients:
                expected[layer.gradients] = ("float", 5)
        for name, (kind, rank) in expected.items():
            found = outputs.get(name)
            known = found is not None and found.type == f"tensor({kind})" and len(found.shape) == rank
            if not known or (name == "logits" and not isinstance(outputs[name].shape[1], int)):
                raise FileFormatError(
                    f"{self._path}: its output {name!r} is missing or changed: export the model again"
                )

    @property
    def path(self) -> Path:
        """The explained model's file."""
        return self._path

    @property
    def providers(self) -> list[str]:
        """Execution providers in use, the first one first."""
        return list(self._session.get_providers())

    @property
    def signature(self) -> tuple[dict[str, tuple[Any, ...]], dict[str, tuple[Any, ...]]]:
        """Shapes of inputs (but the target) and outputs by name; a text or None is an open dimension."""
        inputs, outputs = self._signature
        return dict(inputs), dict(outputs)

    @property
    def framework(self) -> str:
        """Where the model came from: "keras", "torch" or "onnx"."""
        return self._metadata.framework

    @property
    def layer(self) -> str:
        """Name of the explained layer, the first of several."""
        return self._metadata.layers[0]

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of all explained layers."""
        return self._metadata.layers

    @property
    def methods(self) -> tuple[str, ...]:
        """Methods that this file can be explained by: all of them where it gives full gradients."""
        return tuple(METHODS) if self._has_gradients else (_DEFAULT_METHOD,)

    @property
    def candidates(self) -> tuple[str, ...]:
        """Layers that `export` could have explained, from the last to the first."""
        return self._metadata.candidates

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names by index, None where `export` was given none."""
        return self._metadata.classes

    @property
    def class_count(self) -> int:
        """Number of classes."""
        return self._class_count

    @property
    def input_layout(self) -> Layout:
        """Order of the input's axes: "NHWC" or "NCHW"."""
        return self._metadata.input_layout

    @cached_property
    def input_size(self) -> tuple[int, int]:
        """Height and width of the model's input, in pixels."""
        height, width = (self._input_shape[self.input_layout.index(axis)] for axis in "HW")
        return height, width

    @property
    def preprocessing(self) -> Preprocessing | None:
        """How a picture becomes the model's input; None where the file does not say."""
        return self._metadata.preprocessing

    def prepare(self, images: ImageSource | Sequence[ImageSource]) -> Floats:
        """Turn pictures into the model's input.

        The whole picture is resized to the input's size, without cropping, so that heatmaps cover all of it.

        Parameters
        ----------
        images
            A path, PIL image or uint8 array (H,W,3), or a list that mixes them.

        Returns
        -------
        ndarray
            float32 (N,H,W,channels) or (N,channels,H,W), as the model takes it.

        Raises
        ------
        ImageError
            A picture cannot be read, or the file does not say how to preprocess.
        """
        return self._prepared([read_image(source) for source in _as_list(images)])

    def _prepared(self, pictures: Sequence[Pixels]) -> Floats:
        if self.preprocessing is None:
            raise ImageError(
                f"{self._path} does not say how a picture becomes the model's input: "
                "export it again with preprocess=..., or give a preprocessed float32 batch"
            )
        channels = self._input_shape[self.input_layout.index("C")]
        return prepare(pictures, self.preprocessing, self.input_size, self.input_layout, channels)

    def __call__(
        self,
        images: ImageSource | npt.NDArray[np.floating[Any]] | Sequence[ImageSource],
        target: Target = None,
        *,
        method: str = _DEFAULT_METHOD,
        layer: str | Sequence[str] | None = None,
        size: str | tuple[int, int] = "input",
        normalize: str | None = "max",
        batch: int = 16,
    ) -> Explanation:
        """Score images and explain the scores.

        Grad-CAM (Selvaraju et al. 2017, eq. 1 and 2): ReLU(sum over channels of alpha times activations), alpha being
        the mean over the map of the gradient of the target's logit. The other methods weigh differently.

        Parameters
        ----------
        images
            A path, PIL image or uint8 array (H,W,3), a list that mixes them, or a preprocessed float32 batch.
        target
            What to explain: None, the top class; "top3" (any number), the best three; a class index or name; a list of
            those, for every image; one list an image; or an array (N,K) of indices.
        method
            "gradcam"; or, with a file exported with ``gradients="full"``, "gradcam++" (Chattopadhay et al. 2018, eq. 5
            and 19), "xgradcam" (Fu et al. 2020), "hirescam" (Draelos and Carin 2020) or "layercam" (Jiang et al. 2021,
            eq. 5 and 6).
        layer
            Which of the file's layers, `layers`; None, the first. For a list of them the heatmap is the mean of theirs,
            normalised again, and ``maps`` have the size of the largest.
        size
            Size of the heatmaps: "input", the model's input; "layer", the explained layer; or (height, width).
        normalize
            "max" divides each map by its maximum, "minmax" maps its range to 0..1, None leaves it raw.
        batch
            Largest number of images given to the model at once; bounds the memory.

        Returns
        -------
        Explanation

        Raises
        ------
        ImageError
            An image cannot be read, or does not fit the model.
        TargetError
            A target does not exist.
        LayerError
            The file does not explain a layer.
        ArgumentError
            Another argument is wrong.
        NonFiniteError
            NaN or infinity in an image's scores, activations or gradients.
        """
        chosen_size = self._checked_size(size)
        _check_normalize(normalize)
        check_count("batch", batch)
        fetched = self._first_layer
        if layer is not None or method != _DEFAULT_METHOD:
            fetched = self._fetched([0] if layer is None else self._positions(layer), self._gives(method))
        pictures, tensor_of = self._read(images)
        count = len(pictures)
        if not count:
            raise ImageError("there are no images to explain: the list or batch is empty")
        wanted = self._resolve(target, count)
        step = self._fixed_batch or batch
        parts = []
        for start in range(0, count, step):
            chunk = slice(start, start + step)
            targets = wanted if len(wanted) == 1 else wanted[chunk]
            parts.append(self._explain(tensor_of(chunk), targets, fetched, method, chosen_size, normalize, start))
        heatmaps, maps, targets, logits = parts[0] if len(parts) == 1 else map(np.concatenate, zip(*parts, strict=True))
        return Explanation(
            heatmaps=heatmaps,
            maps=maps,
            targets=targets,
            logits=logits,
            images=pictures,
            classes=self.classes,
            score_activation=self._metadata.score_activation,
        )

    def _read(self, images: Any) -> tuple[list[Pixels | None], Callable[[slice], Floats]]:
        """Return the pictures, None for rows of a preprocessed batch, and what gives a slice of the model's input."""
        if isinstance(images, np.ndarray) and images.dtype.kind == "f":
            tensor = self._checked_batch(images)
            return [None] * len(tensor), tensor.__getitem__
        pictures = [read_image(source) for source in _as_list(images)]
        return list(pictures), lambda chunk: self._prepared(pictures[chunk])

    def _positions(self, layer: str | Sequence[str]) -> list[int]:
        """Return the numbers of the layers that are named."""
        names = [layer] if isinstance(layer, str) else list(layer)
        for name in names:
            if name not in self.layers:
                raise LayerError(
                    f"{self._path} does not explain a layer {name!r}: {suggest(str(name), self.layers)}"
                    f"Explained: {', '.join(self.layers)}"
                )
        if not names or len(set(names)) != len(names):
            raise LayerError(f"layer={layer!r}: give a name, or a list of different ones")
        return [self.layers.index(name) for name in names]

    def _fetched(self, positions: Sequence[int], second: str) -> tuple[str, ...]:
        """Return the outputs that explain these layers: logits and targets, then activations and ``second`` of each."""
        layers = [self._layer_outputs[position] for position in positions]
        return (*_OUTPUTS, *(name for layer in layers for name in (layer.activations, getattr(layer, second))))

    def _gives(self, method: str) -> str:
        """Return which of a layer's outputs the method starts from."""
        find_method(method)
        if method not in self.methods:
            raise ArgumentError(
                f"method={method!r} needs the full gradients, and {self._path} holds pooled ones: "
                'export the model again with gradients="full"'
            )
        return "weights" if method == _DEFAULT_METHOD else "gradients"

    def _explain(
        self,
        tensor: Floats,
        targets: Indices,
        fetched: tuple[str, ...],
        method: str,
        size: tuple[int, int] | None,
        normalize: Any,
        start: int,
    ) -> tuple[Floats, Floats, Indices, Floats]:
        """Return heatmaps, maps, targets and logits of one chunk, whose first image is number ``start``."""
        logits, explained, *layers = self._run(tensor, targets, fetched)
        self._check_shapes(len(tensor), targets.shape[1], logits, explained, layers)
        bad = kernels.first_not_finite(logits)
        if bad is not None:
            raise NonFiniteError(f"the scores of image {start + bad} are not finite: check the model", start + bad)
        try:
            if len(layers) == 2:
                rendered = self._render(method, layers[0], layers[1], normalize, size)
                return rendered.heatmaps, rendered.maps, explained, logits
            pairs = zip(layers[::2], layers[1::2], strict=True)
            maps = [self._render(method, *pair, normalize, None).maps for pair in pairs]
        except NonFiniteError as error:
            image = start + error.image
            raise NonFiniteError(
                f"the activations or gradients of image {image} are not finite: check the model", image
            ) from error
        largest = max((single.shape[2:] for single in maps), key=math.prod)
        heatmaps, fused = (_fused(maps, chosen, normalize) for chosen in (size or largest, largest))
        return heatmaps, fused, explained, logits

    def _check_shapes(self, n: int, k: int, logits: Floats, explained: Indices, layers: Sequence[Floats]) -> None:
        """Refuse outputs of a changed file that do not fit each other, which the kernels take for granted."""
        fits = logits.shape == (n, self._class_count) and explained.shape == (n, k)
        for activations, second in zip(layers[::2], layers[1::2], strict=True):
            c = activations.shape[1]
            whole = (n, k, c) if second.ndim == 3 else (n, k, c, *activations.shape[2:])
            fits = fits and activations.shape[0] == n and second.shape == whole and activations.size > 0
        if not fits:
            raise FileFormatError(f"{self._path}: its outputs do not fit each other: export the model again")

    def _render(
        self, method: str, activations: Floats, second: Floats, normalize: Any, size: tuple[int, int] | None
    ) -> kernels.Rendered:
        if method == _DEFAULT_METHOD:
            return kernels.render_outputs(activations, second, normalize, size, self._threads)
        row = find_method(method)
        # What overflows here is found and named by the kernel.
        with np.errstate(over="ignore", invalid="ignore"):
            weights = row.weights(activations, second)
        return kernels.render(
            activations, weights, weighting=row.weighting, normalize=normalize, size=size, threads=self._threads
        )

    def _run(self, tensor: Floats, targets: Indices, fetched: tuple[str, ...]) -> list[npt.NDArray[Any]]:
        """Run the model; return the outputs ``fetched`` for every row of ``tensor``."""
        count = len(tensor)
        if self._fixed_batch is not None:
            # Such a file takes whole batches only: the last image fills up the last one.
            tensor, targets = (_filled(array, self._fixed_batch) for array in (tensor, targets))
        try:
            outputs = self._session.run(fetched, {self._input_name: tensor, "target": targets})
        except Exception as error:  # ONNX Runtime's exception classes derive from Exception directly
            raise ModelError(f"{self._path}: ONNX Runtime cannot run this model: {error}") from error
        return list(outputs) if self._fixed_batch is None else [array[:count] for array in outputs]

    def _checked_size(self, size: Any) -> tuple[int, int] | None:
        """Return the heatmaps' size, None for the layer's own."""
        if isinstance(size, str) and size == "input":
            return self.input_size
        if isinstance(size, str) and size == "layer":
            return None
        numbers = tuple(size) if isinstance(size, Sequence | np.ndarray) and not isinstance(size, str) else ()
        if len(numbers) == 2 and all(_is_whole(number) and number > 0 for number in numbers):
            height, width = int(numbers[0]), int(numbers[1])
            if height * width <= _LARGEST_HEATMAP:
                return height, width
        raise ArgumentError(f"size={size!r}: give 'input', 'layer' or (height, width), at least 1 each, 2**28 in all")

    def _checked_batch(self, batch: npt.NDArray[Any]) -> Floats:
        """Return a preprocessed batch as float32 of the model's shape."""
        if batch.ndim != 4 or batch.shape[1:] != self._image_shape:
            raise ImageError(
                f"the batch has shape {batch.shape}; the model takes (N, {', '.join(map(str, self._image_shape))}), "
                f"{self.input_layout}"
            )
        tensor = np.ascontiguousarray(batch, np.float32)
        bad = kernels.first_not_finite(tensor)
        if bad is not None:
            raise ImageError(f"image {bad} of the batch holds NaN or infinity, or a number beyond float32")
        return tensor

    def _resolve(self, target: Target, count: int) -> Indices:
        """Return class indices (1 or N, K); -r stands for the r-th best class, which the file works out itself."""
        if target is None:
            return np.array([[-1]], np.int64)
        if isinstance(target, str) and target not in (self.classes or ()):
            ranks = _top_ranks(target, self._class_count)
            if ranks is not None:
                return ranks
        rows = _target_rows(target)
        if len(rows) not in (1, count):
            raise TargetError(f"target holds {len(rows)} lists for {count} images: give one, or one an image")
        lengths = {len(row) for row in rows}
        if len(lengths) != 1 or 0 in lengths:
            raise TargetError(
                f"target holds lists of {sorted(lengths)} classes: give every image the same number, 1 or more"
            )
        return np.array([[self._class_index(item) for item in row] for row in rows], np.int64)

    def _class_index(self, item: Any) -> int:
        if isinstance(item, str):
            return self._class_by_name(item)
        if isinstance(item, bool | np.bool_) or not isinstance(item, int | np.integer):
            raise TargetError(f"target {item!r} is neither a class index nor a class name")
        if not 0 <= item < self._class_count:
            raise TargetError(f"target {item} is out of range: the model has classes 0..{self._class_count - 1}")
        return int(item)

    def _class_by_name(self, name: str) -> int:
        """Return the class that is called so, or has this index where the name is a number and no class's."""
        if name not in (self.classes or ()) and re.fullmatch("[0-9]{1,9}", name):
            return self._class_index(int(name))
        if self.classes is None:
            raise TargetError(f"target {name!r}: {self._path} has no class names; export it with classes=[...]")
        found = [index for index, known in enumerate(self.classes) if known == name]
        if len(found) > 1:
            raise TargetError(f"target {name!r} names the classes {found}: give the index")
        if not found:
            raise TargetError(
                f"the model has no class {name!r}: {suggest(name, self.classes) or 'see Explainer.classes'}".rstrip()
            )
        return found[0]


def _open_session(path: Path, providers: list[Any], threads: int | None) -> onnxruntime.InferenceSession:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError(
            f'Explainer needs onnxruntime ({error}): pip install "fastcam[cpu]" or "fastcam[gpu]"'
        ) from error
    reason = why_no_file(path)
    if reason is not None:
        raise ModelError(f"{path}: {reason}")
    names = [provider if isinstance(provider, str) else provider[0] for provider in providers]
    missing = [name for name in names if name not in onnxruntime.get_available_providers()]
    if missing:
        raise DeviceError(
            f"ONNX Runtime has no {', '.join(missing)} here; it has {', '.join(onnxruntime.get_available_providers())}"
        )
    options = onnxruntime.SessionOptions()
    # Errors only: that `target` may be left out is a warning to ONNX Runtime, and the point to us.
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:  # ONNX Runtime's exception classes derive from Exception directly
        raise ModelError(
            f"{path}: ONNX Runtime cannot load this model: {error}. Give a file of fastcam.export"
        ) from error
    if session.get_providers()[0] != names[0]:
        raise DeviceError(f"{names[0]} could not start: ONNX Runtime fell back to {session.get_providers()[0]}")
    return session


class _Value(NamedTuple):
    """An input or output of the file; ``shape`` holds a number, or a name or None where a dimension is open."""

    name: str
    type: str
    shape: tuple[Any, ...]


def _signature(path: Path, session: onnxruntime.InferenceSession) -> tuple[dict[str, _Value], dict[str, _Value]]:
    try:
        inputs, outputs = (
            {item.name: _Value(item.name, item.type, tuple(item.shape)) for item in items}
            for items in (session.get_inputs(), session.get_outputs())
        )
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{path}: a name in it is damaged ({error}): export the model again") from error
    return inputs, outputs


def _properties(path: Path, session: onnxruntime.InferenceSession) -> Mapping[str, str]:
    try:
        properties: Mapping[str, str] = session.get_modelmeta().custom_metadata_map
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{path}: its metadata are damaged ({error}): export the model again") from error
    return properties


def _checked_providers(device: str, providers: Sequence[Any] | None) -> list[Any]:
    if providers is not None:
        if isinstance(providers, str) or not providers or not all(map(_names_a_provider, providers)):
            raise ArgumentError(f"providers={providers!r}: give a list of names, or of pairs of a name and its options")
        return list(providers)
    if device not in _PROVIDERS:
        raise ArgumentError(
            f"device={device!r} is not known; choose one of {', '.join(map(repr, _PROVIDERS))}, "
            "or name ONNX Runtime's execution providers=[...]"
        )
    return list(_PROVIDERS[device])


def _names_a_provider(item: Any) -> bool:
    return isinstance(item, str) or (isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str))


def _check_normalize(normalize: Any) -> None:
    if normalize is not None and not (isinstance(normalize, str) and normalize in ("max", "minmax")):
        raise ArgumentError(f"normalize={normalize!r}: choose 'max', 'minmax' or None")


def _is_whole(number: Any) -> bool:
    return isinstance(number, int | np.integer)


def _checked_threads(threads: int | None) -> int | None:
    if threads is not None:
        check_count("threads", threads)
    return threads


def check_count(name: str, number: int) -> None:
    """Raise ArgumentError where the argument ``name`` is no whole number, at least 1."""
    if not _is_whole(number) or number < 1:
        raise ArgumentError(f"{name}={number!r}: give a whole number, at least 1")


def _as_list(images: Any) -> list[Any]:
    """Return the single pictures: a list's items, an array's (N,H,W,3) rows, or the one that is given."""
    if isinstance(images, np.ndarray):
        return list(images) if images.ndim == 4 else [images]
    return list(images) if isinstance(images, list | tuple) else [images]


def _top_ranks(target: str, class_count: int) -> Indices | None:
    """Return the ranks that "top3" means as (1,3) negative numbers; None for another text."""
    match = re.fullmatch(r"top(\d{1,9})", target)
    if match is None:
        return None
    count = int(match[1])
    if not 1 <= count <= min(class_count, MAXIMUM_RANK):
        raise TargetError(f"target {target!r}: the model ranks its best 1..{min(class_count, MAXIMUM_RANK)} classes")
    return -np.arange(1, count + 1, dtype=np.int64)[None]


def _target_rows(target: Any) -> list[list[Any]]:
    """Return one list of classes for all images, or one an image."""
    items = target.tolist() if isinstance(target, np.ndarray) else target
    if isinstance(items, str | int | np.integer):
        return [[items]]
    if not isinstance(items, list | tuple) or not items:
        raise TargetError(f"target {target!r}: give None, 'top3', a class, a list of classes, or one list an image")
    nested = [isinstance(item, list | tuple | np.ndarray) for item in items]
    if all(nested):
        return [list(item) for item in items]
    if any(nested):
        raise TargetError(f"target {target!r} mixes classes and lists: give one list an image, or one for all")
    return [list(items)]


def _fused(maps: Sequence[Floats], size: tuple[int, int], normalize: Any) -> Floats:
    """Return the mean of several layers' maps (N,K,h,w) at one size, normalised as they were."""
    mean = np.mean([kernels.resize(single, size) for single in maps], axis=0, dtype=np.float64)
    return normalized(np.asarray(mean), normalize).astype(np.float32)


def _filled(array: npt.NDArray[Any], count: int) -> npt.NDArray[Any]:
    """Repeat the last row until there are ``count``."""
    return np.concatenate([array, np.repeat(array[-1:], count - len(array), axis=0)])


def _softmax(logits: Floats) -> Floats:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True), np.float32)


def _sigmoid(logits: Floats) -> Floats:
    # exp of a negative number only: exp(-x) would overflow for large negative logits.
    small = np.exp(-np.abs(logits))
    return np.asarray(np.where(logits >= 0, 1 / (1 + small), small / (1 + small)), np.float32)


_PROBABILITIES = {"softmax": _softmax, "sigmoid": _sigmoid, "none": _softmax}
