"""From a file and the name of a device to an engine."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from ...errors import DeviceError, ModelError
from ...files import file_state
from .. import devices, providers
from ..convolutions import Convolutions, Rewritten, rewrite
from ..explained_model import ExplainedModel
from ..openvino import OpenVinoSession
from ..sessions import open_session
from . import Engine
from .cpu import CpuEngine
from .cuda import CudaEngine

if TYPE_CHECKING:
    import onnxruntime

Session: TypeAlias = "onnxruntime.InferenceSession | OpenVinoSession"

# A session may still use its stream while it is destroyed: streams outlive sessions and are reused.
_idle_streams: dict[int, list[int]] = defaultdict(list)


# A file that is replaced while it is opened is opened again, this many times.
_ATTEMPTS = 10


class Opened(NamedTuple):
    """A file that is ready to run."""

    model: ExplainedModel
    session: Session
    engine: Engine
    convolutions: Convolutions
    open_evidence: Callable[[str], Session]


def open_engine(path: Path, request: providers.Request, threads: int | None, convolutions: str = "auto") -> Opened:
    """Open a file on the requested device.

    "auto" takes CUDA if it can be used. If there is a device that cannot be used, it warns and takes the CPU; if there
    is none, it takes the CPU silently.

    Raises
    ------
    DeviceError
        The device cannot be used: the message says why and what to do.
    ModelError, FileFormatError, MissingExtraError
        As `Explainer`.
    """
    for _ in range(_ATTEMPTS):
        before = file_state(path)
        try:
            return _open(path, request, threads, convolutions)
        except ModelError:
            # Replaced in the meantime, its weights in a second file too: what was read first is gone.
            if before is None or file_state(path) == before:
                raise
    return _open(path, request, threads, convolutions)


def _open(path: Path, request: providers.Request, threads: int | None, convolutions: str) -> Opened:
    if request.kind == "auto":
        return _open_best(path, providers.choose(request), threads, convolutions)
    if request.kind == "cpu":
        return _open_on_cpu(path, request, threads, convolutions)
    if request.kind == "openvino":
        return _with_host_engine(path, OpenVinoSession(path, threads), threads, "OpenVINO")
    providers.refuse(request)
    return _open_on_device(path, request, threads)


def _open_best(path: Path, chosen: providers.Request, threads: int | None, convolutions: str) -> Opened:
    if chosen.kind == "cuda":
        try:
            return _open_on_device(path, chosen, threads)
        except DeviceError as error:
            providers.warn_of_cpu(str(error))
    return _open_on_cpu(path, chosen._replace(kind="cpu"), threads, convolutions)


def _open_on_cpu(path: Path, request: providers.Request, threads: int | None, convolutions: str) -> Opened:
    placement = providers.place(request, path, 0)
    rewritten = _rewritten(path, placement, threads) if convolutions == "auto" else Convolutions(reason="as requested")
    replacement = rewritten if isinstance(rewritten, Rewritten) else None
    session = open_session(path, placement, threads, replacement)
    model = ExplainedModel(path, session)
    found = rewritten.convolutions if isinstance(rewritten, Rewritten) else rewritten

    def open_evidence(name: str) -> Session:
        if name in model.outputs:
            return session
        return open_session(path, providers.place_evidence(request, path, name), threads)

    return Opened(model, session, CpuEngine(model, session, threads), found, open_evidence)


def _with_host_engine(path: Path, session: Session, threads: int | None, runs_on: str) -> Opened:
    model = ExplainedModel(path, session)
    reason = Convolutions(reason=f"the model runs on {runs_on}")
    return Opened(model, session, CpuEngine(model, session, threads), reason, lambda name: session)


def _rewritten(path: Path, placement: providers.Placement, threads: int | None) -> Rewritten | Convolutions:
    if [name for name, _ in placement.providers] != [providers.CPU]:
        return Convolutions(reason=f"the model runs on {placement.providers[0][0]}")
    return rewrite(path, threads)


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
    if (
        model.draws_only
        or not model.metadata.layers
        or model.metadata.picture is not None
        or model.descriptions
        or model.extra
    ):
        # Its graph does the work of the device's kernels, or it has inputs or outputs of which these know nothing.
        return _with_host_engine(path, session, threads, placement.providers[0][0])
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
    reason = Convolutions(reason=f"the model runs on {placement.providers[0][0]}")
    return Opened(model, session, engine, reason, lambda name: session)
