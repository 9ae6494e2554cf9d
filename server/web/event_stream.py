"""Server-sent events, and work that is cancelled when its client disconnects. Knows no model and no endpoint."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from server.errors import InternalError, ServerError, error_reply
from server.protocol.json import encode_event

PING_S = 10.0
# The key of the ASGI server's own `send` in the scope. A stream sends its events directly to it and bypasses the
# wrappers of the middlewares, which only read the start and the end of a response.
FIRST_SEND = "allattn.send"

Result = TypeVar("Result")
SendEvents = Callable[[bytes], Coroutine[Any, Any, None]]
Job = Callable[[SendEvents], Coroutine[Any, Any, None]]


async def while_connected(receive: Receive, jobs: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Run all jobs concurrently and return their results in order. The first failure cancels the others and is raised.

    Raises:
        ClientDisconnect: the client disconnected first; every job was cancelled.
    """
    try:
        async with asyncio.TaskGroup() as group:
            watcher = group.create_task(_raise_when_gone(receive))
            tasks = [group.create_task(job) for job in jobs]
            await asyncio.wait(tasks)
            watcher.cancel()
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


async def _raise_when_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    raise ClientDisconnect


class EventStream(Response):
    """A response of server-sent events, which its jobs send. It ends when all jobs have ended."""

    def __init__(
        self, jobs: Sequence[Job], *, request_id: str, close: Callable[[], None], ping_s: float = PING_S
    ) -> None:
        """close: called once at the end, even after a failure and if no job has started."""
        super().__init__(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        )
        del self.headers["content-length"]
        self._jobs = jobs
        self._request_id = request_id
        self._close = close
        self._ping_s = ping_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the headers, the events on arrival, and the end. A failure becomes the last event, an error."""
        send_on: Callable[[Message], Coroutine[Any, Any, None]] = scope.get(FIRST_SEND, send)

        def send_events(data: bytes) -> Coroutine[Any, Any, None]:
            return send_on({"type": "http.response.body", "body": data, "more_body": True})

        pings = asyncio.create_task(self._ping(send_events))
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await while_connected(receive, [job(send_events) for job in self._jobs])
        except ClientDisconnect:
            return
        except Exception as failure:
            error = failure if isinstance(failure, ServerError) else InternalError("an unexpected error")
            if error is not failure:
                logging.getLogger(__name__).exception(
                    "a stream failed", extra={"fields": {"request_id": self._request_id}}
                )
            await send_events(encode_event(error_reply(error, request_id=self._request_id)))
        finally:
            pings.cancel()
            self._close()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _ping(self, send: SendEvents) -> None:
        while True:
            await asyncio.sleep(self._ping_s)
            await send(b": ping\n\n")
