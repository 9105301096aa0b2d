"""Serves a site on this machine, with the headers that let a page use threads."""

from __future__ import annotations

import functools
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class _Handler(SimpleHTTPRequestHandler):
    def end_headers(self) -> None:
        """Isolate the page from other origins: only then do browsers share memory between threads."""
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, *arguments: Any) -> None:
        """Do not log requests."""


def make_server(folder: Path, port: int = 0) -> ThreadingHTTPServer:
    """Return a server for a folder, for this machine only, on a free port by default; ``serve_forever`` runs it."""
    return ThreadingHTTPServer(("127.0.0.1", port), functools.partial(_Handler, directory=str(folder)))
