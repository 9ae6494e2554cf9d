"""The application: routers, request ids, errors as bodies, one log line a request. Starts and stops nothing."""

import logging
import re
import time
import uuid
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model.bundle import Bundle
from server import openapi
from server.config import Settings
from server.errors import (
    InternalError,
    MalformedRequest,
    MethodNotAllowed,
    NotFound,
    ServerError,
    error_reply,
    retry_headers,
)
from server.generate import generate_router
from server.health import health_router
from server.score import score_router
from server.service import Link, Service, package_version

REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")

log = logging.getLogger(__name__)


def create_app(*, settings: Settings, bundle: Bundle, link: Link) -> FastAPI:
    """The HTTP side of a server whose engine is at the other end of `link`. Neither starts nor stops it."""
    app = FastAPI(title="allattn", version=package_version(), summary="An all-attention language model over HTTP")
    service = Service(settings, bundle=bundle, link=link)
    for router in (generate_router(service), score_router(service), health_router(service)):
        app.include_router(router)
    service.metrics.instrument(app)
    app.add_middleware(RequestLog)
    openapi.install(app)
    _install_errors(app, service=service)
    return app


def _install_errors(app: FastAPI, *, service: Service) -> None:
    def answer(request: Request, error: ServerError) -> Response:
        service.metrics.count_rejected(error.code)
        request_id = request.state.request_id
        body = msgspec.json.encode(error_reply(error, request_id=request_id))
        headers = {**retry_headers(error), "X-Request-Id": request_id}
        if error.status == 413:
            headers["Connection"] = "close"  # the rest of the body is not read
        return Response(body, status_code=error.status, headers=headers, media_type="application/json")

    @app.exception_handler(ServerError)
    async def expected(request: Request, error: ServerError) -> Response:
        return answer(request, error)

    @app.exception_handler(HTTPException)
    async def routing(request: Request, error: HTTPException) -> Response:
        path = request.url.path
        if error.status_code == 404:
            return answer(request, NotFound(f"there is no {path}; /docs lists what there is"))
        if error.status_code == 405:
            return answer(request, MethodNotAllowed(f"{request.method} {path} is not possible; /docs lists what is"))
        return answer(request, MalformedRequest(error.detail))

    @app.exception_handler(ClientDisconnect)
    async def gone(_request: Request, _error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nginx's word for it; nobody reads it but the metrics and the log

    @app.exception_handler(Exception)
    async def bug(request: Request, _error: Exception) -> Response:
        return answer(request, InternalError("an unexpected error; the server's log has it under the request id"))


class RequestLog:
    """Gives each request its id, and each POST its one line in the log: ids, counts and times, never a text.

    The id is the client's X-Request-Id, or a new one; the answer carries it. An endpoint may set
    `request.state.summary`, a function that tells at the end what is worth a line.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        state: dict[str, Any] = scope.setdefault("state", {})
        state["request_id"] = request_id
        status, started = 500, time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            if scope["method"] == "POST":
                line = {
                    "request_id": request_id,
                    "path": scope["path"],
                    "status": status,
                    "seconds": round(time.perf_counter() - started, 6),
                    **(state["summary"]() if "summary" in state else {}),
                }
                log.info("request", extra={"fields": line})
