"""The API process's line to the engine: the streams of its sequences, and the supervision of its process.

Whatever happens to the engine, every submitted sequence gets exactly one Ended. Knows no HTTP and no torch.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable

from server.config import Settings
from server.link.child import Child
from server.link.mailbox import Stream, untimed_ending
from server.protocol.frames import End
from server.protocol.messages import (
    LOAD_MODEL,
    AskedToEnd,
    Cancel,
    EngineFinish,
    EngineOptions,
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

WATCH_S = 0.1
EXIT_S = 1.5  # an engine that was told to end and has not by then is killed
FIRST_BACK_OFF_S, LONGEST_BACK_OFF_S = 0.1, 2.0
RESTART_SLACK_S = 60.0  # a restart that takes so much longer than twice the first start counts as a hang

log = logging.getLogger("server.link.supervisor")


class EngineLink:
    """At most one engine process at a time, and the sequences that live in it.

    starting -> ready -> draining, when `close` is called; ready -> restarting -> ready, when the process dies or hangs;
    failed, when the first start fails or the restarts of a while are used up.
    """

    def __init__(
        self, settings: Settings, *, runner: str = LOAD_MODEL, restart_slack_s: float = RESTART_SLACK_S
    ) -> None:
        """runner: module:factory of the runner that the engine process shall build."""
        self.state: LinkState = "starting"
        self.ready: Ready | None = None  # of the newest process that has been ready
        self.failure = ""  # the last one
        self.restarts = 0
        self.num_waiting = self.tokens_waiting = self.rows_used = 0
        self.asked_to_end = False  # by a signal to the engine process, in place of one to this process
        self.on_step: Callable[[Step], None] | None = None
        self._settings = settings
        self._runner = runner
        self._streams: dict[str, Stream] = {}
        self._child: Child | None = None  # the newest process
        self._takes_work = False  # it is ready, and neither dead nor hung as far as we know
        self._closing = False  # an end of the process is no failure any more
        self._supervisor: asyncio.Task[None] | None = None
        self._settled = asyncio.Event()  # ready, failed or closed
        self._restarted: list[float] = []  # when, within the window
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
        """Start the engine process, unless closed before; returns once it is ready or has failed, see `state`."""
        if self._closing:
            return
        self._begun = time.monotonic()
        self._supervisor = asyncio.create_task(self._supervise())
        await self._settled.wait()

    def submit(self, message: Generate | Score) -> list[Stream]:
        """Start sequences, one for each of the message's ids; a stream's last message is its one Ended, come what may.

        While there is no engine that takes work they end at once with an error.
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
        """Free the row of a sequence; nothing happens where it has ended."""
        if sequence in self._streams:
            assert self._child is not None
            self._child.send(Cancel(sequence))

    async def close(self, grace_s: float) -> None:
        """Take nothing new, let live work end by itself for `grace_s`, end the rest with "shutdown", end the process.

        The engine has as long again, but not longer than EXIT_S, to tell of those endings itself, with timings.
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
        """One engine process after the other, for as long as another try is worth it."""
        while True:
            await self._run_engine()
            if self.state != "restarting":
                break
            await asyncio.sleep(min(FIRST_BACK_OFF_S * 2 ** (len(self._restarted) - 1), LONGEST_BACK_OFF_S))

    async def _run_engine(self) -> None:
        """One process, to its end."""
        self._begun = time.monotonic()
        try:
            self._child = child = await Child.start(self._options(), hear=self._hear)
        except Exception as error:  # the system has no room for it, most likely
            self._fail(f"the engine process cannot be started: {type(error).__name__}: {error}")
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

    def _options(self) -> EngineOptions:
        settings = self._settings
        return EngineOptions(
            bundle=os.fspath(settings.bundle),
            backend=settings.backend,
            num_rows=settings.num_rows,
            dtype=settings.dtype,
            device=settings.device,
            provider=settings.provider,
            num_threads=settings.num_threads,
            batch_invariant=settings.batch_invariant,
            chunk_tokens=settings.chunk_tokens,
            budget_tokens=settings.budget_tokens,
            prefill_ms=settings.prefill_ms,
            runner=self._runner,
        )

    async def _watch(self, child: Child) -> str:
        """Why the process is of no use any more: it is gone, silent though work is pending, or a restart hangs.

        Silence is counted in turns of this loop, not by the clock: where the loop itself was held up, messages only
        wait to be read.
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
                return f"the engine process has been silent for {silent_s:.1f} s"
            if not self._takes_work and silent_s > 2 * self._first_start_s + self._restart_slack_s:
                return f"the engine process has not become ready within {silent_s:.0f} s"

    def _hear(self, message: FromEngine) -> None:
        self._heard = time.monotonic()
        if isinstance(message, Step):
            self._dispatch(message)
        elif isinstance(message, Ready):
            self._welcome(message)
        elif isinstance(message, AskedToEnd):
            self.asked_to_end = True

    def _dispatch(self, step: Step) -> None:
        """The hot path: hand on all that one step has to say."""
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
        self._stepped = self._heard  # it says so after real steps
        self.ready = ready
        if self.state != "draining":
            self.state, self._takes_work = "ready", True
        self._settled.set()
        facts = {
            "pid": ready.pid,
            "device": ready.device,
            "dtype": ready.dtype,
            "rows": ready.num_rows,
            "state_bytes_per_row": ready.state_bytes_per_row,
            "state_bytes": ready.state_bytes_per_row * ready.num_rows,
            "batch_invariant": ready.batch_invariant,
            "warm_up_s": round(ready.warm_up_s, 3),
            "restarts": self.restarts,
        }
        log.info("engine ready", extra={"fields": facts})

    def _fail(self, why: str) -> None:
        """End what the process leaves, and decide what comes next. A draining link tries nothing new."""
        now = time.monotonic()
        self._restarted = [moment for moment in self._restarted if now - moment < self._settings.restart_window_s]
        self.failure = why
        if self.state != "draining":
            if self.ready is None or len(self._restarted) >= self._settings.max_restarts:
                self.state = "failed"
            else:
                self.state = "restarting"
                self.restarts += 1
                self._restarted.append(now)
        facts = {"why": why, "sequences": len(self._streams), "state": self.state, "restarts": self.restarts}
        log.warning("engine failed", extra={"fields": facts})
        self._end_streams("error", error=why)
        if self.state == "failed":
            self._settled.set()

    def _end_streams(self, finish_reason: EngineFinish, *, error: str = "") -> None:
        streams, self._streams = self._streams, {}
        for name, stream in streams.items():
            stream.put(untimed_ending(name, finish_reason, error=error))
        self.rows_used = self.num_waiting = self.tokens_waiting = 0
