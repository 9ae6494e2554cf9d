"""One scored sequence: sends a document to the engine, and turns its scores into outputs. Knows no dialect.

A plain reply and a stream are made from the same outputs, so the two cannot differ.
"""

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from model.scoring import RunningFigures
from server.errors import Cancelled, Draining, RequestTimeout, ServerError
from server.protocol.messages import TOKEN_BYTES, Ended, Extras, Score, Scores
from server.requests.offload import beside_the_loop
from server.requests.results import ScoredToken, ScoreOutput, TextScore, WorkSummary
from server.requests.service import LiveSequence, SequenceMessage, Service
from server.requests.token_list import TokenLister

Send = Callable[[bytes], Awaitable[None]]
Encode = Callable[[ScoreOutput], bytes]
JSON_BYTES = 64  # approximate size of a listed token
FAILURES: dict[str, type[ServerError]] = {"timeout": RequestTimeout, "cancelled": Cancelled, "shutdown": Draining}


@dataclass(frozen=True)
class Document:
    """A context and the texts to score after it, each as if it alone followed the context."""

    context: NDArray[np.int32]  # read but not scored; if empty, the first token of a text has no score
    texts: tuple[NDArray[np.int32], ...]  # each of at least one token

    def message(self, new_id: Callable[[], str], *, extras: Extras, timeout_s: float | None) -> Score:
        """Return the message for the engine: read the context except its last token once, then each text after it."""
        first, *others = self.texts
        return Score(
            id=new_id(),
            tokens=_raw(self.context, first),
            num_shared=max(len(self.context) - 1, 0),
            extras=extras,
            timeout_s=timeout_s,
            forks=tuple((new_id(), _raw(self.context[-1:], other)) for other in others),
        )


@dataclass(frozen=True, kw_only=True)
class ScoringPlan:
    """A validated request to score one sequence."""

    tokens: NDArray[np.int32]  # the text, at least one token
    num_scored: int  # all tokens, or all but the first
    lists_tokens: bool
    extras: Extras


