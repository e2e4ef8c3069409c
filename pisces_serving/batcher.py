"""Puts requests that may share a batch together, in the order in which they came; one queue per key.

The event loop submits, the worker takes. A request whose sender is gone, or whose time is over, never reaches the
worker. Nothing here knows what a model is.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

from .errors import ApiError, shutting_down


class Key(NamedTuple):
    """What rows of one batch have in common: `shape` is whatever else of a request the whole batch shares."""

    endpoint: str
    adapter: str | None
    shape: Hashable = None


class Job:
    """One request on its way.

    Args:
        key: jobs of equal keys may run together.
        num_rows: how many rows of a batch it fills.
        work: what to do, as the worker's function for this endpoint reads it.
        send: called from any thread with ("piece" | "done" | "error", value), until the job is cancelled.
    """

    def __init__(self, key: Key, num_rows: int, work: Any, send: Callable[[str, Any], None]):
        self.key, self.num_rows, self.work, self.send = key, num_rows, work, send
        self.since = time.monotonic()
        self.is_cancelled = False  # nobody waits for the answer any more; set once, read in both threads

    def tell(self, kind: str, value: Any) -> None:
        if not self.is_cancelled:
            self.send(kind, value)

    def cancel(self) -> None:
        self.is_cancelled = True


class Batcher:
    """Queues of jobs between the event loop and the worker.

    Args:
        max_queue: jobs that may wait.
        max_batch: rows of a batch; a job with more rows is a batch of its own.
        wait_s: how long the first job of a batch waits for others.
        alone: endpoints whose jobs run one at a time.
    """

    def __init__(self, max_queue: int, max_batch: int, wait_s: float, alone: tuple[str, ...] = ("chat",)):
        self.max_queue, self.max_batch, self.wait_s, self.alone = max_queue, max_batch, wait_s, alone
        self.queues: dict[Key, deque[Job]] = {}
        self.changed = threading.Condition()
        self.is_closed = False
        self.running: list[Job] = []
        self.running_since: float | None = None
        self.seconds_per_job = 1.0  # a moving average, for Retry-After

    def __len__(self) -> int:
        with self.changed:
            return self._num_waiting()

    def check_room(self) -> None:
        """Refuse before a body is read what would be refused after it.

        Raises:
            ApiError: 429 when the queue is full, 503 when the server is closing.
        """
        with self.changed:
            self._check_room()

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises:
            ApiError: as `check_room`.
        """
        with self.changed:
            self._check_room()
            self.queues.setdefault(job.key, deque()).append(job)
            self.changed.notify()

    def take(self) -> list[Job]:
        """The next batch, waited for; empty when the batcher is closed and nothing is left."""
        with self.changed:
            self._note_end()
            while True:
                self._drop_cancelled()
                key = min(self.queues, key=lambda found: self.queues[found][0].since, default=None)
                if key is None:
                    if self.is_closed:
                        return []
                    self.changed.wait()
                    continue
                left = self.queues[key][0].since + self.wait_s - time.monotonic()
                if left > 0 and not self._is_full(key):
                    self.changed.wait(left)
                    continue
                self.running, self.running_since = self._pop(key), time.monotonic()
                return self.running

    def close(self) -> None:
        """Take nothing new; whoever waits is told so, and what runs may end."""
        with self.changed:
            self.is_closed = True
            waiting = [job for queue in self.queues.values() for job in queue]
            self.queues.clear()
            self.changed.notify_all()
        for job in waiting:
            job.tell("error", shutting_down())

    def give_up(self) -> None:
        """Tell those whose batch still runs that they get no answer."""
        with self.changed:
            running = list(self.running)
        for job in running:
            job.tell("error", shutting_down())
            job.cancel()

    def busy_s(self) -> float:
        """How long the running batch has been running."""
        since = self.running_since
        return 0.0 if since is None else time.monotonic() - since

    def _check_room(self) -> None:
        if self.is_closed:
            raise shutting_down()
        if (waiting := self._num_waiting()) >= self.max_queue:
            raise ApiError(
                f"{waiting} requests are waiting, this server's --max_queue. Ask again later.",
                status=429,
                code="queue_full",
                retry_after_s=max(1, math.ceil(waiting * self.seconds_per_job)),
            )

    def _num_waiting(self) -> int:
        return sum(not job.is_cancelled for queue in self.queues.values() for job in queue)

    def _is_full(self, key: Key) -> bool:
        return key.endpoint in self.alone or sum(job.num_rows for job in self.queues[key]) >= self.max_batch

    def _drop_cancelled(self) -> None:
        for key, queue in list(self.queues.items()):
            self.queues[key] = deque(job for job in queue if not job.is_cancelled)
            if not self.queues[key]:
                del self.queues[key]

    def _pop(self, key: Key) -> list[Job]:
        queue = self.queues[key]
        jobs, num_rows = [queue.popleft()], 0
        num_rows = jobs[0].num_rows
        while queue and key.endpoint not in self.alone and num_rows + queue[0].num_rows <= self.max_batch:
            jobs.append(queue.popleft())
            num_rows += jobs[-1].num_rows
        if not queue:
            del self.queues[key]
        return jobs

    def _note_end(self) -> None:
        if self.running_since is not None and self.running:
            seconds = (time.monotonic() - self.running_since) / len(self.running)
            self.seconds_per_job += 0.2 * (seconds - self.seconds_per_job)
        self.running, self.running_since = [], None


__all__ = ["Batcher", "Job", "Key"]
