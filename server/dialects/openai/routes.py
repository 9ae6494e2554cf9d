"""POST /v1/completions: OpenAI's words for what POST /generate and POST /score do, and no generation of its own."""

import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any

from msgspec import UNSET

from server.dialects.openai.choices import ChoiceEvents, PromptPart, Shape, plain_choice, scored_choice
from server.dialects.openai.replies import Choice, Completion, Logprobs, Usage
from server.dialects.openai.schema import CompletionRequest
from server.dialects.sampling import plan_generations
from server.errors import Cancelled, InvalidField, ModelNotFound
from server.protocol.json import encode, encode_event
from server.protocol.messages import Generate, Score
from server.requests.group import GenerationGroup
from server.requests.offload import beside_the_loop
from server.requests.plan import GenerationPlan
from server.requests.prompts import read_prompts
from server.requests.results import Generated, ScoredToken, WorkSummary
from server.requests.scoring import Document, Scoring, ScoringPlan, summarise
from server.requests.service import LiveSequence, Service
from server.web import openapi
from server.web.endpoint import Endpoint
from server.web.engine_request import EngineRoad
from server.web.event_stream import Job, SendEvents

JSON_BYTES = 256  # of a listed token, about
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What is left of a body once its prompts were read; they may be large."""

    n: int
    echoes: list[str] | None  # the texts of the prompts, if they are echoed
    lists_logprobs: bool
    include_usage: bool
    user: str | None


@dataclass(frozen=True, kw_only=True)
class CompletionPlan:
    """A checked request: the prompts are continued, or only scored."""

    service: Service
    plans: list[GenerationPlan]
    generates: bool
    asked: _Asked

    def messages(self, new_id: Callable[[], str]) -> list[Generate | Score]:
        """What the engine is told."""
        if self.generates:
            return [plan.message(new_id) for plan in self.plans]
        return [_document(plan, new_id) for plan in self.plans]

    def begin(self, live: list[LiveSequence], *, request_id: str) -> "GeneratedCompletion | ScoredCompletion":
        """The work of the sequences."""
        service, asked = self.service, self.asked
        shape = Shape(
            id=f"cmpl-{request_id}",
            created=int(time.time()),
            model=service.model_name,
            fingerprint=service.fingerprint,
            tokenizer=service.tokenizer,
            lists_logprobs=asked.lists_logprobs,
            usage=None if asked.include_usage else UNSET,
        )
        if self.generates:
            is_alone = len(self.plans) * asked.n == 1
            group = GenerationGroup.of(self.plans, live=live, service=service, num_returned=asked.n, is_alone=is_alone)
            return GeneratedCompletion(group, asked=asked, shape=shape)
        plans = [_scoring_plan(plan) for plan in self.plans]
        scorings = [Scoring(plan, live=one, service=service) for plan, one in zip(plans, live, strict=True)]
        return ScoredCompletion(scorings, asked=asked, shape=shape)


class _Completion:
    """What both kinds of work share: the end of a stream, and the tokens that were read and generated."""

    def __init__(self, *, asked: _Asked, shape: Shape, num_choices: int) -> None:
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

    def __init__(self, group: GenerationGroup, *, asked: _Asked, shape: Shape) -> None:
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

    def __init__(self, scorings: list[Scoring], *, asked: _Asked, shape: Shape) -> None:
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


def _plan(body: CompletionRequest, service: Service) -> CompletionPlan:
    service.check_model(body.model)
    tokenizer = service.tokenizer
    plans = plan_generations(
        body,
        prompts=read_prompts(body.prompt, field="prompt", tokenizer=tokenizer),
        tokenizer=tokenizer,
        timeout_s=service.deadline(body.timeout_s),
        prompt_extras=body.prompt_extras,
    )
    asked = _Asked(
        n=body.n,
        echoes=[tokenizer.decode(plan.tokens.tolist()) for plan in plans] if body.echo else None,
        lists_logprobs=body.logprobs is not None,
        include_usage=body.stream_options.include_usage,
        user=body.user,
    )
    return CompletionPlan(service=service, plans=plans, generates=body.max_tokens > 0, asked=asked)


def _document(plan: GenerationPlan, new_id: Callable[[], str]) -> Score:
    assert plan.prompt_extras is not None
    document = Document(plan.tokens[:0], (plan.tokens,))
    return document.message(new_id, extras=plan.prompt_extras, timeout_s=plan.timeout_s)


def _scoring_plan(plan: GenerationPlan) -> ScoringPlan:
    assert plan.prompt_extras is not None
    return ScoringPlan(
        tokens=plan.tokens, num_scored=len(plan.tokens) - 1, lists_tokens=True, extras=plan.prompt_extras
    )


_REQUESTS: dict[str, dict[str, Any]] = {
    "a text": {"model": "default", "prompt": "It was a", "max_tokens": 64, "temperature": 0.8},
    "until a line ends": {"prompt": "It was a", "stop": "\n", "temperature": 0},
    "several choices": {"prompt": ["It was", "Rain fell"], "n": 2, "best_of": 4, "seed": 42},
    "scores of the prompt": {"prompt": [73, 116], "max_tokens": 0, "echo": True, "logprobs": 1},
    "a stream": {"prompt": "It was a", "stream": True, "stream_options": {"include_usage": True}},
}
_LOGPROBS = Logprobs(["I", "t"], [None, -0.5], [None, {" ": -0.25, "t": -0.5}], [0, 1])
_USAGE = Usage(2, 0, 2)


def _example(choices: list[Choice], usage: Usage | None) -> Completion:
    fingerprint = "0c6f1d2e9a51-float32-cpu-chunk64-0.1.0"
    return Completion("cmpl-6f1c0e4a", "text_completion", 1_764_000_000, "default", fingerprint, choices, usage)


_EVENTS = (
    _example([Choice(0, " dark")], None),
    _example([Choice(0, " night", None, "stop")], None),
    _example([], _USAGE),
)
_ERRORS = (
    *(one for one in openapi.ENDPOINT_ERRORS if not isinstance(one, InvalidField)),
    InvalidField.of("temperature", value=3, allowed="it should be at least 0 and at most 2"),
    Cancelled("cancelled: 4096 of 30000 tokens had been scored"),
    ModelNotFound.of("gpt", name="default"),
)

ENDPOINTS = (
    Endpoint(
        method="POST",
        path="/v1/completions",
        tag="openai",
        summary="Continue or score texts, for OpenAI's clients",
        make=EngineRoad(CompletionRequest, plan=_plan),
        body=CompletionRequest,
        examples=_REQUESTS,
        reply=_example([Choice(0, "It", _LOGPROBS, "length")], _USAGE),
        stream=(b"".join(map(encode_event, _EVENTS)) + DONE).decode(),
        errors=_ERRORS,
    ),
)
