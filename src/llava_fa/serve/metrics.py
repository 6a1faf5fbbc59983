"""What the server counts, for Prometheus."""

from __future__ import annotations

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        given = {"registry": self.registry}
        self.requests = Counter("llava_fa_requests", "Chat completions by outcome", ["status"], **given)
        self.seconds = Histogram(
            "llava_fa_request_seconds", "First byte of a request to last of its answer", buckets=SECONDS, **given
        )
        self.tokens = Counter("llava_fa_tokens", "Tokens read and written", ["kind"], **given)
        self.active = Gauge("llava_fa_active_requests", "Chat completions under way, waiting ones included", **given)
        memory = Gauge("llava_fa_resident_bytes", "Resident memory of the server", **given)
        memory.set_function(lambda: psutil.Process().memory_info().rss)
        Gauge("llava_fa_model_info", "The model served", ["model"], **given).labels(model).set(1)

    def text(self) -> bytes:
        """The page for Prometheus."""
        return generate_latest(self.registry)
