"""ONNX Runtime sessions, opened so that nothing falls back silently."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DeviceError, ModelError
from ..files import why_no_file
from .convolutions import Rewritten
from .providers import CPU, CUDA, TENSORRT, Placement, Provider, import_onnxruntime
from .runs import wait_for

if TYPE_CHECKING:
    import onnxruntime

_NO_FALLBACK = "session.disable_cpu_ep_fallback"
_FELL_BACK = "explicitly disabled by the user"
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
_TELL_PLACES = "session.record_ep_graph_assignment_info"
# Ops that compute shapes: ONNX Runtime keeps these few integers on the host, where the next op needs them.
_SHAPE_OPS = frozenset(
    "Add Cast Concat Constant ConstantOfShape Div Equal Gather Max Min Mul Range ReduceProd Reshape Shape Size Slice "
    "Squeeze Sub Unsqueeze Where".split()
)


def open_session(
    path: Path, placement: Placement, threads: int | None, rewritten: Rewritten | None = None
) -> onnxruntime.InferenceSession:
    """Open a session whose first provider is actually in use.

    On CUDA the whole network runs on the device. The CPU runs ops only if the caller's ``providers`` list it;
    otherwise a warning names these ops.

    Parameters
    ----------
    path : Path
        The file's name for messages.
    placement : Placement
    threads : int or None
    rewritten : Rewritten, optional
        The model to open instead of the file.

    Raises
    ------
    MissingExtraError
        ONNX Runtime is not installed.
    ModelError
        The file is missing, or ONNX Runtime cannot load it.
    DeviceError
        A provider is missing or could not start.
    """
    onnxruntime = import_onnxruntime()
    reason = why_no_file(path)
    if reason is not None:
        raise ModelError(f"{path}: {reason}")
    names = [name for name, _ in placement.providers]
    missing = [name for name in names if name not in onnxruntime.get_available_providers()]
    if missing:
        raise DeviceError(
            f"this ONNX Runtime has no {', '.join(missing)}; it has {', '.join(onnxruntime.get_available_providers())}"
        )
    strict = names[0] in (CUDA, TENSORRT) and CPU not in names
    try:
        with placement.building():
            whole = _create_whole(placement, threads) if strict else None
            entries = {_TELL_PLACES: "1"} if strict else {}
            if isinstance(placement.model, bytes):
                entries[_WEIGHTS_FOLDER] = str(path.parent)
            session = whole or _create(placement, threads, entries, rewritten=rewritten)
    except Exception as error:  # ONNX Runtime's exception classes derive from Exception directly
        # Its errors about models are not RuntimeErrors; those of a provider that does not start are.
        if isinstance(error, RuntimeError | ValueError) and names[0] in (CUDA, TENSORRT):
            raise DeviceError(f"{names[0]} could not start: {error}") from error
        raise ModelError(
            f"{path}: ONNX Runtime cannot load this model: {error}. Give a file of fastcam.export"
        ) from error
    if session.get_providers()[0] != names[0]:
        raise DeviceError(f"{names[0]} could not start: ONNX Runtime fell back to {session.get_providers()[0]}")
    if strict and whole is None:
        _warn_of_ops(path, names[0], session)
    return session


def _create_whole(placement: Placement, threads: int | None) -> onnxruntime.InferenceSession | None:
    """Return a session that leaves nothing to the CPU, or None if it would have to."""
    try:
        return _create(placement, threads, {_NO_FALLBACK: "1"}, severity=4)
    except Exception as error:
        if _FELL_BACK in str(error):
            return None
        raise


def _create(
    placement: Placement,
    threads: int | None,
    entries: dict[str, str],
    severity: int = 3,
    rewritten: Rewritten | None = None,
) -> onnxruntime.InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Errors only: ONNX Runtime warns that `target` may be omitted, which is intended.
    options.log_severity_level = severity
    if threads is not None:
        options.intra_op_num_threads = threads
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    providers = [_plain(provider) for provider in placement.providers]
    model: Path | bytes = placement.model
    weights = []
    if rewritten is not None:
        weights = rewritten.prepare(options)
        model = rewritten.message
    # Its own fallback would try the CPU, against our options, and hide why the provider does not start.
    session = wait_for(lambda: onnxruntime.InferenceSession(model, options, providers=providers, enable_fallback=0))
    weights.clear()
    if rewritten is not None:
        rewritten.check_unchanged()
    return session


def _plain(provider: Provider) -> Any:
    name, options = provider
    return (name, options) if options else name


def _warn_of_ops(path: Path, provider: str, session: onnxruntime.InferenceSession) -> None:
    """Warn about ops that run on the CPU, with a copy each way; ops on shapes run there anyway."""
    tell = getattr(session, "get_provider_graph_assignment_info", list)  # since ONNX Runtime 1.24
    ops = {node.op_type for part in tell() if part.ep_name == CPU for node in part.get_nodes()} - _SHAPE_OPS
    if ops:
        warnings.warn(
            f"{path}: {provider} has no kernels for {', '.join(sorted(ops))}, which run on the CPU, with copies. "
            f"List {CPU} in providers=[...] to accept that",
            stacklevel=2,
        )
