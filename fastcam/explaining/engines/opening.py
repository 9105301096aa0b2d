"""From a file and a device's name to an engine that runs."""

from __future__ import annotations

import weakref
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from ...errors import DeviceError
from .. import devices, providers
from ..explained_model import ExplainedModel
from ..openvino import OpenVinoSession
from ..sessions import open_session
from .cpu import CpuEngine
from .cuda import CudaEngine

if TYPE_CHECKING:
    import onnxruntime

Session: TypeAlias = "onnxruntime.InferenceSession | OpenVinoSession"

# A session may still use its stream while it is taken apart: streams outlive sessions, and serve the next ones.
_idle_streams: dict[int, list[int]] = defaultdict(list)


class Opened(NamedTuple):
    """A file that is ready to run."""

    model: ExplainedModel
    session: Session
    engine: CpuEngine | CudaEngine


def open_engine(path: Path, request: providers.Request, threads: int | None) -> Opened:
    """Open a file where it is asked for.

    "auto" takes CUDA where nothing speaks against it. Where a device is there and cannot be used it warns and takes the
    CPU; where there is none, nothing is lost, and nothing said.

    Raises
    ------
    DeviceError
        The device cannot be used: the message says why and what to do.
    ModelError, FileFormatError, MissingExtraError
        As `Explainer`.
    """
    if request.kind == "auto":
        return _open_best(path, providers.choose(request), threads)
    if request.kind == "cpu":
        return _open_on_cpu(path, request, threads)
    if request.kind == "openvino":
        return _with_host_engine(path, OpenVinoSession(path, threads), threads)
    providers.refuse(request)
    return _open_on_device(path, request, threads)


def _open_best(path: Path, chosen: providers.Request, threads: int | None) -> Opened:
    if chosen.kind == "cuda":
        try:
            return _open_on_device(path, chosen, threads)
        except DeviceError as error:
            providers.warn_of_cpu(str(error))
    return _open_on_cpu(path, chosen._replace(kind="cpu"), threads)


def _open_on_cpu(path: Path, request: providers.Request, threads: int | None) -> Opened:
    return _with_host_engine(path, open_session(path, providers.place(request, path, 0), threads), threads)


def _with_host_engine(path: Path, session: Session, threads: int | None) -> Opened:
    model = ExplainedModel(path, session)
    return Opened(model, session, CpuEngine(model, session, threads))


def _open_on_device(path: Path, request: providers.Request, threads: int | None) -> Opened:
    device, kernels = devices.open_device(request.number)
    device.activate()
    idle = _idle_streams[request.number]
    stream = idle.pop() if idle else device.stream_create()
    try:
        placement = providers.place(request, path, stream)
        session = open_session(path, placement, threads)
    except BaseException:
        idle.append(stream)
        raise
    weakref.finalize(session, idle.append, stream).atexit = False
    model = ExplainedModel(path, session)
    if model.draws_only or model.metadata.picture is not None:
        # Its graph does what the device's kernels are for.
        return Opened(model, session, CpuEngine(model, session, threads))
    engine = CudaEngine(
        model,
        session,
        device,
        kernels,
        stream,
        threads=threads,
        captures=str(placement.providers[0][1].get("enable_cuda_graph", "0")).lower() in ("1", "true"),
        largest_batch=placement.largest_batch,
        largest_targets=placement.largest_targets,
    )
    return Opened(model, session, engine)
