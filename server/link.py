"""The API process's end of the line to the engine process: start it, talk to it, notice when it is gone.

Whatever happens to the engine, every submitted sequence gets exactly one Ended. Knows no HTTP and no torch.
"""

import asyncio
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from server.config import Settings
from server.messages import (
    Cancel,
    Died,
    Ended,
    EngineOptions,
    FromEngine,
    Generate,
    Heartbeat,
    LinkState,
    Ready,
    Score,
    Scores,
    Step,
    Timings,
    ToEngine,
    Token,
)

HANG_S = 5.0  # silence of the engine, while work is pending, that counts as a hang
WATCH_S = 0.1
LAST_WORDS_S = 1.0  # for messages of an engine that has ended in order
EXIT_S = 5.0  # an engine that was told to end and has not by then is killed
RUNNER = "server.runner:TorchRunner.from_bundle"


class Stream:
    """The messages of one sequence, in order; iteration ends after its Ended."""

    def __init__(self) -> None:
        self._messages: asyncio.Queue[Token | Scores | Ended] = asyncio.Queue()
        self._over = False

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Token | Scores | Ended:
        if self._over:
            raise StopAsyncIteration
        message = await self._messages.get()
        self._over = isinstance(message, Ended)
        return message

    def put(self, message: Token | Scores | Ended) -> None:
        """Hand on what the engine said."""
        self._messages.put_nowait(message)


