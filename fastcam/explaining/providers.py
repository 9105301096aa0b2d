"""Where a model runs: devices by name, ONNX Runtime's providers for them, and what keeps them from starting."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

from ..arguments import shown
from ..errors import ArgumentError, DeviceError, FastcamError, MissingExtraError, ModelError
from . import tensorrt
from .devices import NO_KERNELS, find_backend
from .pruning import only_evidence, without_evidence

Provider: TypeAlias = "tuple[str, dict[str, Any]]"

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
_KINDS = {CUDA: "cuda", TENSORRT: "tensorrt"}
# Providers that know inputs with a default value. Others (OpenVINO's, for example) treat the default as a constant.
_KEEP_DEFAULTS = (CPU, CUDA)

# TF32, ONNX Runtime's default, rounds float32 products to 10 bits of mantissa: heatmaps would differ from the CPU's
# in the third digit.
_CUDA_DEFAULTS = {"use_tf32": "0"}

_INSTALL = 'pip uninstall onnxruntime, then pip install "fastcam[gpu]"'
_CUDNN = {"linux": "libcudnn.so.9", "win32": "cudnn64_9.dll"}
_DRIVER = {"linux": "libcuda.so.1", "win32": "nvcuda.dll"}
_NOTHING_VISIBLE = 100  # CUDA_ERROR_NO_DEVICE


class Request(NamedTuple):
    """Where the caller wants the model to run.

    Attributes
    ----------
    kind : {"auto", "cpu", "cuda", "openvino", "tensorrt"}
        "cpu" stands for every provider whose results ONNX Runtime brings to the host.
    number : int
        Number of the device.
    providers : list of (str, dict)
        Providers that the caller named, with options; empty where a device was named.
    """

    kind: str
    number: int
    providers: list[Provider]

    @property
    def name(self) -> str:
        """Its name for messages."""
        return self.providers[0][0] if self.providers else f'device="{self.kind}"'


@dataclass(frozen=True)
class Placement:
    """How to open the session.

    Attributes
    ----------
    model : Path or bytes
        What to open: a file, or a model whose external weights are in its file's folder.
    providers : list of (str, dict)
    building : callable
        Returns the context in which to open the session.
    largest_batch, largest_targets : int or None
        Limits of one run.
    """

    model: Path | bytes
    providers: list[Provider]
    building: Callable[[], AbstractContextManager[None]] = nullcontext
    largest_batch: int | None = None
    largest_targets: int | None = None


@dataclass(frozen=True)
class Problem:
    """Why CUDA cannot be used.

    Attributes
    ----------
    reason : str
        What is missing and what to do.
    is_loss : bool
        Whether there is an NVIDIA device that goes unused.
    """

    reason: str
    is_loss: bool


def ask(device: str, providers: Sequence[Any] | None) -> Request:
    """Read the arguments of `Explainer`.

    Raises
    ------
    ArgumentError
        They name an unknown device or provider.
    """
    if providers is not None:
        return _named_providers(providers)
    match = (
        re.fullmatch(r"(auto|cpu|cuda|openvino|tensorrt)|(cuda|tensorrt):(\d{1,3})", device)
        if _is_text(device)
        else None
    )
    if match is None:
        raise ArgumentError(
            f"device={shown(device)} is not known; choose one of {', '.join(map(repr, DEVICES))} "
            "(a second GPU is 'cuda:1'), or name ONNX Runtime's execution providers=[...]"
        )
    return Request(match[1] or match[2], int(match[3] or 0), [])


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _named_providers(providers: Sequence[Any]) -> Request:
    is_list = isinstance(providers, list | tuple)
    if not is_list or not providers or not all(map(_names_a_provider, providers)):
        raise ArgumentError(
            f"providers={shown(providers)}: give a list of names, or of pairs of a name and its options"
        )
    pairs = [(item, {}) if isinstance(item, str) else (item[0], dict(item[1])) for item in providers]
    kind = _KINDS.get(pairs[0][0], "cpu")
    if kind == "cpu":
        return Request(kind, 0, pairs)
    options = pairs[0][1]
    if "user_compute_stream" in options:
        raise ArgumentError(f"providers: {pairs[0][0]} works on the Explainer's stream: omit user_compute_stream")
    if str(options.get("trt_cuda_graph_enable", "0")).lower() in ("1", "true"):
        raise ArgumentError("providers: trt_cuda_graph_enable captures a single graph for every batch size: omit it")
    index = str(options.get("device_id", 0))
    if not index.isdecimal():
        raise ArgumentError(f"providers: device_id {index!r} is not a number")
    return Request(kind, int(index), pairs)


def _names_a_provider(item: Any) -> bool:
    is_pair = isinstance(item, tuple) and len(item) == 2
    return isinstance(item, str) or (is_pair and isinstance(item[0], str) and isinstance(item[1], Mapping))


def place(request: Request, path: Path, stream: int) -> Placement:
    """Return how to open the session for a resolved request, with ``stream`` to work on."""
    return DEVICES[request.kind](request, path, stream)


def _place_on_cpu(request: Request, path: Path, stream: int) -> Placement:
    providers = request.providers or [(CPU, {})]
    if any(name not in _KEEP_DEFAULTS for name, _ in providers):
        return Placement(without_default(path), providers)
    return Placement(without_evidence(path) or path, providers)


def place_evidence(request: Request, path: Path, name: str) -> Placement:
    """Return how to open the session of a request on the CPU that gives an output for single methods, and no other."""
    return Placement(only_evidence(path, name) or path, request.providers or [(CPU, {})])


def without_default(path: Path) -> Path | bytes:
    """Return the file's model with an ordinary input ``target``: the path itself if it already is one.

    Raises
    ------
    ModelError
        The file is missing or damaged.
    """
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf and the file system raise their own
        raise ModelError(f"{path}: cannot be read: {error}") from error
    kept = [tensor for tensor in model.graph.initializer if tensor.name != "target"]
    if len(kept) == len(model.graph.initializer):
        return path
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def _place_on_cuda(request: Request, path: Path, stream: int) -> Placement:
    return Placement(path, _completed(request.providers or [(CUDA, {})], request.number, stream))


def _place_on_tensorrt(request: Request, path: Path, stream: int) -> Placement:
    plan = tensorrt.plan(path, device_id=request.number, stream=stream)
    own = dict(request.providers)
    planned = dict(plan.providers)
    streams = {"user_compute_stream", "has_user_compute_stream"}
    ours = [
        (name, {**options, **own.get(name, {}), **{key: options[key] for key in streams & options.keys()}})
        for name, options in plan.providers
    ]
    return Placement(
        plan.model,
        ours + [(name, options) for name, options in request.providers if name not in planned],
        plan.building,
        plan.batches.largest,
        plan.targets.largest,
    )


def find_tensorrt_problem(index: int) -> str | None:
    """Return why TensorRT cannot be used although CUDA can, or None if it can."""
    try:
        tensorrt.this_machine(index)
    except FastcamError as error:
        return str(error)
    return None


DEVICES: dict[str, Callable[[Request, Path, int], Placement]] = {
    "auto": _place_on_cpu,
    "cpu": _place_on_cpu,
    "cuda": _place_on_cuda,
    "openvino": _place_on_cpu,
    "tensorrt": _place_on_tensorrt,
}


def _completed(providers: list[Provider], index: int, stream: int) -> list[Provider]:
    """Return the providers on the Explainer's stream, with fastcam's options where the caller gave none."""
    ours = {**_CUDA_DEFAULTS, "device_id": str(index)}
    own = {"user_compute_stream": str(stream)}
    return [(name, {**ours, **options, **own} if name in _KINDS else options) for name, options in providers]


def find_problem(index: int) -> Problem | None:
    """Return why CUDA device number ``index`` cannot be used, or None if it can."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return Problem("the environment variable CUDA_VISIBLE_DEVICES hides every device", is_loss=False)
    visible = _sees_device()
    reason = next((reason for check in _CHECKS if (reason := check(index)) is not None), None)
    return None if reason is None else Problem(reason, is_loss=visible)


