"""POST /generate: a checked body becomes plans, and generations become a plain reply or a stream."""

from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response

from model.tokenizer import Tokenizer
from server.connection import EventStream, beside_the_loop, read_body, while_connected
from server.errors import InvalidField
from server.generate_docs import DOCS
from server.generation import Generation, start_generations
from server.parameters import GenerateRequest
from server.plans import GenerationPlan, make_plans
from server.prompts import is_list_of_inputs, num_inputs, read_prompts
from server.replies import GenerateReply, encode
from server.schemas import parse
from server.service import Service


def generate_router(service: Service) -> APIRouter:
    """The endpoints that continue a text."""
    router = APIRouter(tags=["generate"])

    @router.post("/generate", summary="Continue texts, plainly or as a stream", **DOCS)
    async def generate(request: Request) -> Response:
        return await _answer(request, service=service, always_stream=False)

    @router.post("/generate_stream", summary="The same with stream = true", **DOCS)
    async def generate_stream(request: Request) -> Response:
        return await _answer(request, service=service, always_stream=True)

    @router.post("/", summary="The same as /generate, where huggingface_hub's clients look for it", **DOCS)
    async def root(request: Request) -> Response:
        return await _answer(request, service=service, always_stream=False)

    return router


@dataclass(frozen=True)
class _Started:
    """What is left of a request once its body was turned into live sequences: not the body, which may be large."""

    plans: list[GenerationPlan]
    generations: list[Generation]
    num_returned: int  # of the sequences of each input
    is_list: bool
    details: bool
    stream: bool

    def close(self) -> None:
        """Let go of all sequences, also of those that nobody came to wait for."""
        for one in self.generations:
            one.close()


async def _answer(request: Request, *, service: Service, always_stream: bool) -> Response:
    started = await _start(request, service=service, always_stream=always_stream)
    generations = started.generations
    request.state.summary = lambda: _summary(started)
    if started.stream:
        jobs = [one.run for one in generations]
        return EventStream(jobs, request_id=request.state.request_id, close=started.close)
    try:
        folds = [one.fold(details=started.details) for one in generations]
        replies = _returned(started, replies=await while_connected(request.receive, folds))
    finally:
        started.close()
    return Response(encode(replies if started.is_list else replies[0]), media_type="application/json")


async def _start(request: Request, *, service: Service, always_stream: bool) -> _Started:
    """Admit all sequences of a request or none. Raises as `parse`, `_plans` and the service do."""
    service.check_admission(1)  # before the work of reading
    raw = await read_body(request, max_bytes=service.settings.max_body_bytes)
    body = await beside_the_loop(lambda: parse(raw, model=GenerateRequest), size=len(raw))
    if body.request_id is not None:
        request.state.request_id = body.request_id
    if always_stream and not body.stream and "stream" in body.model_fields_set:
        raise InvalidField.of("stream", value=False, allowed="/generate_stream always streams, see /generate")
    asked, stream = body.parameters, body.stream or always_stream
    asked.check_reply(stream=stream)
    num_sequences = num_inputs(body.inputs) * asked.num_sequences
    field = "inputs" if asked.num_sequences == 1 else "inputs, each of n or best_of sequences"
    service.check_admission(num_sequences, num_tokens=len(raw), field=field)  # before the work of tokenising
    timeout_s = service.deadline(body.timeout_s)
    plans = await beside_the_loop(lambda: _plans(body, tokenizer=service.tokenizer, timeout_s=timeout_s), size=len(raw))
    is_list = is_list_of_inputs(body.inputs) or asked.n > 1
    generations = start_generations(plans, service=service, request_id=request.state.request_id, numbered=is_list)
    return _Started(plans, generations, asked.n, is_list=is_list, details=asked.details, stream=stream)


def _plans(body: GenerateRequest, *, tokenizer: Tokenizer, timeout_s: float | None) -> list[GenerationPlan]:
    prompts = read_prompts(body.inputs, tokenizer=tokenizer)
    return make_plans(body.parameters, prompts=prompts, tokenizer=tokenizer, timeout_s=timeout_s)


def _returned(started: _Started, *, replies: list[GenerateReply]) -> list[GenerateReply]:
    """The replies that were asked for: all, or those of the best sequences of each input."""
    chosen: list[GenerateReply] = []
    pairs = list(zip(started.generations, replies, strict=True))
    start = 0
    for plan in started.plans:
        group = pairs[start : start + plan.num_sequences]
        start += plan.num_sequences
        if len(group) > started.num_returned:
            group = sorted(group, key=lambda pair: pair[0].mean_logprob, reverse=True)[: started.num_returned]
        chosen += [reply for _, reply in group]
    return chosen


def _summary(started: _Started) -> dict[str, Any]:
    """For the log: counts and times, no text."""
    details = [one.details for one in started.generations]
    timings = [one.timings for one in details if one is not None]
    return {
        "sequences": len(details),
        "prompt_tokens": sum(len(plan.tokens) for plan in started.plans),
        "generated_tokens": sum(one.num_tokens for one in started.generations),
        "finish_reasons": ["unfinished" if one is None else one.finish_reason for one in details],
        "queue_ms": max((one.queue_ms for one in timings), default=None),
        "prefill_ms": max((one.prefill_ms for one in timings), default=None),
        "decode_ms": max((one.decode_ms for one in timings), default=None),
    }
