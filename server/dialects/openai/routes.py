"""POST /v1/completions: OpenAI's words for what POST /generate and POST /score do, and no generation of its own."""

from typing import cast

from fastapi import APIRouter, Request, Response

from model.tokenizer import Tokenizer
from server.dialects.generate.replies import GenerateReply
from server.dialects.openai.choices import CompletionRun, PromptPart, finish_of
from server.dialects.openai.docs import DOCS
from server.dialects.openai.logprobs import joined
from server.dialects.openai.models import check_model
from server.dialects.openai.replies import Choice, Completion
from server.dialects.openai.schema import CompletionRequest, their_names
from server.dialects.openai.stream import CompletionStream
from server.dialects.score.replies import ScoredToken
from server.protocol.json import encode
from server.requests.generation import Generation
from server.requests.offload import beside_the_loop
from server.requests.plan import GenerationPlan, make_plans
from server.requests.prompts import read_prompts
from server.requests.service import Service
from server.web.body import parse, read_body
from server.web.event_stream import EventStream, while_connected

JSON_BYTES = 256  # of a listed token, about


def completions_router(service: Service) -> APIRouter:
    """The endpoint of OpenAI's clients."""
    router = APIRouter(tags=["openai"])

    @router.post("/v1/completions", summary="Continue or score texts, for OpenAI's clients", **DOCS)
    async def completions(request: Request) -> Response:
        return await _answer(request, service=service)

    return router


async def _answer(request: Request, *, service: Service) -> Response:
    service.check_admission(1)  # before the work of reading
    raw = await read_body(request, max_bytes=service.settings.max_body_bytes)
    body = await beside_the_loop(lambda: _parse(raw), size=len(raw))
    run = await _start(request, body=body, num_bytes=len(raw), service=service)
    request.state.summary = run.summary
    if body.stream:
        stream = CompletionStream(run, include_usage=body.stream_options.include_usage)
        return EventStream(stream.jobs(), request_id=run.request_id, close=run.close)
    return await _plain(request, run=run)


def _parse(raw: bytes) -> CompletionRequest:
    with their_names():
        return parse(raw, model=CompletionRequest)


async def _start(request: Request, *, body: CompletionRequest, num_bytes: int, service: Service) -> CompletionRun:
    """Admit all sequences of a request or none. Raises as `check_model`, `_plans` and the service do."""
    if body.request_id is not None:
        request.state.request_id = body.request_id
    check_model(body.model, service=service)
    service.check_admission(body.num_sequences, num_tokens=num_bytes, field="prompt")  # before the work of tokenising
    timeout_s = service.deadline(body.timeout_s)
    plans = await beside_the_loop(
        lambda: _plans(body, tokenizer=service.tokenizer, timeout_s=timeout_s), size=num_bytes
    )
    return CompletionRun.start(body, plans=plans, service=service, request_id=request.state.request_id)


def _plans(body: CompletionRequest, *, tokenizer: Tokenizer, timeout_s: float | None) -> list[GenerationPlan]:
    with their_names():
        prompts = read_prompts(body.prompt, tokenizer=tokenizer)
        return make_plans(body.parameters, prompts=prompts, tokenizer=tokenizer, timeout_s=timeout_s)


async def _plain(request: Request, *, run: CompletionRun) -> Response:
    scorings, details = [one.tokens() for one in run.scorings], run.asked.logprobs
    folds = [one.fold(details=details) for one in run.group.generations]
    try:
        results = await while_connected(request.receive, [*scorings, *folds])
    finally:
        run.close()
    scored = cast("list[list[ScoredToken]]", results[: len(scorings)])
    replies = cast("list[GenerateReply]", results[len(scorings) :])
    usage = run.usage()
    size = JSON_BYTES * usage.total_tokens if details else 0
    answer = await beside_the_loop(lambda: encode(_completion(run, scored=scored, replies=replies)), size=size)
    return Response(answer, media_type="application/json")


def _completion(run: CompletionRun, *, scored: list[list[ScoredToken]], replies: list[GenerateReply]) -> Completion:
    prompts = [
        run.prompt_part(number, scored=scored[number] if scored else ()) for number in range(len(run.group.plans))
    ]
    if run.asked.generates:
        pairs = enumerate(run.group.returned(replies))
        choices = [_choice(run, index, prompts[index // run.asked.n], *pair) for index, pair in pairs]
    else:
        ends = finish_of("length")
        choices = [Choice(index, one.text, one.logprobs, ends) for index, one in enumerate(prompts)]
    return run.completion(choices, usage=run.usage())


def _choice(run: CompletionRun, index: int, prompt: PromptPart, generation: Generation, reply: GenerateReply) -> Choice:
    assert generation.details is not None
    text = prompt.text + reply.generated_text
    finish = finish_of(generation.details.finish_reason)
    lister = run.lister(prompt)
    if lister is None:
        return Choice(index, text, None, finish)
    assert reply.details
    tokens = reply.details.tokens or []
    tops = reply.details.top_tokens or [[]] * len(tokens)
    for token, top in zip(tokens, tops, strict=True):
        lister.add(token, top=top)
    logprobs = lister.take() if prompt.logprobs is None else joined(prompt.logprobs, lister.take())
    return Choice(index, text, logprobs, finish)
