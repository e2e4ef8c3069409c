"""Runs work on the model in a thread of its own and hands out what it says, so that a page can show it and stop it.

`pisces_demo/model.py` is built on it. Nothing here knows what the work is.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any


Say = Callable[[Any], None]
_END = object()


def run_in_steps(lock: threading.Lock, work: Callable[[Say, threading.Event], None]) -> Iterator[Any]:
    """Yield everything that `work(say, stop)` says, while it runs in a thread that holds `lock`.

    The lock belongs to the thread and not to this iterator: whoever reads may leave in the middle, closing the
    iterator or forgetting it. Then `stop` is set, and the lock is free as soon as the work has seen that. Leaving does
    not wait for it.

    Args:
        lock: held by whoever uses the model.
        work: calls `say` with what is new, and returns soon after `stop` is set.

    Raises:
        Exception: what the work raised.
    """
    said: queue.SimpleQueue = queue.SimpleQueue()
    stop = threading.Event()
    failure: list[BaseException] = []

    def run() -> None:
        try:
            with lock:
                if not stop.is_set():
                    work(said.put, stop)
        except BaseException as error:  # it belongs to the one who reads, whatever it is
            failure.append(error)
        finally:
            said.put(_END)

    threading.Thread(target=run, name="pisces-model", daemon=True).start()
    try:
        while (piece := said.get()) is not _END:
            yield piece
    finally:
        stop.set()
    if failure:
        raise failure[0]
