"""`explain_dataset`: pictures explained by a Ray cluster, results in Parquet files.

Each actor of a pool opens the model once and explains batches of pictures as `explain_files` does, with the same rows.
It writes one Parquet file per batch, named by the batch's pictures, and returns only two counts: the object store stays
small, and a batch that Ray repeats after a crash replaces its own file.

In: paths, or a Ray dataset. Out: ``parts/*.parquet``, ``run.json``, and ``report/`` with the page of `explain_files`.
Imports `folders`, `explaining` and the ground.
"""

from __future__ import annotations

import io
import json
import logging
import tempfile
import time
from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from . import kernels
from .arguments import (
    check_choice,
    check_count,
    check_fraction,
    check_number,
    check_text,
    checked,
    optional,
    shown,
)
from .errors import ArgumentError, FastcamError, MissingExtraError, WriteError
from .explaining.explainer import Explainer
from .files import digest, digest_file
from .folders.jobs import (
    BOXES,
    FORMATS,
    JOB_CHECKS,
    Drawing,
    JobTarget,
    PictureJob,
    Size,
    fixed_size,
    plain_settings,
    streams_of,
)
from .folders.journal import FOLDERS, PAGE, RESULTS, RUN, Entry
from .folders.report import write_report
from .folders.sources import Source, find_sources, named_source
from .pictures.writing import encode_image, palette

if TYPE_CHECKING:
    import os

    import pyarrow as pa
    import pyarrow.fs

__all__ = ["DatasetResult", "explain_dataset"]

_PARTS, _REPORT = "parts", "report"
# A page of more is slow to write from one machine; the Parquet files hold all of them.
_REPORTED = 1000
# Protobuf ends at 2 GB; larger models keep their weights in a second file.
_LARGEST_MODEL = 2 * 2**30
# A node's last processor reads, schedules and writes.
_SPARE = 1.0


class DatasetResult(NamedTuple):
    """The result of `explain_dataset`.

    Attributes
    ----------
    parts : str
        The folder of Parquet files.
    report : str or None
        The page.
    images : int
        Pictures in all files, each once.
    resumed : int
        How many of them an earlier run had finished.
    failed : int
        How many could not be explained: their rows say why.
    seconds : float
    """

    parts: str
    report: str | None
    images: int
    resumed: int
    failed: int
    seconds: float


class _Plan(NamedTuple):
    """What every actor needs, apart from the model itself."""

    model: str
    sha256: str
    target: JobTarget
    method: str
    settings: Mapping[str, Any] | None
    layer: str | Sequence[str] | None
    threshold: float | None
    format: str | None
    colormap: str
    alpha: float
    size: Size
    thumbnails: bool
    batch_size: int
    device: str
    threads: int
    out: str