class EngineLink:
    """One engine process and the sequences that live in it."""

    def __init__(self, settings: Settings, *, runner: str = RUNNER) -> None:
        """runner: module:factory of the runner that the engine process shall build."""
        self.state: LinkState = "starting"
        self.ready: Ready | None = None
        self.failure = ""
        self.num_waiting = 0
        self.rows_used = 0
        self.on_step: Callable[[Step], None] | None = None
        self._settings = settings
        self._runner = runner
        self._streams: dict[str, Stream] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._settled = asyncio.Event()  # ready, failed or closed
        self._heard = self._stepped = time.monotonic()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)
        self._folder = tempfile.TemporaryDirectory(prefix="allattn-")  # mode 0700
        self._requests = f"ipc://{Path(self._folder.name) / 'requests'}"
        self._steps = f"ipc://{Path(self._folder.name) / 'steps'}"
        self._outbox: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
        self._inbox: zmq.asyncio.Socket | None = None  # bound to the event loop of `start`
        _listen(self._outbox, self._requests)

    @property
    def heartbeat_age_s(self) -> float:
        """Seconds since the engine last said anything."""
        return time.monotonic() - self._heard

    @property
    def last_step_age_s(self) -> float:
        """Seconds since the engine's last step, or since the start."""
        return time.monotonic() - self._stepped

    async def start(self) -> None:
        """Start the engine process; returns once it is ready or has failed, see `state`."""
        self._inbox = zmq.asyncio.Context.instance().socket(zmq.PULL)
        _listen(self._inbox, self._steps)
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "server.engine_process",
            msgspec.json.encode(self._options()).decode(),
            stdin=asyncio.subprocess.PIPE,  # never written to: its end tells the engine that this process is gone
        )
        self._reader = asyncio.create_task(self._read(self._inbox))
        self._watcher = asyncio.create_task(self._watch())
        self._reader.add_done_callback(self._reader_ended)
        await self._settled.wait()

    def submit(self, message: Generate | Score) -> Stream:
        """Start a sequence; its stream holds exactly one Ended, the last, whatever happens."""
        assert message.id not in self._streams
        stream = Stream()
        if self.state in ("ready", "draining"):
            self._streams[message.id] = stream
            self._send(message)
        else:
            stream.put(_ended(message.id, "error", self.failure or "the engine is not ready"))
        return stream

    def cancel(self, sequence: str) -> None:
        """Free the row of a sequence; nothing happens where it has ended."""
        if sequence in self._streams:
            self._send(Cancel(sequence))

    async def close(self, grace_s: float) -> None:
        """Let live sequences go on for `grace_s`, end the rest with "shutdown", end the process, leave no file."""
        if self.state == "ready":
            self.state = "draining"
        deadline = time.monotonic() + grace_s
        while self._streams and self.state == "draining" and time.monotonic() < deadline:
            await asyncio.sleep(WATCH_S / 4)
        await _cancel(self._watcher)  # from here on an end of the process is no failure
        await self._end_process()
        await _cancel(self._reader)
        self._end_streams("shutdown", "")
        self._outbox.close(linger=0)
        if self._inbox is not None:
            self._inbox.close(linger=0)
        self._folder.cleanup()
        self._settled.set()

    def _options(self) -> EngineOptions:
        settings = self._settings
        return EngineOptions(
            inbox=self._requests,
            outbox=self._steps,
            bundle=os.fspath(settings.bundle),
            num_rows=settings.num_rows,
            dtype=settings.dtype,
            device=settings.device,
            num_threads=settings.num_threads,
            chunk_tokens=settings.chunk_tokens,
            budget_tokens=settings.budget_tokens,
            runner=self._runner,
        )

    def _send(self, message: ToEngine) -> None:
        with contextlib.suppress(zmq.Again):  # nobody is at the other end: the watch ends all streams
            self._outbox.send(self._encoder.encode(message), zmq.NOBLOCK)

    async def _read(self, inbox: zmq.asyncio.Socket) -> None:
        while True:
            message = self._decoder.decode(await inbox.recv())
            self._heard = time.monotonic()
            match message:
                case Step():
                    self._dispatch(message)
                case Ready():
                    self.ready, self.state = message, "ready"
                    self._settled.set()
                case Died(message=why):
                    self._fail(why)
                case Heartbeat():
                    pass

    def _dispatch(self, step: Step) -> None:
        self._stepped = self._heard
        self.rows_used, self.num_waiting = step.rows_used, step.num_waiting
        said: Token | Scores
        for said in step.tokens + step.scores:
            if stream := self._streams.get(said.sequence):
                stream.put(said)
        for ended in step.ended:
            if stream := self._streams.pop(ended.sequence, None):
                stream.put(ended)
        if self.on_step:
            self.on_step(step)

    async def _watch(self) -> None:
        """Fail when the process is gone, or silent though work is pending."""
        assert self._process is not None
        heard, silent_s = self._heard, 0.0
        while self.state != "failed":
            await asyncio.sleep(WATCH_S)
            # In turns of this loop, not by the clock: where the loop itself was held up, messages only wait to be read.
            silent_s = silent_s + WATCH_S if self._streams and self._heard == heard else 0.0
            heard = self._heard
            status = self._process.returncode
            if status is not None:
                self._fail(f"the engine process ended with status {status}")
            elif silent_s > HANG_S:
                self._fail(f"the engine process has been silent for {silent_s:.1f} s")

    def _reader_ended(self, reader: asyncio.Task[None]) -> None:
        if not reader.cancelled() and (error := reader.exception()):
            self._fail(f"its messages cannot be read: {type(error).__name__}: {error}")

    def _fail(self, why: str) -> None:
        if self.state == "failed":
            return
        self.state, self.failure = "failed", why
        self._kill()
        self._end_streams("error", why)
        self._settled.set()

    def _end_streams(self, finish_reason: str, error: str) -> None:
        for name, stream in self._streams.items():
            stream.put(_ended(name, finish_reason, error))
        self._streams.clear()

    async def _end_process(self) -> None:
        """Ask, wait, kill; what the engine says at its end still reaches the streams."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        if self.ready is None:
            self._kill()
        else:
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), EXIT_S)
        except TimeoutError:
            self._kill()
            await process.wait()
        deadline = time.monotonic() + LAST_WORDS_S
        while self._streams and time.monotonic() < deadline:
            await asyncio.sleep(WATCH_S / 10)

    def _kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()


async def _cancel(task: asyncio.Task[None] | None) -> None:
    if task is not None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _ended(sequence: str, finish_reason: str, error: str) -> Ended:
    return Ended(sequence, finish_reason, Timings(0.0, 0.0, 0.0), error)


def _listen(socket: zmq.Socket[bytes] | zmq.asyncio.Socket, address: str) -> None:
    socket.set_hwm(0)  # admission bounds what is in flight
    socket.bind(address)
