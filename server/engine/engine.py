"""The engine: requests in, one `Step` message per step out. Drives a runner; knows no torch, no HTTP and no sockets.

Every accepted sequence gets exactly one ending: "length", "eos_token", "scored", "cancelled", "timeout", "shutdown" or
"error". What goes wrong with one row ends that row only; what goes wrong with the device ends the engine.
"""

import heapq
import logging
import math
import time
from collections.abc import Callable
from collections.abc import Sequence as Many
from typing import TypeVar

import numpy as np

from server.config import EngineOptions
from server.engine.scheduler import Plan, Reading, Scheduler
from server.engine.sequence import ChunkResult, ChunkScores, Drawn, Phase, Runner, Sequence
from server.protocol.messages import Ended, EngineFinish, Generate, Score, Scores, Step, Token

NOT_A_NUMBER = "the model's output for this sequence is not a number"
PACE_MEMORY = 0.8  # of the running mean of how long reading takes

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


class Engine:
    """Continuous batching over the rows of a runner."""

    def __init__(
        self, runner: Runner, options: EngineOptions, *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._runner = runner
        self._scheduler = Scheduler(num_rows=runner.num_rows, chunk_tokens=options.chunk_tokens)
        self._budget_tokens = options.budget_tokens
        self._prefill_s = options.prefill_ms / 1e3
        self._clock = clock
        self._live: dict[str, Sequence] = {}
        self._deadlines: list[tuple[float, str]] = []  # a heap; may name sequences that have ended
        self._pace = 0.0  # seconds to read a token
        self._num_unread = 0  # tokens of all live sequences
        self._tokens: list[Token] = []
        self._scores: list[Scores] = []
        self._ended: list[Ended] = []

    @property
    def has_work(self) -> bool:
        """Whether a step would compute or say anything."""
        return bool(self._live or self._ended)

    def submit(self, request: Generate | Score) -> None:
        """Accept a request. The API process has validated it."""
        first = Sequence.group(request, submitted=self._clock())
        for sequence in (first, *first.forks):
            assert sequence.id not in self._live
            self._live[sequence.id] = sequence
            self._num_unread += sequence.num_unread
            if sequence.deadline is not None:
                heapq.heappush(self._deadlines, (sequence.deadline, sequence.id))
        if len(self._deadlines) > 2 * len(self._live) + 64:  # most of them are of sequences that ended long before
            self._deadlines = sorted(entry for entry in self._deadlines if entry[1] in self._live)
        self._scheduler.add(first)
        if first.num_shared == 0:
            self._fork(first)
        if first.num_to_read == 0:  # a document of one token has nothing to score
            self._end(first, "scored")

    def cancel(self, name: str) -> None:
        """End a sequence now; nothing happens where it has already ended."""
        if sequence := self._live.get(name):
            self._end(sequence, "cancelled")

    def shutdown(self) -> Step:
        """End everything."""
        for sequence in list(self._live.values()):
            if sequence.phase is not Phase.ENDED:  # with its leader
                self._end(sequence, "shutdown")
        return self._emit(num_decoded=0, num_read=0, seconds=0.0)

    def step(self) -> Step:
        """Expire, plan, seat, decode, read, emit.

        Raises:
            whatever the runner raises when its device does not work; the engine must not be used any more then.
        """
        begun = self._clock()
        self._expire(begun)
        plan = self._scheduler.plan(self._budget())
        self._seat(plan)
        self._decode(plan.decoding)
        self._read(plan.reading)
        return self._emit(
            num_decoded=len(plan.decoding),
            num_read=sum(reading.size for reading in plan.reading),
            seconds=self._clock() - begun,
        )

    def _expire(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            _, name = heapq.heappop(self._deadlines)
            if sequence := self._live.get(name):
                self._end(sequence, "timeout")

    def _budget(self) -> int:
        """Tokens to read in the next step: as many as the others can bear to wait for, by how long reading took."""
        generating = any(one is not None and one.phase is Phase.DECODING for one in self._scheduler.rows)
        if not generating or not self._pace:
            return self._budget_tokens
        return min(self._budget_tokens, int(self._prefill_s / self._pace))

    def _seat(self, plan: Plan) -> None:
        for sequence in plan.admitted:
            sequence.admitted = sequence.admitted or self._clock()
            if sequence.snapshot is None:
                self._runner.reset(sequence.row)
            else:
                self._runner.restore(sequence.row, sequence.snapshot)
                sequence.snapshot = None
        for move in plan.moves:
            self._runner.move(move.source, move.target)

    def _decode(self, sequences: Many[Sequence]) -> None:
        def run(some: Many[Sequence]) -> list[Drawn]:
            rows, tokens = [one.row for one in some], [one.last_token for one in some]
            return self._runner.decode(rows, tokens, [one.next_draw() for one in some])

        for sequence, drawn in zip(sequences, self._attempt(run, sequences), strict=True):
            if isinstance(drawn, Exception):
                self._end(sequence, "error", error=_blame(drawn))
            else:
                self._take_token(sequence, drawn)

    def _read(self, readings: Many[Reading]) -> None:
        def run(some: Many[Reading]) -> list[ChunkResult]:
            return self._runner.extend([one.sequence.next_chunk(one.size) for one in some])

        begun = self._clock()
        results = self._attempt(run, readings)
        if readings:
            pace = (self._clock() - begun) / sum(reading.size for reading in readings)
            self._pace = PACE_MEMORY * (self._pace or pace) + (1 - PACE_MEMORY) * pace
        for reading, result in zip(readings, results, strict=True):
            if isinstance(result, Exception):
                self._end(reading.sequence, "error", error=_blame(result))
            else:
                self._scheduler.commit(reading)
                self._num_unread -= reading.size
                self._take_read(reading.sequence, result)

    def _attempt(self, run: Callable[[Many[Item]], Many[Result]], items: Many[Item]) -> list[Result | Exception]:
        """Run all items at once; where that fails, each alone. Raises where the device itself has failed."""
        if not items:
            return []
        try:
            return [*run(items)]
        except Exception as error:
            log.warning("a step failed, its rows are tried alone", extra={"fields": {"error": type(error).__name__}})
            self._runner.check()
            if len(items) == 1:
                return [error]
        return [result for item in items for result in self._attempt(run, [item])]

    def _take_read(self, sequence: Sequence, result: ChunkResult) -> None:
        done = sequence.phase is Phase.DECODING
        if done:
            sequence.read = self._clock()
        if result.scores is not None:
            if not np.isfinite(result.scores.logprobs).all():
                self._end(sequence, "error", error=NOT_A_NUMBER)
                return
            self._scores.append(_scores(sequence.id, result.scores))
        group = (sequence, *sequence.forks)
        if sequence.num_read == sequence.num_shared:
            self._fork(sequence)
        for one, drawn in zip(group, result.drawn, strict=False):  # a document draws nothing
            self._take_token(one, drawn)
        if done and isinstance(sequence.request, Score):
            self._end(sequence, "scored")

    def _fork(self, sequence: Sequence) -> None:
        """What the group shares has been read: its other members begin where this one is now."""
        if not sequence.forks:
            return
        snapshot = self._runner.snapshot(sequence.row) if sequence.num_read else None
        for fork in reversed(sequence.forks):
            fork.snapshot, fork.leader = snapshot, None
            if isinstance(fork.request, Generate):
                fork.admitted, fork.read = sequence.admitted, sequence.read
            self._scheduler.add_first(fork)
        sequence.forks = []

    def _take_token(self, sequence: Sequence, drawn: Drawn) -> None:
        assert isinstance(sequence.request, Generate)
        if not math.isfinite(drawn.logprob):
            self._end(sequence, "error", error=NOT_A_NUMBER)
            return
        sequence.last_token = drawn.token
        sequence.num_generated += 1
        self._tokens.append(Token(sequence.id, drawn.token, drawn.logprob, drawn.top))
        if drawn.token in sequence.request.sampling.end_ids:
            self._end(sequence, "eos_token")
        elif sequence.num_generated == sequence.request.max_new_tokens:
            self._end(sequence, "length")

    def _end(self, sequence: Sequence, finish_reason: EngineFinish, *, error: str = "") -> None:
        """The one ending. Those who still wait for what this sequence reads end with it."""
        for fork in list(sequence.forks):
            self._end(fork, finish_reason, error=error)
        if sequence.leader is not None:
            sequence.leader.forks.remove(sequence)
        self._scheduler.release(sequence)
        del self._live[sequence.id]
        self._num_unread -= sequence.num_unread
        self._ended.append(Ended(sequence.id, finish_reason, sequence.timings(self._clock()), error))

    def _emit(self, *, num_decoded: int, num_read: int, seconds: float) -> Step:
        num_used = self._scheduler.num_used
        step = Step(
            tokens=tuple(self._tokens),
            scores=tuple(self._scores),
            ended=tuple(self._ended),
            num_decoded=num_decoded,
            num_prefilled=num_read,
            seconds=seconds,
            rows_used=num_used,
            num_waiting=len(self._live) - num_used,
            tokens_waiting=self._num_unread,
        )
        self._tokens, self._scores, self._ended = [], [], []
        if not self._live:
            self._scheduler.check_idle()
        return step


def _blame(error: Exception) -> str:
    return f"the model failed on this sequence: {type(error).__name__}: {str(error)[:200]}"


def _scores(name: str, scores: ChunkScores) -> Scores:
    return Scores(
        name,
        _packed(scores.logprobs, "<f4"),
        _packed(scores.ranks, "<i4"),
        _packed(scores.top_ids, "<i4"),
        _packed(scores.top_logprobs, "<f4"),
        _packed(scores.entropies, "<f4"),
        _packed(scores.memory_shares, "<f4"),
    )


def _packed(array: np.ndarray | None, dtype: str) -> bytes:
    return b"" if array is None else array.astype(dtype).tobytes()
