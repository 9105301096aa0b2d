"""`explain_files`: pictures in, overlays and results on disk, at the speed of the model and without losing anything.

Several streams run side by side, each with its share of the threads. A stream takes one batch at a time through ::

    read and prepare -> explain -> draw, encode, write

so that one stream reads or writes while another runs the model, and no thread waits for another. Results reach the
journal in order.
"""

from __future__ import annotations

import io
import json
import math
import os
import time
from base64 import b64encode
from collections import deque
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from itertools import repeat
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from .. import kernels
from ..arguments import (
    check_callable,
    check_choice,
    check_count,
    check_flag,
    check_fraction,
    check_mapping,
    check_names,
    check_path,
    check_shard,
    check_text,
    check_text_or_pair,
    checked,
    optional,
    renamed,
    shown,
)
from ..arrays import Floats, Pixels
from ..errors import ArgumentError, FastcamError, ImageError, NonFiniteError
from ..explaining.boxes import check_threshold
from ..explaining.explained_model import LARGEST_HEATMAP
from ..explaining.explainer import Explainer
from ..explaining.image_explanation import ImageExplanation, caption, captioned
from ..files import digest_file, replacing, writing
from ..pictures.captions import add_boxes
from ..pictures.letterbox import Frame
from ..pictures.preparing import resize_image, shrink_image
from ..pictures.reading import read_picture
from ..pictures.writing import encode_image, palette
from .journal import FOLDERS, RESULTS, Entry, Journal, Stamp, open_journal
from .report import write_report
from .sources import Source, find_sources, slug

FORMATS = ("jpg", "png", "webp", "npy")

# Larger images are read twice instead of being kept in memory until their batch has been explained.
_KEPT_BYTES = 4 * 2**20
# A thumbnail's longer side is at least this many pixels, and less than twice as many.
_THUMBNAIL_SIDE = 240
# The report draws at the size of a thumbnail: finer maps would only enlarge the page.
_FINEST_MAP = 56
_TOP = 5
# Boxes that are explained by default.
BOXES = 10
# A probability that float32 tells from 0, so that its logarithm is finite.
_TINY = 1e-12
# Each stream needs memory for a batch and the model's buffers.
_MOST_STREAMS = 8

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
Size: TypeAlias = "str | tuple[int, int]"
JobTarget: TypeAlias = "int | str | Sequence[int | str] | None"


@dataclass(frozen=True)
class JobProgress:
    """The progress of a job, reported after each image.

    Attributes
    ----------
    done : int
        Finished images, including failed ones and those of the resumed run.
    failed : int
        Images that could not be explained.
    total : int
        All images.
    entry : dict
        The image's line of ``results.jsonl``; empty when reporting images that an earlier run finished.
    """

    done: int
    failed: int
    total: int
    entry: Entry


@dataclass(frozen=True)
class JobResult:
    """The result of `explain_files`.

    Attributes
    ----------
    results : Path
        ``results.jsonl``, one line per image.
    report : Path or None
        ``report.html``.
    images : int
        Number of pictures named by the inputs.
    resumed : int
        How many of them an earlier run finished.
    failures : tuple of (str, str)
        Path and reason of each picture that could not be explained.
    several_frames : int
        Files with several frames or pages, of which only the first was explained.
    seconds : float
        Wall time from the first image to the last file.
    """

    results: Path
    report: Path | None
    images: int
    resumed: int
    failures: tuple[tuple[str, str], ...]
    several_frames: int
    seconds: float

    @property
    def rate(self) -> float:
        """Images per second, not counting those of an earlier run."""
        return (self.images - self.resumed) / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Drawing:
    """How an image's heatmaps are drawn.

    Attributes
    ----------
    folder : Path
    format : str or None
        One of `FORMATS`; None for no files.
    colormap : str
    alpha : float
    size : (int, int) or None
        Of the drawings; None for the picture's own size.
    report : bool
        Whether each line gets the maps that the report draws.
    thumbnails : bool
        Whether it also gets a thumbnail.
    """

    folder: Path
    format: str | None
    colormap: str
    alpha: float
    size: tuple[int, int] | None
    report: bool
    thumbnails: bool = True

    @property
    def subfolder(self) -> str:
        """Where the drawings go."""
        return "heatmaps" if self.format == "npy" else "overlays"


