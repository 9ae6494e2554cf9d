"""POST /generate: a checked body becomes plans, and generations become a plain reply or a stream."""

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
from fastapi import Response
from msgspec import UNSET
from msgspec.structs import replace

from model.tokenizer import Tokenizer
from server.dialects.generate.replies import Details, EventMaker, GenerateEvent, GenerateReply, PromptToken, plain_reply
from server.dialects.generate.schema import GenerateRequest, GenerateStreamRequest, Parameters, describe_numbers
from server.dialects.sampling import plan_generations
from server.protocol.json import encode, encode_event
from server.protocol.messages import Extras, Generate, Score, Timings
from server.requests.group import GenerationGroup
from server.requests.offload import beside_the_loop
from server.requests.plan import GenerationPlan
from server.requests.prompts import Prompt, read_prompts
from server.requests.results import Generated, Output, OutputToken, WorkSummary
from server.requests.service import LiveSequence, Service
from server.web import openapi
from server.web.endpoint import Endpoint, Handler
from server.web.engine_request import EngineRoad
from server.web.event_stream import Job


@dataclass(frozen=True)
class _Asked:
    """What is left of a body once its inputs were read; they may be large."""

    echoes: list[str]  # what generated_text begins with, one an input
    is_list: bool
    num_returned: int  # sequences of each input
    details: bool
    logprobs: bool
    tops: bool


@dataclass(frozen=True)
class GeneratePlan:
    """A checked request."""

    service: Service
    plans: list[GenerationPlan]
    asked: _Asked

    def messages(self, new_id: Callable[[], str]) -> list[Generate | Score]:
        """What the engine is told."""
        return [plan.message(new_id) for plan in self.plans]

    def begin(self, live: list[LiveSequence], *, request_id: str) -> "GenerateWork":  # noqa: ARG002
        """The work of the sequences."""
        asked = self.asked
        group = GenerationGroup.of(
            self.plans, live=live, service=self.service, num_returned=asked.num_returned, is_alone=not asked.is_list
        )
        return GenerateWork(group, asked)


class GenerateWork:
    """Live sequences, told in the words of /generate."""

    def __init__(self, group: GenerationGroup, asked: _Asked) -> None:
        self._group = group
        self._asked = asked

    def jobs(self) -> list[Job]:
        """What sends the events of each sequence."""
        asked, jobs = self._asked, list[Job]()
        for number, (echo, one) in enumerate(zip(self._echoes(), self._group.generations, strict=True)):
            maker = EventMaker(sequence=number if asked.is_list else UNSET, echo=echo, logprobs=asked.logprobs)
            jobs.append(partial(one.run, encode=partial(_encode, maker)))
        return jobs

    def folds(self) -> list[Coroutine[Any, Any, Generated]]:
        """What gives each sequence as a whole."""
        return [one.fold(keep_tokens=self._asked.details) for one in self._group.generations]

    async def reply(self, results: list[Generated]) -> bytes:
        """The plain reply."""
        size = sum(len(one.prompt or ()) for one in results)
        return await beside_the_loop(lambda: self._encode_replies(results), size=size)

    def summary(self) -> WorkSummary:
        """For the log."""
        return self._group.summary()

    def close(self) -> None:
        """Let go of all sequences."""
        self._group.close()

    def _echoes(self) -> list[str]:
        pairs = zip(self._asked.echoes, self._group.plans, strict=True)
        return [echo for echo, plan in pairs for _ in range(plan.num_sequences)]

    def _encode_replies(self, results: list[Generated]) -> bytes:
        asked = self._asked
        echoes = [echo for echo in asked.echoes for _ in range(asked.num_returned)]
        replies = [
            plain_reply(one, echo=echo, details=asked.details, logprobs=asked.logprobs, tops=asked.tops)
            for one, echo in zip(self._group.returned(results), echoes, strict=True)
        ]
        return encode(replies if asked.is_list else replies[0])


def _encode(maker: EventMaker, output: Output) -> bytes:
    event = maker.event(output)
    return b"" if event is None else encode_event(event)


