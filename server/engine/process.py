"""The engine process: it loads the model, warms up, sends Ready, then takes messages and computes steps until its end.

`server.link.child` starts it as `python -m server.engine.process FD PARENT RUNNER OPTIONS`: the inherited end of the
pipe, the process id of the API process, the function that makes the runner as module:function, and an `EngineOptions`
as JSON. The process never outlives the API process, whatever it is doing.
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

import numpy as np

from model.bundle import BundleError
from model.sampling.params import SamplingParams
from server.config import EngineOptions
from server.engine.engine import Engine
from server.engine.pipe import EngineEnd
from server.engine.sequence import Runner
from server.protocol.frames import End, Heard
from server.protocol.messages import AskedToEnd, Cancel, Died, FromEngine, Generate, Heartbeat, Ready, Score
from server.runtime import log_to_stderr, settle_garbage

HEARTBEAT_S = 0.5  # the longest silence of a process whose loop turns
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

# Nicer than the API process, which has little to compute and whose delay every client feels.
ENGINE_NICENESS = 5

log = logging.getLogger("server.engine.process")  # __name__ is __main__ here


class EngineProcess:
    """The loop around an `Engine` and its pipe."""

    def __init__(self, make_runner: str, options: EngineOptions, *, pipe: EngineEnd) -> None:
        """make_runner: module:function, which takes the options and returns a `Runner`."""
        self._make_runner = make_runner
        self._options = options
        self._pipe = pipe
        self._asked_to_end = False  # by the API process
        self._was_told = False  # the API process knows of the signal
        self._last_said = time.monotonic()
        self.has_signal = False  # set by a handler

    def run(self) -> int:
        """Serve until the end; returns the exit status."""
        try:
            engine = self._start()
            while not self._asked_to_end:
                self._turn(engine)
                self._tell_of_signal()
            self._say(engine.shutdown())
            return 0
        except BundleError as error:
            self._say(Died(str(error), blames_model=True))
            return 1
        except Exception as error:  # of any kind: the API process must know, and this process is done
            log.exception("the engine process fails")
            self._say(Died(f"{type(error).__name__}: {error}"))  # the last message: the API process then kills this one
            return 1

    def _start(self) -> Engine:
        runner = _load(self._make_runner, self._options)
        begun = time.monotonic()
        facts = runner.warm_up()
        engine = Engine(runner, self._options)
        warm_up(engine)
        settle_garbage()
        self._say(Ready(os.getpid(), facts, warm_up_s=time.monotonic() - begun))
        return engine

    def _turn(self, engine: Engine) -> None:
        """Take all messages, waiting only if there is nothing to compute; then compute one step."""
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


def _load(make_runner: str, options: EngineOptions) -> Runner:
    module, _, factory = make_runner.partition(":")
    make = importlib.import_module(module)
    for name in factory.split("."):
        make = getattr(make, name)
    runner: Runner = make(options)  # type: ignore[operator]
    return runner


def warm_up(engine: Engine) -> None:
    """Run real steps of each kind, so that a ready engine is one whose steps work."""
    tokens = np.ones(2, dtype="<i4").tobytes()
    engine.submit(Generate("warm-up greedy", tokens, SamplingParams(temperature=0), 3))
    engine.submit(Generate("warm-up drawn", tokens, SamplingParams(temperature=1), 3))
    engine.submit(Score("warm-up score", tokens))
    while engine.has_work:
        for ended in engine.step().ended:
            if ended.finish_reason == "error":
                raise RuntimeError(f"the model does not work: {ended.error}")


def die_with(parent: int) -> None:
    """Let the kernel kill this process when the parent is gone, even if this process is stopped or hangs in a library.

    On other systems than Linux the process ends when it next reads its pipe.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent was gone before the call above
        os._exit(1)


def main(argv: list[str]) -> int:
    """Run the engine that `argv` describes; returns the exit status."""
    os.nice(ENGINE_NICENESS)
    descriptor, parent, make_runner, options = argv
    die_with(int(parent))
    log_to_stderr()
    end = socket.socket(fileno=int(descriptor))
    end.set_inheritable(False)
    process = EngineProcess(make_runner, EngineOptions.model_validate_json(options), pipe=EngineEnd(end))
    # Signals of a terminal or a service manager go to both processes, and the API process decides; it hears of one that
    # came here. Handlers and not SIG_IGN, which the processes of a compiler that torch may start would inherit.
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: setattr(process, "has_signal", True))
    return process.run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
