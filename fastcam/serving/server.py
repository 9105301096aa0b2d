"""`serve`: a server that explains until it is stopped."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence

from ..arguments import check_integer, check_text, checked
from ..errors import MissingExtraError
from .models import ModelStore
from .settings import ServerSettings

_ON_THE_CPU = ("auto", "cpu", "openvino")
_FACTS = ("route", "status", "milliseconds")


class JsonLines(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        facts = {name: getattr(record, name) for name in _FACTS if hasattr(record, name)}
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {"time": f"{moment}Z", "level": record.levelname.lower(), "message": record.getMessage(), **facts}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def default_workers(device: str, threads: int | None) -> int:
    """Return how many calls fill the processors; 1 on a GPU."""
    return max(1, (os.cpu_count() or 1) // (threads or 1)) if device in _ON_THE_CPU else 1


@checked(host=check_text)
def serve(
    models: Sequence[str | os.PathLike[str]],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str = "auto",
    threads: int | None = None,
    settings: ServerSettings | None = None,
) -> None:
    """Explain over HTTP until SIGTERM or SIGINT; requests that were accepted are answered before it returns.

    Parameters
    ----------
    models : sequence of path
        Written by `fastcam.export`; each is served under its file's name.
    host : str
        The address to listen on. The default is reachable from this machine only.
    port : int
    device, threads
        As in `Explainer`.
    settings : ServerSettings, optional
        By default, on the CPU, as many workers as processors, with one thread each.

    Raises
    ------
    MissingExtraError
        A package of the extra "serve" is not installed.
    ArgumentError
        A setting is wrong, or the names of the models are.
    FastcamError
        A model cannot be opened.
    """
    try:
        import uvicorn

        from .app import create_app
    except ImportError as error:
        raise MissingExtraError(f'a server needs {error.name}: pip install "fastcam[serve]"') from error
    if settings is None:
        settings = ServerSettings(workers=default_workers(device, threads))
    limits = settings.checked()
    if threads is None and limits.workers > 1 and device in _ON_THE_CPU:
        threads = max(1, (os.cpu_count() or 1) // limits.workers)
    number = check_integer("port", port, 0, 65535)
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    log = logging.getLogger("fastcam.serving")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        app = create_app(ModelStore(models, device=device, threads=threads), limits)
        log.info("listening on http://%s:%s", host, number)
        uvicorn.run(app, host=host, port=number, log_level="warning", access_log=False, timeout_keep_alive=30)
    finally:
        log.removeHandler(handler)
