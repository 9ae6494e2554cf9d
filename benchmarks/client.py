"""The client's side of a load test: lean HTTP/1.1 on asyncio, a server of one's own, and what its processes cost.

A general HTTP client costs more CPU for a token than the server does, and both share the machine. This one only counts
events and notes when they came; a reply is parsed as JSON when somebody asks, after the measurement.
"""

import asyncio
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

ROOT = Path(__file__).parents[1]
TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
START_S = 300.0  # a server that is not ready by then has failed

Address = tuple[str, int]


@dataclass(slots=True)
class Reply:
    """One answer as far as it has come. Times are seconds of `time.perf_counter`."""

    status: int = 0  # 0 before the headers
    headers: dict[bytes, bytes] = field(default_factory=dict)  # names in lower case
    body: bytearray = field(default_factory=bytearray)  # of a stream: all events, or those of the last read
    times: array = field(default_factory=lambda: array("d"))  # when each event came
    sent: float = 0.0
    ended: float = 0.0  # 0 while it lasts
    error: str = ""  # left, timeout, cut off, no connection, or not HTTP; empty where the answer is whole

    def events(self) -> list[dict[str, Any]]:
        """The events that were kept. Raises ValueError where one is not JSON."""
        blocks = bytes(self.body).split(b"\n\n")
        return [json.loads(block.removeprefix(b"data: ")) for block in blocks if block.startswith(b"data: ")]

    @property
    def problem(self) -> str:
        """Why a streamed generation did not go as asked; empty where it did, or still lasts, or was left."""
        if self.error or not self.ended:
            return "" if self.error == "left" else self.error
        if self.status != 200:
            return str(self.status)
        return "" if b'"finish_reason":"length"' in self.body else "no proper end"


class ReplyParser:
    """Bytes of one answer in, cut anywhere; a `Reply` out."""

    def __init__(self, reply: Reply, *, keep: bool) -> None:
        """keep: keep every event of a stream, not just those of the last read."""
        self._reply = reply
        self._keep = keep
        self._rest = b""  # of the transport: an unfinished head or chunk
        self._tail = b""  # of the stream: an unfinished event
        self._in_head = True
        self._chunked = self._stream = False
        self._missing = 0  # bytes of a plain body

    def feed(self, data: bytes, now: float) -> bool:
        """Take what came at `now`; whether the answer is whole. Raises ValueError where it is not HTTP."""
        if self._rest:
            data = self._rest + data
            self._rest = b""
        if self._in_head:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                self._rest = data
                return False
            self._read_head(data[:end])
            data = data[end + 4 :]
        if self._chunked:
            return self._read_chunks(data, now)
        self._reply.body += data
        self._missing -= len(data)
        return self._missing <= 0

    def _read_head(self, head: bytes) -> None:
        first, *lines = head.split(b"\r\n")
        if not first.startswith(b"HTTP/1."):
            raise ValueError(f"not HTTP: {first[:40]!r}")
        status = first.split(b" ")[1]
        pairs = (line.split(b":", 1) for line in lines)
        headers = {name.lower(): value.strip() for name, value in pairs}
        self._reply.status, self._reply.headers = int(status), headers
        self._chunked = headers.get(b"transfer-encoding") == b"chunked"
        self._stream = headers.get(b"content-type", b"").startswith(b"text/event-stream")
        self._missing = 0 if self._chunked or status == b"204" else int(headers[b"content-length"])
        self._in_head = False

    def _read_chunks(self, data: bytes, now: float) -> bool:
        start, payloads, done = 0, [], False
        while not done:
            line_end = data.find(b"\r\n", start)
            if line_end < 0:
                break
            begin = line_end + 2
            end = begin + int(data[start:line_end], 16)
            if len(data) < end + 2:
                break
            if end > begin:
                payloads.append(data[begin:end])
            done = end == begin
            start = end + 2
        self._rest = data[start:]
        if payloads:
            self._read_payload(payloads[0] if len(payloads) == 1 else b"".join(payloads), now)
        return done

    def _read_payload(self, text: bytes, now: float) -> None:
        reply = self._reply
        if not self._stream:
            reply.body += text
            return
        if self._tail:
            text = self._tail + text
        cut = text.rfind(b"\n\n") + 2
        if cut < 2:
            self._tail = text
            return
        self._tail = text[cut:]
        num_events = text.count(b"\n\ndata: ", 0, cut) + text.startswith(b"data: ")
        if num_events:
            reply.times.extend([now] * num_events)
            if not self._keep:
                reply.body.clear()
            reply.body += text[:cut]