@checked(
    **JOB_CHECKS,
    out=check_text,
    threshold=optional(check_fraction),
    rows_per_file=check_count,
    actors=optional(check_count),
)
def explain_dataset(
    model: str | os.PathLike[str],
    source: Any,
    out: str,
    *,
    target: JobTarget = None,
    top_k: int | None = None,
    threshold: float | None = None,
    method: str | None = None,
    settings: Mapping[str, Any] | None = None,
    layer: str | Sequence[str] | None = None,
    format: str | None = None,  # noqa: A002 - the name that it has in `explain_files` and on the command line
    colormap: str = "jet",
    alpha: float = 0.5,
    size: Size = "image",
    batch_size: int = 8,
    rows_per_file: int = 256,
    actors: int | None = None,
    threads: int | None = None,
    gpus: float = 0,
    device: str = "auto",
    report: bool = True,
    resume: bool = False,
) -> DatasetResult:
    """Explain pictures on a Ray cluster, and write one row per picture to Parquet files.

    The rows are the lines of `explain_files`. Killed workers and nodes lose and double nothing: Ray repeats their
    batches, each batch replaces its own file, and at the end every picture is counted. A job that was stopped as a
    whole continues with ``resume``.

    Parameters
    ----------
    model : path
        Written by `fastcam.export`, in one file. It is sent to the nodes that do not have it.
    source : path, sequence of paths, or ray.data.Dataset
        Paths, folders and patterns as in `explain_files`, on storage that all nodes share. Or a dataset from one of
        Ray's own readers, with the columns "path" and "bytes", as ``read_binary_files(..., include_paths=True)`` gives
        them, from S3 and the like too; or "path" and "image", as ``read_images(..., include_paths=True)`` does. Without
        "path", rows are named by their content.
    out : str
        A folder that all nodes share, or an address that pyarrow knows, such as "s3://bucket/why".
    target, top_k, threshold, method, settings, layer, colormap, alpha, size, batch_size
        As in `explain_files`.
    format : {None, "jpg", "png", "webp", "npy"}
        None writes each heatmap as levels of 0..255 at the layer's size, in the column ``map``. Others also draw
        overlays (or float32 heatmaps), in the column ``drawing``.
    rows_per_file : int
        Pictures per batch of an actor, and so per Parquet file.
    actors : int, optional
        Size of the pool; by default one for each node.
    threads : int, optional
        Processors of one actor; by default those of the smallest node. One of them is left to Ray's own tasks when
        actors are placed.
    gpus : float
        GPUs of one actor; with ``device="cuda"`` usually 1.
    device : str
        As in `Explainer`, on the nodes.
    report : bool
        Whether to store thumbnails, and to write the page, of the first 1,000 pictures.
    resume : bool
        Whether to continue an earlier run in ``out``, which must have had the same settings.

    Returns
    -------
    DatasetResult

    Raises
    ------
    ArgumentError
        An option is wrong, or the resumed run had other settings.
    WriteError
        The folder holds an earlier run already.
    FastcamError
        As `explain_files` does; or pictures are missing although Ray reported no error.
    MissingExtraError
        Ray is not installed.
    """
    ray, _ = _import_ray(), _import_arrow()
    begin = time.perf_counter()
    gpus = float(check_number("gpus", gpus, lambda x: x >= 0, "a number, at least 0"))
    if format is not None:
        check_choice("format", format, FORMATS)
    if not ray.is_initialized():
        ray.init(logging_level=logging.ERROR)
    nodes = _nodes(ray)
    # Workers have a working folder of their own.
    path, out = Path(model).absolute(), out if "://" in out else str(Path(out).absolute())
    if target is not None and top_k is not None:
        raise ArgumentError(f"top_k={top_k} and target={shown(target)} both choose the classes: pass only one of them")
    wanted = target if top_k is None else f"top{top_k}"
    plan = _Plan(
        str(path), digest_file(path), wanted, method or "", settings, layer, threshold, format, colormap,
        alpha, size, report, batch_size, device, threads or min(nodes), out,
    )  # fmt: skip
    plan, facts = _tried(plan)
    _start(plan, facts, resume)
    done = {row["id"] for row in _rows(out, ["id", "error"]) if row["error"] is None}
    dataset, ids = _dataset(ray, source, done, rows_per_file)
    if dataset is not None:
        reserved = max(_SPARE / 2, plan.threads - _SPARE)
        counts = dataset.map_batches(
            _Actor,
            fn_constructor_args=(plan, [ray.put(_whole(path))]),
            batch_size=rows_per_file,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=actors or len(nodes)),
            num_cpus=reserved,
            num_gpus=gpus or None,
            max_restarts=-1,
            max_task_retries=-1,
        )
        # Two numbers for each file.
        counts.take_all()
    images, failed = _check(out, ids)
    page = _write_page(plan, facts, ids) if report else None
    seconds = time.perf_counter() - begin
    _finish(out, {"images": images, "failed": failed, "seconds": round(seconds, 3)})
    return DatasetResult(_join(_place(out), _PARTS), page, images, len(done), failed, seconds)


def _import_ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingExtraError(f'explain_dataset needs Ray ({error}): pip install "fastcam[ray]"') from error
    return ray


def _import_arrow() -> Any:
    try:
        import pyarrow.dataset
        import pyarrow.fs
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError(f'explain_dataset needs pyarrow ({error}): pip install "fastcam[ray]"') from error
    return pyarrow


def _nodes(ray: Any) -> list[int]:
    """Return the processors of each node."""
    found = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    with_processors = [count for count in found if count]
    if not with_processors:
        raise ArgumentError("the Ray cluster has no node with processors: start one with num_cpus")
    return with_processors


