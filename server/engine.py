"""The engine: requests in, one `Step` message per step out. Drives a runner; knows no torch, no HTTP and no sockets.

Every accepted sequence gets exactly one ending: "length", "eos_token", "scored", "cancelled", "shutdown" or "error".
"""

import math
import time
from collections.abc import Callable

import numpy as np

from server.messages import Ended, Generate, Score, Scores, Step, Token
from server.scheduler import Plan, Scheduler
from server.sequence import ChunkResult, Phase, Runner, Sequence

NOT_A_NUMBER = "the model's output for this sequence is not a number"


class Engine:
    """Continuous batching over the rows of a runner."""

    def __init__(
        self,
        runner: Runner,
        *,
        chunk_tokens: int = 256,
        budget_tokens: int = 1024,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._runner = runner
        self._scheduler = Scheduler(num_rows=runner.num_rows, chunk_tokens=chunk_tokens, budget_tokens=budget_tokens)
        self._live: dict[str, Sequence] = {}
        self._clock = clock
        self._tokens: list[Token] = []
        self._scores: list[Scores] = []
        self._ended: list[Ended] = []

    @property
    def has_work(self) -> bool:
        """Whether a step would compute or say anything."""
        return self._scheduler.has_work or bool(self._ended)

    def submit(self, request: Generate | Score) -> None:
        """Accept a request. The API process has validated it."""
        sequence = Sequence(request, submitted=self._clock())
        assert sequence.id not in self._live
        self._live[sequence.id] = sequence
        self._scheduler.add(sequence)
        if sequence.num_to_read == 0:  # a document of one token has nothing to score
            self._end(sequence, "scored")

    def cancel(self, name: str) -> None:
        """End a sequence now; nothing happens where it has already ended."""
        if sequence := self._live.get(name):
            self._end(sequence, "cancelled")

    def shutdown(self) -> Step:
        """End everything."""
        for sequence in list(self._live.values()):
            self._end(sequence, "shutdown")
        return self._emit(num_decoded=0, num_read=0, seconds=0.0)

    def step(self) -> Step:
        """Plan, run, commit, emit.

        Raises:
            whatever the runner raises; the engine must not be used any more then.
        """
        begun = self._clock()
        plan = self._scheduler.plan()
        drawn, read = self._run(plan)
        self._scheduler.commit(plan)
        self._take_drawn(plan, *drawn)
        self._take_read(plan, read)
        return self._emit(
            num_decoded=len(plan.decoding),
            num_read=sum(reading.size for reading in plan.reading),
            seconds=self._clock() - begun,
        )

    def _run(self, plan: Plan) -> tuple[tuple[list[int], list[float]], list[ChunkResult]]:
        for sequence in plan.admitted:
            sequence.admitted = self._clock()
            self._runner.reset(sequence.row)
        for move in plan.moves:
            self._runner.move(move.source, move.target)
        drawn: tuple[list[int], list[float]] = [], []
        if plan.decoding:
            drawn = self._runner.decode(
                [sequence.row for sequence in plan.decoding],
                [sequence.last_token for sequence in plan.decoding],
                [sequence.next_draw() for sequence in plan.decoding],
            )
        read = []
        if plan.reading:
            read = self._runner.extend([reading.sequence.next_chunk(reading.size) for reading in plan.reading])
        return drawn, read

    def _take_drawn(self, plan: Plan, tokens: list[int], logprobs: list[float]) -> None:
        for sequence, token, logprob in zip(plan.decoding, tokens, logprobs, strict=True):
            self._take_token(sequence, token, logprob)

    def _take_read(self, plan: Plan, results: list[ChunkResult]) -> None:
        for reading, result in zip(plan.reading, results, strict=True):
            sequence = reading.sequence
            done = sequence.phase is Phase.DECODING
            if done:
                sequence.read = self._clock()
            if isinstance(sequence.request, Score):
                self._take_scores(sequence, result, done=done)
            elif done:
                self._take_token(sequence, result.token, result.logprob)

    def _take_token(self, sequence: Sequence, token: int, logprob: float) -> None:
        assert isinstance(sequence.request, Generate)
        if not math.isfinite(logprob):
            self._end(sequence, "error", error=NOT_A_NUMBER)
            return
        sequence.last_token = token
        sequence.num_generated += 1
        self._tokens.append(Token(sequence.id, token, logprob))
        if token in sequence.request.stop_token_ids:
            self._end(sequence, "eos_token")
        elif sequence.num_generated == sequence.request.max_new_tokens:
            self._end(sequence, "length")

    def _take_scores(self, sequence: Sequence, result: ChunkResult, *, done: bool) -> None:
        assert result.logprobs is not None
        assert result.ranks is not None
        if not np.isfinite(result.logprobs).all():
            self._end(sequence, "error", error=NOT_A_NUMBER)
            return
        logprobs, ranks = result.logprobs.astype("<f4").tobytes(), result.ranks.astype("<i4").tobytes()
        self._scores.append(Scores(sequence.id, logprobs, ranks))
        if done:
            self._end(sequence, "scored")

    def _end(self, sequence: Sequence, finish_reason: str, *, error: str = "") -> None:
        self._scheduler.release(sequence)
        del self._live[sequence.id]
        self._ended.append(Ended(sequence.id, finish_reason, sequence.timings(self._clock()), error))

    def _emit(self, *, num_decoded: int, num_read: int, seconds: float) -> Step:
        step = Step(
            tokens=tuple(self._tokens),
            scores=tuple(self._scores),
            ended=tuple(self._ended),
            num_decoded=num_decoded,
            num_prefilled=num_read,
            seconds=seconds,
            rows_used=self._scheduler.num_used,
            num_waiting=len(self._scheduler.waiting),
        )
        self._tokens, self._scores, self._ended = [], [], []
        assert self._live or not self._scheduler.num_used, "a row is taken, but no sequence lives"
        return step
