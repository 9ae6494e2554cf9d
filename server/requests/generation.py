"""One generated sequence: the engine's tokens become outputs, text and counts. Knows no HTTP and no dialect.

A plain reply is folded from the same outputs as a stream, so the two cannot differ.
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
JSON_BYTES = 256  # of a listed token, about


class Generation:
    """A live sequence and all that is known of it so far."""

    def __init__(
        self,
        plan: GenerationPlan,
        *,
        place: int,
        prompt: PromptScores | None,
        live: LiveSequence,
        service: Service,
        is_alone: bool,
    ) -> None:
        """Make the generation of one live sequence.

        Args:
            place: among the sequences of one input.
            prompt: the scores to report first, if they are asked for.
            is_alone: whether the request has no other sequence, so that a deadline without any token is its failure.
        """
        self.plan = plan
        self.ending: Ending | None = None
        self.num_tokens = 0
        self.logprob_sum = 0.0
        self._place = place
        self._is_alone = is_alone
        self._prompt = prompt  # None once it was reported
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
        """Per token; the worst of all where there is none."""
        return self.logprob_sum / self.num_tokens if self.num_tokens else -math.inf

    async def run(self, send: Send, *, encode: Encode) -> None:
        """Send every output; the last one has the ending. One call of `send` for all outputs that are there.

        Leaving early, by a cancellation or because `send` raises, frees the row. So does `close` where this was never
        awaited.

        Args:
            encode: gives the bytes of an output; called for each one once, in order.

        Raises:
            RequestTimeout: time was up before the first token.
            EngineDown, InternalError: the engine gave the sequence up.
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
        """Send tokens in the turn in which they come, as long as they end nothing and the client keeps up."""
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
        """Run to the end; the sequence as a whole, its tokens only if they are kept. Raises as `run` does."""
        outputs: list[Output] = []
        prompt = None
        try:
            while self.ending is None:
                outputs += await self._next_outputs()
                if outputs and outputs[0].prompt is not None:
                    prompt = outputs.pop(0).prompt
                if not keep_tokens:
                    outputs.clear()  # the text is all in the ending
        finally:
            self.close()
        tokens = [output.token for output in outputs if output.token is not None]
        tops = [output.top for output in outputs if output.top is not None]
        assert self.ending is not None
        return Generated(self.ending, tokens, tops, prompt)

    def close(self) -> None:
        """Free the row and count the ending, whatever it was. Once is enough, twice does no harm."""
        if self._is_closed:
            return
        self._is_closed = True
        self._service.leave(self._live)
        if self.ending is None:
            reason = self._live.ended.finish_reason if self._live.ended else "cancelled"
            self._service.metrics.count_abandoned(reason if reason in ("error", "timeout") else "cancelled")

    async def _next_outputs(self) -> list[Output]:
        """The outputs of all that the engine has said meanwhile; in the end the last one, and `ending` is set."""
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
            if isinstance(message, Ended):  # an ending that no token foretold: cancelled, timeout, shutdown
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
        """The prompt's output: the first sequence of an input has heard its scores, and completes them for all."""
        if self._place == 0:
            await prompt.complete()
        self._prompt = None
        return Output(0, prompt=await prompt.tokens())

    @property
    def _is_complete(self) -> bool:
        """Whether the sequence is over with the token just taken."""
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
        """The hot path: once for each token."""
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
        """The output with the ending. `last`: the output of the last token, if the ending is told with it.

        Raises RequestTimeout where time was up before the first token of the only sequence.
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
            prompt_tokens=0 if self._place else num_prompt_tokens,  # read once for all sequences of an input
        )
        return Ending(
            text="".join(self._pieces),
            finish_reason=finish_reason,
            num_tokens=self.num_tokens,
            num_prompt_tokens=num_prompt_tokens,
            seed=self.plan.seed(self._place),
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
    """The bytes of all outputs; those of a long prompt are made in a thread."""
    size = sum(JSON_BYTES * len(output.prompt) for output in outputs if output.prompt is not None)
    return await beside_the_loop(lambda: b"".join(map(encode, outputs)), size=size)
