"""What runs when: a bounded queue, one or several workers, and batches of requests that ask the same."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from ..errors import FastcamError
from .metrics import Metrics
from .settings import ServerSettings

Run = Callable[[Sequence[Any], float], Sequence[Any]]
"""From items and the seconds left, a result for each item."""


class BusyError(FastcamError):
    """The queue is full."""


class LateError(FastcamError):
    """The request waited longer than it may take."""


@dataclass
class _Item:
    value: Any
    end: float
    entered: float
    done: asyncio.Future[Any]


@dataclass
class _Batch:
    run: Run
    items: list[_Item] = field(default_factory=list)


class Scheduler:
    """Runs requests in worker threads.

    A request whose client has left is taken out as long as it waits. If a batch fails, its items run one by one, so
    that one bad picture spoils one answer.

    Parameters
    ----------
    settings : ServerSettings
    metrics : Metrics
    """

    def __init__(self, settings: ServerSettings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._pool = ThreadPoolExecutor(settings.workers, "fastcam-serve")
        self._open: dict[Hashable, _Batch] = {}
        self._waiting = 0
        self._background: set[asyncio.Future[Any]] = set()

    async def submit(self, key: Hashable, value: Any, run: Run, timeout: float) -> Any:
        """Return ``run``'s result for one value, together with other values of the same key.

        Raises
        ------
        BusyError
            The queue is full.
        LateError
            It waited too long.
        """
        if self._waiting >= self._settings.queue + self._settings.workers:
            raise BusyError(f"{self._waiting} requests are waiting already: try again later")
        now = time.monotonic()
        item = _Item(value, now + timeout, now, asyncio.get_running_loop().create_future())
        self._waiting += 1
        self._metrics.waiting.set(self._waiting)
        try:
            self._join(key, item, run)
            return await item.done
        finally:
            self._waiting -= 1
            self._metrics.waiting.set(self._waiting)

    def close(self) -> None:
        """Wait for what runs, and drop what waits."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _join(self, key: Hashable, item: _Item, run: Run) -> None:
        if self._settings.max_batch == 1:
            self._start(_Batch(run, [item]))
            return
        batch = self._open.get(key)
        if batch is None:
            batch = self._open[key] = _Batch(run)
            asyncio.get_running_loop().call_later(self._settings.max_wait, self._flush, key, batch)
        batch.items.append(item)
        if len(batch.items) >= self._settings.max_batch:
            self._flush(key, batch)

    def _flush(self, key: Hashable, batch: _Batch) -> None:
        if self._open.get(key) is batch:
            del self._open[key]
            self._start(batch)

    def _start(self, batch: _Batch) -> None:
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._pool, self._work, batch, loop)
        self._background.add(future)
        future.add_done_callback(self._background.discard)

    def _work(self, batch: _Batch, loop: asyncio.AbstractEventLoop) -> None:
        """Run a batch in a worker thread, and hand the results to the event loop."""
        now = time.monotonic()
        items = [item for item in batch.items if not item.done.cancelled()]
        for item in items:
            self._metrics.stages.labels("waiting").observe(now - item.entered)
        late = [item for item in items if item.end <= now]
        for item in late:
            loop.call_soon_threadsafe(_fail, item, LateError("the request waited longer than its timeout"))
        items = [item for item in items if item.end > now]
        if not items:
            return
        self._metrics.batches.observe(len(items))
        for item, result in zip(items, self._results(batch.run, items), strict=True):
            settle = _fail if isinstance(result, BaseException) else _finish
            loop.call_soon_threadsafe(settle, item, result)
        self._metrics.stages.labels("model").observe(time.monotonic() - now)

    def _results(self, run: Run, items: Sequence[_Item]) -> Sequence[Any]:
        try:
            left = min(item.end for item in items) - time.monotonic()
            return run([item.value for item in items], left)
        except Exception as error:  # noqa: BLE001 - whatever fails belongs to these requests, not to the worker
            if len(items) == 1:
                return [error]
            return [self._results(run, [item])[0] for item in items]


def _finish(item: _Item, result: Any) -> None:
    if not item.done.done():
        item.done.set_result(result)


def _fail(item: _Item, error: BaseException) -> None:
    if not item.done.done():
        item.done.set_exception(error)
