"""The client of a load test: a lean HTTP/1.1 client on asyncio with one exchange at a time on a connection.

A general HTTP client takes more CPU for a token than the server, and both share the machine. This client only counts
events and records when they arrived. A caller that wants the JSON of an answer parses it after the measurement.
"""

import asyncio
import json
import socket
import time
from array import array
from dataclasses import dataclass, field
from typing import Any, Self, cast

import httptools

Address = tuple[str, int]


@dataclass(slots=True)
class Reply:
    """An answer, as far as it has arrived. Times are seconds of `time.perf_counter`."""

    status: int = 0  # 0 until the headers have arrived
    headers: dict[bytes, bytes] = field(default_factory=dict)  # names in lower case
    body: bytearray = field(default_factory=bytearray)  # of a stream: all events, or the events of the last read
    times: "array[float]" = field(default_factory=lambda: array("d"))  # when each event arrived
    sent: float = 0.0
    ended: float = 0.0  # 0 until the answer has ended
    error: str = ""  # "left", "timeout", "cut off", "no connection" or "not HTTP"; empty if the answer is whole

    def events(self) -> list[dict[str, Any]]:
        """Return the events in `body`. Raises ValueError if an event is not JSON."""
        blocks = bytes(self.body).split(b"\n\n")
        return [json.loads(block.removeprefix(b"data: ")) for block in blocks if block.startswith(b"data: ")]

    @property
    def problem(self) -> str:
        """The reason why a streamed generation failed; empty if it is whole, still runs, or the client left it."""
        if self.error or not self.ended:
            return "" if self.error == "left" else self.error
        if self.status != 200:
            return str(self.status)
        return "" if b'"finish_reason":"length"' in self.body else "no proper end"


class ReplyParser:
    """Fills a `Reply` from the bytes of an answer, cut anywhere. httptools parses HTTP; this class finds the events."""

    def __init__(self, reply: Reply, *, keep: bool) -> None:
        """keep: keep every event of a stream, not just the events of the last read."""
        self._reply = reply
        self._keep = keep
        self._payloads: list[bytes] = []  # parts of the body since the last call of `feed`
        self._tail = b""  # of a stream: the bytes of an unfinished event
        self._is_stream = self._is_whole = False
        self.on_body = self._payloads.append  # httptools calls `append` itself, without a Python function between
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes, now: float) -> bool:
        """Parse bytes that arrived at `now`; return whether the answer is whole. Raises ValueError if not HTTP."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            raise ValueError(f"not HTTP: {error}") from error
        if self._payloads:
            text = b"".join(self._payloads)
            self._payloads.clear()
            if self._is_stream:
                self._take_events(text, now)
            else:
                self._reply.body += text
        return self._is_whole

    def on_header(self, name: bytes, value: bytes) -> None:
        """Store a header; httptools calls this."""
        self._reply.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        """Store the status; httptools calls this."""
        self._reply.status = self._parser.get_status_code()
        self._is_stream = self._reply.headers.get(b"content-type", b"").startswith(b"text/event-stream")

    def on_message_complete(self) -> None:
        """Note that the answer is whole; httptools calls this."""
        self._is_whole = True

    def _take_events(self, text: bytes, now: float) -> None:
        if self._tail:
            text = self._tail + text
        cut = text.rfind(b"\n\n") + 2
        if cut < 2:
            self._tail = text
            return
        self._tail = text[cut:]
        num_events = text.count(b"\n\ndata: ", 0, cut) + text.startswith(b"data: ")
        if num_events:
            self._reply.times.extend([now] * num_events)
            if not self._keep:
                self._reply.body.clear()
            self._reply.body += text[:cut]


class Connection(asyncio.Protocol):
    """A connection to the server, with one exchange at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._parser: ReplyParser | None = None
        self._reply = Reply()
        self._done: asyncio.Future[Reply] | None = None

    @classmethod
    async def open(cls, address: Address, *, receive_buffer: int | None = None) -> Self:
        """Connect to the server. receive_buffer: bytes that the kernel holds for a slow reader. Raises OSError."""
        loop = asyncio.get_running_loop()
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        peer = socket.socket(family, socket.SOCK_STREAM)
        try:
            peer.setblocking(False)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if receive_buffer is not None:
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            await loop.sock_connect(peer, address)
            _, connection = await loop.create_connection(cls, sock=peer)
        except BaseException:
            peer.close()
            raise
        return connection

    @property
    def is_open(self) -> bool:
        """Whether the connection can send another request."""
        return self._transport is not None and not self._transport.is_closing()

    async def exchange(
        self, request: bytes, *, reply: Reply | None = None, keep: bool = False, timeout_s: float = 600.0
    ) -> Reply:
        """Send a request and return its answer, whole or with `error`. A `reply` that is given is filled meanwhile.

        Raises:
            ConnectionError: the connection is closed.
        """
        assert self._done is None
        if not self.is_open or self._transport is None:
            raise ConnectionError("the connection is closed")
        loop = asyncio.get_running_loop()
        self._reply = Reply() if reply is None else reply
        self._parser = ReplyParser(self._reply, keep=keep)
        done = self._done = loop.create_future()
        timer = loop.call_later(timeout_s, self._give_up, "timeout")
        self._reply.sent = time.perf_counter()
        self._transport.write(request)
        try:
            return await done
        finally:
            timer.cancel()
            if not done.done() or done.cancelled():
                self._give_up("left")

    def leave(self) -> None:
        """Close the connection at once, even during an exchange."""
        self._give_up("left")

    def pause(self) -> None:
        """Stop reading what the server sends."""
        if self._transport is not None and self.is_open:
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read again what the server sends."""
        if self._transport is not None and self.is_open:
            self._transport.resume_reading()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport; asyncio calls this."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        """Parse bytes of the answer; asyncio calls this."""
        if self._parser is None:
            return
        try:
            whole = self._parser.feed(data, time.perf_counter())
        except ValueError:
            self._give_up("not HTTP")
            return
        if whole:
            self._finish("")

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """End the exchange that is under way; asyncio calls this."""
        self._transport = None
        self._finish("cut off")

    def _give_up(self, error: str) -> None:
        self._finish(error)
        if self._transport is not None:
            self._transport.abort()

    def _finish(self, error: str) -> None:
        self._parser, done, self._done = None, self._done, None
        if done is None:
            return
        self._reply.error, self._reply.ended = error, time.perf_counter()
        if not done.done():
            done.set_result(self._reply)


def encode_request(method: str, path: str, *, body: object = None, keep_alive: bool = True, name: str = "") -> bytes:
    """Return the bytes of a request. body: bytes are sent as they are, all else as JSON. name: the request's id."""
    content = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(content)}"]
    lines += ["Content-Type: application/json"] if content else []
    lines += [] if keep_alive else ["Connection: close"]
    lines += [f"X-Request-Id: {name}"] if name else []
    return "\r\n".join([*lines, "", ""]).encode() + content


async def ask(
    address: Address, request: bytes, *, reply: Reply | None = None, keep: bool = True, timeout_s: float = 600.0
) -> Reply:
    """Make one exchange over a new connection, and close it; return the answer."""
    reply = Reply() if reply is None else reply
    try:
        connection = await Connection.open(address)
        await connection.exchange(request, reply=reply, keep=keep, timeout_s=timeout_s)
    except OSError:
        reply.error = "no connection"
        reply.ended = time.perf_counter()
        return reply
    connection.leave()
    return reply
