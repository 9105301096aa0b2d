"""The limits of a server."""

from __future__ import annotations

from typing import NamedTuple

from ..arguments import check_count, check_number, check_text
from ..errors import ArgumentError

_LONGEST = 3600.0


class ServerSettings(NamedTuple):
    """What a server allows.

    Attributes
    ----------
    workers : int
        Calls of models at the same time. Each uses all threads of its model: on the CPU, as many workers as processors
        with one thread each answer the most requests, and one worker with all threads answers a single one soonest.
    queue : int
        Requests that may wait; others are answered with 503.
    max_batch : int
        Pictures of different requests that are given to the model together. 1 on the CPU, where batches gain nothing.
    max_wait : float
        Seconds that a request may wait for others to join its batch.
    timeout : float
        Seconds that a request may take, waiting included.
    max_bytes : int
        Largest body of a request.
    max_pixels : int
        Largest picture.
    token : str or None
        What clients must send as ``Authorization: Bearer ...``.
    """

    workers: int = 1
    queue: int = 64
    max_batch: int = 1
    max_wait: float = 0.005
    timeout: float = 30.0
    max_bytes: int = 20_000_000
    max_pixels: int = 50_000_000
    token: str | None = None

    def checked(self) -> ServerSettings:
        """Return the same, or raise ArgumentError."""
        for name in ("workers", "queue", "max_batch", "max_bytes", "max_pixels"):
            check_count(name, getattr(self, name))
        check_number("max_wait", self.max_wait, lambda x: 0 <= x <= 1, "seconds, 0 to 1")
        check_number("timeout", self.timeout, lambda x: 0 < x <= _LONGEST, "seconds, up to 3600")
        if self.token is not None and not check_text("token", self.token):
            raise ArgumentError("token is empty: give a secret, or None for a server that is open to everyone")
        return self
