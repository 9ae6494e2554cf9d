"""Scored sequences: what the engine is told of a document, and how its scores become events. Knows no HTTP.

The plain reply is folded from the same events as the stream, so the two cannot differ.
"""

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import msgspec
import numpy as np
from msgspec import UNSET, UnsetType
from numpy.typing import NDArray

from server.dialects.score.replies import ScoredToken, ScoreEvent, ScoreReply
from server.dialects.score.schema import Unit
from server.errors import Cancelled, Draining, RequestTimeout
from server.protocol.json import encode_event
from server.protocol.messages import Ended, Extras, Score, Scores
from server.requests.offload import beside_the_loop
from server.requests.service import LiveSequence, Said, Service
from server.requests.token_list import Tally, TokenLister

Send = Callable[[bytes], Awaitable[None]]
TOKEN_BYTES = 64  # of JSON, about
FAILURES = {"timeout": RequestTimeout, "cancelled": Cancelled, "shutdown": Draining}


@dataclass(frozen=True)
class Document:
    """Texts to score, each as if it alone followed the context."""

    context: NDArray[np.int32]  # only read; where it is empty, the first token of a text has nothing before it
    texts: tuple[NDArray[np.int32], ...]  # each of at least one token

    def message(self, new_id: Callable[[], str], *, extras: Extras, timeout_s: float | None) -> Score:
        """What the engine is told: to read the context but for its last token once, and to go on from there."""
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
    """What is asked of one sequence, validated."""

    tokens: NDArray[np.int32]  # the text, at least one
    num_scored: int  # all of them, or all but the first
    unit: Unit
    lists_tokens: bool
    extras: Extras
    sequence: int | UnsetType = UNSET  # which reply of a list


class Scoring:
    """A live sequence and the sums over what was scored of it so far."""

    def __init__(self, plan: ScoringPlan, *, live: LiveSequence, service: Service) -> None:
        self.plan = plan
        self.live = live
        self._service = service
        self._tally = Tally()
        self._lister = TokenLister(service.tokenizer, num_tokens=len(plan.tokens), extras=plan.extras)
        self._entries: list[ScoredToken] = []  # of the list of tokens, that are in no event yet
        self._has_begun = False
        self._is_counted = False

    @property
    def num_done(self) -> int:
        """Tokens scored so far."""
        return self._tally.num_tokens

    async def run(self, send: Send) -> None:
        """Send every event, framed; the last one has the reply. One call for all there is.

        Leaving early, by a cancellation or because `send` raises, frees the row.

        Raises:
            RequestTimeout, Cancelled, Draining: the text was not scored to its end.
            EngineDown, InternalError: the engine gave the sequence up.
        """
        with self._alive():
            async for events in self._events():
                await send(b"".join(await _encoded(events, encode=encode_event)))

    async def fold(self) -> bytes:
        """Run to the end; the plain reply as JSON. Raises as `run` does."""
        entries: list[bytes] = []  # as JSON, for the objects of a long list would take several times the memory
        reply = None
        with self._alive():
            async for events in self._events():
                entries += filter(None, await _encoded(events, encode=_entries))
                reply = events[-1].reply
        assert reply is not None
        head = msgspec.json.encode(reply)
        return b"".join((head[:-1], b',"tokens":[', b",".join(entries), b"]}")) if self.plan.lists_tokens else head

    async def tokens(self) -> list[ScoredToken]:
        """Run to the end; the list of tokens, which the plan must ask for. Raises as `run` does."""
        entries: list[ScoredToken] = []
        with self._alive():
            async for events in self._events():
                entries += chain.from_iterable(event.tokens or () for event in events)
        return entries

    def close(self) -> None:
        """Free the row of a sequence that nobody came to wait for."""
        if not self._has_begun:
            with self._alive():
                pass

    @contextmanager
    def _alive(self) -> Iterator[None]:
        """Have the row until the end, and count the ending, whatever it is."""
        self._has_begun = True
        try:
            with self.live:
                yield
        finally:
            if not self._is_counted:
                self._service.metrics.count_abandoned("error" if self.live.ended else "cancelled")

    async def _events(self) -> AsyncIterator[list[ScoreEvent]]:
        """Turn by turn one event for each message; that of the last one waits for the ending, and has the reply."""
        if self.plan.lists_tokens and self.plan.num_scored < len(self.plan.tokens):
            self._entries.append(self._lister.unscored(int(self.plan.tokens[0])))
        held: list[ScoreEvent] = []
        while self.live.ended is None:
            events = held + await self._take_all(await self.live.take())
            held = [events.pop()] if events and events[-1].index == self.plan.num_scored else []
            if events:
                yield events
        reply = self._finish(self.live.ended)
        last = held[0] if held else self._event()
        yield [msgspec.structs.replace(last, reply=reply)]

    async def _take_all(self, messages: Sequence[Said]) -> list[ScoreEvent]:
        scores = [message for message in messages if isinstance(message, Scores)]
        size = sum(len(one.logprobs) + len(one.top_ids) + len(one.memory_shares) for one in scores)
        return await beside_the_loop(lambda: [self._take(one) for one in scores], size=size)

    def _take(self, scores: Scores) -> ScoreEvent:
        start = len(self.plan.tokens) - self.plan.num_scored + self.num_done
        tokens = self.plan.tokens[start : start + len(scores.logprobs) // 4]
        text = b"".join(map(self._service.tokenizer.token_bytes, tokens.tolist()))
        self._tally.add(text, scores)
        if self.plan.lists_tokens:
            self._entries += self._lister.scored(tokens, scores)
        return self._event()

    def _event(self) -> ScoreEvent:
        entries, self._entries = self._entries, []
        tokens = entries if self.plan.lists_tokens else UNSET
        return ScoreEvent(self.num_done, self.plan.num_scored, sequence=self.plan.sequence, tokens=tokens)

    def _finish(self, ended: Ended) -> ScoreReply:
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
        return self._tally.reply(self.plan.unit)


def _raw(context: NDArray[np.int32], text: NDArray[np.int32]) -> bytes:
    return np.concatenate([context, text]).astype("<i4", copy=False).tobytes()


async def _encoded(events: Sequence[ScoreEvent], *, encode: Callable[[ScoreEvent], bytes]) -> list[bytes]:
    num_tokens = sum(len(event.tokens or ()) for event in events)
    return await beside_the_loop(lambda: [encode(event) for event in events], size=TOKEN_BYTES * num_tokens)


def _entries(event: ScoreEvent) -> bytes:
    """The inside of its list of tokens."""
    return msgspec.json.encode(event.tokens)[1:-1] if event.tokens else b""
