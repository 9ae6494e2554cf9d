"""POST /generate: a checked body becomes plans, and generations become a plain reply or a stream."""

from dataclasses import dataclass

from fastapi import APIRouter, Request, Response

from model.tokenizer import Tokenizer
from server.dialects.generate.docs import DOCS
from server.dialects.generate.schema import GenerateRequest
from server.errors import InvalidField
from server.protocol.json import encode
from server.requests.group import GenerationGroup
from server.requests.offload import beside_the_loop
from server.requests.plan import GenerationPlan, make_plans
from server.requests.prompts import is_list_of_inputs, num_inputs, read_prompts
from server.requests.service import Service
from server.web.body import parse, read_body
from server.web.event_stream import EventStream, while_connected


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

    group: GenerationGroup
    is_list: bool
    details: bool
    stream: bool


async def _answer(request: Request, *, service: Service, always_stream: bool) -> Response:
    started = await _start(request, service=service, always_stream=always_stream)
    group = started.group
    request.state.summary = group.summary
    if started.stream:
        jobs = [one.run for one in group.generations]
        return EventStream(jobs, request_id=request.state.request_id, close=group.close)
    try:
        folds = [one.fold(details=started.details) for one in group.generations]
        replies = [reply for _, reply in group.returned(await while_connected(request.receive, folds))]
    finally:
        group.close()
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
    group = GenerationGroup.start(
        plans, service=service, request_id=request.state.request_id, num_returned=asked.n, numbered=is_list
    )
    return _Started(group, is_list=is_list, details=asked.details, stream=stream)


def _plans(body: GenerateRequest, *, tokenizer: Tokenizer, timeout_s: float | None) -> list[GenerationPlan]:
    prompts = read_prompts(body.inputs, tokenizer=tokenizer)
    return make_plans(body.parameters, prompts=prompts, tokenizer=tokenizer, timeout_s=timeout_s)
