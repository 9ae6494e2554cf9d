"""The application: endpoints, middleware, keys, errors as bodies. Starts and stops nothing."""

import logging

import msgspec
from fastapi import FastAPI, Request, Response
from prometheus_fastapi_instrumentator import Instrumentator
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from model.bundle import Bundle
from server.config import Settings
from server.config.keys import others_can_read
from server.dialects import cancel, tokenizer
from server.dialects.generate import routes as generate
from server.dialects.openai import models
from server.dialects.openai import routes as openai
from server.dialects.score import routes as score
from server.errors import (
    MalformedRequest,
    MethodNotAllowed,
    NotFound,
    Overloaded,
    RequestError,
    ServerError,
    error_reply,
    retry_headers,
    shorten,
)
from server.operation import health
from server.operation.tracing import Tracing
from server.requests.metrics import Metrics
from server.requests.service import Link, Service
from server.runtime import package_version
from server.web import openapi, playground
from server.web.auth import OPEN_PATHS, Answer, BearerAuth
from server.web.endpoint import register
from server.web.event_stream import FIRST_SEND
from server.web.exchange import exchange_of
from server.web.request_log import CLIENT_GONE, RequestLog

ENDPOINTS = (
    *generate.ENDPOINTS,
    *score.ENDPOINTS,
    *openai.ENDPOINTS,
    *models.ENDPOINTS,
    *tokenizer.ENDPOINTS,
    *cancel.ENDPOINTS,
    *health.ENDPOINTS,
    *playground.ENDPOINTS,
)

log = logging.getLogger(__name__)


def create_app(*, settings: Settings, bundle: Bundle, link: Link, tracing: Tracing | None = None) -> FastAPI:
    """The HTTP side of a server whose engine is at the other end of `link`. Neither starts nor stops it."""
    app = Application(
        title="allattn",
        version=package_version(),
        summary="An all-attention language model over HTTP",
        docs_url=None,  # openapi.install has its own
        redoc_url=None,
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # would quote exceptions; see request_spans
    )
    service = Service(settings, bundle=bundle, link=link)
    register(app, ENDPOINTS, service=service)
    answer = _answers(service.metrics)
    _install_keys(app, settings=settings, answer=answer)
    _install_metrics(app, service.metrics)
    app.add_middleware(RequestLog, answer=answer)
    _install_errors(app, answer=answer)
    if tracing is not None:
        tracing.install(app, model=service.model_name)
    return app


def _install_metrics(app: FastAPI, metrics: Metrics) -> None:
    """Count the HTTP requests beside what the engine does, and answer GET /metrics."""
    instrumentator = Instrumentator(should_group_status_codes=False, registry=metrics.registry)
    instrumentator.instrument(app).expose(app, tags=["others"])


class Application(FastAPI):
    """FastAPI, but the server's own `send` is kept for the events of streams."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        scope[FIRST_SEND] = send
        await super().__call__(scope, receive, send)


def _install_keys(app: FastAPI, *, settings: Settings, answer: Answer) -> None:
    """Guard the application, where there are keys."""
    keys = settings.all_api_keys()
    if not keys:
        return
    if settings.api_key_file is not None and others_can_read(settings.api_key_file):
        log.warning("%s can be read by every user of this machine", settings.api_key_file)
    app.add_middleware(BearerAuth, keys=keys, refuse=answer)
    openapi.require_bearer(app, open_paths=OPEN_PATHS)


def _answers(metrics: Metrics) -> Answer:
    """The function that turns an error into the answer to a request, and counts it."""

    def answer(request: Request, error: ServerError) -> Response:
        if isinstance(error, RequestError | Overloaded):  # all others were admitted, and are counted by their ending
            metrics.count_rejected(error.code)
        request_id = exchange_of(request.scope).request_id
        body = msgspec.json.encode(error_reply(error, request_id=request_id))
        headers = retry_headers(error)
        if error.status == 413:
            headers["Connection"] = "close"  # the rest of the body is not read
        return Response(body, status_code=error.status, headers=headers, media_type="application/json")

    return answer


def _install_errors(app: FastAPI, *, answer: Answer) -> None:
    @app.exception_handler(ServerError)
    async def expected(request: Request, error: ServerError) -> Response:
        return answer(request, error)

    @app.exception_handler(HTTPException)
    async def routing(request: Request, error: HTTPException) -> Response:
        path = request.url.path
        if error.status_code == 404:
            return answer(request, NotFound(f"there is no {shorten(path)}; /docs lists what there is"))
        if error.status_code == 405:
            why = f"{request.method} {shorten(path)} is not possible; /docs lists what is"
            reply = answer(request, MethodNotAllowed(why))
            reply.headers.update(error.headers or {})  # Allow
            return reply
        return answer(request, MalformedRequest(error.detail))

    @app.exception_handler(ClientDisconnect)
    async def gone(_request: Request, _error: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_GONE)
