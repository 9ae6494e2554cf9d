"""The live sequences of a completion, with replies and events in OpenAI's format."""

from collections.abc import Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any

from server.dialects.openai.choices import ChoiceEvents, PromptPart, Shape, plain_choice, scored_choice
from server.dialects.openai.replies import Choice, Usage
from server.protocol.json import encode, encode_event
from server.requests.group import GenerationGroup
from server.requests.offload import beside_the_loop
from server.requests.results import Generated, ScoredToken, WorkSummary
from server.requests.scoring import Scoring, summarise
from server.web.event_stream import Job, SendEvents

JSON_BYTES = 256  # approximate size of a listed token
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, kw_only=True)
class ReplyOptions:
    """The parts of a body that shape its reply. The prompts are dropped, as they may be large."""

    n: int
    echoes: list[str] | None  # the texts of the prompts, if they are echoed
    lists_logprobs: bool
    include_usage: bool
    user: str | None


class _Completion:
    """Base of both kinds of work: the end of the stream, and the counts of tokens."""

    def __init__(self, *, options: ReplyOptions, shape: Shape, num_choices: int) -> None:
        self._options = options
        self._shape = shape
        self._num_left = num_choices

    def usage(self) -> Usage:
        """Return the counts of read and generated tokens, after all sequences have ended."""
        raise NotImplementedError

    async def _end_choice(self, send: SendEvents) -> None:
        """Count a choice as ended; after the last choice, send the end of the stream."""
        self._num_left -= 1
        if not self._num_left:
            last = encode_event(self._shape.completion([], usage=self.usage())) if self._options.include_usage else b""
            await send(last + DONE)

    def _encode(self, choices: list[Choice]) -> bytes:
        return encode(self._shape.completion(choices, usage=self.usage()))


class GeneratedCompletion(_Completion):
    """The work of continuing prompts. With echo and logprobs, the same sequences report the scores of their prompts."""

    def __init__(self, group: GenerationGroup, *, options: ReplyOptions, shape: Shape) -> None:
        super().__init__(options=options, shape=shape, num_choices=len(group.plans) * options.n)
        self._group = group

    def jobs(self) -> list[Job]:
        """Return a function for each choice that sends its events."""
        return [partial(self._send_choice, index) for index in range(self._num_left)]

    def folds(self) -> list[Coroutine[Any, Any, Generated]]:
        """Return a coroutine for each sequence that produces it whole."""
        return [generation.fold(keep_tokens=self._options.lists_logprobs) for generation in self._group.generations]

    async def reply(self, results: list[Generated]) -> bytes:
        """Return the plain reply as JSON."""
        size = JSON_BYTES * self.usage().total_tokens if self._options.lists_logprobs else 0
        return await beside_the_loop(lambda: self._encode(self._choices(results)), size=size)

    def usage(self) -> Usage:
        """Return the token counts of the whole request; each prompt counts once."""
        read = sum(len(plan.tokens) for plan in self._group.plans)
        generated = sum(generation.num_tokens for generation in self._group.generations)
        return Usage(read, generated, read + generated)

    def summary(self) -> WorkSummary:
        """Return the counts and times for the log."""
        return self._group.summary(user=self._options.user)

    def close(self) -> None:
        """Free the rows of all sequences."""
        self._group.close()

    async def _send_choice(self, index: int, send: SendEvents) -> None:
        echoes = self._options.echoes
        echo = None if echoes is None else echoes[index // self._options.n]
        events = ChoiceEvents(index, echo=echo, shape=self._shape)
        if echo is not None and not self._shape.lists_logprobs:
            await send(events.of_prompt(None))
        await self._group.generations[index].run(send, encode=events.of_output)
        await self._end_choice(send)

    def _choices(self, results: list[Generated]) -> list[Choice]:
        returned = self._group.returned(results)
        firsts = range(0, len(returned), self._options.n)
        prompts = [self._prompt_part(number, returned[first]) for number, first in enumerate(firsts)]
        return [
            plain_choice(index, result, prompt=prompts[index // self._options.n], shape=self._shape)
            for index, result in enumerate(returned)
        ]

    def _prompt_part(self, number: int, generated: Generated) -> PromptPart:
        if self._options.echoes is None:
            return PromptPart()
        return PromptPart.of(self._options.echoes[number], scored=generated.prompt, tokenizer=self._shape.tokenizer)


class ScoredCompletion(_Completion):
    """The work of only scoring prompts: a request with echo, logprobs and no new tokens."""

    def __init__(self, scorings: list[Scoring], *, options: ReplyOptions, shape: Shape) -> None:
        super().__init__(options=options, shape=shape, num_choices=len(scorings))
        self._scorings = scorings

    def jobs(self) -> list[Job]:
        """Return a function for each choice that sends its event."""
        return [partial(self._send_choice, index) for index in range(len(self._scorings))]

    def folds(self) -> list[Coroutine[Any, Any, list[ScoredToken]]]:
        """Return a coroutine for each prompt that produces its scored tokens."""
        return [scoring.tokens() for scoring in self._scorings]

    async def reply(self, results: list[list[ScoredToken]]) -> bytes:
        """Return the plain reply as JSON."""
        size = JSON_BYTES * self.usage().total_tokens
        return await beside_the_loop(lambda: self._encode(self._choices(results)), size=size)

    def usage(self) -> Usage:
        """Return the token counts of the whole request."""
        read = sum(len(scoring.plan.tokens) for scoring in self._scorings)
        return Usage(read, 0, read)

    def summary(self) -> WorkSummary:
        """Return the counts and times for the log."""
        return summarise(self._scorings, user=self._options.user)

    def close(self) -> None:
        """Free the rows of all sequences."""
        for scoring in self._scorings:
            scoring.close()

    async def _send_choice(self, index: int, send: SendEvents) -> None:
        scored = await self._scorings[index].tokens()
        data = await beside_the_loop(lambda: self._encode_event(index, scored), size=JSON_BYTES * len(scored))
        await send(data)
        await self._end_choice(send)

    def _encode_event(self, index: int, scored: list[ScoredToken]) -> bytes:
        return encode_event(self._shape.completion([self._choice(index, scored)], usage=self._shape.usage))

    def _choices(self, results: list[list[ScoredToken]]) -> list[Choice]:
        return [self._choice(index, scored) for index, scored in enumerate(results)]

    def _choice(self, index: int, scored: list[ScoredToken]) -> Choice:
        assert self._options.echoes is not None
        part = PromptPart.of(self._options.echoes[index], scored=scored, tokenizer=self._shape.tokenizer)
        return scored_choice(index, part)