def _plan(body: GenerateRequest, service: Service) -> GeneratePlan:
    asked, tokenizer = body.parameters, service.tokenizer
    prompts = read_prompts(body.inputs, field="inputs", tokenizer=tokenizer)
    plans = plan_generations(
        asked,
        prompts=[Prompt(prompt.tokens[-(asked.truncate or 0) :], prompt.text) for prompt in prompts],
        tokenizer=tokenizer,
        timeout_s=service.deadline(body.timeout_s),
        prompt_extras=Extras() if asked.decoder_input_details else None,
    )
    return GeneratePlan(
        service,
        plans,
        _Asked(
            echoes=_echoes(prompts, asked=asked, tokenizer=tokenizer),
            is_list=body.has_list_reply,
            num_returned=asked.n,
            details=asked.details,
            logprobs=asked.logprobs,
            tops=asked.top_n_tokens > 0,
        ),
    )


def _echoes(prompts: Sequence[Prompt], *, asked: Parameters, tokenizer: Tokenizer) -> list[str]:
    """The prompts as texts, whole even where they are truncated for the model; nothing if not asked for."""
    if not asked.return_full_text:
        return [""] * len(prompts)
    return [tokenizer.decode(one.tokens.tolist()) if one.text is None else one.text for one in prompts]


_REQUESTS: dict[str, dict[str, Any]] = {
    "a text": {"inputs": "It was a", "parameters": {"max_new_tokens": 64, "temperature": 0.8}},
    "until a line ends": {"inputs": "It was a", "parameters": {"stop": ["\n"], "min_new_tokens": 8}},
    "several inputs": {"inputs": ["It was", "Rain fell"], "timeout_s": 30.0},
    "several continuations": {"inputs": "It was a", "parameters": {"n": 2, "best_of": 8, "top_p": 0.9, "seed": 42}},
    "all details": {
        "inputs": "It was a",
        "parameters": {"details": True, "decoder_input_details": True, "top_n_tokens": 2, "seed": 42},
    },
    "a stream": {"inputs": "It was a", "parameters": {"max_new_tokens": None}, "stream": True, "request_id": "mine-1"},
}
_TOKEN = OutputToken(32, " ", -0.25, special=False)
_TOP = [_TOKEN, OutputToken(10, "\n", -1.75, special=False)]
_PREFILL = [PromptToken(73, "I", None), PromptToken(116, "t", -0.5)]
_DETAILS = Details("length", 1, 2, 42, None, -0.25, Timings(0.1, 2.5, 4.0), "0c6f1d2e9a51-float32-cpu-0.1.0")
_ALL_DETAILS = replace(_DETAILS, prefill=_PREFILL, tokens=[_TOKEN], top_tokens=[_TOP])


def _form(schema: dict[str, Any]) -> dict[str, Any]:
    return {
        "anyOf": [schema, {"type": "array", "items": schema}],
        "description": "one reply; an array for a list of inputs or for n > 1, the n of the first input first",
    }


def _endpoint(path: str, summary: str, *, body: type[GenerateRequest] = GenerateRequest) -> Endpoint:
    return Endpoint(
        method="POST",
        path=path,
        tag="generate",
        summary=summary,
        make=EngineRoad(body, plan=_plan),
        body=GenerateRequest,
        examples=_REQUESTS,
        reply=GenerateReply(" ", _ALL_DETAILS),
        form=_form,
        stream=encode_event(GenerateEvent(1, _TOKEN, " ", _DETAILS)).decode(),
        events=(GenerateEvent,),
        errors=openapi.ENDPOINT_ERRORS,
    )


def _form_fields(_service: Service) -> Handler:
    answer = msgspec.json.encode(describe_numbers())

    async def parameters() -> Response:
        return Response(answer, media_type="application/json")

    return parameters


ENDPOINTS = (
    _endpoint("/generate", "Continue texts, plainly or as a stream"),
    _endpoint("/generate_stream", "The same with stream = true", body=GenerateStreamRequest),
    _endpoint("/", "The same as /generate, where huggingface_hub's clients look for it"),
    # for the form of the page, whose files need no key
    Endpoint(method="GET", path="/playground/parameters.json", make=_form_fields, in_schema=False),
)
