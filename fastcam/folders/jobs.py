"""`explain_files`: many pictures to overlays on disk, as fast as the model goes, and nothing lost.

Each of several streams takes a batch all the way, on its share of the threads::

    read and prepare -> explain -> draw, encode, write

so that one reads or writes while another one's model runs, and no thread waits for another. Their results go to the
journal in order.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from base64 import b64encode
from collections import deque
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from .. import kernels
from ..errors import ArgumentError, FastcamError, ImageError, NonFiniteError
from ..explaining.explained_model import LARGEST_HEATMAP
from ..explaining.explainer import Explainer, check_count
from ..explaining.explanation import Explanation
from ..files import replacing, writing
from ..pictures.preparing import resize_image, shrink_image
from ..pictures.reading import Pixels, read_picture
from ..pictures.writing import encode_image, palette
from .journal import FOLDERS, RESULTS, Entry, Journal, Stamp, open_journal
from .report import write_report
from .sources import Source, find_sources, slug

FORMATS = ("jpg", "png", "webp", "npy")

# An image whose pixels take more is read twice rather than kept while it waits for its batch and its heatmap.
_KEPT_BYTES = 4 * 2**20
# A thumbnail's longer side is at least this, and less than twice.
_THUMBNAIL_SIDE = 240
# The report draws at a thumbnail's size: finer maps would only make the page heavy.
_FINEST_MAP = 56
_TOP = 5
# Each stream holds a batch and the model's buffers for it.
_MOST_STREAMS = 8

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
Size: TypeAlias = "str | tuple[int, int]"
JobTarget: TypeAlias = "int | str | Sequence[int | str] | None"


@dataclass(frozen=True)
class JobProgress:
    """How far a job is, after each image.

    Attributes
    ----------
    done : int
        Images finished, failed ones and those of a resumed run included.
    failed : int
        Images that could not be explained.
    total : int
        Images in all.
    entry : dict
        The image's line of ``results.jsonl``; empty for the images that a resumed run had finished.
    """

    done: int
    failed: int
    total: int
    entry: Entry


@dataclass(frozen=True)
class JobResult:
    """What `explain_files` did.

    Attributes
    ----------
    results : Path
        ``results.jsonl``, one line an image.
    report : Path or None
        ``report.html``.
    images : int
        Pictures that the inputs named.
    resumed : int
        How many of them an earlier run had done.
    failures : tuple of (str, str)
        Path and reason of each picture that could not be explained.
    several_frames : int
        Files of which only the first frame or page was explained.
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
        """Images per second, those of an earlier run not counted."""
        return (self.images - self.resumed) / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class _Drawing:
    """What is written of an image; ``size`` is None for the picture's own."""

    folder: Path
    format: str
    colormap: str
    alpha: float
    size: tuple[int, int] | None
    report: bool

    @property
    def subfolder(self) -> str:
        return "heatmaps" if self.format == "npy" else "overlays"


@dataclass(frozen=True)
class _Image:
    """An image on its way. ``pixels`` are None where they are read again, ``error`` says why there is no tensor."""

    source: Source
    tensor: NDArray[Any] | None = None
    pixels: Pixels | None = None
    notes: tuple[str, ...] = ()
    stamp: Stamp | None = None
    error: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class _Explained:
    """An image with what the model said of it; ``position`` is its row in the batch."""

    image: _Image
    explanation: Explanation
    position: int
    seconds: float


