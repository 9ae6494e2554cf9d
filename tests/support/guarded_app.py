"""The middleware of the application around a few endpoints that need no engine, for tests of the middleware."""

import json
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import msgspec
import pytest
from fastapi import FastAPI, Request, Response
from pydantic import SecretStr
from starlette.responses import HTMLResponse, StreamingResponse

from server.errors import ServerError, error_reply
from server.requests.results import WorkSummary
from server.runtime import JsonLines
from server.web import openapi
from server.web.auth import OPEN_PATHS, BearerAuth
from server.web.exchange import exchange_of
from server.web.request_log import RequestLog

KEYS = ["correct-horse-battery", "staple/2+more=chars~~"]
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"


@pytest.fixture
def log_lines() -> Iterator[list[str]]:
    """Give every line of the log, the server's and uvicorn's, as it would appear on standard error."""
    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    handler, server = Lines(), logging.getLogger("server")
    handler.setFormatter(JsonLines())
    logging.getLogger().addHandler(handler)
    before = server.level
    server.setLevel(logging.INFO)
    yield lines
    logging.getLogger().removeHandler(handler)
    server.setLevel(before)


SUMMARY = WorkSummary(sequences=1, prompt_tokens=3, finish_reasons=["length"], timings=[])


def answer(request: Request, error: ServerError) -> Response:
    body = error_reply(error, request_id=exchange_of(request.scope).request_id)
    return Response(msgspec.json.encode(body), status_code=error.status, media_type="application/json")


def make_app(*, keys: list[str] | None = None) -> FastAPI:
    """Return an application with the middleware of create_app around a few endpoints that need no engine."""
    app = FastAPI(title="allattn", docs_url=None, redoc_url=None)

    @app.get("/health/live")
    @app.get("/healthz")
    @app.get("/health")
    @app.delete("/requests/{id}")
    async def fine() -> dict[str, str]:
        return {"status": "fine"}

    @app.get("/page")
    async def page() -> HTMLResponse:
        return HTMLResponse("<p>")

    @app.get("/special")
    async def special() -> HTMLResponse:
        return HTMLResponse("<p>", headers={"Content-Security-Policy": "default-src 'none'"})

    @app.post("/echo")
    async def echo(request: Request) -> Response:
        exchange_of(request.scope).summary = lambda: SUMMARY
        return Response(await request.body())

    @app.post("/named")
    async def named(request: Request) -> Response:
        exchange_of(request.scope).request_id = "from-the-body"
        return Response()

    @app.post("/bug")
    async def bug(request: Request) -> Response:
        raise ValueError(f"cannot read {await request.body()!r}")

    @app.post("/late-bug")
    async def late_bug(request: Request) -> Response:
        async def parts() -> AsyncIterator[bytes]:
            yield b"first"
            raise ValueError(f"cannot read {body!r}")

        body = await request.body()
        return StreamingResponse(parts())

    @app.post("/wait")
    async def wait(request: Request) -> Response:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        return Response()

    openapi.install(app, requests=(), replies=())
    if keys:
        app.add_middleware(BearerAuth, keys=[SecretStr(key) for key in keys], refuse=answer)
        openapi.require_bearer(app, open_paths=OPEN_PATHS)
    app.add_middleware(RequestLog, respond=answer)
    return app


def make_client(app: FastAPI | None = None, *, key: str | None = None) -> httpx.AsyncClient:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    transport = httpx.ASGITransport(app or make_app())  # an exception that no middleware handles fails the test
    return httpx.AsyncClient(transport=transport, base_url="http://server", headers=headers)


def ends(lines: list[str]) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, lines) if line["event"] == "request"]
