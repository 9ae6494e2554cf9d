"""One generated sequence: the engine's tokens become the events a client sees. Knows no HTTP.

The plain reply is folded from the same events as the stream, so the two cannot differ.
"""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec
import numpy as np
from msgspec import UNSET, UnsetType
from numpy.typing import NDArray

from server.messages import Ended, Generate, Sampling, Token
from server.replies import Details, FinishReason, GenerateEvent, GenerateReply, TokenInfo
from server.service import LiveSequence, Service
from server.text import OutputText, StopStrings

Emit = Callable[[GenerateEvent], Awaitable[None]]


@dataclass(frozen=True, kw_only=True)
class GenerationPlan:
    """What is asked of one sequence, validated and defaulted."""

    tokens: NDArray[np.int32]  # the prompt, at least one
    echo: str  # what generated_text begins with
    sampling: Sampling
    max_new_tokens: int
    stops: StopStrings
    stop_token_ids: frozenset[int]
    ignore_eos: bool
    sequence: int | UnsetType = UNSET  # which input of a list

    def message(self, id: str, *, eos_id: int | None) -> Generate:
        """What the engine is told."""
        ends = self.stop_token_ids if self.ignore_eos or eos_id is None else self.stop_token_ids | {eos_id}
        return Generate(
            id=id,
            tokens=self.tokens.astype("<i4").tobytes(),
            sampling=self.sampling,
            max_new_tokens=self.max_new_tokens,
            stop_token_ids=tuple(sorted(ends)),
        )


def start_generations(plans: list[GenerationPlan], *, service: Service) -> list["Generation"]:
    """Admit all sequences of a request or none.

    Raises:
        Starting, Draining, EngineDown, QueueFull: none was admitted.
    """
    messages = [plan.message(service.new_id(), eos_id=service.tokenizer.eos_id) for plan in plans]
    live = service.submit(messages)
    return [Generation(plan, live=one, service=service) for plan, one in zip(plans, live, strict=True)]


class Generation:
    """A live sequence and all that is known of it so far."""

    def __init__(self, plan: GenerationPlan, *, live: LiveSequence, service: Service) -> None:
        self.plan = plan
        self.details: Details | None = None
        self.num_tokens = 0
        self._live = live
        self._service = service
        self._text = OutputText(service.tokenizer, stops=plan.stops)
        self._pieces = [plan.echo]
        self._logprob_sum = 0.0
        self._end_token: int | None = None
        self._last_token_at = live.submitted

    async def run(self, emit: Emit) -> None:
        """Pass every event to `emit`, the last one with the whole text and the details.

        Leaving early, by a cancellation or because `emit` raises, frees the row.

        Raises:
            EngineDown, InternalError: the engine gave the sequence up.
        """
        with self._live as live:
            try:
                async for message in live:
                    if isinstance(message, Ended):  # an ending that no token foretold: cancelled, shutdown
                        await emit(self._last_event(message, token=None))
                        return
                    assert isinstance(message, Token)
                    token = self._take(message)
                    if not self._is_complete:
                        await emit(GenerateEvent(self.num_tokens, token, sequence=self.plan.sequence))
                        continue
                    if self._text.matched_stop is not None:
                        live.cancel()
                    await emit(self._last_event(await live.ending(), token=token))
                    return
            finally:
                if self.details is None:
                    self._service.metrics.count_abandoned("error" if live.ended else "cancelled")

    async def fold(self, *, details: bool) -> GenerateReply:
        """Run to the end and answer plainly. Raises as `run` does."""
        events: list[GenerateEvent] = []

        async def keep(event: GenerateEvent) -> None:
            events.append(event)

        await self.run(keep)
        last = events[-1]
        assert last.generated_text is not None
        assert last.details is not None
        if not details:
            return GenerateReply(last.generated_text)
        tokens = [event.token for event in events if event.token is not None]
        return GenerateReply(last.generated_text, msgspec.structs.replace(last.details, tokens=tokens))

    @property
    def _is_complete(self) -> bool:
        """Whether the sequence is over with the token just taken."""
        return (
            self._end_token is not None
            or self._text.matched_stop is not None
            or self.num_tokens == self.plan.max_new_tokens
        )

    def _take(self, message: Token) -> TokenInfo:
        now = time.perf_counter()
        metrics = self._service.metrics
        (metrics.observe_next_token if self.num_tokens else metrics.observe_first_token)(now - self._last_token_at)
        self._last_token_at = now
        self.num_tokens += 1
        self._logprob_sum += message.logprob
        is_eos = message.token == self._service.tokenizer.eos_id
        if (is_eos and not self.plan.ignore_eos) or message.token in self.plan.stop_token_ids:
            self._end_token = message.token
            text = ""
        else:
            text = self._text.add(message.token)
        self._pieces.append(text)
        return TokenInfo(message.token, text, message.logprob, is_eos)

    def _last_event(self, ended: Ended, *, token: TokenInfo | None) -> GenerateEvent:
        rest = self._text.finish()
        self._pieces.append(rest)
        if token is not None and rest:
            token = msgspec.structs.replace(token, text=token.text + rest)
        finish_reason, matched = self._reason(ended)
        self.details = Details(
            finish_reason=finish_reason,
            generated_tokens=self.num_tokens,
            prompt_tokens=len(self.plan.tokens),
            seed=self.plan.sampling.seed,
            matched_stop=matched,
            logprob_sum=self._logprob_sum,
            timings=ended.timings,
            fingerprint=self._service.fingerprint,
        )
        self._service.metrics.count_finished(
            finish_reason,
            seconds=time.perf_counter() - self._live.submitted,
            queue_s=ended.timings.queue_ms / 1000,
            prompt_tokens=len(self.plan.tokens),
        )
        return GenerateEvent(self.num_tokens, token, "".join(self._pieces), self.details, sequence=self.plan.sequence)

    def _reason(self, ended: Ended) -> tuple[FinishReason, str | int | None]:
        if self._text.matched_stop is not None:
            return "stop_sequence", self._text.matched_stop
        if self._end_token is None:
            return msgspec.convert(ended.finish_reason, FinishReason), None
        if self._end_token == self._service.tokenizer.eos_id and not self.plan.ignore_eos:
            return "eos_token", None
        return "stop_sequence", self._end_token
