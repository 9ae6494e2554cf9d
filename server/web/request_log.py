"""The request log: gives each request an id and a log line, and responds to bugs with an error. Knows no endpoint."""

import asyncio
import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import InternalError
from server.web.auth import ErrorResponder, add_security_headers
from server.web.body import REQUEST_ID
from server.web.exchange import Exchange, add_exchange

# W3C Trace Context, version 00: neither trace-id nor parent-id is all zero
TRACEPARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
CLIENT_GONE = 499  # nginx's status for it; only the metrics, the log and the traces show it

log = logging.getLogger(__name__)


class RequestLog:
    """Middleware that gives each request an id, and each POST and DELETE one log line of ids, counts and times.

    The log never has text of a request. The id is the client's X-Request-Id, or else the trace id of its traceparent,
    or else a new id; the response carries it. The `Exchange` of the request holds it; an endpoint may replace it by the
    id in the body, and adds the summary of its work.
    Bugs are logged and turned into an error here, because an outer layer would print the exception's message, which may
    quote the request.
    """

    def __init__(self, app: ASGIApp, *, respond: ErrorResponder) -> None:
        self._app = app
        self._respond = respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        logged = _LoggedRequest(scope, receive=receive, send=send)
        try:
            await self._app(scope, logged.receive, logged.send)
        except asyncio.CancelledError:  # Ray Serve reports a disconnected client by a cancellation
            logged.is_gone = True
            raise
        except Exception as bug:
            log.error("a bug", exc_info=bug, extra={"fields": logged.ids})
            if logged.status is None:
                error = InternalError("an unexpected error; the server's log has it under the request id")
                await self._respond(Request(scope), error)(scope, receive, logged.send)
            # otherwise the response stays incomplete, and uvicorn closes the connection
        finally:
            logged.log_end()


class _LoggedRequest:
    """A request that passes through RequestLog, with its response."""

    def __init__(self, scope: Scope, *, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        client_id = headers.get("x-request-id", "")
        traced = TRACEPARENT.fullmatch(headers.get("traceparent", ""))
        trace_id = traced[1] if traced else None
        request_id = client_id if REQUEST_ID.fullmatch(client_id) else trace_id or uuid.uuid4().hex
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
        """The ids of the request in the log."""
        traced = {} if self.exchange.trace_id is None else {"trace_id": self.exchange.trace_id}
        return {"request_id": self.exchange.request_id, **traced}

    async def receive(self) -> Message:
        message = await self._receive()
        self.is_gone |= message["type"] == "http.disconnect"  # nobody awaits it any more once the response is complete
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
