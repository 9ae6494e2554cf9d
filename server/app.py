"""The HTTP application: endpoints, middlewares, API keys and error responses. Starts and stops nothing."""

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
from server.web.auth import OPEN_PATHS, BearerAuth, ErrorResponder
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
    """Return the HTTP application of a server with its engine at the other end of `link`. Does not start the engine."""
    app = Application(
        title="allattn",
        version=package_version(),
        summary="An all-attention language model over HTTP",
        docs_url=None,  # openapi.install adds its own page
        redoc_url=None,
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # they would quote exceptions; see request_spans
    )
    service = Service(settings, bundle=bundle, link=link)
    register(app, ENDPOINTS, service=service)
    respond = _error_responder(service.metrics)
    _install_keys(app, settings=settings, respond=respond)
    _install_metrics(app, service.metrics)
    app.add_middleware(RequestLog, respond=respond)
    _install_errors(app, respond=respond)
    if tracing is not None:
        tracing.install(app, model=service.model_name)
    return app


def _install_metrics(app: FastAPI, metrics: Metrics) -> None:
    """Add metrics of HTTP requests to those of the engine, and serve all of them at GET /metrics."""
    instrumentator = Instrumentator(should_group_status_codes=False, registry=metrics.registry)
    instrumentator.instrument(app).expose(app, tags=["others"])


class Application(FastAPI):
    """A FastAPI application that keeps the ASGI server's own `send` for the events of streams."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        scope[FIRST_SEND] = send
        await super().__call__(scope, receive, send)


def _install_keys(app: FastAPI, *, settings: Settings, respond: ErrorResponder) -> None:
    """Require an API key if the settings have keys."""
    keys = settings.all_api_keys()
    if not keys:
        return
    if settings.api_key_file is not None and others_can_read(settings.api_key_file):
        log.warning("%s can be read by every user of this machine", settings.api_key_file)
    app.add_middleware(BearerAuth, keys=keys, refuse=respond)
    openapi.require_bearer(app, open_paths=OPEN_PATHS)


def _error_responder(metrics: Metrics) -> ErrorResponder:
    """Return the function that turns an error into a response and counts it."""

    def respond(request: Request, error: ServerError) -> Response:
        if isinstance(error, RequestError | Overloaded):  # other failed requests were admitted: their endings count
            metrics.count_rejected(error.code)
        request_id = exchange_of(request.scope).request_id
        body = msgspec.json.encode(error_reply(error, request_id=request_id))
        headers = retry_headers(error)
        if error.status == 413:
            headers["Connection"] = "close"  # the rest of the body is not read
        return Response(body, status_code=error.status, headers=headers, media_type="application/json")

    return respond


def _install_errors(app: FastAPI, *, respond: ErrorResponder) -> None:
    @app.exception_handler(ServerError)
    async def expected(request: Request, error: ServerError) -> Response:
        return respond(request, error)

    @app.exception_handler(HTTPException)
    async def routing(request: Request, error: HTTPException) -> Response:
        path = request.url.path
        if error.status_code == 404:
            return respond(request, NotFound(f"there is no {shorten(path)}; /docs lists what there is"))
        if error.status_code == 405:
            why = f"{request.method} {shorten(path)} is not possible; /docs lists what is"
            reply = respond(request, MethodNotAllowed(why))
            reply.headers.update(error.headers or {})  # Allow
            return reply
        return respond(request, MalformedRequest(error.detail))

    @app.exception_handler(ClientDisconnect)
    async def gone(_request: Request, _error: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_GONE)
