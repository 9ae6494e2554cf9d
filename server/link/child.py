"""One engine process, from its start to its end, as the API process sees it. Knows no sequences."""

import asyncio
import contextlib
import os
import sys
from collections.abc import Callable
from typing import Self, cast

import msgspec

from model.backends import chosen
from server.config import EngineOptions
from server.protocol.frames import End, Frames, encode_frame, socket_pair
from server.protocol.messages import Died, FromEngine, ToEngine

LAST_WORDS_S = 1.0  # to read what a process that has ended left in the pipe
REAP_S = 5.0  # a killed process that is not gone by then hangs in the kernel: nobody can do more about it


class Child(asyncio.Protocol):
    """The engine process and its pipe. If one of them ends, this class ends the other."""

    ended: asyncio.Task[Died]  # done when the process is gone and its last message was read; tells why

    def __init__(self, hear: Callable[[FromEngine], None]) -> None:
        """Use `start`. hear: called with each message, in order, until the end or `kill`."""
        self._hear = hear
        self._why: Died | None = None
        self._deaf = False
        self._frames = Frames()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)
        self._lost = asyncio.get_running_loop().create_future()
        self._transport: asyncio.Transport | None = None
        self._process: asyncio.subprocess.Process | None = None

    @classmethod
    async def start(cls, options: EngineOptions, *, make_runner: str, hear: Callable[[FromEngine], None]) -> Self:
        """Start a process, from the main thread: on Linux it dies with the thread that started it.

        Args:
            options: may be a `Settings`, of which the process gets the engine's part only.
            make_runner: see `EngineProcess`.
            hear: see `__init__`.

        Raises:
            OSError: the system has no room for the process.
        """
        ours, theirs = socket_pair()
        with theirs:
            _, child = await asyncio.get_running_loop().create_unix_connection(lambda: cls(hear), sock=ours)
            try:
                child._process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    *("-m", "server.engine.process", str(theirs.fileno()), str(os.getpid()), make_runner),
                    options.model_dump_json(include=set(EngineOptions.model_fields)),
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    env={**_thread_settings(options), **os.environ},
                )
            except BaseException:  # a cancellation too: a process that has started notices the end of its pipe
                child.kill()
                raise
        child.ended = asyncio.create_task(child._end())
        return child

    @property
    def pid(self) -> int:
        """The id of the process."""
        assert self._process is not None
        return self._process.pid

    def send(self, message: ToEngine | End) -> None:
        """Send a message; it is lost if the process is gone."""
        assert self._transport is not None
        if not self._transport.is_closing():
            self._transport.write(encode_frame(message, encoder=self._encoder))

    def kill(self) -> None:
        """End the process now; `hear` is not called any more."""
        self._deaf = True
        if self._transport is not None:
            self._transport.abort()
        self._kill_process()

    async def gone(self) -> None:
        """Wait until a killed process is reaped."""
        await asyncio.wait([self.ended], timeout=REAP_S)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio calls this once, at the start."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """asyncio calls this with new bytes, about once for each step of the engine: the hot path."""
        for body in self._frames.feed(data):
            if self._deaf:
                return
            message = self._decoder.decode(body)
            if isinstance(message, Died):
                self._why = message
                self.kill()
            else:
                self._hear(message)

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio calls this once, at the end of the pipe; a process without a pipe is of no use, so it is killed."""
        if exc is not None and not isinstance(exc, OSError):
            self._why = Died(f"its messages cannot be taken: {type(exc).__name__}: {exc}")
        self._lost.set_result(None)
        self._kill_process()

    async def _end(self) -> Died:
        assert self._process is not None
        assert self._transport is not None
        status = await self._process.wait()
        await asyncio.wait([self._lost], timeout=LAST_WORDS_S)  # longer only if its own children hold the pipe
        self._transport.abort()
        return self._why or Died(f"the engine process ended with status {status}")

    def _kill_process(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()


def _thread_settings(options: EngineOptions) -> dict[str, str]:
    """Variables that keep each thread of the engine on a core of its own, if nobody has set the number of threads.

    Threads that are free to move meet on one core as soon as any other process works, and then wait for each other's
    time slices: on 2 busy cores a step took twice as long. Who sets the number of threads may run several engines on
    one machine, which must not all sit on the same cores. A backend with its own threads gets no variables: its threads
    would inherit the one core of the thread that makes them.
    """
    if options.num_threads is not None or chosen(options, kind=None).has_own_threads:
        return {}
    return {"OMP_PROC_BIND": "true", "GOMP_SPINCOUNT": "20000"}  # spin for some 50 us, then sleep
