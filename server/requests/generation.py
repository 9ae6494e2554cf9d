"""One generated sequence: turns the engine's tokens into outputs, text and counts. Knows no HTTP and no dialect.

A plain reply and a stream are made from the same outputs, so the two cannot differ.
"""

import math
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from msgspec.structs import replace

from server.errors import RequestTimeout
from server.protocol.messages import Ended, FinishReason, Scores, Token
from server.requests.coroutine import Rest, begin
from server.requests.offload import beside_the_loop
from server.requests.output_text import OutputText
from server.requests.plan import GenerationPlan
from server.requests.prompt_scores import PromptScores
from server.requests.results import Ending, Generated, Output, OutputToken
from server.requests.service import LiveSequence, Service

Send = Callable[[bytes], Coroutine[Any, Any, None]]
Encode = Callable[[Output], bytes]
JSON_BYTES = 256  # approximate size of a listed token


class Generation:
    """A live generated sequence with its tokens, text and sums so far."""

    def __init__(
        self,
        plan: GenerationPlan,
        *,
        index: int,
        prompt: PromptScores | None,
        live: LiveSequence,
        service: Service,
        is_alone: bool,
    ) -> None:
        """Make the generation of one live sequence.

        Args:
            index: number of the sequence among those of the same input, from 0.
            prompt: the prompt's scores to report first, if the client asks for them.
            is_alone: whether the request has no other sequence; then it fails if its time runs out before any token.
        """
        self.plan = plan
        self.ending: Ending | None = None
        self.num_tokens = 0
        self.logprob_sum = 0.0
        self._index = index
        self._is_alone = is_alone
        self._prompt = prompt  # None once reported
        self._live = live
        self._service = service
        self._eos_id = service.tokenizer.eos_id
        self._end_ids = frozenset(plan.sampling.end_ids)
        self._end_token: int | None = None
        self._text = OutputText(service.tokenizer, stops=plan.stops, num_free=plan.sampling.min_new_tokens)
        self._pieces: list[str] = []
        self._is_closed = False

    @property
    def mean_logprob(self) -> float:
        """Mean log-probability of a token in nats; minus infinity without tokens."""
        return self.logprob_sum / self.num_tokens if self.num_tokens else -math.inf

    async def run(self, send: Send, *, encode: Encode) -> None:
        """Send every output; the last output has the ending. Outputs that are ready together share one call of `send`.

        A cancellation, or an exception of `send`, frees the row. `close` frees it if nobody ever awaits this method.

        Args:
            send: writes bytes to the client.
            encode: returns the bytes of an output; called once for each output, in order.

        Raises:
            RequestTimeout: the time limit passed before the first token.
            EngineDown, InternalError: the engine gave up the sequence.
        """
        try:
            while self.ending is None:
                if data := await _encoded(await self._next_outputs(), encode):
                    await send(data)
                if self.ending is None and not self.plan.stops and self._prompt is None:
                    await self._run_ahead(send, encode)
        finally:
            self.close()

    async def _run_ahead(self, send: Send, encode: Encode) -> None:
        """Send each token as soon as it arrives, until a token ends the sequence or the client reads too slowly."""
        rest: Rest | None = None

        def take(message: Token) -> bool:
            nonlocal rest
            if message.token in self._end_ids or self.num_tokens + 1 == self.plan.max_new_tokens:
                return False
            rest = begin(send(encode(self._output(message))))
            if rest is not None:
                self._live.wake()
            return True

        await self._live.pour(take)
        if rest is not None:
            await rest

    async def fold(self, *, keep_tokens: bool) -> Generated:
        """Run to the end and return the whole sequence, with its tokens if `keep_tokens`. Raises as `run` does."""
        outputs: list[Output] = []
        prompt = None
        try:
            while self.ending is None:
                outputs += await self._next_outputs()
                if outputs and outputs[0].prompt is not None:
                    prompt = outputs.pop(0).prompt
                if not keep_tokens:
                    outputs.clear()  # the ending has the whole text
        finally:
            self.close()
        tokens = [output.token for output in outputs if output.token is not None]
        tops = [output.top for output in outputs if output.top is not None]
        assert self.ending is not None
        return Generated(self.ending, tokens, tops, prompt)

    def close(self) -> None:
        """Free the row and count the ending. A second call does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        self._service.leave(self._live)
        if self.ending is None:
            reason = self._live.ended.finish_reason if self._live.ended else "cancelled"
            self._service.metrics.count_abandoned(reason if reason in ("error", "timeout") else "cancelled")

    async def _next_outputs(self) -> list[Output]:
        """Wait for messages of the engine and return their outputs. Sets `ending` with the last output."""
        messages = await self._live.take()
        now, num_before = time.perf_counter(), self.num_tokens
        outputs: list[Output] = []
        for message in messages:
            if isinstance(message, Scores):
                assert self._prompt is not None
                self._prompt.add(message)
                continue
            if self._prompt is not None:
                outputs.append(await self._report_prompt(self._prompt))
            if isinstance(message, Ended):  # the sequence ended between two tokens: cancelled, timeout, shutdown
                outputs.append(self._last_output(message, last=None))
                break
            output = self._output(message)
            if self._is_complete:
                outputs.append(self._last_output(await self._ended(), last=output))
                break
            outputs.append(output)
        if self.num_tokens and not num_before:
            self._service.metrics.observe_first_token(now - self._live.submitted)
        return outputs

    async def _report_prompt(self, prompt: PromptScores) -> Output:
        """Return the prompt's output. The first sequence of an input receives all scores and completes them."""
        if self._index == 0:
            await prompt.complete()
        self._prompt = None
        return Output(0, prompt=await prompt.tokens())

    @property
    def _is_complete(self) -> bool:
        """Whether the latest token ends the sequence."""
        return (
            self._end_token is not None
            or self._text.matched_stop is not None
            or self.num_tokens == self.plan.max_new_tokens
        )

    async def _ended(self) -> Ended:
        if self._text.matched_stop is not None and self._live.ended is None:
            self._live.cancel()
        return await self._live.ending()

    def _output(self, message: Token) -> Output:
        """Return the output of a new token. This is the hot path: it runs once for each token."""
        token, logprob = message.token, message.logprob
        self.num_tokens += 1
        self.logprob_sum += logprob
        if token in self._end_ids:
            self._end_token, text = token, ""
        else:
            text = self._text.add(token)
            self._pieces.append(text)
        shown = OutputToken(token, text, logprob, token == self._eos_id)
        return Output(self.num_tokens, shown, self._top(message) if message.top else None)

    def _top(self, message: Token) -> list[OutputToken]:
        text, eos = self._service.tokenizer.token_text, self._eos_id
        return [OutputToken(token, text(token), logprob, token == eos) for token, logprob in message.top]

    def _last_output(self, ended: Ended, *, last: Output | None) -> Output:
        """Return the output with the ending. `last`: the last token's output, if that output carries the ending.

        Raises RequestTimeout if the time limit passed before the first token of the only sequence.
        """
        if ended.finish_reason == "timeout" and not self.num_tokens and self._is_alone:
            raise RequestTimeout(f"no token was generated within the {self.plan.timeout_s} s of timeout_s")
        rest = self._text.finish()
        self._pieces.append(rest)
        output = last or Output(self.num_tokens)
        if rest and output.token is not None:
            output = replace(output, token=replace(output.token, text=output.token.text + rest))
        self.ending = self._finish(ended)
        return replace(output, ending=self.ending)

    def _finish(self, ended: Ended) -> Ending:
        finish_reason, matched = self._reason(ended)
        num_prompt_tokens = len(self.plan.tokens)
        self._service.metrics.count_finished(
            finish_reason,
            seconds=time.perf_counter() - self._live.submitted,
            queue_s=ended.timings.queue_ms / 1000,
            prompt_tokens=0 if self._index else num_prompt_tokens,  # all sequences of an input share one reading
        )
        return Ending(
            text="".join(self._pieces),
            finish_reason=finish_reason,
            num_tokens=self.num_tokens,
            num_prompt_tokens=num_prompt_tokens,
            seed=self.plan.seed(self._index),
            matched_stop=matched,
            logprob_sum=self.logprob_sum,
            timings=ended.timings,
            fingerprint=self._service.fingerprint,
        )

    def _reason(self, ended: Ended) -> tuple[FinishReason, str | int | None]:
        if self._text.matched_stop is not None:
            return "stop_sequence", self._text.matched_stop
        if self._end_token is None:
            assert ended.finish_reason != "scored"
            assert ended.finish_reason != "error"  # `take` has raised
            return ended.finish_reason, None
        if self._end_token in self.plan.stop_token_ids:
            return "stop_sequence", self._end_token
        return "eos_token", None


async def _encoded(outputs: Sequence[Output], encode: Encode) -> bytes:
    """Return the bytes of all outputs, made in a thread if they list a long prompt."""
    size = sum(JSON_BYTES * len(output.prompt) for output in outputs if output.prompt is not None)
    return await beside_the_loop(lambda: b"".join(map(encode, outputs)), size=size)
