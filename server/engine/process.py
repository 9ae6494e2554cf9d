"""The engine's own process: load, warm up, say Ready, then turn messages into steps until told, or left, to end.

Started by `server.link.child` as `python -m server.engine.process FD PARENT OPTIONS`: the inherited end of the
pipe, the process id of the API process, and an `EngineOptions` as JSON. It never outlives the API process, whatever it
is doing.
"""

import contextlib
import ctypes
import importlib
import logging
import os
import signal
import socket
import sys
import time

import msgspec
import numpy as np

from model.sampling.params import SamplingParams
from server.engine.engine import Engine
from server.engine.pipe import EngineEnd
from server.engine.sequence import Runner
from server.protocol.frames import End, Heard
from server.protocol.messages import (
    AskedToEnd,
    Cancel,
    Died,
    EngineOptions,
    FromEngine,
    Generate,
    Heartbeat,
    Ready,
    Score,
)
from server.runtime import log_to_stderr, settle_garbage

HEARTBEAT_S = 0.5  # at least so often the process says that its loop turns
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

# Above that of the API process: it has little to do, and whoever waits for it waits for a stream or a refusal.
ENGINE_NICENESS = 5

log = logging.getLogger("server.engine.process")  # __name__ is __main__ here


class EngineProcess:
    """The loop around an `Engine` and its pipe."""

    def __init__(self, options: EngineOptions, *, pipe: EngineEnd) -> None:
        self._options = options
        self._pipe = pipe
        self._asked_to_end = False  # by the API process
        self._was_told = False  # that a signal came
        self._last_said = time.monotonic()
        self.has_signal = False  # set by a handler

    def run(self) -> int:
        """Serve until the end; the exit status."""
        try:
            engine = self._start()
            while not self._asked_to_end:
                self._turn(engine)
                self._tell_of_signal()
            self._say(engine.shutdown())
            return 0
        except Exception as error:  # whatever it is, the API process must hear of it, and this process is done
            log.exception("the engine process fails")
            self._say(Died(f"{type(error).__name__}: {error}"))  # the last thing: it is killed for it
            return 1

    def _start(self) -> Engine:
        options = self._options
        runner = _load(options)
        begun = time.monotonic()
        batch_invariant = runner.warm_up(options.chunk_tokens)
        engine = Engine(
            runner,
            chunk_tokens=options.chunk_tokens,
            budget_tokens=options.budget_tokens,
            prefill_ms=options.prefill_ms,
        )
        warm_up(engine)
        settle_garbage()
        self._say(ready(runner, batch_invariant=batch_invariant, warm_up_s=time.monotonic() - begun))
        return engine

    def _turn(self, engine: Engine) -> None:
        """Hear all there is to hear, waiting for it only where there is nothing to do; then one step."""
        for message in self._pipe.take(0 if engine.has_work else HEARTBEAT_S):
            self._hear(engine, message)
        if engine.has_work:
            self._say(engine.step())
        elif time.monotonic() - self._last_said >= HEARTBEAT_S:
            self._say(Heartbeat())

    def _tell_of_signal(self) -> None:
        if self.has_signal and not self._was_told:
            self._was_told = True
            self._say(AskedToEnd())

    def _hear(self, engine: Engine, message: Heard) -> None:
        match message:
            case Generate() | Score():
                engine.submit(message)
            case Cancel(id=name):
                engine.cancel(name)
            case End():
                self._asked_to_end = True

    def _say(self, message: FromEngine) -> None:
        self._pipe.send(message)
        self._last_said = time.monotonic()


def _load(options: EngineOptions) -> Runner:
    module, _, factory = options.runner.partition(":")
    make = importlib.import_module(module)
    for name in factory.split("."):
        make = getattr(make, name)
    runner: Runner = make(  # type: ignore[operator]
        options.bundle,
        num_rows=options.num_rows,
        dtype=options.dtype,
        device=options.device,
        provider=options.provider,
        num_threads=options.num_threads,
        batch_invariant=options.batch_invariant,
    )
    return runner


def warm_up(engine: Engine) -> None:
    """Run real steps of each kind, so that readiness means that they work."""
    tokens = np.ones(2, dtype="<i4").tobytes()
    engine.submit(Generate("warm-up greedy", tokens, SamplingParams(temperature=0), 3))
    engine.submit(Generate("warm-up drawn", tokens, SamplingParams(temperature=1), 3))
    engine.submit(Score("warm-up score", tokens))
    while engine.has_work:
        for ended in engine.step().ended:
            if ended.finish_reason == "error":
                raise RuntimeError(f"the model does not work: {ended.error}")


def ready(runner: Runner, *, batch_invariant: bool, warm_up_s: float) -> Ready:
    """The facts of a runner that works."""
    return Ready(
        pid=os.getpid(),
        backend=runner.backend,
        device=runner.device,
        dtype=runner.dtype,
        weights=runner.weights,
        num_rows=runner.num_rows,
        state_bytes_per_row=runner.state_bytes_per_row,
        batch_invariant=batch_invariant,
        spans=runner.spans,
        warm_up_s=warm_up_s,
    )


def die_with(parent: int) -> None:
    """Have the kernel kill this process when the parent is gone, even while it is stopped or hangs in a library.

    Linux only; elsewhere the end of the pipe alone ends it, as soon as it runs.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before
        os._exit(1)


def main(argv: list[str]) -> int:
    """Run the engine that `argv` describes; returns the exit status."""
    os.nice(ENGINE_NICENESS)
    descriptor, parent, options = argv
    die_with(int(parent))
    log_to_stderr()
    end = socket.socket(fileno=int(descriptor))
    end.set_inheritable(False)
    process = EngineProcess(msgspec.json.decode(options, type=EngineOptions), pipe=EngineEnd(end))
    # Signals of a terminal or a service manager go to both processes, and the API process decides; it hears of one that
    # came here. Handlers and not SIG_IGN, which the processes of a compiler that torch may start would inherit.
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: setattr(process, "has_signal", True))
    return process.run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