def _wanted(plan: _Plan, explainer: Explainer) -> JobTarget:
    return f"top{BOXES if explainer.has_boxes else 1}" if plan.target is None else plan.target


def _job(plan: _Plan, explainer: Explainer, folder: Path) -> PictureJob:
    drawing = Drawing(
        folder, plan.format, plan.colormap, plan.alpha, fixed_size(plan.size, explainer), True, plan.thumbnails
    )
    return PictureJob(explainer, plan.target, plan.method, plan.settings, plan.layer, drawing, plan.threshold)


def _tried(plan: _Plan) -> tuple[_Plan, dict[str, Any]]:
    """Return the plan with its method, and the facts of ``run.json``, after one grey picture was explained here."""
    explainer = Explainer(plan.model, device="cpu")
    plan = plan._replace(target=_wanted(plan, explainer), method=plan.method or explainer.default_method)
    palette(plan.colormap)
    _job(plan, explainer, Path()).try_out()
    layers = explainer.default_layers if plan.layer is None else plan.layer
    own = ("sha256", "target", "settings", "threshold", "format", "colormap", "alpha", "size", "thumbnails")
    facts = {
        "fastcam": version("fastcam"),
        "method": plan.method,
        "layers": [layers] if isinstance(layers, str) else list(layers),
        **{name: getattr(plan, name) for name in own},
    }
    return plan, plain_settings(facts)


# Storage


def _storage(out: str) -> tuple[pyarrow.fs.FileSystem, str]:
    fs = _import_arrow().fs
    if "://" in out:
        try:
            found: tuple[pyarrow.fs.FileSystem, str] = fs.FileSystem.from_uri(out)
        except Exception as error:  # pyarrow raises its own
            raise ArgumentError(f"out={out!r}: pyarrow does not know this address ({error})") from error
        return found
    return fs.LocalFileSystem(), out


def _place(out: str) -> str:
    """Return an address as it may be shown: without keys and options."""
    return f"{out.partition('://')[0]}://{_storage(out)[1]}" if "://" in out else out


def _join(*parts: str) -> str:
    return "/".join(part.rstrip("/") for part in parts)


def _read_run(out: str) -> dict[str, Any] | None:
    fs, root = _storage(out)
    try:
        with fs.open_input_stream(_join(root, RUN)) as file:
            found: dict[str, Any] = json.loads(file.read())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ArgumentError(f"{_place(out)}: its {RUN} cannot be read ({error}): choose another folder") from error
    return found


def _write(out: str, name: str, data: bytes) -> None:
    """Write a file completely or not at all: object stores do, and elsewhere it gets its name at the end."""
    fs, root = _storage(out)
    path = _join(root, name)
    try:
        fs.create_dir(path.rpartition("/")[0], recursive=True)
        is_local = fs.type_name == "local"
        with fs.open_output_stream(f"{path}.part" if is_local else path) as file:
            file.write(data)
        if is_local:
            fs.move(f"{path}.part", path)
    except OSError as error:
        raise WriteError(f"{_place(out)}: {name} cannot be written: {error}") from error


def _start(plan: _Plan, facts: Mapping[str, Any], resume: bool) -> None:
    earlier = _read_run(plan.out)
    if earlier is not None and not resume:
        raise WriteError(
            f"{_place(plan.out)}: contains an earlier run: resume it (resume=True), or choose another folder"
        )
    changed = [name for name, value in facts.items() if earlier is not None and earlier.get(name) != value]
    if changed and earlier is not None:
        said = ", ".join(f"{name} was {earlier.get(name)!r}, is {facts[name]!r}" for name in changed)
        raise ArgumentError(f"{_place(plan.out)}: the earlier run had other settings ({said})")
    started = (earlier or {}).get("started", datetime.now(timezone.utc).isoformat(timespec="seconds"))
    _write(plan.out, RUN, _json({**facts, "model": plan.model, "started": started}))


def _finish(out: str, counts: Mapping[str, Any]) -> None:
    finished = datetime.now(timezone.utc).isoformat(timespec="seconds")
    _write(out, RUN, _json({**(_read_run(out) or {}), **counts, "finished": finished}))


