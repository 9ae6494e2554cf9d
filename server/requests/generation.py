"""Generated sequences: the engine's tokens become the events a client sees. Knows no HTTP.

The plain reply is folded from the same events as the stream, so the two cannot differ.
"""

import math
import time
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from server.dialects.generate.replies import Details, FinishReason, GenerateEvent, GenerateReply, PromptToken, TokenInfo
from server.errors import RequestTimeout
from server.protocol.json import encode_event
from server.protocol.messages import Ended, Scores, Token
from server.requests.coroutine import Rest, begin
from server.requests.output_text import OutputText
from server.requests.plan import GenerationPlan
from server.requests.prompt_scores import PromptScores
from server.requests.service import LiveSequence, Service

Send = Callable[[bytes], Coroutine[Any, Any, None]]
Encode = Callable[[GenerateEvent], bytes]


class Generation:
    """A live sequence and all that is known of it so far."""

    def __init__(
        self,
        plan: GenerationPlan,
        *,
        place: int,
        prompt: PromptScores,
        live: LiveSequence,
        service: Service,
        sequence: int | UnsetType,
    ) -> None:
        """place: among the sequences of one input. sequence: the number its events carry."""
        self.plan = plan
        self.details: Details | None = None
        self.num_tokens = 0
        self.logprob_sum = 0.0
        self._place = place
        self._prompt = prompt
        self._reports_prompt = plan.prompt_scores and place == 0  # the engine tells this one, and it tells the others
        self._live = live
        self._service = service
        self._sequence = sequence
        self._tells_logprobs = plan.logprobs
        self._eos_id = service.tokenizer.eos_id
        self._end_ids = frozenset(plan.sampling.end_ids)
        self._end_token: int | None = None
        self._text = OutputText(service.tokenizer, stops=plan.stops, num_free=plan.sampling.min_new_tokens)
        self._pieces = [plan.echo]
        self._is_plain = not plan.stops and not plan.prompt_scores  # no text can end it, and nothing comes before it
        self._is_closed = False

    @property
    def mean_logprob(self) -> float:
        """Per token; the worst of all where there is none."""
        return self.logprob_sum / self.num_tokens if self.num_tokens else -math.inf

    async def run(self, send: Send, *, encode: Encode = encode_event) -> None:
        """Send every event, framed; the last one has the whole text and the details. One call for all there is.

        encode: puts an event as it shall be sent; called for each one once, in order.

        Leaving early, by a cancellation or because `send` raises, frees the row. So does `close` where this was never
        awaited.

        Raises:
            RequestTimeout: time was up before the first token.
            EngineDown, InternalError: the engine gave the sequence up.
        """
        try:
            while self.details is None:
                if events := await self._next_events():
                    await send(b"".join(map(encode, events)))
                if self.details is None and self._is_plain:
                    await self._run_ahead(send, encode)
        finally:
            self.close()

    async def _run_ahead(self, send: Send, encode: Encode) -> None:
        """Send tokens in the turn in which they come, as long as they end nothing and the client keeps up."""
        rest: Rest | None = None

        def take(message: Token) -> bool:
            nonlocal rest
            if message.token in self._end_ids or self.num_tokens + 1 == self.plan.max_new_tokens:
                return False
            rest = begin(send(encode(self._event(message))))
            if rest is not None:
                self._live.wake()
            return True

        await self._live.pour(take)
        if rest is not None:
            await rest

    async def fold(self, *, details: bool) -> GenerateReply:
        """Run to the end and answer plainly. Raises as `run` does."""
        events: list[GenerateEvent] = []
        try:
            while self.details is None:
                events += await self._next_events()
                if not details:
                    del events[:-1]  # the text is all in the last one
        finally:
            self.close()
        last = events[-1]
        assert last.generated_text is not None
        assert last.details is not None
        if not details:
            return GenerateReply(last.generated_text)
        tops = [event.top_tokens for event in events if event.token and event.top_tokens is not UNSET]
        whole = replace(
            last.details,
            prefill=last.details.prefill or [],
            tokens=[event.token for event in events if event.token],
            top_tokens=tops if self.plan.sampling.num_top else UNSET,
        )
        return GenerateReply(last.generated_text, whole)

    def close(self) -> None:
        """Free the row and count the ending, whatever it was. Once is enough, twice does no harm."""
        if self._is_closed:
            return
        self._is_closed = True
        self._service.leave(self._live)
        if self.details is None:
            reason = self._live.ended.finish_reason if self._live.ended else "cancelled"
            self._service.metrics.count_abandoned(reason if reason in ("error", "timeout") else "cancelled")

    async def _next_events(self) -> list[GenerateEvent]:
        """The events of all that the engine has said meanwhile; in the end the last one, and `details` is set."""
        messages = await self._live.take()
        now, num_before = time.perf_counter(), self.num_tokens
        events: list[GenerateEvent] = []
        for message in messages:
            if isinstance(message, Scores):
                if self._reports_prompt:
                    self._prompt.add(message)
                continue
            if self._reports_prompt:
                await self._prompt.complete()
                self._reports_prompt = False
            if isinstance(message, Ended):  # one that no token foretold: cancelled, timeout, shutdown
                events.append(await self._last_event(message, last=None))
                break
            event = self._event(message)
            if self._is_complete:
                events.append(await self._last_event(await self._ending(), last=event))
                break
            events.append(event)
        if self.num_tokens and not num_before:
            self._service.metrics.observe_first_token(now - self._live.submitted)
        return events

    @property
    def _is_complete(self) -> bool:
        """Whether the sequence is over with the token just taken."""
        return (
            self._end_token is not None
            or self._text.matched_stop is not None
            or self.num_tokens == self.plan.max_new_tokens
        )

    async def _ending(self) -> Ended:
        if self._text.matched_stop is not None and self._live.ended is None:
            self._live.cancel()
        return await self._live.ending()

    def _event(self, message: Token) -> GenerateEvent:
        token, logprob = message.token, message.logprob
        self.num_tokens += 1
        self.logprob_sum += logprob
        if token in self._end_ids:
            self._end_token, text = token, ""
        else:
            text = self._text.add(token)
            self._pieces.append(text)
        info = TokenInfo(token, text, logprob if self._tells_logprobs else None, token == self._eos_id)
        return GenerateEvent(
            self.num_tokens, info, None, None, self._sequence, self._top(message) if message.top else UNSET
        )

    def _top(self, message: Token) -> list[TokenInfo]:
        text, eos = self._service.tokenizer.token_text, self._eos_id
        return [TokenInfo(token, text(token), logprob, token == eos) for token, logprob in message.top]

    async def _last_event(self, ended: Ended, *, last: GenerateEvent | None) -> GenerateEvent:
        """That of the ending. `last`: the event of the last token, if the ending is told with it."""
        alone = self._sequence is UNSET  # of a list, the others may have something to tell
        if ended.finish_reason == "timeout" and not self.num_tokens and alone:
            raise RequestTimeout(f"no token was generated within the {self.plan.timeout_s} s of timeout_s")
        rest = self._text.finish()
        self._pieces.append(rest)
        event = last or GenerateEvent(self.num_tokens, None, sequence=self._sequence)
        if rest and event.token is not None:
            event = replace(event, token=replace(event.token, text=event.token.text + rest))
        prefill = await self._prompt.tokens() if self.plan.prompt_scores else UNSET
        self.details = self._finish(ended, prefill=prefill)
        return replace(event, generated_text="".join(self._pieces), details=self.details)

    def _finish(self, ended: Ended, *, prefill: list[PromptToken] | UnsetType) -> Details:
        finish_reason, matched = self._reason(ended)
        prompt_tokens = len(self.plan.tokens)
        self._service.metrics.count_finished(
            finish_reason,
            seconds=time.perf_counter() - self._live.submitted,
            queue_s=ended.timings.queue_ms / 1000,
            prompt_tokens=0 if self._place else prompt_tokens,  # read once for all sequences of an input
        )
        return Details(
            finish_reason=finish_reason,
            generated_tokens=self.num_tokens,
            prompt_tokens=prompt_tokens,
            seed=self.plan.seed(self._place),
            matched_stop=matched,
            logprob_sum=self.logprob_sum,
            timings=ended.timings,
            fingerprint=self._service.fingerprint,
            prefill=prefill,
        )

    def _reason(self, ended: Ended) -> tuple[FinishReason, str | int | None]:
        if self._text.matched_stop is not None:
            return "stop_sequence", self._text.matched_stop
        if self._end_token is None:
            return msgspec.convert(ended.finish_reason, FinishReason), None
        if self._end_token in self.plan.stop_token_ids:
            return "stop_sequence", self._end_token
        return "eos_token", None
