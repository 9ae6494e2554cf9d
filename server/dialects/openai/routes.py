"""POST /v1/completions: OpenAI's words for what POST /generate and POST /score do, and no generation of its own."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from msgspec import UNSET

from server.dialects.openai.choices import Shape
from server.dialects.openai.replies import Choice, Completion, Logprobs, Usage
from server.dialects.openai.schema import CompletionRequest
from server.dialects.openai.work import DONE, Asked, GeneratedCompletion, ScoredCompletion
from server.dialects.sampling import plan_generations
from server.errors import Cancelled, InvalidField, ModelNotFound
from server.protocol.json import encode_event
from server.protocol.messages import Generate, Score
from server.requests.group import GenerationGroup
from server.requests.plan import GenerationPlan
from server.requests.prompts import read_prompts
from server.requests.scoring import Document, Scoring, ScoringPlan
from server.requests.service import LiveSequence, Service
from server.web import openapi
from server.web.endpoint import Endpoint
from server.web.engine_request import EngineRoad


@dataclass(frozen=True, kw_only=True)
class CompletionPlan:
    """A checked request: the prompts are continued, or only scored."""

    service: Service
    plans: list[GenerationPlan]
    generates: bool
    asked: Asked

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
    asked = Asked(
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
