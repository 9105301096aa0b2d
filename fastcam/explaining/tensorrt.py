"""TensorRT: what ONNX Runtime's TensorRT provider needs to run an explained model, and keeps between runs.

Building an engine takes minutes. It is kept in a folder determined by everything that it depends on: the file, the
GPU, the versions and the profiles. Only `_gpu`, `load_libraries` and the building itself need a
GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import ArgumentError, DeviceError, FileFormatError, MissingExtraError, ModelError, WriteError
from ..files import check_writable, digest, replacing
from ..metadata import Metadata

if TYPE_CHECKING:
    import onnx

PROVIDER = "TensorrtExecutionProvider"
CACHE_VARIABLE = "FASTCAM_CACHE"

_CONTEXT_OP = "EPContext"
# Metadata entry: what a context model was built for.
_BUILT_FOR = "fastcam.tensorrt"
# Bytes read at once.
_CHUNK = 2**20
# Files of a cache folder: the builder's lock, and the mark of a complete engine.
_LOCK, _COMPLETE = ".lock", "complete"
# Names of TensorRT's libraries, as ONNX Runtime's provider library requests them from the system.
_NEEDED = re.compile(rb"\blib(?:nvinfer|nvonnxparser)\.so\.\d+|\b(?:nvinfer|nvonnxparser)_\d+\.dll")


class Range(NamedTuple):
    """Sizes that an engine accepts: it is tuned for the usual one and rejects those outside the range."""

    smallest: int
    usual: int
    largest: int


@dataclass(frozen=True)
class Machine:
    """What an engine depends on besides the model: it runs on this GPU, with these versions, and nowhere else.

    Attributes
    ----------
    gpu : str
        Name of the device.
    capability : str
        Its compute capability, "9.0".
    tensorrt, cuda, onnxruntime : str
        Versions: of the libraries that are loaded, and of ONNX Runtime.
    """

    gpu: str
    capability: str
    tensorrt: str
    cuda: str
    onnxruntime: str


@dataclass(frozen=True)
class Plan:
    """How to open a session on TensorRT.

    ::

        plan = tensorrt.plan("dogs.onnx", stream=stream.ptr, batches=(1, 16, 16))
        with plan.building():
            session = onnxruntime.InferenceSession(plan.model, options, providers=plan.providers)
        plan.check(session)

    Attributes
    ----------
    model : Path
        The file for the session: not the one that was exported, but a copy in which `target` has no default. TensorRT
        treats every default as a constant and would always explain the top class. So pass `target` in every run, with
        one row per image.
    providers : list of (str, dict of str to str)
        TensorRT, then CUDA for ops that TensorRT does not support, each with its options.
    batches, targets : Range
        Images, and classes per image, of one run; other sizes fail.
    folder : Path or None
        Where the engine is kept; None for a context model, which contains it.
    """

    model: Path
    providers: list[tuple[str, dict[str, str]]]
    batches: Range
    targets: Range
    folder: Path | None

    @contextlib.contextmanager
    def building(self) -> Iterator[None]:
        """Open the session within: one process builds the engine, others wait for it and then read it.

        Files left half-written by a killed process are discarded.
        """
        if self.folder is None or (self.folder / _COMPLETE).exists():
            yield
            return
        import filelock

        with filelock.FileLock(self.folder / _LOCK):
            if not (self.folder / _COMPLETE).exists():
                for leftover in self.folder.glob("*.engine"):
                    leftover.unlink()
            yield
            (self.folder / _COMPLETE).touch()

    def check(self, session: Any) -> None:
        """Raise DeviceError if ONNX Runtime uses another provider than TensorRT."""
        used = session.get_providers()[0]
        if used != PROVIDER:
            raise DeviceError(f"{PROVIDER} could not start: ONNX Runtime fell back to {used}")


def plan(
    path: str | os.PathLike[str],
    *,
    device_id: int = 0,
    stream: int | None = None,
    batches: tuple[int, int, int] = (1, 16, 16),
    targets: tuple[int, int, int] = (1, 1, 16),
    cache: str | os.PathLike[str] | None = None,
) -> Plan:
    """Prepare what a session on TensorRT needs; loads TensorRT's libraries.

    Only the file determines the precision (`fastcam.export(..., precision="fp16")`): TensorRT computes every value in
    the type that it has in the file. Float32 products use TF32 if the GPU has it, unless NVIDIA_TF32_OVERRIDE=0.

    Parameters
    ----------
    path : path
        A file of `fastcam.export` or of `write_context`.
    device_id : int
    stream : int, optional
        Pointer of the CUDA stream for both providers.
    batches, targets : (int, int, int)
        The smallest, the usual and the largest number of images in a run, and of classes per image. A context model
        keeps those with which it was written.
    cache : path, optional
        Folder for engines; by default the environment variable FASTCAM_CACHE, then the user's cache folder.

    Returns
    -------
    Plan

    Raises
    ------
    DeviceError
        TensorRT, ONNX Runtime's provider for it, or the GPU is missing, or a context model was built for another one;
        the message names what to install or do.
    ModelError
        The file cannot be read, or was not made by `fastcam.export` (FileFormatError).
    ArgumentError
        A range is not 1 <= smallest <= usual <= largest.
    WriteError
        The cache folder cannot be written.
    """
    source = Path(path)
    ranges = _checked_range("batches", batches), _checked_range("targets", targets)
    machine = this_machine(device_id)
    model = _read(source)
    shared = _device_options(device_id, stream)
    if _is_context(model):
        return _context_plan(source, model, machine, shared)
    profiles = shape_profiles(model, *ranges)
    folder = cache_folder(cache) / "tensorrt" / cache_key(source, machine, profiles)
    _make_folder(folder)
    _write_without_default(model, source, folder / source.name)
    options = shared | engine_cache_options(folder) | profiles
    return Plan(folder / source.name, _with_cuda(options, shared), *ranges, folder)


def write_context(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    device_id: int = 0,
    batches: tuple[int, int, int] = (1, 16, 16),
    targets: tuple[int, int, int] = (1, 1, 16),
    embed: bool = True,
) -> Path:
    """Build the engine of an explained model and write it as a context model, which starts without building.

    It runs on GPUs of this name with these versions only; `plan` and `Explainer` reject it elsewhere. `Explainer`
    finds the same facts in it as in the exported file.

    Parameters
    ----------
    path : path
        A file of `fastcam.export`.
    out : path
        The .onnx file to write, "dogs_ctx.onnx"; replaced only once the new one is complete.
    device_id, batches, targets
        As in `plan`.
    embed : bool
        Whether the engine is embedded in the file. If not, it is stored next to it in ``out`` + ".<hash>.engine", which
        starts faster and may exceed 2 GB; the two files have to stay together.

    Returns
    -------
    Path
        ``out``.

    Raises
    ------
    DeviceError, ModelError, ArgumentError
        As `plan`; DeviceError also if TensorRT does not support the whole network, which a context model requires.
    WriteError
        The file cannot be written; an existing one is left untouched.
    """
    source, destination = Path(path), Path(out)
    ranges = _checked_range("batches", batches), _checked_range("targets", targets)
    if destination.suffix.lower() != ".onnx":
        raise ArgumentError(f"context model {str(out)!r} must end in .onnx")
    check_writable(destination)
    machine = this_machine(device_id)
    model = _read(source)
    if _is_context(model):
        raise ArgumentError(f"{source} is a context model already: give the file of fastcam.export")
    profiles = shape_profiles(model, *ranges)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".fastcam-") as name:
        folder = Path(name)
        _write_without_default(model, source, folder / "model.onnx")
        shared = _device_options(device_id, None)
        options = shared | profiles | context_options(folder / "context.onnx", embed=embed)
        _build(folder / "model.onnx", _with_cuda(options, shared))
        context = _read_built(folder / "context.onnx", source)
        built_for = {"machine": asdict(machine), "batches": ranges[0], "targets": ranges[1]}
        properties = {entry.key: entry.value for entry in model.metadata_props}
        _set_properties(context, properties | {_BUILT_FOR: json.dumps(built_for)})
        older = set(destination.parent.glob(f"{destination.name}.*.engine"))
        engine = None if embed else _move_engine(context, folder, destination)
        with replacing(destination) as file:
            file.write(context.SerializeToString())
    for other in older - {engine}:
        other.unlink(missing_ok=True)
    return destination


def this_machine(device_id: int) -> Machine:
    """Return what engines that are built here depend on.

    Raises
    ------
    DeviceError
        TensorRT, ONNX Runtime's provider for it, or the GPU is missing.
    """
    import onnxruntime

    tensorrt = load_libraries()
    gpu, capability, cuda = _gpu(device_id)
    return Machine(gpu, capability, tensorrt, cuda, onnxruntime.__version__)


def load_libraries() -> str:
    """Load TensorRT's libraries, which ONNX Runtime's provider then finds loaded, and return their version.

    Without them ONNX Runtime would print an error and use another provider.

    Raises
    ------
    DeviceError
        ONNX Runtime has no TensorRT provider, or TensorRT is missing.
    """
    names, cuda = _needed_libraries()
    package = f'pip install "tensorrt-cu{cuda}-libs=={_major(names[0])}.*"'
    try:
        # Visible to everything loaded later: wheels keep their libraries where the system does not look.
        loaded = [ctypes.CDLL(_library_path(name), mode=ctypes.RTLD_GLOBAL) for name in names]
    except OSError as error:
        raise DeviceError(
            f"TensorRT is not installed, or not the version that ONNX Runtime needs ({error}): {package}"
        ) from error
    number = int(loaded[0].getInferLibVersion())
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def _needed_libraries() -> tuple[list[str], str]:
    """Return the names of the libraries that ONNX Runtime's provider was built with, and CUDA's major version."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError(f'TensorRT needs onnxruntime-gpu ({error}): pip install "fastcam[gpu]"') from error
    folder = Path(onnxruntime.__file__).parent / "capi"
    library = next(iter(sorted(folder.glob("*onnxruntime_providers_tensorrt.*"))), None)
    names = sorted({match.decode() for match in _NEEDED.findall(library.read_bytes())}) if library else []
    if not names:
        raise DeviceError(
            "ONNX Runtime has no TensorRT provider here: pip uninstall onnxruntime, then "
            'pip install "fastcam[gpu]" (onnxruntime-gpu)'
        )
    return names, str(getattr(onnxruntime, "cuda_version", "") or "13").partition(".")[0]


