"""The API process's link to the engine: it supervises the engine process and has a stream for each sequence.

Whatever happens to the engine, every submitted sequence gets exactly one Ended. Knows no HTTP and no torch.
"""

import asyncio
import logging
import time
from collections.abc import Callable

from server.config import Settings
from server.link.child import Child
from server.link.mailbox import Stream, untimed_ending
from server.protocol.frames import End
from server.protocol.messages import (
    AskedToEnd,
    Cancel,
    Died,
    EngineFinish,
    FromEngine,
    Generate,
    LinkState,
    Ready,
    Score,
    Scores,
    Step,
    Token,
)

__all__ = ["EngineLink", "Stream"]

LOAD_MODEL = "server.engine.runner:ModelRunner.load"
LOGGED_FACTS = ("device", "dtype", "state_bytes_per_row", "state_bytes", "batch_invariant")
WATCH_S = 0.1
EXIT_S = 1.5  # an engine that was told to end and is still there after so long is killed
FIRST_BACK_OFF_S, LONGEST_BACK_OFF_S = 0.1, 2.0
RESTART_SLACK_S = 60.0  # a restart that takes so much longer than twice the first start counts as a hang

log = logging.getLogger("server.link.supervisor")


class EngineLink:
    """Runs one engine process at a time, and knows the sequences that live in it.

    starting -> ready -> draining, when `close` is called; ready -> restarting -> ready, when the process dies or hangs;
    failed, when the first start fails or the restarts of a while are used up.
    """

    def __init__(
        self, settings: Settings, *, runner: str = LOAD_MODEL, restart_slack_s: float = RESTART_SLACK_S
    ) -> None:
        """runner: module:function that makes the engine process's runner of its options."""
        self.state: LinkState = "starting"
        self.ready: Ready | None = None  # of the newest process that has been ready
        self.failure = ""  # the newest one
        self.blames_model = False  # the failure is that the model's files are wrong
        self.restarts = 0
        self.num_waiting = self.tokens_waiting = self.rows_used = 0
        self.asked_to_end = False  # a signal to the engine process meant this process
        self.on_step: Callable[[Step], None] | None = None
        self._settings = settings
        self._runner = runner
        self._streams: dict[str, Stream] = {}
        self._child: Child | None = None  # the newest process
        self._takes_work = False  # it is ready, and not known to be dead or hung
        self._closing = False  # from now on the end of the process is no failure
        self._supervisor: asyncio.Task[None] | None = None
        self._settled = asyncio.Event()  # ready, failed or closed
        self._restarted: list[float] = []  # times of the restarts within the window
        self._restart_slack_s = restart_slack_s
        self._first_start_s = 0.0
        self._begun = self._heard = self._stepped = time.monotonic()

    @property
    def heartbeat_age_s(self) -> float:
        """Seconds since the engine last said anything."""
        return time.monotonic() - self._heard

    @property
    def last_step_age_s(self) -> float:
        """Seconds since the engine's last step, or since the start."""
        return time.monotonic() - self._stepped

    async def start(self) -> None:
        """Start the engine process, unless the link is closed; returns once `state` is ready or failed."""
        if self._closing:
            return
        self._begun = time.monotonic()
        self._supervisor = asyncio.create_task(self._supervise())
        await self._settled.wait()

    def submit(self, message: Generate | Score) -> list[Stream]:
        """Start a sequence for each of the message's ids; the last message of every stream is its one Ended.

        While no engine takes work, the sequences end at once with an error.
        """
        streams = {name: Stream(max_behind=self._settings.max_behind) for name in message.ids}
        assert len(streams) == len(message.ids)
        assert streams.keys().isdisjoint(self._streams)
        if self._takes_work:
            assert self._child is not None
            self._streams.update(streams)
            self._child.send(message)
        else:
            for name, stream in streams.items():
                stream.put(untimed_ending(name, "error", error=self.failure or "the engine is not ready"))
        return list(streams.values())

    def cancel(self, sequence: str) -> None:
        """Free the row of a sequence, unless the sequence has ended."""
        if sequence in self._streams:
            assert self._child is not None
            self._child.send(Cancel(sequence))

    async def close(self, grace_s: float) -> None:
        """Refuse new work, wait `grace_s` for live work, end the rest with "shutdown", and end the process.

        The engine gets up to `grace_s` again, at most EXIT_S, to send those endings itself, with timings.
        """
        if self.state != "failed":
            self.state = "draining"
        deadline = time.monotonic() + grace_s
        while self._streams and time.monotonic() < deadline:
            await asyncio.sleep(WATCH_S / 4)
        self._closing = True
        if self._supervisor is not None:
            if self._takes_work and self._child is not None:
                self._child.send(End())
                await asyncio.wait([self._supervisor], timeout=min(EXIT_S, grace_s))
            self._supervisor.cancel()
            await asyncio.wait([self._supervisor])
        self._end_streams("shutdown")
        if self._child is not None:
            await self._child.gone()
        self._settled.set()

    async def _supervise(self) -> None:
        """Run one engine process after the other until the link is closed or has failed."""
        while True:
            await self._run_engine()
            if self.state != "restarting":
                break
            await asyncio.sleep(min(FIRST_BACK_OFF_S * 2 ** (len(self._restarted) - 1), LONGEST_BACK_OFF_S))

    async def _run_engine(self) -> None:
        """Run one process to its end."""
        self._begun = time.monotonic()
        try:
            self._child = child = await Child.start(self._settings, make_runner=self._runner, hear=self._hear)
        except Exception as error:  # the system has no room for it, most likely
            self._fail(Died(f"the engine process cannot be started: {type(error).__name__}: {error}"))
            return
        try:
            why = await self._watch(child)
            self._takes_work = False
            if not self._closing:
                self._fail(why)
        finally:
            self._takes_work = False
            child.kill()
            await child.gone()

    async def _watch(self, child: Child) -> Died:
        """Wait until the process is of no use any more: it is gone, silent though work is pending, or a restart hangs.

        Silence is counted in turns of this loop, not by the clock: if the loop itself was held up, messages only wait
        to be read.
        """
        heard, silent_s = self._heard, 0.0
        while True:
            await asyncio.wait([child.ended], timeout=WATCH_S)
            if child.ended.done():
                return child.ended.result()
            counts = bool(self._streams) if self._takes_work else self.restarts > 0
            silent_s = silent_s + WATCH_S if counts and self._heard == heard else 0.0
            heard = self._heard
            if self._takes_work and silent_s > self._settings.heartbeat_timeout_s:
                return Died(f"the engine process has been silent for {silent_s:.1f} s")
            if not self._takes_work and silent_s > 2 * self._first_start_s + self._restart_slack_s:
                return Died(f"the engine process has not become ready within {silent_s:.0f} s")

    def _hear(self, message: FromEngine) -> None:
        self._heard = time.monotonic()
        if isinstance(message, Step):
            self._dispatch(message)
        elif isinstance(message, Ready):
            self._welcome(message)
        elif isinstance(message, AskedToEnd):
            self.asked_to_end = True

    def _dispatch(self, step: Step) -> None:
        """Hand the messages of one step to their streams: the hot path."""
        self._stepped = self._heard
        self.rows_used, self.num_waiting, self.tokens_waiting = step.rows_used, step.num_waiting, step.tokens_waiting
        streams = self._streams
        said: Token | Scores
        for said in step.scores + step.tokens:  # a prompt's scores come before its first token
            stream = streams.get(said.sequence)
            if stream is not None and not stream.put(said):
                self.cancel(said.sequence)
                del streams[said.sequence]
        for ended in step.ended:
            if stream := streams.pop(ended.sequence, None):
                stream.put(ended)
        if self.on_step:
            self.on_step(step)

    def _welcome(self, ready: Ready) -> None:
        self._first_start_s = self._first_start_s or self._heard - self._begun
        self._stepped = self._heard  # the engine has computed steps before it says that it is ready
        self.ready = ready
        if self.state != "draining":
            self.state, self._takes_work = "ready", True
        self._settled.set()
        facts = ready.facts.as_dict()
        fields = {
            "pid": ready.pid,
            "rows": ready.facts.num_rows,
            **{name: facts[name] for name in LOGGED_FACTS},
            "warm_up_s": round(ready.warm_up_s, 3),
            "restarts": self.restarts,
        }
        log.info("engine ready", extra={"fields": fields})

    def _fail(self, why: Died) -> None:
        """End the sequences of a dead process, and decide what comes next. A draining link tries nothing new."""
        now = time.monotonic()
        self._restarted = [moment for moment in self._restarted if now - moment < self._settings.restart_window_s]
        self.failure, self.blames_model = why.message, why.blames_model
        if self.state != "draining":
            if self.ready is None or len(self._restarted) >= self._settings.max_restarts:
                self.state = "failed"
            else:
                self.state = "restarting"
                self.restarts += 1
                self._restarted.append(now)
        facts = {"why": self.failure, "sequences": len(self._streams), "state": self.state, "restarts": self.restarts}
        log.warning("engine failed", extra={"fields": facts})
        self._end_streams("error", error=self.failure)
        if self.state == "failed":
            self._settled.set()

    def _end_streams(self, finish_reason: EngineFinish, *, error: str = "") -> None:
        streams, self._streams = self._streams, {}
        for name, stream in streams.items():
            stream.put(untimed_ending(name, finish_reason, error=error))
        self.rows_used = self.num_waiting = self.tokens_waiting = 0
