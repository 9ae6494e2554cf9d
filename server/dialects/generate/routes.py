"""POST /generate: turns a checked body into plans, and generations into a plain reply or a stream."""

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
from server.requests.generation import JSON_BYTES
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
class _ReplyOptions:
    """The parts of a body that shape its reply. The inputs are dropped, as they may be large."""

    echoes: list[str]  # the text at the start of generated_text, for each input
    is_list: bool
    num_returned: int  # sequences of each input
    details: bool
    logprobs: bool
    tops: bool


@dataclass(frozen=True)
class GeneratePlan:
    """A checked request to generate."""

    service: Service
    plans: list[GenerationPlan]
    options: _ReplyOptions

    def messages(self, new_id: Callable[[], str]) -> list[Generate | Score]:
        """Return the messages for the engine."""
        return [plan.message(new_id) for plan in self.plans]

    def begin(self, live: list[LiveSequence], *, request_id: str) -> "GenerateWork":  # noqa: ARG002
        """Return the work of the admitted sequences."""
        options = self.options
        group = GenerationGroup.of(
            self.plans, live=live, service=self.service, num_returned=options.num_returned, is_alone=not options.is_list
        )
        return GenerateWork(group, options)


class GenerateWork:
    """The live sequences of a request, with the replies and events of /generate."""

    def __init__(self, group: GenerationGroup, options: _ReplyOptions) -> None:
        self._group = group
        self._options = options

    def jobs(self) -> list[Job]:
        """Return a function for each sequence that sends its events."""
        options, jobs = self._options, list[Job]()
        for number, (echo, generation) in enumerate(zip(self._echoes(), self._group.generations, strict=True)):
            maker = EventMaker(sequence=number if options.is_list else UNSET, echo=echo, logprobs=options.logprobs)
            jobs.append(partial(generation.run, encode=partial(_encode, maker)))
        return jobs

    def folds(self) -> list[Coroutine[Any, Any, Generated]]:
        """Return a coroutine for each sequence that produces it whole."""
        return [generation.fold(keep_tokens=self._options.details) for generation in self._group.generations]

    async def reply(self, results: list[Generated]) -> bytes:
        """Return the plain reply as JSON."""
        size = JSON_BYTES * sum(len(result.prompt or ()) for result in results)
        return await beside_the_loop(lambda: self._encode_replies(results), size=size)

    def summary(self) -> WorkSummary:
        """Return the counts and times for the log."""
        return self._group.summary()

    def close(self) -> None:
        """Free the rows of all sequences."""
        self._group.close()

    def _echoes(self) -> list[str]:
        pairs = zip(self._options.echoes, self._group.plans, strict=True)
        return [echo for echo, plan in pairs for _ in range(plan.num_sequences)]

    def _encode_replies(self, results: list[Generated]) -> bytes:
        options = self._options
        echoes = [echo for echo in options.echoes for _ in range(options.num_returned)]
        replies = [
            plain_reply(result, echo=echo, details=options.details, logprobs=options.logprobs, tops=options.tops)
            for result, echo in zip(self._group.returned(results), echoes, strict=True)
        ]
        return encode(replies if options.is_list else replies[0])


def _encode(maker: EventMaker, output: Output) -> bytes:
    event = maker.event(output)
    return b"" if event is None else encode_event(event)


def _plan(body: GenerateRequest, service: Service) -> GeneratePlan:
    parameters, tokenizer = body.parameters, service.tokenizer
    prompts = read_prompts(body.inputs, field="inputs", tokenizer=tokenizer)
    plans = plan_generations(
        parameters,
        prompts=[Prompt(prompt.tokens[-(parameters.truncate or 0) :], prompt.text) for prompt in prompts],
        tokenizer=tokenizer,
        timeout_s=service.deadline(body.timeout_s),
        prompt_extras=Extras() if parameters.decoder_input_details else None,
    )
    return GeneratePlan(
        service,
        plans,
        _ReplyOptions(
            echoes=_echoes(prompts, parameters=parameters, tokenizer=tokenizer),
            is_list=body.has_list_reply,
            num_returned=parameters.n,
            details=parameters.details,
            logprobs=parameters.logprobs,
            tops=parameters.top_n_tokens > 0,
        ),
    )


def _echoes(prompts: Sequence[Prompt], *, parameters: Parameters, tokenizer: Tokenizer) -> list[str]:
    """Return the texts of the prompts, before truncation; empty texts if the client does not request them."""
    if not parameters.return_full_text:
        return [""] * len(prompts)
    return [tokenizer.decode(prompt.tokens.tolist()) if prompt.text is None else prompt.text for prompt in prompts]


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
        "description": "one reply; an array for a list of inputs or for n > 1, in the order of the inputs",
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
    _endpoint("/generate_stream", "The same as /generate with stream = true", body=GenerateStreamRequest),
    _endpoint("/", "The same as /generate, at the path that huggingface_hub's clients use"),
    # for the form of the page, whose files need no key
    Endpoint(method="GET", path="/playground/parameters.json", make=_form_fields, in_schema=False),
)