def _json(value: object) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"


# The source


def _dataset(ray: Any, source: Any, done: Iterable[str], rows_per_file: int) -> tuple[Any, list[str] | None]:
    """Return the pictures that remain as a dataset, None for none, and the ids of all in their order, if known."""
    finished = set(done)
    if isinstance(source, ray.data.Dataset):
        return (_without(source, finished) if finished else source), None
    listed = [source] if isinstance(source, str) or not isinstance(source, Sequence) else list(source)
    sources = find_sources(listed)
    left = [
        {"path": one.path, "id": one.id, "place": str(Path(one.path).absolute())}
        for one in sources
        if one.id not in finished
    ]
    if not left:
        return None, [one.id for one in sources]
    blocks = -(-len(left) // rows_per_file)
    return ray.data.from_items(left, override_num_blocks=blocks), [one.id for one in sources]


def _without(dataset: Any, finished: set[str]) -> Any:
    return dataset.filter(lambda row: _source(row).id not in finished)


def _source(row: Mapping[str, Any]) -> Source:
    """Return the name of a row's picture: its path, or the digest of its bytes."""
    if row.get("id"):
        return Source(row["path"], row["id"])
    if row.get("path"):
        return named_source(str(row["path"]))
    return named_source(digest([_data(row)]))


def _data(row: Mapping[str, Any]) -> bytes:
    """Return the picture of a row as the bytes of a file."""
    value = row.get("bytes", row.get("image"))
    if isinstance(value, Mapping):
        value = value.get("bytes")
    if isinstance(value, bytes):
        return value
    if value is None:
        raise ArgumentError(f'the dataset has the columns {sorted(row)}: it needs "bytes" or "image"')
    found = io.BytesIO()
    # Without loss, and fast to write and read.
    Image.fromarray(np.asarray(value, np.uint8)).save(found, "png", compress_level=1)
    return found.getvalue()


# In the actors


def _whole(model: Path) -> bytes:
    if model.stat().st_size >= _LARGEST_MODEL or list(model.parent.glob(f"{model.name}.*.data")):
        # Sent as a path only: the nodes must share it.
        return b""
    return model.read_bytes()


def _local_model(plan: _Plan, content: bytes, folder: Path) -> Path:
    """Return the model's file on this node, after writing it where it is missing or another one."""
    path = Path(plan.model)
    with suppress(OSError):
        if digest_file(path) == plan.sha256:
            return path
    if not content:
        raise ArgumentError(
            f"{plan.model} keeps its weights in a second file: put both on storage that all nodes share"
        )
    copy = folder / "model.onnx"
    copy.write_bytes(content)
    return copy


class _Actor:
    """Explains batches, and writes each as one Parquet file."""

    def __init__(self, plan: _Plan, content: Sequence[Any]) -> None:
        ray = _import_ray()
        self._plan = plan
        memory = Path("/dev/shm")  # noqa: S108 - where files cost no disk, if there is such a place
        place = str(memory) if memory.is_dir() else None
        self._temporary = tempfile.TemporaryDirectory(prefix="fastcam-", dir=place)
        folder = Path(self._temporary.name)
        path = _local_model(plan, ray.get(content[0]), folder)
        self._streams = streams_of(plan.threads)
        self._explainer = Explainer(path, device=plan.device, threads=max(1, plan.threads // self._streams))
        self._folder = folder / "work"

    def __call__(self, batch: pa.Table) -> dict[str, list[int]]:
        arrow = _import_arrow()
        for name in (*FOLDERS, "pictures"):
            (self._folder / name).mkdir(parents=True, exist_ok=True)
        named = [self._placed(row) for row in batch.to_pylist()]
        sources = [Source(place, source.id) for source, place in named]
        job = _job(self._plan, self._explainer, self._folder)
        size = self._plan.batch_size
        groups = [sources[start : start + size] for start in range(0, len(sources), size)]
        entries = list(job.entries(groups, self._streams))
        rows = [self._row(entry, *pair) for entry, pair in zip(entries, named, strict=True)]
        table = arrow.Table.from_pylist(rows, schema=_schema(arrow))
        content = io.BytesIO()
        arrow.parquet.write_table(table, content, compression="zstd")
        ids = "\n".join(sorted(source.id for source, _ in named))
        _write(self._plan.out, f"{_PARTS}/part-{digest([ids.encode()])[:24]}.parquet", content.getvalue())
        return {"images": [len(rows)], "failed": [sum(row["error"] is not None for row in rows)]}

    def _placed(self, row: Mapping[str, Any]) -> tuple[Source, str]:
        """Return a row's picture and the path of its file, which is written here if the row holds it."""
        source = _source(row)
        if "place" in row:
            return source, row["place"]
        place = self._folder / "pictures" / source.id
        place.write_bytes(_data(row))
        return source, str(place)

    def _row(self, entry: Entry, source: Source, place: str) -> Entry:
        """Return a line as a row: with the picture's own name, and files as bytes. The files are removed."""
        row = {**entry, "path": source.path, "error": entry.get("error")}
        row.pop("stamp", None)
        if row["error"] is not None:
            row["error"] = row["error"].replace(place, source.path)
        row["thumbnail"] = self._taken(entry.get("thumbnail"))
        row["drawing"] = self._taken(entry.get("overlay"))
        row["classes"] = [
            {
                **described,
                "map": b64decode(described["map"]),
                "drawing": None if row["drawing"] is not None else self._taken(described.get("file")),
            }
            for described in entry.get("classes", [])
        ]
        (self._folder / "pictures" / source.id).unlink(missing_ok=True)
        return row

    def _taken(self, name: str | None) -> bytes | None:
        if name is None:
            return None
        path = self._folder / name
        data = path.read_bytes()
        path.unlink()
        return data


def _schema(arrow: Any) -> Any:
    score = [
        ("index", arrow.int64()),
        ("label", arrow.string()),
        ("probability", arrow.float64()),
        ("score", arrow.float64()),
    ]
    described = [
        *score,
        ("evidence", arrow.float64()),
        ("caption", arrow.string()),
        ("box", arrow.list_(arrow.float32())),
        ("map", arrow.binary()),
        ("drawing", arrow.binary()),
    ]
    return arrow.schema(
        [
            ("path", arrow.string()),
            ("id", arrow.string()),
            ("error", arrow.string()),
            ("image_size", arrow.list_(arrow.int32())),
            ("map_size", arrow.list_(arrow.int32())),
            ("classes", arrow.list_(arrow.struct(described))),
            ("top", arrow.list_(arrow.struct(score))),
            ("notes", arrow.list_(arrow.string())),
            ("thumbnail", arrow.binary()),
            ("drawing", arrow.binary()),
            ("seconds", arrow.struct([(name, arrow.float64()) for name in ("read", "model", "write")])),
        ]
    )


# What is there


def _parts(out: str) -> list[str]:
    arrow = _import_arrow()
    fs, root = _storage(out)
    found = fs.get_file_info(arrow.fs.FileSelector(_join(root, _PARTS), allow_not_found=True))
    return sorted(info.path for info in found if info.path.endswith(".parquet"))


def _rows(out: str, columns: Sequence[str], ids: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """Return rows of all parts: all of them, or those of some pictures."""
    arrow = _import_arrow()
    parts = _parts(out)
    if not parts:
        return []
    wanted = None if ids is None else arrow.dataset.field("id").isin(list(ids))
    table = arrow.dataset.dataset(parts, schema=_schema(arrow), filesystem=_storage(out)[0]).to_table(
        columns=list(columns), filter=wanted
    )
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def _check(out: str, ids: Sequence[str] | None) -> tuple[int, int]:
    """Remove rows of pictures that were explained twice; return how many pictures there are, and how many failed.

    A batch that is repeated replaces its file. A resumed run forms other batches: pictures that had failed come again.
    """
    arrow = _import_arrow()
    fs, _ = _storage(out)
    kept: dict[str, str] = {}
    failed: set[str] = set()
    for attempt in (False, True):
        # First the pictures that were explained, then those that were not.
        for part in _parts(out):
            table = arrow.parquet.read_table(part, columns=["id", "error"], filesystem=fs)
            for name, error in zip(table["id"].to_pylist(), table["error"].to_pylist(), strict=True):
                if (error is not None) == attempt and name not in kept:
                    kept[name] = part
                    if attempt:
                        failed.add(name)
    for part in _parts(out):
        _drop_doubles(out, part, kept, failed)
    missing = set(ids or ()) - kept.keys()
    if missing:
        raise FastcamError(f"{_place(out)}: {len(missing)} pictures have no row: run it again with resume=True")
    return len(kept), len(failed)


def _drop_doubles(out: str, part: str, kept: Mapping[str, str], failed: set[str]) -> None:
    arrow = _import_arrow()
    fs, root = _storage(out)
    table = arrow.parquet.read_table(part, columns=["id", "error"], filesystem=fs)
    seen: set[str] = set()
    mask = []
    for name, error in zip(table["id"].to_pylist(), table["error"].to_pylist(), strict=True):
        own = kept.get(name) == part and name not in seen and (error is not None) == (name in failed)
        mask.append(own)
        seen |= {name} if own else set()
    if all(mask):
        return
    if not any(mask):
        fs.delete_file(part)
        return
    whole = arrow.parquet.read_table(part, filesystem=fs).filter(arrow.array(mask))
    content = io.BytesIO()
    arrow.parquet.write_table(whole, content, compression="zstd")
    _write(out, part[len(root) :].lstrip("/"), content.getvalue())


# The page


def _write_page(plan: _Plan, facts: Mapping[str, Any], ids: Sequence[str] | None) -> str:
    """Write the report of the first pictures, here, and copy it to where the results are."""
    arrow = _import_arrow()
    if ids is None:
        named = sorted((row["path"], row["id"]) for row in _rows(plan.out, ["path", "id"]))
        ids = [name for _, name in named]
    first = list(ids[:_REPORTED])
    columns = ["path", "id", "error", "image_size", "map_size", "classes", "top", "notes", "thumbnail"]
    rows = {row["id"]: row for row in _rows(plan.out, columns, first)}
    fs, root = _storage(plan.out)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in ("overlays", "thumbnails"):
            (folder / name).mkdir()
        lines = [json.dumps(_line(rows[name], folder, plan)) for name in first]
        (folder / RESULTS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        (folder / RUN).write_bytes(_json({**facts, **(_read_run(plan.out) or {})}))
        write_report(folder)
        try:
            arrow.fs.copy_files(str(folder), _join(root, _REPORT), arrow.fs.LocalFileSystem(), fs)
        except OSError as error:
            raise WriteError(f"{_place(plan.out)}: the report cannot be written: {error}") from error
    return _join(_place(plan.out), _REPORT, PAGE)


def _line(row: Mapping[str, Any], folder: Path, plan: _Plan) -> Entry:
    """Return a row as a line of ``results.jsonl``, whose files are written into the folder."""
    if row["error"] is not None:
        return {name: row[name] for name in ("path", "id", "error")}
    (folder / "thumbnails" / f"{row['id']}.jpg").write_bytes(row["thumbnail"])
    pixels = np.asarray(Image.open(io.BytesIO(row["thumbnail"])).convert("RGB"))
    classes = []
    for number, described in enumerate(row["classes"], start=1):
        name = f"overlays/{row['id']}.{number}.jpg"
        levels = np.frombuffer(described["map"], np.uint8).reshape(row["map_size"])
        heatmap = np.asarray(levels / 255, np.float32)[None, None]
        overlay = kernels.colorize(heatmap, pixels[None], palette=palette(plan.colormap), alpha=plan.alpha)[0, 0]
        (folder / name).write_bytes(encode_image(overlay, Path(name)))
        fields = {key: value for key, value in described.items() if value is not None and key != "drawing"}
        probability = {"probability": described["probability"]}
        classes.append({**fields, **probability, "map": b64encode(described["map"]).decode(), "file": name})
    return {
        **{name: row[name] for name in ("path", "id", "image_size", "map_size", "top")},
        "classes": classes,
        "thumbnail": f"thumbnails/{row['id']}.jpg",
        **({"notes": row["notes"]} if row["notes"] else {}),
    }