def explain_files(
    model: str | os.PathLike[str],
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    target: JobTarget = None,
    top: int = 1,
    method: str = "gradcam",
    layer: str | Sequence[str] | None = None,
    format: str = "jpg",  # noqa: A002 - what it is called on the command line
    colormap: str = "jet",
    alpha: float = 0.5,
    size: Size = "image",
    batch: int = 8,
    device: str = "auto",
    threads: int | None = None,
    report: bool = True,
    resume: bool = False,
    progress: Callable[[JobProgress], None] | None = None,
    stdin: BinaryIO | None = None,
) -> JobResult:
    """Explain every picture of files and folders, and write overlays, ``results.jsonl`` and ``report.html``.

    Reading and writing overlap the model, and the memory that is used depends on the batch, not on the number of
    images. A picture that cannot be explained is listed with its reason, and the others are done. Every file appears
    whole or not at all. A run that was interrupted or killed goes on where it was with ``resume``, and ends with the
    files that it would have written at once; a finished one is extended by new pictures, and those that changed since
    are done again.

    Parameters
    ----------
    model : path
        Written by `fastcam.export`.
    inputs : path or sequence of paths
        Pictures, folders (with all pictures below them), glob patterns, .txt or .lst files with one of these a line, or
        "-" for such a list on standard input.
    out : path
        Folder for the results; made where it does not exist.
    target : optional
        Classes to explain, by index or name, the same for all images.
    top : int
        How many of the best classes to explain; not together with ``target``.
    method, layer
        As in `Explainer.__call__`.
    format : {"jpg", "png", "webp", "npy"}
        Overlays in a picture format, or heatmaps as float32 (H,W) arrays in 0..1.
    colormap, alpha
        As in `ImageExplanation.overlay`.
    size : "image", "input" or (height, width)
        Size of the overlays and heatmaps: the picture's own, the model's input's, or another.
    batch : int
        Images given to the model at once.
    device, threads
        As in `Explainer`; the threads also read and write.
    report : bool
        Whether to write the page, its thumbnails, and the maps in ``results.jsonl`` that it needs.
    resume : bool
        Whether to go on with an earlier run in ``out``; it must have had the same settings.
    progress : callable, optional
        Called with a `JobProgress` after each image, in this thread.
    stdin : binary file, optional
        Instead of the process's standard input.

    Returns
    -------
    JobResult

    Notes
    -----
    A line of ``results.jsonl`` holds ``path``, ``id`` and either ``error`` or ``image_size`` (height, width),
    ``classes`` (of each explained class: ``index``, ``label``, ``probability``, ``file`` and, for the report, ``map``:
    the explained layer's map, 8 bits a value, row by row, in base 64), ``map_size``, ``top`` (the five best classes),
    ``thumbnail``, ``notes``, ``stamp`` (bytes of the picture's file, and nanoseconds of its last change) and
    ``seconds`` (``read``, ``model``: the image's share of its batch, ``write``).

    Raises
    ------
    ArgumentError
        An option is wrong, or a resumed run had other settings.
    ImageError
        A folder or pattern holds no pictures, or the model does not say how to prepare one.
    TargetError, LayerError, ModelError, FileFormatError, DeviceError, MissingExtraError
        As `Explainer` and its call.
    WriteError
        The folder cannot be written, is full, is in use by another run, or holds an earlier one.
    """
    _check_drawing(format, colormap, alpha)
    if target is not None and top != 1:
        raise ArgumentError(f"top={top!r} asks for the best classes and target={target!r} for others: choose one")
    threads = os.cpu_count() or 1 if threads is None else threads
    for name, number in (("top", top), ("batch", batch), ("threads", threads)):
        check_count(name, number)
    wanted = f"top{top}" if target is None else target
    folder = _folder(out)
    sources = find_sources(_listed(inputs), [folder / name for name in FOLDERS], stdin)
    streams = min(threads, _MOST_STREAMS, -(-len(sources) // batch))
    explainer = Explainer(model, device=device, threads=threads // streams)
    drawing = _Drawing(folder, format, colormap, alpha, _fixed_size(size, explainer), report)
    job = _Job(explainer, wanted, method, layer, drawing)
    job.try_out()
    settings = {
        "fastcam": version("fastcam"),
        "model_sha256": _digest(explainer.path),
        "target": wanted,
        "method": method,
        "layers": explainer.layers[:1] if layer is None else [layer] if isinstance(layer, str) else list(layer),
        "format": format,
        "colormap": colormap,
        "alpha": alpha,
        "size": size,
        "batch": batch,
        "report": report,
    }
    with open_journal(folder, _plain(settings), resume=resume) as journal:
        return _run(job, sources, journal, batch, streams, progress)


def _run(
    job: _Job,
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
    """Yield the batches that are left to do.

    A batch of which something is missing is done whole, in the company that it had: what a model makes of an image may
    depend, in the last bits, on the images beside it. Pictures that could not be explained are tried by themselves.
    """
    for start in range(0, len(sources), batch):
        members = list(sources[start : start + batch])
        failed = [source for source in members if journal.has_failed(source.id)]
        missing = sum(source.id not in done for source in members)
        left = members if missing > len(failed) else failed
        if left:
            yield left


class _Job:
    """How each image is read, explained and written."""

    def __init__(
        self, explainer: Explainer, target: JobTarget, method: str, layer: str | Sequence[str] | None, drawing: _Drawing
    ) -> None:
        self.explainer = explainer
        self.drawing = drawing
        self._call = partial(explainer, target=target, method=method, layer=layer, size="layer")

    def try_out(self) -> None:
        """Explain a grey picture, so that a wrong target or method is refused before the first file is read."""
        grey = np.full((8, 8, 3), 128, np.uint8)
        with suppress(NonFiniteError):
            targets = self._call(grey).targets[0].tolist()
            twice = sorted({index for index in targets if targets.count(index) > 1})
            if twice:
                raise ArgumentError(f"target names the classes {twice} more than once: name each once")

    def entries(self, groups: Iterable[list[Source]], streams: int) -> Generator[Entry, None, None]:
        """Yield the line of each image when all its files are written, in order."""
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
        # Before the picture is read: what is written meanwhile counts as a change.
        stamp = _stamp(source.path)
        try:
            pixels, is_first_of_several = read_picture(source.path)
            tensor = self.explainer.prepare(pixels)
        except FastcamError as error:
            return _Image(source, error=str(error))
        return _Image(
            source,
            tensor,
            pixels if pixels.nbytes <= _KEPT_BYTES else None,
            ("the file holds several frames or pages: the first one is explained",) if is_first_of_several else (),
            stamp,
            seconds=time.perf_counter() - begin,
        )

    def _explain(self, images: Sequence[_Image]) -> list[_Image | _Explained]:
        """Explain one batch; images that could not be read, or that the model makes no numbers of, stay as they are."""
        found: dict[str, _Image | _Explained] = {image.source.id: image for image in images}
        ready = [image for image in images if image.tensor is not None]
        while ready:
            begin = time.perf_counter()
            tensors = np.concatenate([image.tensor for image in ready if image.tensor is not None])
            try:
                explanation = self._call(tensors, batch=len(ready))
            except NonFiniteError as error:
                bad = ready.pop(error.image)
                reason = f"'{bad.source.path}' makes the model's scores, activations or gradients NaN or infinite"
                found[bad.source.id] = replace(bad, tensor=None, pixels=None, error=reason)
                continue
            seconds = (time.perf_counter() - begin) / len(ready)
            for position, image in enumerate(ready):
                kept = replace(image, tensor=None)
                found[image.source.id] = _Explained(kept, explanation, position, seconds)
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
        """Write an image's files; return what its line says of them."""
        image = item.image
        pixels = read_picture(image.source.path).pixels if image.pixels is None else image.pixels
        maps = item.explanation.maps[item.position]
        entry: Entry = {"image_size": list(pixels.shape[:2]), **self._scores(item)}
        for described, file in zip(
            entry["classes"], self._write_drawings(image.source, pixels, maps, entry), strict=True
        ):
            described["file"] = file
        if self.drawing.report:
            entry |= self._report_parts(image.source, pixels, maps, entry["classes"])
        if image.notes:
            entry["notes"] = list(image.notes)
        return entry

    def _scores(self, item: _Explained) -> Entry:
        """Return ``classes``, the explained ones, and ``top``, the best ones."""
        probabilities = item.explanation.probabilities[item.position]
        best = np.argsort(-item.explanation.logits[item.position], kind="stable")[:_TOP]

        def described(index: int) -> Entry:
            label = str(index) if self.explainer.classes is None else self.explainer.classes[index]
            return {"index": index, "label": label, "probability": round(float(probabilities[index]), 7)}

        targets = item.explanation.targets[item.position].tolist()
        return {
            "classes": [described(index) for index in targets],
            "top": [described(index) for index in best.tolist()],
        }

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
        for number, (described, picture) in enumerate(zip(entry["classes"], drawn, strict=True), start=1):
            label = slug(described["label"])
            name = f"{drawing.subfolder}/{source.id}.{number}.{label or described['index']}.{drawing.format}"
            _write_file(drawing.folder / name, _encoded(picture, Path(name)))
            yield name

    def _report_parts(self, source: Source, pixels: Pixels, maps: NDArray[np.float32], classes: list[Entry]) -> Entry:
        """Write the thumbnail, and add to the classes the maps that the report draws."""
        finest = max(maps.shape[1:])
        if finest > _FINEST_MAP:
            size = [max(1, round(side * _FINEST_MAP / finest)) for side in maps.shape[1:]]
            maps = kernels.resize(maps[None], size, threads=1)[0]
        for described, single in zip(classes, maps, strict=True):
            described["map"] = b64encode(np.rint(single * 255).astype(np.uint8).tobytes()).decode()
        name = f"thumbnails/{source.id}.jpg"
        _write_file(
            self.drawing.folder / name,
            encode_image(shrink_image(pixels, max(pixels.shape[:2]) // _THUMBNAIL_SIDE), Path(name)),
        )
        return {"map_size": list(maps.shape[1:]), "thumbnail": name}


def _ahead(
    pool: ThreadPoolExecutor, work: Callable[[_Item], _Result], items: Iterable[_Item], limit: int
) -> Iterator[_Result]:
    """Yield the results in order, with at most ``limit`` items begun and not yet yielded."""
    pending: deque[Future[_Result]] = deque()
    for item in items:
        pending.append(pool.submit(work, item))
        if len(pending) >= limit:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _check_drawing(format_: Any, colormap: Any, alpha: Any) -> None:
    if format_ not in FORMATS:
        raise ArgumentError(f"format={format_!r}: choose one of {', '.join(FORMATS)}")
    if not isinstance(colormap, str):
        raise ArgumentError(f"colormap={colormap!r}: give the name of a colour map")
    palette(colormap)
    if not isinstance(alpha, int | float | np.number) or not 0 <= alpha <= 1:
        raise ArgumentError(f"alpha={alpha!r}: give a number 0..1")


def _fixed_size(size: Any, explainer: Explainer) -> tuple[int, int] | None:
    if isinstance(size, str):
        sizes = {"image": None, "input": explainer.input_size}
        if size not in sizes:
            raise ArgumentError(f"size={size!r}: choose 'image', 'input' or (height, width)")
        return sizes[size]
    if not isinstance(size, Sequence | np.ndarray) or len(size) != 2:
        raise ArgumentError(f"size={size!r}: give (height, width)")
    for side in size:
        check_count("size", side)
    height, width = int(size[0]), int(size[1])
    if height * width > LARGEST_HEATMAP:
        raise ArgumentError(f"size={size!r}: give (height, width), 2**28 pixels in all at most")
    return height, width


def _folder(out: Any) -> Path:
    if not isinstance(out, str | os.PathLike) or "\0" in str(out) or not str(out):
        raise ArgumentError(f"out={out!r}: give the path of a folder")
    return Path(out)


def _listed(inputs: Any) -> Iterable[Any]:
    if isinstance(inputs, str | os.PathLike):
        return [inputs]
    if isinstance(inputs, bytes) or not isinstance(inputs, Iterable):
        raise ArgumentError(f"inputs={inputs!r}: give a path or a list of paths")
    return inputs


def _stamp(path: str) -> Stamp | None:
    """Return size and time of the last change, None where there is no such file."""
    try:
        status = os.stat(path)  # noqa: PTH116 - Path.stat is this, and a Path an image
    except (OSError, ValueError):
        return None
    return [status.st_size, status.st_mtime_ns]


def _encoded(picture: NDArray[Any], path: Path) -> memoryview:
    if path.suffix != ".npy":
        return encode_image(picture, path)
    data = io.BytesIO()
    np.save(data, picture)
    return data.getbuffer()


def _write_file(path: Path, data: memoryview) -> None:
    # One wait for the disk an image would be most of the time; the journal checks the files of an earlier run.
    with replacing(path, durable=False) as file:
        file.write(data)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings as JSON gives them back, NumPy's numbers as Python's."""
    plain: dict[str, Any] = json.loads(json.dumps(settings, default=lambda value: value.tolist()))
    return plain


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
