"""The engine's own process: load, warm up, say Ready, then turn messages into steps until told, or left, to end.

Started by `server.link` as `python -m server.engine_process OPTIONS`, OPTIONS being an `EngineOptions` as JSON.
Messages travel as msgpack over two ZeroMQ pipes that the API process has bound. SIGTERM ends it in order; so does, at
once, the end of its standard input, whose other end the API process holds for as long as it lives.
"""

import contextlib
import importlib
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType

import msgspec
import numpy as np
import zmq

from server.engine import Engine
from server.messages import Cancel, Died, EngineOptions, Generate, Heartbeat, Ready, Sampling, Score, ToEngine
from server.sequence import Runner

HEARTBEAT_S = 0.5  # at least so often the process says that its loop turns


class EngineProcess:
    """The loop around an `Engine` and its two pipes."""

    def __init__(self, options: EngineOptions) -> None:
        self._options = options
        self._asked_to_end = False
        self._context = zmq.Context()
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.connect(options.inbox)
        self._outbox = self._context.socket(zmq.PUSH)
        self._outbox.set_hwm(0)  # the API process bounds what is in flight
        self._outbox.connect(options.outbox)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToEngine)
        self._last_said = time.monotonic()

    def run(self) -> int:
        """Serve until the end; the exit status."""
        try:
            runner = self._load()
            engine = Engine(runner, chunk_tokens=self._options.chunk_tokens, budget_tokens=self._options.budget_tokens)
            warm_up(engine)
            self._say(ready(runner))
            while not self._asked_to_end:
                self._turn(engine)
            self._say(engine.shutdown())
            return 0
        except Exception as error:  # whatever it is, the API process must hear of it, and this process is done
            traceback.print_exc()
            self._say(Died(f"{type(error).__name__}: {error}"))
            return 1
        finally:
            self._context.destroy(linger=1000)

    def ask_to_end(self, _number: int, _frame: FrameType | None) -> None:
        """The handler of SIGTERM."""
        self._asked_to_end = True

    def _load(self) -> Runner:
        options = self._options
        module, _, factory = options.runner.partition(":")
        make = importlib.import_module(module)
        for name in factory.split("."):
            make = getattr(make, name)
        runner: Runner = make(  # type: ignore[operator]
            options.bundle,
            num_rows=options.num_rows,
            dtype=options.dtype,
            device=options.device,
            num_threads=options.num_threads,
        )
        return runner

    def _turn(self, engine: Engine) -> None:
        """Hear all there is to hear, waiting for it only where there is nothing to do; then one step."""
        wait_ms = 0 if engine.has_work else int(HEARTBEAT_S * 1000)
        while self._inbox.poll(wait_ms):
            self._hear(engine, self._inbox.recv())
            wait_ms = 0
        if engine.has_work:
            self._say(engine.step())
        elif time.monotonic() - self._last_said >= HEARTBEAT_S:
            self._say(Heartbeat())

    def _hear(self, engine: Engine, data: bytes) -> None:
        match self._decoder.decode(data):
            case Generate() | Score() as request:
                engine.submit(request)
            case Cancel(id=name):
                engine.cancel(name)

    def _say(self, message: msgspec.Struct) -> None:
        self._outbox.send(self._encoder.encode(message))
        self._last_said = time.monotonic()


def warm_up(engine: Engine) -> None:
    """Run real steps of each kind, so that readiness means that they work."""
    greedy = Sampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)
    drawn = Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)
    tokens = np.ones(2, dtype="<i4").tobytes()
    engine.submit(Generate("warm-up greedy", tokens, greedy, 3, ()))
    engine.submit(Generate("warm-up drawn", tokens, drawn, 3, ()))
    engine.submit(Score("warm-up score", tokens))
    while engine.has_work:
        for ended in engine.step().ended:
            if ended.finish_reason == "error":
                raise RuntimeError(f"the model does not work: {ended.error}")


def ready(runner: Runner) -> Ready:
    """The facts of a runner that has loaded."""
    return Ready(
        pid=os.getpid(),
        device=runner.device,
        dtype=runner.dtype,
        num_rows=runner.num_rows,
        state_bytes_per_row=runner.state_bytes_per_row,
        spans=runner.spans,
    )


def end_with_parent(options: EngineOptions) -> None:
    """Wait until the API process is gone, however it went, then remove the pipes with their folder and end this one.

    A thread, so that neither loading nor a step that hangs is in its way; the end of standard input cannot be missed,
    not even where the parent goes before this process has come to look.
    """
    while os.read(sys.stdin.fileno(), 1):
        pass
    pipes = [Path(address.removeprefix("ipc://")) for address in (options.inbox, options.outbox)]
    with contextlib.suppress(OSError):  # the folder is not empty, or not ours to remove
        for pipe in pipes:
            pipe.unlink(missing_ok=True)
        pipes[0].parent.rmdir()
    os._exit(1)


def main(argv: list[str]) -> int:
    """Run the engine that `argv[0]` describes; never outlives the API process."""
    options = msgspec.json.decode(argv[0], type=EngineOptions)
    threading.Thread(target=end_with_parent, args=(options,), daemon=True).start()
    process = EngineProcess(options)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to both processes: the API process decides
    signal.signal(signal.SIGTERM, process.ask_to_end)
    return process.run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
