"""The HTTP application: its routes, who may ask, and one form for every error."""

import hmac
import time
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .flow import Gone, Server
from .routes.chat import complete_chat
from .routes.embeddings import embed
from .routes.images import edit_images, generate_images


OPEN_PATHS = ("/health", "/ready")  # without the key: whoever watches the machine has none
POSTS: dict[str, Callable[[Request, Server], Awaitable[Response]]] = {
    "/v1/chat/completions": complete_chat,
    "/v1/images/generations": generate_images,
    "/v1/images/edits": edit_images,
    "/v1/embeddings": embed,
}
GETS = ("/v1/models", "/v1/models/{name}", "/health", "/ready", "/metrics")


def create_app(server: Server) -> FastAPI:
    """The application around a server whose worker runs."""
    app = FastAPI(title="Pisces", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    for path, answer in POSTS.items():
        app.add_api_route(path, _route(answer, server), methods=["POST"])
    _add_gets(app, server)
    app.add_exception_handler(ApiError, lambda request, error: _refusal(server, error))
    app.add_exception_handler(HTTPException, lambda request, error: _refusal(server, _of_http(request, error)))
    app.add_exception_handler(Exception, lambda request, error: _refusal(server, _internal()))
    app.add_middleware(Door, server=server)
    return app


def _route(answer: Callable[[Request, Server], Awaitable[Response]], server: Server) -> Any:
    async def route(request: Request) -> Response:
        try:
            return await answer(request, server)
        except Gone:
            return Response(status_code=499)  # nginx's number for a client that left; nobody reads it

    return route


def _add_gets(app: FastAPI, server: Server) -> None:
    started = int(time.time())

    def card(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": started, "owned_by": "pisces"}

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [card(name) for name in server.models]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Any:
        return card(server.find_model(name)[0])

    @app.get("/health")
    async def health() -> Any:
        if not server.worker.is_alive() or server.worker.is_stuck:
            raise ApiError("the worker does not answer. Start the server again.", 503, code="worker_lost")
        return {"status": "alive"}

    @app.get("/ready")
    async def ready() -> Any:
        if not server.worker.is_ready.is_set() or server.batcher.is_closed:
            raise ApiError("the model is not loaded yet, or the server is ending.", 503, code="not_ready")
        return {"status": "ready"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(server.worker.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _refusal(server: Server, error: ApiError) -> JSONResponse:
    server.worker.metrics.errors.labels(error.code or str(error.status)).inc()
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers())


def _of_http(request: Request, error: Any) -> ApiError:
    paths = ", ".join([*POSTS, *GETS])
    if error.status_code == 404:
        return ApiError(f"{request.url.path!a:.200} is not served here. Served: {paths}.", 404, code="unknown_url")
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "POST" if request.url.path in POSTS else "GET")
        return ApiError(f"{request.method!a:.40} is not allowed here; expected {allowed}.", 405, code="wrong_method")
    return ApiError(str(error.detail), error.status_code)


def _internal() -> ApiError:
    return ApiError("the server failed at this request; its log says where.", 500, code="internal_error")


class Door:
    """Checks the key before anything of a request is read, and counts answers by path and status."""

    def __init__(self, app: ASGIApp, server: Server):
        self.app, self.server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"] if scope["path"] in (*POSTS, *GETS) else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.server.worker.metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        if scope["path"] not in OPEN_PATHS and not self._has_key(scope):
            error = ApiError("no valid API key. Send Authorization: Bearer KEY.", 401, code="invalid_api_key")
            return await _refusal(self.server, error)(scope, receive, counted)
        await self.app(scope, receive, counted)

    def _has_key(self, scope: Scope) -> bool:
        key = self.server.settings.api_key
        if key is None:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, f"Bearer {key}".encode())


__all__ = ["create_app"]
