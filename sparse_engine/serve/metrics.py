"""What Prometheus is told. No label has more values than there are models, codes or batches."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from sparse_engine import __version__

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
STEP_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The metrics of one service, in a registry of their own."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, queued: Callable[[], float], in_flight: Callable[[], float]) -> None:
        self._registry = registry = CollectorRegistry()

        def histogram(name: str, words: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"sparse_engine_{name}", words, buckets=buckets, registry=registry)

        def counter(name: str, words: str, labels: tuple[str, ...]) -> Counter:
            return Counter(f"sparse_engine_{name}", words, labels, registry=registry)

        self.requests = counter("requests_total", "Requests for images, by the answer's status.", ("code",))
        self.images = counter("images_total", "Images drawn.", ("model",))
        self.padded = counter("padded_images_total", "Rows that filled batches up and were thrown away.", ("model",))
        self.request_seconds = histogram("request_duration_seconds", "From a request's arrival to its answer.", SECONDS)
        self.queue_seconds = histogram(
            "queue_duration_seconds", "From a request's arrival to its first batch.", SECONDS
        )
        self.step_seconds = histogram("step_duration_seconds", "A batch's time by its number of steps.", STEP_SECONDS)
        self.batch_images = histogram("batch_images", "Images drawn together.", BATCHES)
        self.info = Gauge("sparse_engine_build_info", "What runs.", ("version", "backend", "engine"), registry=registry)
        Gauge("sparse_engine_queue_images", "Images that wait.", registry=registry).set_function(queued)
        Gauge("sparse_engine_in_flight_images", "Images being drawn.", registry=registry).set_function(in_flight)

    def loaded(self, model: str, backend: str) -> None:
        """An engine is there."""
        self.info.labels(__version__, backend, model).set(1)
        self.images.labels(model)
        self.padded.labels(model)

    def answered(self, status: int, seconds: float) -> None:
        """A request for images has had its answer."""
        self.requests.labels(str(status)).inc()
        self.request_seconds.observe(seconds)

    def drew(self, model: str, images: int, padding: int, steps: int, seconds: float) -> None:
        """A batch was drawn."""
        self.images.labels(model).inc(images)
        self.padded.labels(model).inc(padding)
        self.batch_images.observe(images)
        self.step_seconds.observe(seconds / steps)

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self._registry)
