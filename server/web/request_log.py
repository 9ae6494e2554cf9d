"""What surrounds every request: its id, its line in the log, an answer where there was a bug. Knows no endpoint."""

import asyncio
import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import InternalError
from server.web.auth import Answer, add_security_headers
from server.web.body import REQUEST_ID
from server.web.exchange import Exchange, add_exchange

# W3C Trace Context, version 00: neither trace-id nor parent-id is all zero
TRACEPARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
CLIENT_GONE = 499  # nginx's word for it; nobody reads it but the metrics, the log and the traces

log = logging.getLogger(__name__)


class RequestLog:
    """Gives each request its id, and each POST and DELETE its one line in the log: ids, counts and times, never a text.

    The id is the client's X-Request-Id, else the trace-id of its traceparent, else a new one; the answer carries it.
    It keeps them in the `Exchange` of the request, where an endpoint may set another id, which the body names, and the
    summary of its work.
    A bug is logged and answered here, so that nobody further out prints what its message may quote.
    """

    def __init__(self, app: ASGIApp, *, answer: Answer) -> None:
        self._app = app
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        passing = _Passing(scope, receive=receive, send=send)
        try:
            await self._app(scope, passing.receive, passing.send)
        except asyncio.CancelledError:  # a server may tell so, Ray Serve does, that the client has left
            passing.is_gone = True
            raise
        except Exception as bug:
            log.error("a bug", exc_info=bug, extra={"fields": passing.ids})
            if passing.status is None:
                error = InternalError("an unexpected error; the server's log has it under the request id")
                await self._answer(Request(scope), error)(scope, receive, passing.send)
            # else the answer stays incomplete, and uvicorn closes the connection
        finally:
            passing.log_end()


class _Passing:
    """A request and its answer on their way through RequestLog."""

    def __init__(self, scope: Scope, *, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        traced = TRACEPARENT.fullmatch(headers.get("traceparent", ""))
        trace_id = traced[1] if traced else None
        request_id = given if REQUEST_ID.fullmatch(given) else trace_id or uuid.uuid4().hex
        self.exchange = Exchange(request_id, trace_id)
        add_exchange(scope, self.exchange)
        self.status: int | None = None
        self.is_gone = False
        self._scope = scope
        self._receive = receive
        self._send = send
        self._started = time.perf_counter()

    @property
    def ids(self) -> dict[str, str]:
        """What the log knows the request by."""
        traced = {} if self.exchange.trace_id is None else {"trace_id": self.exchange.trace_id}
        return {"request_id": self.exchange.request_id, **traced}

    async def receive(self) -> Message:
        message = await self._receive()
        self.is_gone |= message["type"] == "http.disconnect"  # all who wait for it stop once the answer is complete
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"] = self.exchange.request_id
            add_security_headers(headers)
        await self._send(message)

    def log_end(self) -> None:
        status = CLIENT_GONE if self.is_gone else 500 if self.status is None else self.status
        self.exchange.status = status
        if self._scope["method"] not in ("POST", "DELETE") and status != 401:
            return
        summary = self.exchange.summary
        line = {
            **self.ids,
            "method": self._scope["method"],
            "path": self._scope["path"],
            "status": status,
            "seconds": round(time.perf_counter() - self._started, 6),
            **({} if summary is None else summary().fields()),
        }
        log.info("request", extra={"fields": line})