class Connection(asyncio.Protocol):
    """One connection, one exchange at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._parser: ReplyParser | None = None
        self._reply = Reply()
        self._done: asyncio.Future[Reply] | None = None

    @classmethod
    async def open(cls, address: Address, *, receive_buffer: int | None = None) -> Self:
        """Connect. receive_buffer: bytes that the kernel may hold for a slow reader. Raises OSError."""
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
        """Whether another exchange is possible."""
        return self._transport is not None and not self._transport.is_closing()

    async def exchange(
        self, request: bytes, *, reply: Reply | None = None, keep: bool = False, timeout_s: float = 600.0
    ) -> Reply:
        """Send a request and return its answer, whole or with `error`. A caller's `reply` fills up meanwhile.

        Raises:
            ConnectionError: there is no connection any more.
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
        """Go away in the middle of whatever happens."""
        self._give_up("left")

    def pause(self) -> None:
        """Stop reading."""
        if self._transport is not None and self.is_open:
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        if self._transport is not None and self.is_open:
            self._transport.resume_reading()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """For asyncio."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one by its methods only

    def data_received(self, data: bytes) -> None:
        """For asyncio."""
        if self._parser is None:
            return
        try:
            whole = self._parser.feed(data, time.perf_counter())
        except (ValueError, KeyError):
            self._give_up("not HTTP")
            return
        if whole:
            self._finish("")

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """For asyncio."""
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
    """A whole request. body: bytes as they are, anything else as JSON. name: the request's id."""
    content = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(content)}"]
    lines += ["Content-Type: application/json"] if content else []
    lines += [] if keep_alive else ["Connection: close"]
    lines += [f"X-Request-Id: {name}"] if name else []
    return "\r\n".join([*lines, "", ""]).encode() + content


async def ask(
    address: Address, request: bytes, *, reply: Reply | None = None, keep: bool = True, timeout_s: float = 600.0
) -> Reply:
    """One exchange over a connection of its own."""
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


class ServerProcess:
    """`python -m server` on a free port, for as long as one is inside; its own output goes to `log`."""

    def __init__(self, flags: Sequence[str]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address: Address = free.getsockname()[:2]
        self._folder = tempfile.TemporaryDirectory(prefix="allattn-bench-")
        self.log = Path(self._folder.name) / "server.log"
        command = [sys.executable, "-m", "server", "--port", str(self.address[1]), *flags]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        self.pid = self._process.pid

    def __enter__(self) -> Self:
        """Wait until it is ready. Raises RuntimeError where it ends first or takes too long."""
        deadline = time.monotonic() + START_S
        while not is_ready(self.address):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"the server did not start:\n{self.tail()}")
            time.sleep(0.1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._folder.cleanup()

    def stop(self, *, timeout_s: float = 60.0) -> int:
        """SIGTERM, and SIGKILL where that does not help; the exit status."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def tail(self, num_lines: int = 20) -> str:
        """The end of its output."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-num_lines:])


def get_json(address: Address, path: str) -> Any:
    """Ask and wait. Raises OSError where nobody answers, or not with success."""
    with urllib.request.urlopen(f"http://{address[0]}:{address[1]}{path}", timeout=10) as reply:
        return json.load(reply)


def is_ready(address: Address) -> bool:
    """Whether the server takes work."""
    try:
        get_json(address, "/health/ready")
    except OSError:
        return False
    return True


def cpu_seconds(pid: int | None) -> float | None:
    """User and system time of a process so far; None where there is no such process."""
    fields = _proc_fields(pid, "stat")
    return None if fields is None else (int(fields[11]) + int(fields[12])) / TICKS


def resident_bytes(pid: int | None) -> int | None:
    """Memory of a process; None where there is no such process."""
    fields = _proc_fields(pid, "statm")
    return None if fields is None else int(fields[1]) * PAGE


def is_alive(pid: int) -> bool:
    """Whether a process is there and not a zombie."""
    fields = _proc_fields(pid, "stat")
    return fields is not None and fields[0] not in ("Z", "X")


def _proc_fields(pid: int | None, name: str) -> list[str] | None:
    """Fields of a file in /proc, without those before the end of the command's name."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text().rpartition(") ")[2].split()
    except OSError:
        return None


class Costs:
    """CPU seconds of processes from here on, by name; this process is "client"."""

    def __init__(self, pids: dict[str, int | None]) -> None:
        self._pids = pids
        self._begun = self._now()

    def per_token(self, num_tokens: int) -> dict[str, float]:
        """Microseconds, for each process that could be measured."""
        now = self._now()
        known = [name for name in now if now[name] is not None and self._begun[name] is not None]
        return {
            f"{name}_us_per_token": round((now[name] - self._begun[name]) / max(num_tokens, 1) * 1e6, 1)
            for name in known
        }

    def _now(self) -> dict[str, Any]:
        return {**{name: cpu_seconds(pid) for name, pid in self._pids.items()}, "client": time.process_time()}


def machine() -> str:
    """Processor and cores."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = names[0].partition(": ")[2] if names else platform.machine()
    return f"{name}, {os.cpu_count()} cores"
