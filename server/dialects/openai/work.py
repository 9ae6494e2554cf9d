"""The live sequences of a completion, told in OpenAI's words: choices, their events, the usage and the end."""

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

JSON_BYTES = 256  # of a listed token, about
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is left of a body once its prompts were read; they may be large."""

    n: int
    echoes: list[str] | None  # the texts of the prompts, if they are echoed
    lists_logprobs: bool
    include_usage: bool
    user: str | None


class _Completion:
    """What both kinds of work share: the end of a stream, and the tokens that were read and generated."""

    def __init__(self, *, asked: Asked, shape: Shape, num_choices: int) -> None:
        self._asked = asked
        self._shape = shape
        self._num_left = num_choices

    def usage(self) -> Usage:
        """Tokens read and generated, once all sequences have ended."""
        raise NotImplementedError

    async def _end_choice(self, send: SendEvents) -> None:
        """Send the end of the stream where this was the last choice."""
        self._num_left -= 1
        if not self._num_left:
            last = encode_event(self._shape.completion([], usage=self.usage())) if self._asked.include_usage else b""
            await send(last + DONE)

    def _encode(self, choices: list[Choice]) -> bytes:
        return encode(self._shape.completion(choices, usage=self.usage()))


class GeneratedCompletion(_Completion):
    """Prompts that are continued; with echo and logprobs the same sequences tell the scores of their prompts."""

    def __init__(self, group: GenerationGroup, *, asked: Asked, shape: Shape) -> None:
        super().__init__(asked=asked, shape=shape, num_choices=len(group.plans) * asked.n)
        self._group = group

    def jobs(self) -> list[Job]:
        """What sends the events of each choice."""
        return [partial(self._send_choice, index) for index in range(self._num_left)]

    def folds(self) -> list[Coroutine[Any, Any, Generated]]:
        """What gives each sequence as a whole."""
        return [one.fold(keep_tokens=self._asked.lists_logprobs) for one in self._group.generations]

    async def reply(self, results: list[Generated]) -> bytes:
        """The plain reply."""
        size = JSON_BYTES * self.usage().total_tokens if self._asked.lists_logprobs else 0
        return await beside_the_loop(lambda: self._encode(self._choices(results)), size=size)

    def usage(self) -> Usage:
        """Tokens of the whole request; each prompt counts once."""
        read = sum(len(plan.tokens) for plan in self._group.plans)
        generated = sum(one.num_tokens for one in self._group.generations)
        return Usage(read, generated, read + generated)

    def summary(self) -> WorkSummary:
        """For the log."""
        return self._group.summary(user=self._asked.user)

    def close(self) -> None:
        """Let go of all sequences."""
        self._group.close()

    async def _send_choice(self, index: int, send: SendEvents) -> None:
        echoes = self._asked.echoes
        echo = None if echoes is None else echoes[index // self._asked.n]
        events = ChoiceEvents(index, echo=echo, shape=self._shape)
        if echo is not None and not self._shape.lists_logprobs:
            await send(events.of_prompt(None))
        await self._group.generations[index].run(send, encode=events.of_output)
        await self._end_choice(send)

    def _choices(self, results: list[Generated]) -> list[Choice]:
        returned = self._group.returned(results)
        firsts = range(0, len(returned), self._asked.n)
        prompts = [self._prompt_part(number, returned[first]) for number, first in enumerate(firsts)]
        return [
            plain_choice(index, one, prompt=prompts[index // self._asked.n], shape=self._shape)
            for index, one in enumerate(returned)
        ]

    def _prompt_part(self, number: int, generated: Generated) -> PromptPart:
        if self._asked.echoes is None:
            return PromptPart()
        return PromptPart.of(self._asked.echoes[number], scored=generated.prompt, tokenizer=self._shape.tokenizer)


class ScoredCompletion(_Completion):
    """Prompts that are only scored: with echo, logprobs and no new token."""

    def __init__(self, scorings: list[Scoring], *, asked: Asked, shape: Shape) -> None:
        super().__init__(asked=asked, shape=shape, num_choices=len(scorings))
        self._scorings = scorings

    def jobs(self) -> list[Job]:
        """What sends the event of each choice."""
        return [partial(self._send_choice, index) for index in range(len(self._scorings))]

    def folds(self) -> list[Coroutine[Any, Any, list[ScoredToken]]]:
        """What gives the tokens of each prompt."""
        return [one.tokens() for one in self._scorings]

    async def reply(self, results: list[list[ScoredToken]]) -> bytes:
        """The plain reply."""
        size = JSON_BYTES * self.usage().total_tokens
        return await beside_the_loop(lambda: self._encode(self._choices(results)), size=size)

    def usage(self) -> Usage:
        """Tokens of the whole request."""
        read = sum(len(one.plan.tokens) for one in self._scorings)
        return Usage(read, 0, read)

    def summary(self) -> WorkSummary:
        """For the log."""
        return summarise(self._scorings, user=self._asked.user)

    def close(self) -> None:
        """Let go of all sequences."""
        for one in self._scorings:
            one.close()

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
        assert self._asked.echoes is not None
        part = PromptPart.of(self._asked.echoes[index], scored=scored, tokenizer=self._shape.tokenizer)
        return scored_choice(index, part)
