"""What stands before Ray Serve's proxy: an answer whose replica is gone still ends as every failure. Knows no Ray.

Ray Serve puts it there if the environment has RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH with the value
server.operation.ray_proxy:middlewares. Without it such an answer is cut off.
"""

import uuid

import msgspec
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import EngineDown, error_reply, retry_headers
from server.protocol.json import encode_event

REQUEST_ID = "x-request-id"
WHY = "the replica that worked on the request is gone; the same request may be sent again"


def middlewares() -> list[Middleware]:
    """What Ray Serve asks for."""
    return [Middleware(ReplicaLost)]


class ReplicaLost:
    """Answers where a replica can no longer: 503 engine_down, or an error event as the last one of a stream."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send)
        await self._app(scope, receive, answer.send)
        if not answer.is_complete:
            await answer.complete(Headers(scope=scope).get(REQUEST_ID) or uuid.uuid4().hex)


class _Answer:
    """An answer on its way through the proxy."""

    def __init__(self, send: Send) -> None:
        self.is_complete = False
        self._headers: Headers | None = None
        self._send = send

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.body":
            self.is_complete = not message.get("more_body", False)
        elif message["type"] == "http.response.start":
            message["headers"] = _with_one_id(message["headers"])
            self._headers = Headers(raw=message["headers"])
        await self._send(message)

    async def complete(self, request_id: str) -> None:
        """Say that it is all. An answer that began and is no stream stays cut off, which is all one can tell of it."""
        error = EngineDown(WHY)
        if self._headers is None:
            body = msgspec.json.encode(error_reply(error, request_id=request_id))
            headers = {
                "Content-Type": "application/json",
                "Content-Length": str(len(body)),
                REQUEST_ID: request_id,
                **retry_headers(error),
            }
            await self._send({"type": "http.response.start", "status": error.status, "headers": Headers(headers).raw})
        elif self._headers.get("content-type", "").startswith("text/event-stream"):
            body = encode_event(error_reply(error, request_id=self._headers.get(REQUEST_ID, request_id)))
        else:
            return
        await self._send({"type": "http.response.body", "body": body, "more_body": False})


def _with_one_id(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The proxy adds the id it knows to that of the replica, which comes first and may be one that the body named."""
    first = next((pair for pair in headers if pair[0] == REQUEST_ID.encode()), None)
    return [pair for pair in headers if pair is first or pair[0] != REQUEST_ID.encode()]