def _sees_device() -> bool:
    """Return whether this process has access to an NVIDIA device; a card without a driver does not count."""
    if sys.platform == "win32":
        return _loads(_DRIVER["win32"]) is None
    nodes = [path for pattern in ("nvidia[0-9]*", "nvhost-gpu") for path in Path("/dev").glob(pattern)]
    return bool(nodes) or (Path("/dev/dxg").exists() and _loads(_DRIVER["linux"]) is None)


def _no_driver(index: int) -> str | None:
    problem = _loads(_DRIVER.get(sys.platform, ""))
    return problem and f"there is no NVIDIA driver ({problem}): install it, or give the container its GPUs (--gpus all)"


def _no_provider(index: int) -> str | None:
    if CUDA in import_onnxruntime().get_available_providers():
        return None
    return f"this ONNX Runtime has no {CUDA}: {_INSTALL}"


def import_onnxruntime() -> ModuleType:
    """Return the module.

    Raises
    ------
    MissingExtraError
        It is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError(
            f'fastcam needs onnxruntime ({error}): pip install "fastcam[cpu]" or "fastcam[gpu]"'
        ) from error
    module: ModuleType = onnxruntime
    return module


def _no_kernels(index: int) -> str | None:
    return NO_KERNELS if find_backend() is None else None


def _no_device(index: int) -> str | None:
    driver = ctypes.CDLL(_DRIVER[sys.platform])
    count = ctypes.c_int()
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if status and status != _NOTHING_VISIBLE:
        return f"the NVIDIA driver does not start (CUDA error {status}): check whether nvidia-smi runs"
    if index < count.value:
        return None
    return f"there is no CUDA device {index}: the driver shows {count.value}, numbered from 0"


def _no_cudnn(index: int) -> str | None:
    import onnxruntime

    # Wheels keep CUDA's libraries where the system does not look. The call prints what it does not find.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
        onnxruntime.preload_dlls()
    problem = _loads(_CUDNN[sys.platform])
    return problem and f'cuDNN 9 is missing ({problem}): pip install "fastcam[gpu]", or install it with the system'


# In the order in which they can be checked; the first problem is the reason.
_CHECKS: tuple[Callable[[int], str | None], ...] = (_no_driver, _no_provider, _no_kernels, _no_device, _no_cudnn)


def _loads(library: str) -> str | None:
    """Return why a library cannot be loaded, or None if it can."""
    try:
        ctypes.CDLL(library)
    except OSError as error:
        return str(error)
    return None if library else "NVIDIA has none for this system"


def refuse(request: Request) -> None:
    """Raise DeviceError if the requested device cannot be used."""
    problem = find_problem(request.number)
    if problem is not None:
        raise DeviceError(f"{request.name} could not start: {problem.reason}")


def choose(request: Request) -> Request:
    """Resolve "auto": CUDA if it can be used, else the CPU.

    Warns once per process if a device exists but cannot be used. Without a device there is nothing to warn about.
    """
    problem = find_problem(request.number)
    if problem is None:
        return request._replace(kind="cuda")
    if problem.is_loss:
        warn_of_cpu(problem.reason)
    return request._replace(kind="cpu")


@functools.cache
def warn_of_cpu(reason: str) -> None:
    """Warn once that models run on the CPU although there is a GPU, and why."""
    warnings.warn(f'the model runs on the CPU, not on the GPU: {reason}. device="cpu" silences this', stacklevel=2)
