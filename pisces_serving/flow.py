"""The way of one request: its body is read within limits, its job is queued, its events are waited for.

Whoever hangs up, and whoever waits longer than the deadline, is dropped: a job that has not started never starts.
"""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect, Request

from .batcher import Batcher, Job, Key
from .errors import ApiError, deadline_passed, shown
from .settings import Settings


BODY_TIMEOUT_S = 60
NESTING = 40  # levels of JSON; a chat has six


class Gone(Exception):
    """The client has hung up; nobody reads an answer."""


@dataclass
class Server:
    """What every route needs: the queue, the limits, and the names of what is served.

    Args:
        models: served name -> adapter, None for the base; the first is the default.
    """

    settings: Settings
    batcher: Batcher
    models: dict[str, str | None]
    worker: Any
    num_reading: int = 0

    def find_model(self, name: Any) -> tuple[str, str | None]:
        """The served name and the adapter that a request means.

        Raises:
            ApiError: 404 for a name that is not served.
        """
        if name is None:
            return next(iter(self.models.items()))
        if not isinstance(name, str) or name not in self.models:
            raise ApiError(
                f"model {shown(name)} is not served here. Served: {', '.join(self.models)}.",
                status=404,
                param="model",
                code="model_not_found",
            )
        return name, self.models[name]


# ---- bodies


async def read_json(request: Request, server: Server) -> dict[str, Any]:
    """The JSON object of a request.

    Raises:
        ApiError: another type, too large, too slow, or no object.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # and what a page of another site may send without asking first is not JSON
        raise ApiError(
            f"Content-Type is {shown(kind)}; expected application/json.", status=415, code="unsupported_media_type"
        )
    body = await read_body(request, server)
    try:
        found = json.loads(body)
        _check_nesting(found)
    except (ValueError, RecursionError) as error:  # ValueError: also text that is no UTF-8, and numbers of miles
        reason = str(error).partition("\n")[0][:160] if isinstance(error, ValueError) else "nested too deeply"
        raise ApiError(f"the body is no JSON that can be read ({ascii(reason)[1:-1]}).", code="invalid_json") from None
    if not isinstance(found, dict):
        raise ApiError(f"the body is a JSON {type(found).__name__}; expected an object.", code="invalid_json")
    return found


def _check_nesting(value: Any, depth: int = 0) -> None:
    if depth > NESTING:
        raise ValueError(f"nested more than {NESTING} levels deep")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_nesting(inner, depth + 1)


async def read_body(request: Request, server: Server) -> bytes:
    """All bytes of a body, within the limits of size and time.

    Raises:
        ApiError: 413, 408, or 429 and 503 as the queue has it.
        Gone: the client hung up in the middle.
    """
    limit = server.settings.max_body_mib * 2**20
    length = request.headers.get("content-length", "0")
    if length.isascii() and length.isdigit() and int(length[:20]) > limit:
        raise _too_large(limit)
    server.batcher.check_room()
    if server.num_reading >= server.settings.max_queue:
        raise ApiError("too many requests are being read. Ask again later.", 429, code="queue_full", retry_after_s=1)
    server.num_reading += 1
    try:
        return await asyncio.wait_for(_pieces(request, limit), BODY_TIMEOUT_S)
    except ClientDisconnect as error:
        raise Gone from error
    except asyncio.TimeoutError:
        raise ApiError(f"the body was not complete after {BODY_TIMEOUT_S} s.", 408, code="body_too_slow") from None
    finally:
        server.num_reading -= 1


async def _pieces(request: Request, limit: int) -> bytes:
    pieces: list[bytes] = []
    size = 0
    async for piece in request.stream():
        size += len(piece)
        if size > limit:
            raise _too_large(limit)
        pieces.append(piece)
    return b"".join(pieces)


def _too_large(limit: int) -> ApiError:
    return ApiError(
        f"the body is larger than {limit} bytes, this server's --max_body_mib. Send smaller pictures.",
        status=413,
        code="body_too_large",
    )


async def read_form(request: Request, server: Server, most_files: int) -> list[tuple[str, str | bytes]]:
    """The fields of a multipart form in their order, files as their bytes.

    Raises:
        ApiError: another type, or no form that can be read; and as `read_body`.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise ApiError(
            f"Content-Type is {shown(kind)}; expected multipart/form-data.", status=415, code="unsupported_media_type"
        )
    body = await read_body(request, server)

    async def replay() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    limits = {"max_files": most_files + 1, "max_fields": 100, "max_part_size": 2**20}
    scope = {name: value for name, value in request.scope.items() if name != "app"}
    try:
        async with Request(scope, replay).form(**limits) as form:
            return [
                (name, await value.read() if isinstance(value, UploadFile) else value)
                for name, value in form.multi_items()
            ]
    except Exception as error:  # of starlette, of the parser below it, of a charset that nobody knows
        reason = getattr(error, "message", None) or getattr(error, "detail", None) or str(error)
        raise ApiError(
            f"the form cannot be read ({ascii(str(reason))[1:-1]:.160}).", param=None, code="invalid_form"
        ) from error


# ---- jobs


class Ticket:
    """A queued job as its route sees it: events to wait for, until the deadline, as long as the client listens."""

    def __init__(self, request: Request, server: Server, key: Key, num_rows: int, work: Any):
        loop = asyncio.get_running_loop()
        self.request, self.server = request, server
        self.events: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()

        put = self.events.put_nowait  # no reference to self: a cycle would keep the pictures of a request for long

        def send(kind: str, value: Any) -> None:
            with suppress(RuntimeError):  # the loop has been closed, and nobody listens
                loop.call_soon_threadsafe(put, (kind, value))

        self.job = Job(key, num_rows, work, send)
        self.is_done = False
        self.ends = time.monotonic() + server.settings.deadline_s
        self.gone: asyncio.Task | None = None
        server.batcher.submit(self.job)

    async def next(self) -> tuple[str, Any]:
        """The next event, ("piece" | "done", value).

        Raises:
            ApiError: the job failed, or its time is over.
            Gone: the client hung up.
        """
        if self.gone is None:
            self.gone = asyncio.ensure_future(_hung_up(self.request))
        event = asyncio.ensure_future(self.events.get())
        try:
            left = max(0.0, self.ends - time.monotonic())
            await asyncio.wait({event, self.gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if not event.done():
                self.drop()
                raise Gone if self.gone.done() else deadline_passed(self.server.settings.deadline_s)
            kind, value = event.result()
        except asyncio.CancelledError:
            self.drop()
            raise
        finally:
            event.cancel()
        if kind == "error":
            self.drop()
            raise value
        if kind == "done":
            self.is_done = True
            self._stop_watching()
        return kind, value

    async def result(self) -> Any:
        """What the job is done with; pieces on the way are for streams."""
        while True:
            kind, value = await self.next()
            if kind == "done":
                return value

    async def pieces(self, first: tuple[str, Any]) -> AsyncIterator[tuple[str, Any]]:
        """Events from `first` on, the last of them "done"."""
        kind, value = first
        yield kind, value
        while kind != "done":
            kind, value = await self.next()
            yield kind, value

    def drop(self) -> None:
        """Nobody waits any more; nothing where the job is done."""
        if not self.is_done and not self.job.is_cancelled:
            self.job.cancel()
            self.server.worker.metrics.dropped.inc()
        self._stop_watching()

    def _stop_watching(self) -> None:
        if self.gone is not None:
            self.gone.cancel()


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def new_seed() -> int:
    return secrets.randbelow(2**31)


__all__ = ["Gone", "Server", "Ticket", "new_seed", "read_body", "read_form", "read_json"]
