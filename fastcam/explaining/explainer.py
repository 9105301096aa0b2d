"""`Explainer`: from pictures to scores and heatmaps, with an explained model in ONNX Runtime."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from .. import kernels
from ..arguments import (
    check_count,
    check_flag,
    check_mapping,
    check_names,
    check_path,
    check_text,
    checked,
    optional,
    renamed,
    shown,
)
from ..arrays import Floats, Indices, Pixels
from ..errors import ArgumentError, FastcamError, ImageError, LayerError, TargetError, suggest
from ..metadata import MASK, REFERENCE
from ..notes import Note
from ..pictures.letterbox import Frame, letterbox, letterboxed, stretched
from ..pictures.preparing import prepare, resize_images
from ..pictures.reading import ImageSource, ValueRange, read_image
from ..preprocessing import CONTENTS, Layout, Preprocessing
from .boxes import ABSENT, BoxTargets, check_threshold
from .contrast import (
    NEAREST,
    NEAREST_COUNT,
    NEAREST_SHARE,
    Contrast,
    Scaling,
    check_linear,
    check_scaling,
    contrasted,
    nearest_classes,
)
from .convolutions import CHOICES, Convolutions
from .devices.exchange import is_on_device
from .engines import Engine, Results, Task
from .engines.drawing import joined_layers
from .engines.inputs import DeviceInputs, Inputs, Pictures, Tensors
from .engines.opening import open_engine
from .engines.reruns import RerunEngine
from .explained_model import LARGEST_HEATMAP
from .explanation import DeviceExplanation, Explanation
from .extras import is_embedding, mask_rows, reference_rows, reference_values
from .image_explanation import is_whole
from .images import Images, as_list, on_host
from .methods import METHODS, Evidence, find_method
from .providers import ask
from .runs import TimeLimit
from .signals import Signals, enlarge, read_signals
from .targets import Target, Targets


class _Look(NamedTuple):
    """A method, the layers that it explains, and the outputs that it reads."""

    method: str
    positions: Sequence[int]
    fetched: tuple[str, ...]


class _Question(NamedTuple):
    """What a call asks about its images: arguments of `Explainer.__call__`, as they were given."""

    target: Target
    against: Target
    counterfactual: bool
    mask: Any
    reference: Any
    value_range: ValueRange


class Explainer:
    """Runs a model written by `fastcam.export` and draws why it decided.

    One Explainer may be called from many threads at once; each call returns what it would return alone.

    Parameters
    ----------
    path : path
        The .onnx file.
    device : {"auto", "cpu", "cuda", "openvino", "tensorrt"}
        Where to run; the second GPU is "cuda:1" or "tensorrt:1". "auto" takes the first GPU if driver, provider,
        cuDNN and kernels are available. If there is a GPU but one of these is missing, it takes the CPU and warns once,
        saying what is missing; without a GPU it takes the CPU. "openvino" is the CPU through the openvino package, in
        float32: a few percent faster for some networks.
    providers : sequence, optional
        ONNX Runtime execution providers (names, or pairs of name and options) instead of ``device``. The first must
        actually be in use. Options for CUDA are ONNX Runtime's, except that ``use_tf32`` defaults to 0: TF32 is
        faster and changes the third digit of heatmaps. ``enable_cuda_graph=1`` captures a CUDA graph for each size of
        batch: faster for small networks, but nothing else in the process may use the GPU while one is captured.
    threads : int, optional
        Threads of the model and of the kernels; by default all processors.
    convolutions : {"auto", "onnxruntime"}
        Kernels of the convolutions on the CPU: "auto" uses fastcam's own for the layers where they are faster,
        "onnxruntime" uses ONNX Runtime's for all layers. Results differ in the sixth digit. `describe` lists the
        layers.
    background : images, optional
        What method "expectedgradients" compares images with, in a form that a call takes: images like those that the
        model was trained on, some hundred of them. They are prepared once and kept in memory.

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
    ImageError
        An image of the background cannot be read, or there is none.

    Notes
    -----
    Pickling and copying keep the arguments; the file is opened again.

    Examples
    --------
    >>> explainer = fastcam.Explainer("dogs.onnx")  # doctest: +SKIP
    >>> explanation = explainer("dog.jpg", target="top3")  # doctest: +SKIP
    >>> explanation[0].save("why.png")  # doctest: +SKIP
    """

    @checked(path=check_path, threads=optional(check_count))
    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        device: str = "auto",
        providers: Sequence[Any] | None = None,
        threads: int | None = None,
        convolutions: str = "auto",
        background: Images | None = None,
    ) -> None:
        self._arguments = {
            "path": path,
            "device": device,
            "providers": providers,
            "threads": threads,
            "convolutions": convolutions,
            "background": background,
        }
        self._threads = _checked_threads(threads)
        opened = open_engine(Path(path), ask(device, providers), self._threads, _checked_convolutions(convolutions))
        self._model, self._session, self._engine, self._convolutions, open_evidence = opened
        self._targets = (
            BoxTargets(str(path), self._model.table_size)
            if self.has_boxes
            else Targets(str(path), self.classes, self.class_count)
        )
        self._image_shape = self._model.image_shape
        prepared = None if background is None else self._prepared_background(background)
        self._reruns = RerunEngine(self._model, self._session, open_evidence, self._threads, prepared)
        method = self._model.default_method
        self._default_look = _Look(method, *self._looked_at(method, None))

    def __reduce__(self) -> Any:
        # Sessions cannot be copied: a copy, or an Explainer in another process, opens the file again.
        return _reopened, (type(self), self._arguments)

    def __repr__(self) -> str:
        """Tell the file, the layer, the number of classes and where the model runs."""
        layers = ", ".join(self.layers) or "scores"
        return f"<Explainer {str(self.path)!r}: explains {layers}, {self.class_count} classes, on {self.providers[0]}>"

    @property
    def path(self) -> Path:
        """The explained model's file."""
        return self._model.path

    @property
    def providers(self) -> list[str]:
        """Execution providers in use, the first one first."""
        return list(self._session.get_providers())

    @property
    def convolutions(self) -> Convolutions:
        """Which convolutions fastcam's own kernels compute."""
        return self._convolutions

    def describe(self) -> dict[str, Any]:
        """Return how the model runs.

        Returns
        -------
        dict
            "providers": execution providers in use. "convolutions": "layers", the algorithm of each layer that
            fastcam's kernels compute; "others", the number of convolutions that ONNX Runtime computes (None: not
            counted); "reason", why ONNX Runtime computes all of them (None: it does not).
        """
        return {"providers": self.providers, "convolutions": asdict(self._convolutions)}

    @property
    def signature(self) -> tuple[dict[str, tuple[Any, ...]], dict[str, tuple[Any, ...]]]:
        """Shapes of inputs (except the target) and outputs by name; a string or None is a dynamic dimension."""
        inputs, outputs = (
            {name: value.shape for name, value in part.items()} for part in (self._model.inputs, self._model.outputs)
        )
        return inputs, outputs

    @property
    def framework(self) -> str:
        """Where the model came from: "keras", "torch" or "onnx"."""
        return self._model.metadata.framework

    @property
    def precision(self) -> str:
        """What the network computes in, "fp32" or "fp16"; its gradients are always float32."""
        return self._model.metadata.precision

    @property
    def layer(self) -> str:
        """Name of the explained layer, the first of several; "" for a file that gives only scores."""
        return next(iter(self._model.metadata.layers), "")

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of all explained layers."""
        return self._model.metadata.layers

    @property
    def methods(self) -> tuple[str, ...]:
        """Methods by which this file can be explained: all of them if it has full gradients."""
        return self._model.methods

    @property
    def default_method(self) -> str:
        """The method by which the file is explained if none is named."""
        return self._model.default_method

    @property
    def default_layers(self) -> tuple[str, ...]:
        """The layers that are explained if none is named: the first one, or all of a detector."""
        return tuple(self.layers[position] for position in self._default_look.positions) if self.layers else ()

    @property
    def score(self) -> str:
        """What a target is: one of "classes", "values", "segmentation" and "boxes", see `fastcam.export`."""
        return self._model.metadata.score

    @property
    def has_boxes(self) -> bool:
        """Whether the model is a detector, whose targets are boxes."""
        return self._model.has_boxes

    @property
    def fit(self) -> str:
        """How pictures of other proportions are fitted to the input: "stretch" or "letterbox"."""
        return self._model.metadata.fit

    @property
    def candidates(self) -> tuple[str, ...]:
        """Layers that `export` could have explained, from the last to the first."""
        return self._model.metadata.candidates

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names by index; None if the file has none."""
        return self._model.metadata.classes

    @property
    def class_count(self) -> int:
        """Number of classes."""
        return self._model.class_count

    @property
    def input_layout(self) -> Layout:
        """Order of the input's axes: "NHWC" or "NCHW"."""
        return self._model.metadata.input_layout

    @cached_property
    def input_size(self) -> tuple[int, int]:
        """Height and width of the model's input, in pixels.

        Raises
        ------
        ImageError
            The model takes series or volumes: see `grid_shape`.
        """
        if not self.takes_pictures:
            contents = CONTENTS[len(self.input_layout)]
            raise ImageError(
                f"{self.path} takes {contents}, not pictures: pass arrays (N, {_sides(self._image_shape)}) to Explainer"
            )
        return self._model.side("H"), self._model.side("W")

    @property
    def takes_pictures(self) -> bool:
        """Whether the model takes pictures, rather than series or volumes."""
        return self._model.metadata.takes_pictures

    @property
    def map_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of the map of each explained layer: (h,w), (t,) of series or (d,h,w) of volumes."""
        return self._model.map_shapes

    @property
    def grid_shape(self) -> tuple[int, ...]:
        """Sizes of the input's axes besides batch and channels: (H,W), (T,) of series or (D,H,W) of volumes."""
        return self._model.grid_shape

    @property
    def preprocessing(self) -> Preprocessing | None:
        """How a picture becomes the model's input; None if the file does not say."""
        return self._model.metadata.preprocessing

    @property
    def notes(self) -> tuple[Note, ...]:
        """What `export` changed, guessed or left unchanged."""
        return self._model.metadata.notes

    def prepare(
        self, images: ImageSource | Sequence[ImageSource], *, value_range: ValueRange = None
    ) -> Floats | Pixels:
        """Turn pictures into the model's input.

        The whole picture is resized to the input's size, without cropping, so that heatmaps cover all of it: stretched,
        or with the file's ``fit="letterbox"`` scaled as a whole and surrounded by grey.

        Parameters
        ----------
        images
            A path, PIL image or uint8 array (H,W,3), or a list that mixes them.
        value_range
            As in a call.

        Returns
        -------
        ndarray
            float32 (N,H,W,channels) or (N,channels,H,W), as the model takes it; uint8 (N,H,W,3) for a file that takes
            pictures.

        Raises
        ------
        ImageError
            A picture cannot be read, or the file does not say how to preprocess.
        """
        return self._prepared([read_image(source, value_range=value_range) for source in as_list(on_host(images))])

    def _prepared(self, pictures: Sequence[Pixels]) -> Floats | Pixels:
        size = self.input_size
        if self._model.metadata.picture is not None:
            return resize_images(pictures, size)
        channels = self._model.side("C")
        if channels not in (1, 3):
            raise ImageError(
                f"{self.path} takes images of {channels} channels, but pictures have 1 or 3: pass a preprocessed "
                f"float32 batch (N, {_sides(self._image_shape)})"
            )
        if self.preprocessing is None:
            raise ImageError(
                f"{self.path} does not say how a picture becomes the model's input: "
                "export it again with preprocess=..., or pass a preprocessed float32 batch"
            )
        if self.fit == "letterbox":
            pictures = [letterbox(picture, size) for picture in pictures]
        return prepare(pictures, self.preprocessing, size, self.input_layout, channels)

    def frame(self, picture: Pixels) -> Frame:
        """Return where a picture, uint8 (H0,W0,3), lies in the model's input."""
        height, width = picture.shape[:2]
        fitted = letterboxed if self.fit == "letterbox" else stretched
        return fitted((height, width), self.input_size)

    @overload
    def __call__(
        self,
        images: Images,
        target: Target = ...,
        *,
        against: Target = ...,
        counterfactual: bool = ...,
        mask: Any = ...,
        reference: Any = ...,
        method: str | None = ...,
        settings: Mapping[str, Any] | None = ...,
        layer: str | Sequence[str] | None = ...,
        size: str | tuple[int, ...] = ...,
        normalize: str | None = ...,
        threshold: float | None = ...,
        batch_size: int = ...,
        timeout: float | None = ...,
        value_range: ValueRange = ...,
        progress: bool = ...,
        on_device: Literal[False] = ...,
    ) -> Explanation: ...

    @overload
    def __call__(
        self,
        images: Images,
        target: Target = ...,
        *,
        against: Target = ...,
        counterfactual: bool = ...,
        mask: Any = ...,
        reference: Any = ...,
        method: str | None = ...,
        settings: Mapping[str, Any] | None = ...,
        layer: str | Sequence[str] | None = ...,
        size: str | tuple[int, ...] = ...,
        normalize: str | None = ...,
        threshold: float | None = ...,
        batch_size: int = ...,
        timeout: float | None = ...,
        value_range: ValueRange = ...,
        progress: bool = ...,
        on_device: Literal[True],
    ) -> DeviceExplanation: ...

    @renamed(batch="batch_size")
    @checked(
        method=optional(check_text),
        settings=optional(check_mapping),
        layer=optional(check_names),
        batch_size=check_count,
        counterfactual=check_flag,
        progress=check_flag,
        on_device=check_flag,
    )
    def __call__(
        self,
        images: Images,
        target: Target = None,
        *,
        against: Target = None,
        counterfactual: bool = False,
        mask: Any = None,
        reference: Any = None,
        method: str | None = None,
        settings: Mapping[str, Any] | None = None,
        layer: str | Sequence[str] | None = None,
        size: str | tuple[int, ...] = "input",
        normalize: str | None = "max",
        threshold: float | None = None,
        batch_size: int = 16,
        timeout: float | None = None,
        value_range: ValueRange = None,
        progress: bool = False,
        on_device: bool = False,
    ) -> Explanation | DeviceExplanation:
        """Score images and explain the scores.

        Grad-CAM (Selvaraju et al. 2017, eq. 1 and 2): ReLU(sum over channels of alpha times activations), where alpha
        is the mean over the map of the gradient of the target's logit. The other methods use different weights.

        Parameters
        ----------
        images
            A path, the bytes of a file, PIL image, uint8 array (H,W,3) or array of floats (H,W,3) in 0..1; a list that
            mixes them; a preprocessed float32 batch; or a torch tensor or item of a dataset, (image, label): uint8
            (N,3,H,W) are pictures, floats are preprocessed. On CUDA also an array on the device, from CuPy, torch or
            anything with ``__dlpack__`` or ``__cuda_array_interface__``: a preprocessed float32 batch, or uint8
            pictures (N,H,W,3) of the input's size. It is not copied to the host. A model of series or volumes takes
            arrays of numbers, one or a batch, and volumes also as nibabel images or .nii files.
        target
            What to explain: None, the top class; "top3" (any number), the top three; a class index or name; a list of
            those, for every image; one list per image; or an array (N,K) of indices. For a detector: None, the ten best
            boxes; "top3"; or entries of an earlier explanation's ``targets``.
        against
            Why the target rather than these? The map of y_c - mean(y_d), where d are targets in the same form, from the
            same pass. "nearest" is Finer-CAM as torchcam computes it, y_c - 0.6 mean(y_d), where d are the three
            classes with the nearest scores: for one target per image, and with one more pass if it is named.
        counterfactual
            What speaks against the target: the map with the opposite sign (Selvaraju et al. 2017, section 3).
        mask
            For a segmentation: the region to explain, instead of the pixels where the target is predicted. (h,w),
            (K,h,w) or (N,K,h,w), bool or weights; it covers the whole picture, at any size. One true pixel explains
            that pixel.
        reference
            For an embedding: what to compare with, explained by the cosine similarity. Another image or a list of
            them, or embeddings (D,), (K,D) or (N,K,D) in floats. There is a map for each. For values: a number, one
            per target (K,) or (N,K). The map shows what raises the value above it or, where the value is below it,
            what lowers the value (the sign of the difference to explain, Letzgus et al. 2022).
        method
            A row of the table in docs/methods.md; `methods` lists those that the file offers. With any file: "gradcam",
            the default for classes; "eigencam"; and methods that run the model again, such as "scorecam",
            "ablationcam", "rise" and "occlusion". With ``gradients="full"``: "gradcam++", "xgradcam", "hirescam",
            "layercam" and others. With ``gradients="image"``: "saliency", "smoothgrad", "integratedgradients". For a
            detector the default is "hirescam", because the mean gradient of a box tells its class, but not its place.
        settings
            Numbers that a method lets you choose, by name, such as ``{"masks": 4000, "seed": 1}`` for "rise": see
            `METHODS` and docs/methods.md.
        layer
            One of the file's `layers`; None, the first, or for a detector all. For several the heatmap is the mean,
            normalised again, and ``maps`` have the size of the largest.
        size
            Size of the heatmaps: "input", the model's input; "layer", the explained layer; or (height, width), for
            series (time,), for volumes (depth, height, width).
        normalize
            "max" divides each map by its maximum, "minmax" maps its range to 0..1, None leaves it raw. "signed" keeps
            the evidence against the target, -1..1, divided by the largest magnitude.
        threshold
            The lowest probability of a box to explain, for a detector; 0.25 by default. There may be none.
        batch_size
            Maximum number of images per batch; limits the memory. On CUDA a batch that does not fit
            into memory is halved, and so are all later ones.
        timeout
            Seconds that the call may take; None for no limit. A running model is stopped between two of its
            nodes.
        value_range
            The values of black and white in pictures of more than 8 bits, such as (0, 4095) for 12-bit radiographs.
        progress
            Show on the terminal how many of the runs of the model a method has done, and the time left.
        on_device : bool
            Leave the results on the CUDA device, for other libraries to use without a copy. For methods "gradcam" and
            "hirescam", and one layer.

        Returns
        -------
        Explanation
            `DeviceExplanation` with ``on_device``.

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
        TimeLimitError
            The call took longer than ``timeout``.
        DeviceError
            Not even a single image fits into the device's memory.
        """
        limit = TimeLimit(timeout)
        chosen_size = self._checked_size(size)
        scaling = check_scaling(normalize)
        lowest = check_threshold(threshold, has_boxes=self.has_boxes)
        look = self._default_look
        if layer is not None or method not in (None, look.method):
            method = method or look.method
            look = _Look(method, *self._looked_at(method, layer))
        method = look.method
        row = METHODS[method]
        chosen_settings = row.chosen(settings)
        pictures, inputs = self._read(images, value_range)
        if not pictures:
            raise ImageError("there are no images to explain: the list or batch is empty")
        question = _Question(target, against, counterfactual, mask, reference, value_range)
        targets, contrast, extra = self._answerable(question, inputs, pictures, batch_size, limit)
        # Maps before their ReLU are combined and scaled here.
        raw = contrast is not None or scaling == "signed" or not self.takes_pictures
        if contrast is not None:
            check_linear(method)
        self._check_raw(look, raw=raw, on_device=on_device)
        task = Task(
            look.fetched,
            method,
            None if scaling == "signed" else scaling,
            None if raw else chosen_size,
            batch_size,
            on_device,
            limit,
            raw=raw,
            extra=extra,
            positions=look.positions,
            settings=chosen_settings,
            progress=progress,
        )
        engine = self._engine if row.reruns is None else self._reruns
        try:
            if raw:
                contrast = contrast or Contrast(targets.shape[1])
                results = self._combined(engine, inputs, targets, task, contrast, chosen_size, scaling)
                targets = targets[:, : contrast.kept]
            else:
                results = engine.explain(inputs, targets, task)
        except MemoryError as error:
            if isinstance(error, FastcamError):
                raise
            shape = (len(pictures), targets.shape[1], *(chosen_size or self.grid_shape))
            raise ArgumentError(
                f"not enough memory: heatmaps {shape} take {math.prod(shape) * 4 / 2**30:.3g} GiB ({error}). Request "
                "fewer or smaller ones"
            ) from error
        if on_device:
            return DeviceExplanation(*results.arrays, self.classes, self._model.metadata.score_activation)
        if lowest is not None and results.boxes is not None:
            results = _above(lowest, results, results.boxes.scores, targets)
        return self._explanation(results, pictures, inputs, signed=scaling == "signed")

    def _check_raw(self, look: _Look, *, raw: bool, on_device: bool) -> None:
        """Reject what maps before their ReLU, and those of series and volumes, cannot do."""
        if raw and METHODS[look.method].merge != "mean":
            raise ArgumentError(
                f"method={look.method!r} multiplies the maps of several layers: their signs mean nothing"
            )
        if not self.takes_pictures and (on_device or len(look.positions) > 1):
            raise ArgumentError(f"{self.path} takes no pictures: omit on_device=, and name one layer at a time")

    def evidence(self, image: Images, target: Target = None, *, batch_size: int = 16) -> tuple[Evidence, int]:
        """Return what methods and metrics may ask about one image, see `methods.Evidence`, and the explained target.

        Parameters
        ----------
        image
            One image, in a form that a call takes.
        target
            One target; None for the top class.
        batch_size
            Largest number of changed images given to the model at once.

        Raises
        ------
        FastcamError
            As a call does.
        """
        if not self.takes_pictures:
            raise ArgumentError(f"{self.path} takes no pictures, which methods and metrics could change")
        pictures, inputs = self._read(image, None)
        if len(pictures) != 1:
            raise ImageError(f"give one image, not {len(pictures)}")
        targets = self._targets.resolve(target, 1)
        if targets.shape[1] != 1:
            raise TargetError(f"target {shown(target)}: give one target")
        look = self._default_look
        task = Task(look.fetched, look.method, None, None, batch_size, False, TimeLimit(None), positions=look.positions)
        return self._reruns.evidence(inputs, targets, task)

    def _combined(
        self,
        engine: Engine,
        inputs: Inputs,
        targets: Indices,
        task: Task,
        contrast: Contrast,
        size: tuple[int, ...] | None,
        scaling: Scaling,
    ) -> Results:
        """Return the results of maps that are combined before their ReLU.

        Those of a detector's layers one by one, at their own sizes: each box is scored at one of them.
        """
        if not self.takes_pictures:
            found = contrasted(engine.explain(inputs, targets, task), contrast, None, scaling)
            shape = self.map_shapes[task.positions[0]]
            return found._replace(heatmaps=enlarge(found.maps, shape, size), maps=enlarge(found.maps, shape, None))
        if not self.has_boxes or len(task.positions) == 1:
            return contrasted(engine.explain(inputs, targets, task), contrast, size, scaling)
        layers = []
        for position in task.positions:
            fetched = self._model.fetched([position], task.method)
            found = engine.explain(inputs, targets, task._replace(fetched=fetched, positions=[position]))
            layers.append(contrasted(found, contrast, None, scaling))
        return joined_layers(layers, size)

    def _answerable(
        self, question: _Question, inputs: Inputs, pictures: Sequence[Pixels | None], batch: int, limit: TimeLimit
    ) -> tuple[Indices, Contrast | None, Floats | None]:
        """Return the targets, followed by those to subtract, how to combine them, and the model's further input."""
        if self._model.extra == REFERENCE:
            references = self._references(question, len(pictures), limit)
            count = references.shape[1]
            opposite = Contrast(count, counterfactual=True) if question.counterfactual else None
            return np.zeros((1, count), np.int64), opposite, references
        if question.reference is not None and self.score == "values":
            return self._differences(question, len(pictures))
        if question.reference is not None:
            raise ArgumentError(
                'reference= applies to files exported with score="embedding" or score="values": omit it'
            )
        targets, contrast = self._contrast(question, inputs, batch, limit)
        mask = self._mask(question.mask, pictures, targets.shape[1] if contrast is None else contrast.kept)
        if mask is None or contrast is None or contrast.kept == targets.shape[1]:
            return targets, contrast, mask
        if (mask != mask[:, :1]).any():
            raise ArgumentError(
                "mask: with against= all targets are compared in one region: give one, (h,w) or (N,1,h,w)"
            )
        repeated = np.repeat(mask[:, :1], targets.shape[1], axis=1)
        return targets, contrast, repeated

    def _differences(self, question: _Question, count: int) -> tuple[Indices, Contrast, None]:
        """Return the values to explain, and the references that they are compared with."""
        if question.against is not None or question.counterfactual:
            raise ArgumentError("reference= already says what a value is compared with: omit against=, counterfactual=")
        targets = self._targets.resolve(question.target, count)
        references = reference_values(question.reference, count, targets.shape[1])
        return targets, Contrast(targets.shape[1], references=references), None

    def _contrast(
        self, question: _Question, inputs: Inputs, batch: int, limit: TimeLimit
    ) -> tuple[Indices, Contrast | None]:
        """Return the targets, followed by those to subtract, and how to combine them; None for nothing to combine."""
        count, against = len(inputs), question.against
        targets = self._targets.resolve(question.target, count)
        if against is None:
            return targets, Contrast(targets.shape[1], counterfactual=True) if question.counterfactual else None
        share = 1.0
        if isinstance(against, str) and against == NEAREST and against not in (self.classes or ()):
            if targets.shape[1] != 1 or self.has_boxes:
                raise TargetError('against="nearest" needs classes, and one target per image')
            targets, others = self._nearest(inputs, targets, batch, limit)
            share = NEAREST_SHARE
        else:
            others = self._targets.resolve(against, count)
        rows = max(len(targets), len(others))
        both = [np.broadcast_to(part, (rows, part.shape[1])) for part in (targets, others)]
        return np.concatenate(both, axis=1), Contrast(targets.shape[1], share, question.counterfactual)

    def _mask(self, mask: Any, pictures: Sequence[Pixels | None], targets: int) -> Floats | None:
        """Return the regions as the model takes them; None for the predicted ones."""
        if mask is None:
            return None
        size = self._model.metadata.mask_size
        if self._model.extra != MASK or size is None:
            raise ArgumentError('mask= applies to files exported with score="segmentation": omit it')
        frames = [None if picture is None else self.frame(picture) for picture in pictures]
        return mask_rows(mask, len(pictures), targets, size, frames)

    def _references(self, question: _Question, count: int, limit: TimeLimit) -> Floats:
        """Return the embeddings to compare with, as the model takes them."""
        reference = question.reference
        if question.target is not None or question.against is not None:
            raise TargetError("an embedding has no classes: omit target= and against=, and give reference=")
        if reference is None:
            raise ArgumentError("reference is missing: give another image, or embeddings, to compare with")
        if is_embedding(reference, self._model.table_size):
            return reference_rows(reference, count)
        pictures, inputs = self._read(reference, question.value_range)
        if not pictures:
            raise ImageError("there are no references: the list or batch is empty")
        task = Task(self._default_look.fetched, self.default_method, None, None, len(pictures), False, limit)
        found = self._engine.explain(inputs, np.zeros((1, 1), np.int64), task)
        return reference_rows(found.logits, count)

    def _nearest(self, inputs: Inputs, targets: Indices, batch: int, limit: TimeLimit) -> tuple[Indices, Indices]:
        """Return one target per image, and the classes whose scores are nearest to it."""
        if (targets == -1).all() and self.class_count > NEAREST_COUNT:
            # Next to the top class are the classes of the next ranks.
            return targets, -np.arange(2, 2 + NEAREST_COUNT, dtype=np.int64)[None]
        task = Task(self._default_look.fetched, self.default_method, None, None, batch, False, limit)
        scored = self._engine.explain(inputs, targets, task)
        return scored.targets, nearest_classes(scored.logits, scored.targets)

    def _explanation(
        self, results: Results, pictures: list[Pixels | None], inputs: Inputs, *, signed: bool
    ) -> Explanation:
        if results.similarity is not None:
            rows, count = results.targets.shape
            results = results._replace(targets=np.broadcast_to(np.arange(count, dtype=np.int64), (rows, count)))
        has_frames = self.has_boxes or self.fit == "letterbox"
        frames = [self.frame(picture) if has_frames and picture is not None else None for picture in pictures]
        return Explanation(
            heatmaps=results.heatmaps,
            maps=results.maps,
            targets=results.targets,
            logits=results.logits,
            images=pictures,
            classes=self.classes,
            score_activation=self._model.metadata.score_activation,
            evidence=results.evidence,
            boxes=results.boxes,
            frames=frames,
            signed=signed,
            similarity=results.similarity,
            signals=self._channels_first(inputs.batch) if isinstance(inputs, Signals) else None,
            sources=inputs.sources if isinstance(inputs, Signals) else [],
        )

    def _channels_first(self, batch: Floats) -> Floats:
        return np.moveaxis(batch, self.input_layout.index("C"), 1)

    def _prepared_background(self, background: Images) -> Floats:
        pictures, inputs = self._read(background, None)
        if not pictures:
            raise ImageError("background= holds no images: give some, or omit it")
        return np.asarray(inputs.tensor(slice(0, len(inputs))), np.float32)

    def _read(self, images: Any, value_range: ValueRange) -> tuple[list[Pixels | None], Inputs]:
        """Return the pictures (None for images not given as host pictures) and the engine's input."""
        if not self.takes_pictures:
            signals = read_signals(images, self.input_layout, self._image_shape)
            return [None] * len(signals), signals
        images = on_host(images)
        batch = self._preprocessed(images)
        if batch is not None:
            tensor = self._checked_batch(batch)
            return [None] * len(tensor), Tensors(tensor)
        if not isinstance(images, np.ndarray | list | tuple | str | bytes) and is_on_device(images):
            on_device = self._on_device(images)
            return [None] * len(on_device), on_device
        pictures = [read_image(source, value_range=value_range) for source in as_list(images)]
        # Missing facts about the file are reported before anything is enqueued.
        self._prepared([])
        return list(pictures), Pictures(pictures, self._prepared)

    def _preprocessed(self, images: Any) -> npt.NDArray[Any] | None:
        """Return a preprocessed batch, or one image (C,H,W) as a batch; None for pictures, floats of 0..1 included."""
        if not isinstance(images, np.ndarray) or images.dtype.kind != "f":
            return None
        if self.input_layout == "NCHW" and images.shape == self._image_shape:
            return images[None]
        return None if images.ndim in (2, 3) else images

    def _on_device(self, images: Any) -> DeviceInputs:
        """Return an array on a device after checking that it fits the model."""
        shape = tuple(int(side) for side in images.shape)
        kind = str(images.dtype).rpartition(".")[2]  # torch has its own types: torch.float32
        pixels = tuple(self._model.side(axis) for axis in "HWC")
        shapes = {"float32": self._image_shape, "uint8": pixels}
        if len(shape) != 4 or shape[1:] != shapes.get(kind):
            raise ImageError(
                f"the array on the device is {kind} {shape}; the model takes float32 "
                f"(N, {_sides(self._image_shape)}), preprocessed, or uint8 (N, {_sides(pixels)})"
            )
        if kind == "uint8":
            self._prepared([])
        return DeviceInputs(images, shape[0], "pixels" if kind == "uint8" else "input")

    def _looked_at(self, method: str, layer: str | Sequence[str] | None) -> tuple[Sequence[int], tuple[str, ...]]:
        """Return the numbers of the explained layers, and the outputs from which a method explains them."""
        row = find_method(method)
        if layer is not None and row.of_image:
            raise ArgumentError(f"method={method!r} looks at the image, not at a layer: omit layer=")
        named = [0] if row.of_image else self._model.default_positions(method)
        positions = named if layer is None else self._positions(layer)
        return positions, self._model.fetched(positions, method)

    def _positions(self, layer: str | Sequence[str]) -> list[int]:
        """Return the numbers of the named layers."""
        names = [layer] if isinstance(layer, str) else list(layer)
        for name in names:
            if name not in self.layers:
                raise LayerError(
                    f"{self.path} does not explain a layer {name!r}: {suggest(str(name), self.layers)}"
                    f"Explained: {', '.join(self.layers)}"
                )
        if not names or len(set(names)) != len(names):
            raise LayerError(f"layer={shown(layer)}: give a name, or a list of different ones")
        return [self.layers.index(name) for name in names]

    def _checked_size(self, size: Any) -> tuple[int, ...] | None:
        """Return the heatmaps' size; None for the layer's own."""
        if isinstance(size, str) and size == "input":
            return self.grid_shape
        if isinstance(size, str) and size == "layer":
            return None
        is_row = isinstance(size, list | tuple) or (isinstance(size, np.ndarray) and size.ndim == 1)
        numbers = tuple(size) if is_row else ()
        if len(numbers) == len(self.grid_shape) and all(is_whole(number) and number > 0 for number in numbers):
            sides = tuple(int(number) for number in numbers)
            if math.prod(sides) <= LARGEST_HEATMAP:
                return sides
        axes = _AXES[len(self.grid_shape)]
        raise ArgumentError(f"size={shown(size)}: give 'input', 'layer' or {axes}, at least 1 each, 2**28 in all")

    def _checked_batch(self, batch: npt.NDArray[Any]) -> Floats:
        """Return a preprocessed batch as float32 of the model's shape."""
        if self._model.metadata.picture is not None:
            raise ImageError(f"{self.path} takes pictures: pass paths or uint8 arrays (H,W,3), not preprocessed floats")
        if batch.ndim != 4 or batch.shape[1:] != self._image_shape:
            raise ImageError(
                f"the batch has shape {batch.shape}; the model takes (N, {', '.join(map(str, self._image_shape))}), "
                f"{self.input_layout}"
            )
        tensor = np.ascontiguousarray(batch, np.float32)
        if not tensor.flags.aligned:
            tensor = tensor.copy()
        bad = kernels.first_not_finite(tensor)
        if bad is not None:
            raise ImageError(f"image {bad} of the batch holds NaN or infinity, or a number beyond float32")
        return tensor


_AXES = {1: "(time,)", 2: "(height, width)", 3: "(depth, height, width)"}


def _above(threshold: float, results: Results, scores: Floats, asked: Indices) -> Results:
    """Leave out boxes by rank below the threshold: their target is -1, and their map is empty."""
    absent = (results.targets < 0) | (asked == ABSENT) | ((asked < 0) & (scores < threshold))
    for maps in (results.heatmaps, results.maps, results.evidence):
        maps[absent] = 0
    return results._replace(targets=np.where(absent, -1, results.targets))


def _sides(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))


def _checked_threads(threads: int | None) -> int | None:
    processors = os.cpu_count() or 1
    if threads is not None and threads > processors:
        raise ArgumentError(
            f"threads={threads!r}: this machine has {processors} processors: give 1 to {processors}, or omit it"
        )
    return threads


def _reopened(kind: type[Explainer], arguments: dict[str, Any]) -> Explainer:
    """Restore a pickled Explainer."""
    return kind(**arguments)


def _checked_convolutions(convolutions: Any) -> str:
    if convolutions not in CHOICES:
        raise ArgumentError(f"convolutions={convolutions!r}: choose {' or '.join(map(repr, CHOICES))}")
    return str(convolutions)
