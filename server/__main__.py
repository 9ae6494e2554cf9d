"""`python -m server`: settings, bundle, engine, HTTP, and the order in which they start and stop."""

import asyncio
import json
import os
import socket
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

import uvicorn
import uvloop
from fastapi import FastAPI

from model.bundle import Bundle, BundleError
from server.app import create_app
from server.config import ConfigError, Settings, describe_settings, load_settings, wants_print_config
from server.link.supervisor import LOAD_MODEL, EngineLink
from server.operation.tracing import Tracing, open_tracing
from server.requests.service import Link
from server.runtime import log_to_stderr, settle_garbage
from server.served_model import open_model

POLL_S = 0.05
LAST_WRITES_S = 2  # for answers that are complete but not yet read by their clients
AT_ONCE_S = 0.5  # for the kernel to end a killed engine


class ListenError(ValueError):
    """The address cannot be listened on."""


def main(argv: Sequence[str]) -> int:
    """Serve until a signal comes or the engine fails for good.

    Returns:
        the exit status: 0 after a signal, 1 after a failure or a second signal, 2 for a wrong setting.
    """
    try:
        settings = load_settings(argv, environ=os.environ)
        if wants_print_config(argv):
            print(describe_settings(argv, environ=os.environ), end="")
            return 0
    except ConfigError as error:
        return _complain(str(error), status=2)
    log_to_stderr()
    try:
        bundle, settings = open_model(settings)
        tracing = open_tracing(os.environ)
        listener = listen(settings.host, port=settings.port)
    except ConfigError as error:
        return _complain(str(error), status=2)
    except (BundleError, ListenError) as error:
        return _complain(str(error), status=1)
    try:
        uvloop.run(run(settings, bundle=bundle, listener=listener, tracing=tracing))
    except KeyboardInterrupt:  # before the server's own handlers are in place
        return 130


async def run(
    settings: Settings,
    *,
    bundle: Bundle,
    listener: socket.socket,
    runner: str = LOAD_MODEL,
    tracing: Tracing | None = None,
) -> NoReturn:
    """Call `serve` with an engine process, then exit with its status.

    The function does not return: the end of a loop waits for its threads, and threads that are left work for nobody.
    """
    link = EngineLink(settings, runner=runner)
    status = await serve(settings, bundle=bundle, link=link, listener=listener, tracing=tracing)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def listen(host: str, *, port: int) -> socket.socket:
    """Returns a socket that accepts connections. Raises ListenError if the address is taken or not ours."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ListenError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another with --port"
        ) from None


async def serve(
    settings: Settings, *, bundle: Bundle, link: Link, listener: socket.socket, tracing: Tracing | None = None
) -> int:
    """Start the HTTP side, then the engine, wait for a reason to end, and end in order; returns the exit status.

    After the first signal the server refuses new work and lets live work go on for up to `shutdown_timeout_s`; answers
    that are ready by then still reach their clients. After a second signal it ends at once, with status 1, and may lose
    work.
    """
    server = _Server(create_app(settings=settings, bundle=bundle, link=link, tracing=tracing))
    http = asyncio.create_task(server.serve(sockets=[listener]))
    starting = asyncio.create_task(link.start())
    await _until(lambda: starting.done() or server.num_signals > 0 or link.asked_to_end)
    if starting.done():
        await starting  # raises if the link itself has failed
    if starting.done() and link.state != "failed":
        print(banner(settings, bundle=bundle, link=link, port=listener.getsockname()[1]), flush=True)
        settle_garbage()
    await _until(lambda: link.state == "failed" or server.num_signals > 0 or link.asked_to_end)
    failed = link.state == "failed"
    starting.cancel()
    closing = asyncio.create_task(_close(settings, link=link, server=server, http=http, tracing=tracing))
    await _until(lambda: closing.done() or server.num_signals > 1)
    if not closing.done():
        closing.cancel()
        await asyncio.wait([closing])
        await _end_at_once(link, server=server, http=http)
        return _complain("ended at once by a second signal", status=1)
    await closing
    if not failed:
        return 0
    return _complain(link.failure if link.blames_model else f"the engine has failed: {link.failure}", status=1)


async def _close(
    settings: Settings, *, link: Link, server: "_Server", http: asyncio.Task[None], tracing: Tracing | None
) -> None:
    await link.close(grace_s=settings.shutdown_timeout_s)
    server.should_exit = True
    await asyncio.wait([http])
    if tracing is not None:
        await asyncio.to_thread(tracing.close)


async def _end_at_once(link: Link, *, server: "_Server", http: asyncio.Task[None]) -> None:
    """Kill the engine, and give clients AT_ONCE_S to read their endings."""
    await asyncio.wait([asyncio.create_task(link.close(grace_s=0))], timeout=AT_ONCE_S)
    server.should_exit = server.force_exit = True
    await asyncio.wait([http], timeout=AT_ONCE_S)


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(POLL_S)


class _Server(uvicorn.Server):
    """uvicorn that only counts signals: `serve` decides when to stop listening."""

    def __init__(self, app: FastAPI) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="httptools",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,  # nothing here looks at the client's address
                server_header=False,
                timeout_graceful_shutdown=LAST_WRITES_S,
            )
        )
        self.num_signals = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.num_signals += 1


def banner(settings: Settings, *, bundle: Bundle, link: Link, port: int) -> str:
    """Returns a few lines on the served model for a person, with a command to paste."""
    assert link.ready is not None
    facts = link.ready.facts
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    splits = bundle.training.get("splits", {})
    quality = ", ".join(f"{name} {split['bits_per_byte']:.3f} bits per byte" for name, split in splits.items())
    rows = f"{facts.num_rows} rows of {facts.state_bytes_per_row / 2**20:.2f} MiB"
    backend = facts.backend if facts.variant is None else f"{facts.backend} ({facts.variant})"
    body = json.dumps({"inputs": "It was a dark", "parameters": {"temperature": 0.8}, "stream": True})
    return "\n".join(
        [
            f"allattn serves {bundle.path.resolve().name}, {bundle.config.num_parameters / 1e6:.1f} M parameters",
            *([f"  quality  {quality}"] if quality else []),
            f"  engine   {backend}, {facts.weights} on {facts.device}, {rows}",
            f"  url      {url} (documentation at {url}/docs)",
            f"  try      curl -N {url}/generate -d '{body}'",
        ]
    )


def _complain(message: str, *, status: int) -> int:
    print(f"allattn: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