class Scoring:
    """A live scored sequence with the sums over its scored tokens so far."""

    def __init__(self, plan: ScoringPlan, *, live: LiveSequence, service: Service) -> None:
        self.plan = plan
        self.live = live
        self._service = service
        self._tally = RunningFigures(service.tokenizer)
        self._is_greedy = True
        self._lister = TokenLister(service.tokenizer, num_tokens=len(plan.tokens), extras=plan.extras)
        self._entries: list[ScoredToken] = []  # listed tokens that no output has yet
        self._has_begun = False
        self._is_counted = False

    @property
    def num_done(self) -> int:
        """Tokens scored so far."""
        return self._tally.score.num_tokens

    async def run(self, send: Send, *, encode: Encode) -> None:
        """Send every output; the last output has the score. Outputs that are ready together share one call of `send`.

        A cancellation, or an exception of `send`, frees the row.

        Args:
            send: writes bytes to the client.
            encode: returns the bytes of an output; called in a thread if the output is long.

        Raises:
            RequestTimeout, Cancelled, Draining: the text was not scored to its end.
            EngineDown, InternalError: the engine gave up the sequence.
        """
        with self._alive():
            async for outputs in self._outputs():
                await send(b"".join(await _encoded(outputs, encode)))

    async def fold(self, *, encode: Encode) -> tuple[TextScore, list[bytes]]:
        """Run to the end and return the score and the encoded outputs without empty ones. Raises as `run` does.

        It keeps bytes, because the objects of a long list of tokens would take several times the memory.
        """
        parts: list[bytes] = []
        score = None
        with self._alive():
            async for outputs in self._outputs():
                parts += filter(None, await _encoded(outputs, encode))
                score = outputs[-1].score
        assert score is not None
        return score, parts

    async def tokens(self) -> list[ScoredToken]:
        """Run to the end and return the list of tokens. The plan must list tokens. Raises as `run` does."""
        entries: list[ScoredToken] = []
        with self._alive():
            async for outputs in self._outputs():
                for output in outputs:
                    entries += output.tokens
        return entries

    def close(self) -> None:
        """Free the row of a sequence that nobody awaited."""
        if not self._has_begun:
            with self._alive():
                pass

    @contextmanager
    def _alive(self) -> Iterator[None]:
        """Hold the row until the end, and count the ending of any kind."""
        self._has_begun = True
        try:
            with self.live:
                yield
        finally:
            if not self._is_counted:
                self._service.metrics.count_abandoned("error" if self.live.ended else "cancelled")

    async def _outputs(self) -> AsyncIterator[list[ScoreOutput]]:
        """Yield an output for each message. The last output is held until the ending comes, and has the score."""
        if self.plan.lists_tokens and self.plan.num_scored < len(self.plan.tokens):
            self._entries.append(self._lister.unscored(int(self.plan.tokens[0])))
        held: list[ScoreOutput] = []
        while self.live.ended is None:
            outputs = held + await self._take_all(await self.live.take())
            held = [outputs.pop()] if outputs and outputs[-1].num_done == self.plan.num_scored else []
            if outputs:
                yield outputs
        score = self._finish(self.live.ended)
        yield [replace(held[0] if held else self._output(), score=score)]

    async def _take_all(self, messages: Sequence[SequenceMessage]) -> list[ScoreOutput]:
        scores = [message for message in messages if isinstance(message, Scores)]
        size = sum(len(chunk.logprobs) + len(chunk.top_ids) + len(chunk.memory_shares) for chunk in scores)
        return await beside_the_loop(lambda: [self._take(chunk) for chunk in scores], size=size)

    def _take(self, scores: Scores) -> ScoreOutput:
        start = len(self.plan.tokens) - self.plan.num_scored + self.num_done
        tokens = self.plan.tokens[start : start + len(scores.logprobs) // TOKEN_BYTES]
        self._tally.add(tokens.tolist(), np.frombuffer(scores.logprobs, dtype="<f4").tolist())
        self._is_greedy &= not np.frombuffer(scores.ranks, dtype="<i4").any()
        if self.plan.lists_tokens:
            self._entries += self._lister.scored(tokens, scores)
        return self._output()

    def _output(self) -> ScoreOutput:
        entries, self._entries = self._entries, []
        return ScoreOutput(self.num_done, self.plan.num_scored, entries)

    def _finish(self, ended: Ended) -> TextScore:
        self._is_counted = True
        self._service.metrics.count_finished(
            ended.finish_reason,
            seconds=time.perf_counter() - self.live.submitted,
            queue_s=ended.timings.queue_ms / 1000,
            scored_tokens=self.num_done,
        )
        if failure := FAILURES.get(ended.finish_reason):
            raise failure(f"{ended.finish_reason}: {self.num_done} of {self.plan.num_scored} tokens had been scored")
        assert ended.finish_reason == "scored"
        assert self.num_done == self.plan.num_scored
        return TextScore(self._tally.score, self._is_greedy)


def summarise(scorings: Sequence[Scoring], *, user: str | None = None) -> WorkSummary:
    """Return counts and times of all scorings for the log, and no text."""
    endings = [scoring.live.ended for scoring in scorings]
    return WorkSummary(
        sequences=len(scorings),
        scored_tokens=sum(scoring.num_done for scoring in scorings),
        finish_reasons=["unfinished" if ended is None else ended.finish_reason for ended in endings],
        timings=[ended.timings for ended in endings if ended is not None],
        user=user,
    )


def _raw(context: NDArray[np.int32], text: NDArray[np.int32]) -> bytes:
    return np.concatenate([context, text]).astype("<i4", copy=False).tobytes()


async def _encoded(outputs: Sequence[ScoreOutput], encode: Encode) -> list[bytes]:
    num_tokens = sum(len(output.tokens) for output in outputs)
    return await beside_the_loop(lambda: [encode(output) for output in outputs], size=JSON_BYTES * num_tokens)
