"""A server of one file on this machine, which fails as a test tells it to."""

import os
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


def forget_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ensure that the test's requests do not pass through a proxy of the machine."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@dataclass(frozen=True)
class Answer:
    """How the server answers one request; the default is a right answer."""

    status: int = 200
    content: bytes | None = None  # a file to send in place of the served file
    cut_after: int | None = None  # number of bytes of the body to send
    stall: bool = False  # after cut_after, keep the connection open
    reset: bool = False  # after cut_after, end the connection as a crash does
    knows_ranges: bool = True
    says_length: bool = True
    range_shift: int = 0  # begin this many bytes after the requested place
    headers: dict[str, str] = field(default_factory=dict)


class Server:
    """A server that gives the answers in turn and repeats the last; records requests and the number of bytes sent."""

    def __init__(self, content: bytes, *answers: Answer) -> None:
        self.content = content
        self.answers = list(answers) or [Answer()]
        self.asked: list[tuple[str, str]] = []  # path and range of each request
        self.sent = 0
        self.stopped = threading.Event()
        script = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                script.answer(self)

            do_CONNECT = do_GET  # noqa: N815 - a client sends CONNECT to a proxy for https

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.address = f"http://127.0.0.1:{self.http.server_port}"
        self.url = f"{self.address}/corpus.zip"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        wanted = request.headers.get("Range", "")
        self.asked.append((request.path, wanted))
        content = self.content if answer.content is None else answer.content
        start = int(wanted[6:-1]) if wanted and answer.knows_ranges else 0
        status, body = answer.status, content[start + answer.range_shift * bool(start) :]
        if start and status == 200:
            status = 206 if start < len(content) else 416
        request.send_response(status)
        if status == 206:
            first = start + answer.range_shift
            total = len(content)
            request.send_header("Content-Range", f"bytes {first}-{total - 1}/{total}")
        if answer.says_length:
            request.send_header("Content-Length", str(len(body)))
        for name, value in answer.headers.items():
            request.send_header(name, value)
        request.end_headers()
        if status in (200, 206):
            part = body[: answer.cut_after]
            request.wfile.write(part)
            self.sent += len(part)
            if answer.reset:
                request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                request.connection.close()
            if answer.stall:
                self.stopped.wait(60)

    def stop(self) -> None:
        self.stopped.set()
        self.http.shutdown()
        self.http.server_close()
