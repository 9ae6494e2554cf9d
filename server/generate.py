"""POST /generate: a checked body becomes plans, and generations become a plain reply or a stream."""

from typing import Any

from fastapi import APIRouter, Request, Response
from msgspec import UNSET

from server import openapi
from server.connection import EventStream, beside_the_loop, read_body, while_connected
from server.errors import InvalidField
from server.generation import Generation, GenerationPlan, start_generations
from server.messages import Sampling, Timings
from server.prompts import Prompt, is_list_of_inputs, num_inputs, read_ids, read_prompts
from server.replies import Details, GenerateEvent, GenerateReply, TokenInfo, encode
from server.schemas import GenerateRequest, Parameters, parse
from server.service import Service
from server.text import StopStrings

UNLIMITED = 2**62  # tokens; no sequence lives that long

_DETAILS = Details("length", 1, 8, 42, None, -0.25, Timings(0.1, 2.5, 4.0), "0c6f1d2e9a51-float32-cpu-0.1.0")
_TOKEN = TokenInfo(32, " ", -0.25, special=False)
_DOCS: dict[str, Any] = {
    "openapi_extra": openapi.body(
        GenerateRequest, example={"inputs": "It was a", "parameters": {"max_new_tokens": 64, "temperature": 0.8}}
    ),
    "responses": {
        200: openapi.ok(GenerateReply, example=GenerateReply(" dark night", details=_DETAILS)),
        **openapi.errors(*openapi.ENDPOINT_ERRORS),
    },
}
_DOCS["responses"][200]["content"]["text/event-stream"] = openapi.events([GenerateEvent(1, _TOKEN, " ", _DETAILS)])


def generate_router(service: Service) -> APIRouter:
    """The endpoints that continue a text."""
    router = APIRouter(tags=["generate"])

    @router.post("/generate", summary="Continue texts, plainly or as a stream", **_DOCS)
    async def generate(request: Request) -> Response:
        return await _answer(request, service=service, always_stream=False)

    @router.post("/generate_stream", summary="The same with stream = true", **_DOCS)
    async def generate_stream(request: Request) -> Response:
        return await _answer(request, service=service, always_stream=True)

    return router


async def _answer(request: Request, *, service: Service, always_stream: bool) -> Response:
    raw = await read_body(request, max_bytes=service.settings.max_body_bytes)
    body = await beside_the_loop(lambda: parse(raw, model=GenerateRequest), size=len(raw))
    if always_stream and not body.stream and "stream" in body.model_fields_set:
        raise InvalidField.of("stream", value=False, allowed="/generate_stream always streams, see /generate")
    stream = body.stream or always_stream
    service.check_admission(num_inputs(body.inputs))  # before the work of tokenising
    plans = await beside_the_loop(lambda: _plans(body, stream=stream, service=service), size=len(raw))
    generations = start_generations(plans, service=service)
    request.state.summary = lambda: _summary(generations)
    if stream:
        return EventStream([one.run for one in generations], request_id=request.state.request_id)
    details = body.parameters.details
    replies = await while_connected(request.receive, [one.fold(details=details) for one in generations])
    answer = encode(replies if is_list_of_inputs(body.inputs) else replies[0])
    return Response(answer, media_type="application/json")


def _plans(body: GenerateRequest, *, stream: bool, service: Service) -> list[GenerationPlan]:
    """What is asked of each sequence. Raises InvalidField."""
    asked = body.parameters
    if asked.max_new_tokens is None and not stream:
        raise InvalidField.of("parameters.max_new_tokens", value=None, allowed="no limit is for streams only")
    tokenizer = service.tokenizer
    read_ids(asked.stop_token_ids or (), field="parameters.stop_token_ids", tokenizer=tokenizer)
    prompts = read_prompts(body.inputs, tokenizer=tokenizer)
    stops = StopStrings(asked.stop or ())
    numbered = is_list_of_inputs(body.inputs)
    return [
        GenerationPlan(
            tokens=prompt.tokens[-(asked.truncate or 0) :],
            echo=_echo(prompt, service=service) if asked.return_full_text else "",
            sampling=_sampling(asked),
            max_new_tokens=asked.max_new_tokens or UNLIMITED,
            stops=stops,
            stop_token_ids=frozenset(asked.stop_token_ids or ()),
            ignore_eos=asked.ignore_eos,
            sequence=i if numbered else UNSET,
        )
        for i, prompt in enumerate(prompts)
    ]


def _echo(prompt: Prompt, *, service: Service) -> str:
    """The prompt as text, whole even where it was truncated for the model."""
    return service.tokenizer.decode(prompt.tokens.tolist()) if prompt.text is None else prompt.text


def _sampling(asked: Parameters) -> Sampling:
    temperature = 1.0 if asked.temperature is None else asked.temperature
    return Sampling(
        temperature=0.0 if asked.is_greedy else temperature,
        top_k=asked.top_k or 0,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        min_p=asked.min_p or 0.0,
        seed=asked.draw_seed(),
    )


def _summary(generations: list[Generation]) -> dict[str, Any]:
    """For the log: counts and times, no text."""
    details = [one.details for one in generations]
    ended = [one for one in details if one is not None]
    return {
        "sequences": len(generations),
        "prompt_tokens": sum(len(one.plan.tokens) for one in generations),
        "generated_tokens": sum(one.num_tokens for one in generations),
        "finish_reasons": ["unfinished" if one is None else one.finish_reason for one in details],
        "queue_ms": max((one.timings.queue_ms for one in ended), default=None),
        "prefill_ms": max((one.timings.prefill_ms for one in ended), default=None),
        "decode_ms": max((one.timings.decode_ms for one in ended), default=None),
    }