@dataclass(frozen=True)
class _Image:
    """An image in progress; ``pixels`` is None if they will be read again; ``error`` says why a tensor is missing.

    ``frame`` is where the picture lies in the tensor.
    """

    source: Source
    tensor: NDArray[Any] | None = None
    frame: Frame | None = None
    pixels: Pixels | None = None
    notes: tuple[str, ...] = ()
    stamp: Stamp | None = None
    error: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class _Explained:
    """An image with its explanation."""

    image: _Image
    explanation: ImageExplanation
    seconds: float


# Of the arguments that every job over many pictures takes.
JOB_CHECKS: Mapping[str, Callable[[str, Any], Any]] = {
    "model": check_path,
    "top_k": optional(check_count),
    "method": optional(check_text),
    "settings": optional(check_mapping),
    "layer": optional(check_names),
    "colormap": check_text,
    "alpha": check_fraction,
    "size": check_text_or_pair,
    "batch_size": check_count,
    "device": check_text,
    "threads": optional(check_count),
    "report": check_flag,
    "resume": check_flag,
}


@renamed(top="top_k", batch="batch_size")
@checked(**JOB_CHECKS, out=check_path, shard=optional(check_shard), progress=optional(check_callable))
def explain_files(
    model: str | os.PathLike[str],
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    target: JobTarget = None,
    top_k: int | None = None,
    threshold: float | None = None,
    method: str | None = None,
    settings: Mapping[str, Any] | None = None,
    background: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    layer: str | Sequence[str] | None = None,
    format: str = "jpg",  # noqa: A002 - its name on the command line
    colormap: str = "jet",
    alpha: float = 0.5,
    size: Size = "image",
    batch_size: int = 8,
    device: str = "auto",
    threads: int | None = None,
    report: bool = True,
    shard: tuple[int, int] | None = None,
    resume: bool = False,
    progress: Callable[[JobProgress], None] | None = None,
    stdin: BinaryIO | None = None,
) -> JobResult:
    """Explain all pictures in files and folders, and write overlays, ``results.jsonl`` and ``report.html``.

    Reading and writing overlap with the model, and memory use depends on the batch size, not on the number of images. A
    picture that cannot be explained is listed with the reason, and the others are explained. Every file is written
    completely or not at all. A run that was interrupted or killed continues with ``resume`` and ends with the same
    files as a run without interruption; a finished run is extended by new pictures, and pictures that have changed are
    explained again.

    Parameters
    ----------
    model : path
        Written by `fastcam.export`.
    inputs : path or sequence of paths
        Pictures, folders (with all pictures below them), glob patterns, .txt or .lst files with one of these per line,
        or "-" for such a list on standard input.
    out : path
        Folder for the results; created if it does not exist. The job's own files in it must not be links.
    target : optional
        Classes to explain, by index or name, the same for all images.
    top_k : int, optional
        Explain the top K classes of each image, by default 1; of a detector the K best boxes, by default 10. Cannot be
        combined with ``target``.
    threshold : float, optional
        The lowest probability of a box to explain, for a detector; 0.25 by default.
    method, settings, layer
        As in `Explainer.__call__`.
    background : path or sequence of paths, optional
        Pictures and folders as in ``inputs``, for method "expectedgradients": see `Explainer`.
    format : {"jpg", "png", "webp", "npy"}
        Overlays in a picture format, or heatmaps as float32 (H,W) arrays in 0..1. A detector's overlay shows all boxes
        of a picture, and at each pixel the strongest of their maps.
    colormap, alpha
        As in `ImageExplanation.overlay`.
    size : "image", "input" or (height, width)
        Size of the overlays and heatmaps: that of the picture, that of the model's input, or a given one.
    batch_size : int
        Number of images in a batch.
    device, threads
        As in `Explainer`; the threads also read and write.
    report : bool
        Whether to write the page, its thumbnails, and the maps in ``results.jsonl`` that it needs.
    shard : (int, int), optional
        Explain only every n-th picture: (3, 16) is the third of sixteen shares, so that sixteen machines can work on
        one job. `merge_results` joins their folders.
    resume : bool
        Whether to continue an earlier run in ``out``, which must have had the same settings.
    progress : callable, optional
        Called with a `JobProgress` after each image, in this thread.
    stdin : binary file, optional
        Read instead of the process's standard input.

    Returns
    -------
    JobResult

    Notes
    -----
    A line of ``results.jsonl`` contains ``path``, ``id`` and either ``error`` or ``image_size`` (height, width),
    ``classes`` (for each explained class ``index``, ``label``, ``probability`` (null if the file does not define one),
    ``score`` (the logit), ``evidence`` (the share of positive evidence, 0..1), ``caption`` (if there is little of it),
    ``box`` (of a detector: left, top, right and bottom in pixels), ``file`` and, for the report, ``map``: the explained
    layer's map as 8-bit values in row-major order, base64), ``map_size``, ``top`` (the top 5 classes), ``thumbnail``,
    ``overlay`` (of a detector), ``notes``, ``stamp`` (size of the picture's file in bytes, modification time in
    nanoseconds) and ``seconds`` (``read``, ``model``: the image's share of its batch, ``write``).

    Raises
    ------
    ArgumentError
        An option is wrong, or the resumed run had other settings.
    ImageError
        A folder or pattern contains no pictures, or the model does not define how to prepare one.
    TargetError, LayerError, ModelError, FileFormatError, DeviceError, MissingExtraError
        As `Explainer` and its call.
    WriteError
        The folder cannot be written, is full, is in use by another run, or contains an earlier run or links.
    """
    check_choice("format", format, FORMATS)
    palette(colormap)
    threads = threads or os.cpu_count() or 1
    if target is not None and top_k is not None:
        raise ArgumentError(f"top_k={top_k} and target={shown(target)} both choose the classes: pass only one of them")
    folder = Path(out)
    sources = find_sources(_listed(inputs), [folder / name for name in FOLDERS], stdin)
    if shard is not None:
        sources = sources[shard[0] - 1 :: shard[1]]
    streams = max(1, min(streams_of(threads), -(-len(sources) // batch_size)))
    compared = [source.path for source in find_sources(_listed(background))] if background is not None else None
    explainer = Explainer(model, device=device, threads=threads // streams, background=compared)
    drawing = Drawing(folder, format, colormap, alpha, fixed_size(size, explainer), report)
    method = explainer.default_method if method is None else method
    wanted = f"top{top_k or (BOXES if explainer.has_boxes else 1)}" if target is None else target
    lowest = check_threshold(threshold, has_boxes=explainer.has_boxes)
    job = PictureJob(explainer, wanted, method, settings, layer, drawing, lowest)
    job.try_out()
    record = {
        "fastcam": version("fastcam"),
        "model_sha256": digest_file(explainer.path),
        "target": wanted,
        "method": method,
        "layers": explainer.default_layers if layer is None else [layer] if isinstance(layer, str) else list(layer),
        "format": format,
        "colormap": colormap,
        "alpha": alpha,
        "size": size,
        "batch_size": batch_size,
        "report": report,
        **({} if threshold is None else {"threshold": threshold}),
        **({} if not settings else {"settings": settings}),
        **({} if compared is None else {"background_sha256": [digest_file(path) for path in compared]}),
        **({} if shard is None else {"shard": list(shard)}),
    }
    with open_journal(folder, plain_settings(record), resume=resume) as journal:
        return _run(job, sources, journal, batch_size, streams, progress)


def streams_of(threads: int) -> int:
    """Return how many streams read, explain and write side by side, on so many processors."""
    return max(1, min(threads, _MOST_STREAMS))


def _run(
    job: PictureJob,
    sources: Sequence[Source],
    journal: Journal,
    batch: int,
    streams: int,
    progress: Callable[[JobProgress], None] | None,
) -> JobResult:
    folder = job.drawing.folder
    facts = {
        "model": str(job.explainer.path),
        "providers": job.explainer.providers,
        "images": len(sources),
        "started": _now(),
    }
    journal.start(facts)
    for subfolder in (job.drawing.subfolder, *(["thumbnails"] if job.drawing.report else [])):
        with writing(folder / subfolder):
            (folder / subfolder).mkdir(exist_ok=True)
    earlier = {
        source.id
        for source in sources
        if journal.is_done(source.id) and journal.is_done(source.id, _stamp(source.path))
    }
    resumed = done = len(earlier)
    todo = list(_todo(sources, earlier, journal, batch))
    failures = []
    several_frames = 0
    begin = time.perf_counter()
    if progress and resumed:
        progress(JobProgress(done, 0, len(sources), {}))
    with closing(job.entries(todo, streams)) as entries:
        for entry in entries:
            done += entry["id"] not in earlier
            journal.add(entry)
            if "error" in entry:
                failures.append((entry["path"], entry["error"]))
            several_frames += bool(entry.get("notes"))
            if progress:
                progress(JobProgress(done, len(failures), len(sources), entry))
    seconds = time.perf_counter() - begin
    times = {"seconds": round(seconds, 3), "finished": _now()}
    journal.finish([source.id for source in sources], {**facts, **times})
    page = write_report(folder) if job.drawing.report else None
    return JobResult(
        folder / RESULTS, page, len(sources), resumed, tuple(failures), several_frames, time.perf_counter() - begin
    )


def _todo(sources: Sequence[Source], done: Container[str], journal: Journal, batch: int) -> Iterator[list[Source]]:
    """Yield the batches that remain.

    A batch with missing images is repeated as a whole, because the last bits of a result may depend on the other images
    of its batch. Pictures that could not be explained are retried by themselves.
    """
    for start in range(0, len(sources), batch):
        members = list(sources[start : start + batch])
        failed = [source for source in members if journal.has_failed(source.id)]
        missing = sum(source.id not in done for source in members)
        left = members if missing > len(failed) else failed
        if left:
            yield left


class PictureJob:
    """How each image is read, explained and written: for each the line of ``results.jsonl``, and files."""

    def __init__(
        self,
        explainer: Explainer,
        target: JobTarget,
        method: str,
        settings: Mapping[str, Any] | None,
        layer: str | Sequence[str] | None,
        drawing: Drawing,
        threshold: float | None,
    ) -> None:
        self.explainer = explainer
        self.drawing = drawing
        self._call = partial(
            explainer,
            target=target,
            method=method,
            settings=settings,
            layer=layer,
            size="layer",
            threshold=threshold,
        )

    def try_out(self) -> None:
        """Explain a grey picture, so that an invalid target or method is rejected before the first file is read."""
        grey = np.full((8, 8, 3), 128, np.uint8)
        with suppress(NonFiniteError):
            targets = self._call(grey)[0].targets.tolist()
            twice = sorted({index for index in targets if targets.count(index) > 1})
            if twice:
                raise ArgumentError(f"target contains the classes {twice} more than once: name each one once")

    def entries(self, groups: Iterable[list[Source]], streams: int) -> Generator[Entry, None, None]:
        """Yield the line of each image in order, once all its files have been written."""
        pool = ThreadPoolExecutor(streams, "fastcam")
        try:
            for entries in _ahead(pool, self._group_entries, groups, streams + 1):
                yield from entries
        finally:
            pool.shutdown(cancel_futures=True)

    def _group_entries(self, sources: Iterable[Source]) -> list[Entry]:
        return [self._write(item) for item in self._explain([self._read(source) for source in sources])]

    def _read(self, source: Source) -> _Image:
        begin = time.perf_counter()
        # Taken before the picture is read, so that a later change is noticed.
        stamp = _stamp(source.path)
        try:
            pixels, is_first_of_several = read_picture(source.path)
            tensor = self.explainer.prepare(pixels)
        except FastcamError as error:
            return _Image(source, error=str(error))
        return _Image(
            source,
            tensor,
            self.explainer.frame(pixels),
            pixels if pixels.nbytes <= _KEPT_BYTES else None,
            ("the file contains several frames or pages: only the first is explained",) if is_first_of_several else (),
            stamp,
            seconds=time.perf_counter() - begin,
        )

    def _explain(self, images: Sequence[_Image]) -> list[_Image | _Explained]:
        """Explain one batch; images that cannot be read, or whose results are not finite, keep their error."""
        found: dict[str, _Image | _Explained] = {image.source.id: image for image in images}
        ready = [image for image in images if image.tensor is not None]
        while ready:
            begin = time.perf_counter()
            tensors = np.concatenate([image.tensor for image in ready if image.tensor is not None])
            try:
                explanation = self._call(tensors, batch_size=len(ready))
            except NonFiniteError as error:
                bad = ready.pop(error.image)
                reason = f"'{bad.source.path}': the model's scores, activations or gradients are NaN or infinite"
                found[bad.source.id] = replace(bad, tensor=None, pixels=None, error=reason)
                continue
            seconds = (time.perf_counter() - begin) / len(ready)
            for position, image in enumerate(ready):
                kept, explained = replace(image, tensor=None), explanation[position]
                placed = explained if image.frame is None else explained.placed(image.frame)
                found[image.source.id] = _Explained(kept, placed, seconds)
            break
        return list(found.values())

    def _write(self, item: _Image | _Explained) -> Entry:
        image = item if isinstance(item, _Image) else item.image
        entry: Entry = {"path": image.source.path, "id": image.source.id}
        if isinstance(item, _Image):
            return {**entry, "error": item.error}
        begin = time.perf_counter()
        try:
            entry |= self._drawn(item)
        except ImageError as error:
            return {**entry, "error": str(error)}
        entry["stamp"] = image.stamp
        times = {"read": image.seconds, "model": item.seconds, "write": time.perf_counter() - begin}
        return {**entry, "seconds": {name: round(value, 6) for name, value in times.items()}}

    def _drawn(self, item: _Explained) -> Entry:
        """Write an image's files; return the fields of its line that describe them."""
        image = item.image
        pixels = read_picture(image.source.path).pixels if image.pixels is None else image.pixels
        maps = item.explanation.picture_maps
        entry: Entry = {"image_size": list(pixels.shape[:2]), **self._scores(item.explanation)}
        files: Iterator[str]
        if self.drawing.format is None:
            files = iter(())
        elif self.explainer.has_boxes and self.drawing.format != "npy":
            entry["overlay"] = self._write_boxes(image.source, pixels, item.explanation, entry["classes"])
            files = repeat(entry["overlay"])
        else:
            files = self._write_drawings(image.source, pixels, maps, entry)
        for described, file in zip(entry["classes"], files, strict=False):
            described["file"] = file
        if self.drawing.report:
            entry |= self._report_parts(image.source, pixels, maps, entry["classes"])
        if image.notes:
            entry["notes"] = list(image.notes)
        return entry

    def _scores(self, explained: ImageExplanation) -> Entry:
        """Return ``classes``, the explained ones, and ``top``, the top 5."""
        if explained.boxes is not None and explained.box_scores is not None:
            boxes = _described_boxes(explained, explained.boxes, explained.box_scores)
            return {"classes": boxes, "top": [{name: box[name] for name in _SCORE_FIELDS} for box in boxes[:_TOP]]}
        best = np.argsort(-explained.logits, kind="stable")[:_TOP]

        def described(index: int) -> Entry:
            label = str(index) if self.explainer.classes is None else self.explainer.classes[index]
            known = explained.probabilities
            probability = None if known is None else round(float(known[index]), 7)
            return {
                "index": index,
                "label": label,
                "probability": probability,
                "score": round(float(explained.logits[index]), 6),
            }

        classes = [
            {**described(index), "evidence": share, **_caption(share)}
            for index, share in zip(explained.targets.tolist(), explained.evidence.round(7).tolist(), strict=True)
        ]
        return {
            "classes": classes,
            "top": [described(index) for index in best.tolist()],
        }

    def _write_boxes(
        self, source: Source, pixels: Pixels, explained: ImageExplanation, classes: Sequence[Entry]
    ) -> str:
        """Write one overlay with all boxes; return its name."""
        drawing = self.drawing
        size = drawing.size or (pixels.shape[0], pixels.shape[1])
        canvas = pixels if size == pixels.shape[:2] else resize_image(pixels, size)
        if classes:
            strongest = np.ascontiguousarray(explained.picture_maps.max(axis=0)[None, None])
            colours = palette(drawing.colormap)
            canvas = kernels.colorize(strongest, canvas[None], palette=colours, alpha=drawing.alpha, threads=1)[0, 0]
            scale = np.array([size[1] / pixels.shape[1], size[0] / pixels.shape[0]] * 2, np.float32)
            boxes = np.array([item["box"] for item in classes], np.float32) * scale
            canvas = add_boxes(canvas, boxes, [f"{item['label']} {item['probability']:.0%}" for item in classes])
        name = f"{drawing.subfolder}/{source.id}.boxes.{drawing.format}"
        _write_file(drawing.folder / name, _encoded(canvas, Path(name)))
        return name

    def _write_drawings(self, source: Source, pixels: Pixels, maps: NDArray[np.float32], entry: Entry) -> Iterator[str]:
        """Write one file for each class; yield their names."""
        drawing = self.drawing
        size = drawing.size or (pixels.shape[0], pixels.shape[1])
        if drawing.format == "npy":
            drawn = kernels.resize(maps[None], size, threads=1)[0]
        else:
            canvas = pixels if size == pixels.shape[:2] else resize_image(pixels, size)
            colours = palette(drawing.colormap)
            drawn = kernels.colorize(maps[None], canvas[None], palette=colours, alpha=drawing.alpha, threads=1)[0]
            drawn = [
                captioned(overlay, canvas, described["evidence"])
                for overlay, described in zip(drawn, entry["classes"], strict=True)
            ]
        for number, (described, picture) in enumerate(zip(entry["classes"], drawn, strict=True), start=1):
            label = slug(described["label"])
            name = f"{drawing.subfolder}/{source.id}.{number}.{label or described['index']}.{drawing.format}"
            _write_file(drawing.folder / name, _encoded(picture, Path(name)))
            yield name

    def _report_parts(self, source: Source, pixels: Pixels, maps: NDArray[np.float32], classes: list[Entry]) -> Entry:
        """Write the thumbnail, and add to the classes the maps that the report draws."""
        finest = max(maps.shape[1:])
        if finest > _FINEST_MAP and len(maps):
            size = [max(1, round(side * _FINEST_MAP / finest)) for side in maps.shape[1:]]
            maps = kernels.resize(maps[None], size, threads=1)[0]
        for described, single in zip(classes, maps, strict=True):
            described["map"] = b64encode(np.rint(single * 255).astype(np.uint8).tobytes()).decode()
        if not self.drawing.thumbnails:
            return {"map_size": list(maps.shape[1:])}
        name = f"thumbnails/{source.id}.jpg"
        _write_file(
            self.drawing.folder / name,
            encode_image(shrink_image(pixels, max(pixels.shape[:2]) // _THUMBNAIL_SIDE), Path(name)),
        )
        return {"map_size": list(maps.shape[1:]), "thumbnail": name}


_SCORE_FIELDS = ("index", "label", "probability", "score")


def _described_boxes(explained: ImageExplanation, boxes: Floats, scores: Floats) -> list[Entry]:
    """Return the boxes of a picture as ``classes`` of its line."""
    rows = zip(
        explained.targets.tolist(),
        explained.labels,
        scores.tolist(),
        boxes.round(3).tolist(),
        explained.evidence.round(7).tolist(),
        strict=True,
    )
    return [
        {
            "index": target,
            "label": label,
            "probability": round(score, 7),
            "score": round(math.log(max(score, _TINY) / max(1 - score, _TINY)), 6),
            "box": box,
            "evidence": share,
            **_caption(share),
        }
        for target, label, score, box, share in rows
    ]


def _caption(evidence: float) -> Entry:
    """Return the caption of a map as a field of its class, if it needs one."""
    text = caption(evidence)
    return {} if text is None else {"caption": text}


def _ahead(
    pool: ThreadPoolExecutor, work: Callable[[_Item], _Result], items: Iterable[_Item], limit: int
) -> Iterator[_Result]:
    """Yield the results in order, with at most ``limit`` items started and not yet yielded."""
    pending: deque[Future[_Result]] = deque()
    for item in items:
        pending.append(pool.submit(work, item))
        if len(pending) >= limit:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def fixed_size(size: Any, explainer: Explainer) -> tuple[int, int] | None:
    """Return the size of drawings, None for that of each picture; raises ArgumentError."""
    if isinstance(size, str):
        sizes = {"image": None, "input": explainer.input_size}
        if size not in sizes:
            raise ArgumentError(f"size={shown(size)}: choose 'image', 'input' or (height, width)")
        return sizes[size]
    height, width = size
    if height * width > LARGEST_HEATMAP:
        raise ArgumentError(f"size={shown(size)}: give (height, width), at most 2**28 pixels in total")
    return height, width


def _listed(inputs: Any) -> list[Any]:
    if isinstance(inputs, str | os.PathLike):
        return [inputs]
    try:
        return list(inputs)
    except Exception:  # noqa: BLE001 - the caller's object may raise anything when it is iterated
        raise ArgumentError(f"inputs={shown(inputs)}: give a path or a list of paths") from None


def _stamp(path: str) -> Stamp | None:
    """Return size and modification time; None if there is no such file."""
    try:
        status = os.stat(path)  # noqa: PTH116 - Path.stat does the same, and needs a Path per image
    except (OSError, ValueError):
        return None
    return [status.st_size, status.st_mtime_ns]


def _encoded(picture: NDArray[Any], path: Path) -> memoryview:
    if path.suffix != ".npy":
        return encode_image(picture, path)
    data = io.BytesIO()
    np.save(data, picture)
    return memoryview(data.getvalue())


def _write_file(path: Path, data: memoryview) -> None:
    # Waiting for the disk for every image would dominate; instead, the journal checks the files of an earlier run.
    with replacing(path, durable=False) as file:
        file.write(data)


def plain_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings as JSON reads them back, with NumPy numbers as Python numbers."""
    try:
        plain: dict[str, Any] = json.loads(json.dumps(settings, default=lambda value: value.tolist()))
    except (AttributeError, TypeError, ValueError) as error:
        raise ArgumentError(f"the settings cannot be written as JSON ({error}): give numbers and strings") from None
    return plain


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
