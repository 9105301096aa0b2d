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
    limits = (settings or ServerSettings()).checked()
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