def _major(library: str) -> str:
    """Return the major version in a library's name."""
    return re.sub(r"\D", "", library)


def _library_path(name: str) -> str:
    """Return the path of a library in TensorRT's wheel; without the wheel its name, for the system to find."""
    spec = importlib.util.find_spec("tensorrt_libs")
    folders = spec.submodule_search_locations if spec is not None else None
    return next((str(path) for folder in folders or [] if (path := Path(folder) / name).is_file()), name)


def _gpu(device_id: int) -> tuple[str, str, str]:
    """Return a GPU's name and compute capability, and the version of CUDA."""
    try:
        from cupy.cuda import runtime
    except ImportError as error:
        raise MissingExtraError(f'TensorRT needs cupy ({error}): pip install "fastcam[gpu]"') from error
    try:
        properties = runtime.getDeviceProperties(device_id)
        version = int(runtime.runtimeGetVersion())
    except Exception as error:  # cupy's exceptions derive from RuntimeError, and from other classes without a driver
        raise DeviceError(f"CUDA device {device_id} cannot be used: {error}") from error
    name = properties["name"].decode(errors="replace").rstrip("\0")
    return name, f"{properties['major']}.{properties['minor']}", f"{version // 1000}.{version // 10 % 100}"


def cache_folder(cache: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder for engines: the given one, that of FASTCAM_CACHE, or the user's cache folder."""
    chosen = cache or os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    import platformdirs

    return platformdirs.user_cache_path("fastcam")


def cache_key(path: Path, machine: Machine, profiles: Mapping[str, str]) -> str:
    """Return 32 hexadecimal digits that change with the file, the GPU, every version and every profile.

    External weights are named after their content, so hashing the .onnx file covers them.
    """
    facts = json.dumps([path.name, asdict(machine), dict(profiles)], sort_keys=True).encode()
    with path.open("rb") as file:
        return digest(itertools.chain([facts], iter(lambda: file.read(_CHUNK), b"")))[:32]


def shape_profiles(model: onnx.ModelProto, batches: Range, targets: Range) -> dict[str, str]:
    """Return the options that tell TensorRT the sizes of every input.

    The dynamic dimension of the image input is the batch; those of `target` are the batch and the classes per image.
    """
    shapes = {
        info.name: [dim.dim_value or None for dim in info.type.tensor_type.shape.dim] for info in model.graph.input
    }
    return {
        f"trt_profile_{bound}_shapes": ",".join(
            f"{name}:{'x'.join(map(str, _sized(shape, batches[index], targets[index])))}"
            for name, shape in shapes.items()
        )
        for index, bound in enumerate(("min", "opt", "max"))
    }


def _sized(shape: list[int | None], batch: int, targets: int) -> list[int]:
    """Fill in the dynamic dimensions: the first is the batch, and only `target` has a second one."""
    return [size or (batch if axis == 0 else targets) for axis, size in enumerate(shape)]


def engine_cache_options(folder: Path) -> dict[str, str]:
    """Return the options that store engine and timings in ``folder``."""
    return {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
    }


def context_options(out: Path, *, embed: bool) -> dict[str, str]:
    """Return the options that write a context model.

    The provider then rejects an absolute path for the engine; without one it is next to the model. The cache is
    needed if the engine is a separate file.
    """
    return {
        "trt_dump_ep_context_model": "1",
        "trt_ep_context_file_path": str(out),
        "trt_ep_context_embed_mode": str(int(embed)),
        "trt_engine_cache_enable": str(int(not embed)),
    }


def _device_options(device_id: int, stream: int | None) -> dict[str, str]:
    options = {"device_id": str(device_id)}
    return options if stream is None else options | {"has_user_compute_stream": "1", "user_compute_stream": str(stream)}


def _with_cuda(options: dict[str, str], shared: dict[str, str]) -> list[tuple[str, dict[str, str]]]:
    return [(PROVIDER, options), ("CUDAExecutionProvider", shared | {"use_tf32": "0"})]


def _checked_range(name: str, sizes: object) -> Range:
    values: tuple[Any, ...] = tuple(sizes) if isinstance(sizes, tuple | list) else ()
    whole = len(values) == 3 and all(type(size) is int for size in values)
    if not whole or not 1 <= values[0] <= values[1] <= values[2]:
        raise ArgumentError(f"{name}={sizes!r}: give the smallest, usual and largest number, 1 or more, in this order")
    return Range(*values)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
        reason = "it is not writable"
    except OSError as error:
        writable, reason = False, error.strerror or str(error)
    if not writable:
        raise WriteError(
            f"{folder}: engines cannot be stored here: {reason}. Choose another folder with cache=... or the "
            f"environment variable {CACHE_VARIABLE}"
        )


def _read(path: Path) -> onnx.ModelProto:
    """Read a file written by `fastcam.export`, without its external weights."""
    import onnx

    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf raises its own
        raise ModelError(f"{path}: cannot be read: {error}") from error
    metadata = Metadata.from_properties({entry.key: entry.value for entry in model.metadata_props}, str(path))
    if metadata.picture == "any":
        raise DeviceError(
            f"{path} takes pictures of any size, and TensorRT builds engines for known ones: export the model again "
            'with picture="input"'
        )
    return model


def _write_without_default(model: onnx.ModelProto, source: Path, destination: Path) -> None:
    """Write the model without a default of `target`; its external weights are copied next to it.

    ONNX Runtime's provider passes every initializer to TensorRT as a constant, even those that an input can override.
    """
    import onnx

    if destination.exists():
        return
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    kept = [tensor for tensor in model.graph.initializer if tensor.name != "target"]
    del changed.graph.initializer[:]
    changed.graph.initializer.extend(kept)
    for location in {entry.value for tensor in kept for entry in tensor.external_data if entry.key == "location"}:
        _copy(source.parent / location, destination.parent / location)
    with replacing(destination) as file:
        file.write(changed.SerializeToString(deterministic=True))


def _copy(source: Path, destination: Path) -> None:
    """Copy a file completely or not at all; a hard link would not do: model readers treat it as an attack."""
    if destination.exists():
        return
    with source.open("rb") as read, replacing(destination) as written:
        shutil.copyfileobj(read, written, _CHUNK)


def _is_context(model: onnx.ModelProto) -> bool:
    return any(node.op_type == _CONTEXT_OP for node in model.graph.node)


def _context_plan(path: Path, model: onnx.ModelProto, machine: Machine, shared: dict[str, str]) -> Plan:
    """Return the plan for a model that contains its engine, if that was built for this machine."""
    text = next((entry.value for entry in model.metadata_props if entry.key == _BUILT_FOR), "")
    try:
        built_for = json.loads(text)
        built_on = Machine(**built_for["machine"])
        ranges = Range(*built_for["batches"]), Range(*built_for["targets"])
    except (ValueError, KeyError, TypeError) as error:
        raise FileFormatError(
            f"{path}: its metadata entry {_BUILT_FOR!r} is missing or damaged ({error!r}): write it again with "
            "fastcam.write_context"
        ) from error
    if built_on != machine:
        differences = (
            f"{name} {value!r} where this is {getattr(machine, name)!r}"
            for name, value in asdict(built_on).items()
            if value != getattr(machine, name)
        )
        raise DeviceError(
            f"{path}: its engine was built for {'; '.join(differences)}: write it again here with fastcam.write_context"
        )
    return Plan(path, _with_cuda(dict(shared), shared), *ranges, None)


def _build(model: Path, providers: list[tuple[str, dict[str, str]]]) -> None:
    """Have ONNX Runtime build the engine and write the context model."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(model, options, providers=providers, enable_fallback=0)
    except Exception as error:  # ONNX Runtime's exception classes derive from Exception directly
        raise DeviceError(f"TensorRT cannot build an engine of this model: {error}") from error
    if session.get_providers()[0] != PROVIDER:
        raise DeviceError(f"{PROVIDER} could not start: ONNX Runtime fell back to {session.get_providers()[0]}")


def _read_built(path: Path, source: Path) -> onnx.ModelProto:
    """Read ONNX Runtime's context model: one node, the engine."""
    import onnx

    model = onnx.ModelProto()
    if path.is_file():
        model = onnx.load(path)
    ops = [node.op_type for node in model.graph.node]
    if ops != [_CONTEXT_OP]:
        outside = sorted(set(ops) - {_CONTEXT_OP})
        raise DeviceError(
            f"{source}: TensorRT does not support the whole network"
            f"{' (not: ' + ', '.join(outside) + ')' if outside else ''}: run the exported file instead, "
            "which keeps its engine in the cache"
        )
    return model


def _set_properties(model: onnx.ModelProto, properties: Mapping[str, str]) -> None:
    import onnx

    onnx.helper.set_model_props(model, dict(properties))


def _move_engine(model: onnx.ModelProto, folder: Path, destination: Path) -> Path:
    """Move the engine next to ``destination``, named after its content, and point the model's node at it."""
    (attribute,) = (item for item in model.graph.node[0].attribute if item.name == "ep_cache_context")
    built = folder / attribute.s.decode()
    engine = destination.with_name(f"{destination.name}.{digest([built.read_bytes()])[:16]}.engine")
    built.replace(engine)
    attribute.s = engine.name.encode()
    return engine
