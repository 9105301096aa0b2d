"""What a server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_BATCHES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters of one server.

    Attributes
    ----------
    requests : Counter
        By route and status.
    stages : Histogram
        Seconds by stage: waiting, model, encoding, all.
    batches : Histogram
        Pictures per call of a model.
    waiting : Gauge
        Requests that wait or run.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        own = self._registry
        self.requests = Counter("fastcam_requests", "Answered requests", ["route", "status"], registry=own)
        self.stages = Histogram("fastcam_stage_seconds", "Time by stage", ["stage"], buckets=_SECONDS, registry=own)
        self.batches = Histogram("fastcam_batch_pictures", "Pictures per call", buckets=_BATCHES, registry=own)
        self.waiting = Gauge("fastcam_waiting_requests", "Requests that wait or run", registry=own)

    def text(self) -> bytes:
        """Return all of them in Prometheus' text format."""
        return generate_latest(self._registry)
