"""The serving process that `pisces serve` starts: reads its settings from standard input, serves until it is ended.

It says "ready" on standard output once the model has answered, and ends when standard input closes.
"""

import asyncio
import json
import os
import signal
import socket
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from modeling_pisces.checkpoint.adapters import Adapter, find_adapter, find_model
from modeling_pisces.checkpoint.files import check_checkpoint
from modeling_pisces.checkpoint.loading import quiet_libraries
from pisces_commands.ending import CommandEnd, one_line_ending

from .app import create_app
from .batcher import Batcher
from .errors import ApiError
from .flow import Server
from .settings import Settings
from .supervisor import READY
from .worker import Worker


def open_server(settings: Settings) -> Server:
    """Check the checkpoint and its adapters, and put a worker beside a queue; nothing is loaded yet.

    Raises:
        ValueError: one of them cannot be used.
    """
    folder, brought = find_model(settings.model, (), settings.revision)
    check_checkpoint(folder)
    name = settings.served_name or (Path(settings.model).name if Path(settings.model).exists() else settings.model)
    adapters: dict[str, Adapter] = {name: find_adapter(source) for name, source in settings.adapters}
    if brought:  # --model is an adapter: its base is served, and the adapter beside it
        adapters = {Path(settings.model).name: brought[0], **adapters}
        name = settings.served_name or folder.name
    models: dict[str, str | None] = {name: None}
    models |= {f"{name}:{adapter}": adapter for adapter in adapters}
    batcher = Batcher(settings.max_queue, settings.max_batch, settings.batch_wait_ms / 1000)
    return Server(settings, batcher, models, Worker(folder, adapters, settings, batcher))


class Protocol(H11Protocol):
    """Answers what is no HTTP at all in the form of every other error."""

    def send_400_response(self, msg: str) -> None:
        body = json.dumps(ApiError(msg, code="invalid_http").body()).encode()
        head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(f"{head}connection: close\r\n\r\n".encode() + body)
        self.transport.close()


class Uvicorn(uvicorn.Server):
    """Closes the queue when it is asked to end, and gives the running batch its grace."""

    def __init__(self, config: uvicorn.Config, served: Server):
        super().__init__(config)
        self.served = served
        self.loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self.served.worker.start()

    def handle_exit(self, sig: int, frame: Any) -> None:
        super().handle_exit(sig, frame)
        self.end()

    def end(self) -> None:
        """From any thread, and from a signal: locks are taken later, by the event loop."""
        self.should_exit = True
        if self.loop is not None and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._close, self.loop)

    def _close(self, loop: asyncio.AbstractEventLoop) -> None:
        self.served.batcher.close()
        loop.call_later(self.served.settings.grace_s, self.served.batcher.give_up)


def run(settings: Settings) -> None:
    """Serve until ended.

    Raises:
        ValueError: the checkpoint cannot be used.
        BaseException: whatever ended the worker.
    """
    served = open_server(settings)
    level = "info" if settings.verbose else "warning"
    config = uvicorn.Config(
        create_app(served),
        host=settings.host,
        port=settings.port,
        http=Protocol,
        ws="none",
        lifespan="off",
        log_level=level,
        access_log=settings.verbose,
        timeout_graceful_shutdown=int(settings.grace_s) + 5,
        server_header=False,
    )
    server = Uvicorn(config, served)
    served.worker.on_end, served.worker.on_ready = server.end, lambda: print(READY, flush=True)
    # uvicorn raises the signal again when it is done, which would end us by it
    for name in ("SIGTERM", "SIGINT"):
        signal.signal(getattr(signal, name), lambda *_: None)
    threading.Thread(target=_watch_supervisor, args=(server,), daemon=True).start()
    sockets = None if settings.listener is None else [socket.socket(fileno=settings.listener)]
    server.run(sockets)
    if served.worker.error is not None:
        raise served.worker.error


def _watch_supervisor(server: Uvicorn) -> None:
    sys.stdin.read()
    server.end()


def main() -> int:
    settings = Settings.from_json(json.loads(sys.stdin.readline()))
    try:
        with one_line_ending("pisces: error: ", every_error=True, verbose=settings.verbose):
            with nullcontext() if settings.verbose else quiet_libraries():
                run(settings)
    except CommandEnd as end:
        return end.code
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the worker may be inside a long call, and Python would wait for nothing
