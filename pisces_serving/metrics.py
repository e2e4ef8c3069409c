"""What /metrics shows: counts and times, with labels from fixed lists, so that no client can make new ones."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


ROWS = (1, 2, 4, 8, 16, 32, 64)
SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The numbers of one server."""

    def __init__(self, queue_length: Callable[[], float], is_ready: Callable[[], float]):
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "pisces_requests", "answers given, by path and status", ["path", "status"], registry=registry
        )
        self.errors = Counter("pisces_errors", "refusals and failures, by code", ["code"], registry=registry)
        self.batch_rows = Histogram(
            "pisces_batch_rows", "rows of a batch", ["endpoint"], buckets=ROWS, registry=registry
        )
        self.queue_s = Histogram(
            "pisces_queue_seconds", "from queue to start", ["endpoint"], buckets=SECONDS, registry=registry
        )
        self.run_s = Histogram("pisces_run_seconds", "of a batch", ["endpoint"], buckets=SECONDS, registry=registry)
        self.phase_s = Histogram(
            "pisces_phase_seconds",
            "of a batch, by what was busy: vectors and decoder of drawings, text of chats",
            ["phase"],
            buckets=SECONDS,
            registry=registry,
        )
        self.pictures = Counter("pisces_pictures", "pictures drawn", registry=registry)
        self.tokens = Counter("pisces_tokens", "tokens of chats", ["kind"], registry=registry)
        self.dropped = Counter("pisces_dropped", "requests whose sender left before an answer", registry=registry)
        Gauge("pisces_queue_length", "requests that wait", registry=registry).set_function(queue_length)
        Gauge("pisces_ready", "1 once the model is loaded and warm", registry=registry).set_function(is_ready)

    def text(self) -> bytes:
        return generate_latest(self.registry)


__all__ = ["Metrics"]
