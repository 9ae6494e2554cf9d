"""POST /score: the log-probability of texts of any length, in one pass each, and what it means in every unit."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import numpy as np
from fastapi import APIRouter, Request, Response
from msgspec import UNSET
from numpy.typing import NDArray

from model.tokenizer import Tokenizer
from server.dialects.score.docs import DOCS
from server.dialects.score.schema import ScoreRequest
from server.errors import InvalidField
from server.requests.offload import beside_the_loop
from server.requests.prompts import check_id, is_list_of_inputs, read_prompt, read_prompts
from server.requests.scoring import Document, Scoring, ScoringPlan
from server.requests.service import Service
from server.web.body import parse, read_body
from server.web.event_stream import EventStream, while_connected


def score_router(service: Service) -> APIRouter:
    """The endpoint that scores texts."""
    router = APIRouter(tags=["score"])

    @router.post("/score", summary="Perplexity of texts of any length, plainly or as a stream", **DOCS)
    async def score(request: Request) -> Response:
        return await _answer(request, service=service)

    return router


@dataclass(frozen=True)
class _Started:
    """What is left of a request once its body was turned into live sequences: not the body, which may be large."""

    scorings: list[Scoring]
    group_sizes: list[int]  # texts of each document
    depth: int  # of the answer's arrays
    stream: bool


async def _answer(request: Request, *, service: Service) -> Response:
    started = await _start(request, service=service)
    scorings = started.scorings
    request.state.summary = lambda: _summary(scorings)
    if started.stream:
        return EventStream(
            [one.run for one in scorings], request_id=request.state.request_id, close=lambda: _close(scorings)
        )
    try:
        parts = await while_connected(request.receive, [one.fold() for one in scorings])
    finally:
        _close(scorings)
    answer = _nest(parts, group_sizes=started.group_sizes, depth=started.depth)
    return Response(answer, media_type="application/json")


async def _start(request: Request, *, service: Service) -> _Started:
    """Admit all sequences of a request or none. Raises as `parse`, `_documents` and the service do."""
    service.check_admission(1)  # before the work of reading
    raw = await read_body(request, max_bytes=service.settings.max_body_bytes)
    body = await beside_the_loop(lambda: parse(raw, model=ScoreRequest), size=len(raw))
    if body.request_id is not None:
        request.state.request_id = body.request_id
    field = "inputs" if body.continuations is None else "continuations"
    service.check_admission(body.num_replies, num_tokens=len(raw), field=field)  # before the work of tokenising
    documents = await beside_the_loop(lambda: _documents(body, tokenizer=service.tokenizer), size=len(raw))
    plans = _plans(documents, body=body)
    timeout_s, extras = service.deadline(body.timeout_s), body.extras
    messages = [one.message(service.new_id, extras=extras, timeout_s=timeout_s) for one in documents]
    live = service.submit(messages, request_id=request.state.request_id)
    return _Started(
        [Scoring(plan, live=one, service=service) for plan, one in zip(plans, live, strict=True)],
        group_sizes=[len(one.texts) for one in documents],
        depth=body.depth,
        stream=body.stream,
    )


def _close(scorings: Sequence[Scoring]) -> None:
    for one in scorings:
        one.close()


def _documents(body: ScoreRequest, *, tokenizer: Tokenizer) -> list[Document]:
    """One document for each input. Raises InvalidField."""
    if body.extras.num_top > tokenizer.vocab_size:
        raise InvalidField.of("top", value=body.top, allowed=f"there are {tokenizer.vocab_size} tokens")
    prefix = _prefix(body.prefix, tokenizer=tokenizer)
    inputs = [prompt.tokens for prompt in read_prompts(body.inputs, tokenizer=tokenizer)]
    if body.continuations is None:
        return [Document(prefix, (one,)) for one in inputs]
    if is_list_of_inputs(body.inputs):
        nested = cast("list[list[str]]", body.continuations)
        fields = [f"continuations.{i}" for i in range(len(nested))]
    else:
        nested, fields = [cast("list[str]", body.continuations)], ["continuations"]
    return [
        Document(np.concatenate([prefix, one]), _texts(texts, field=field, tokenizer=tokenizer))
        for one, texts, field in zip(inputs, nested, fields, strict=True)
    ]


def _prefix(prefix: str | int | None, *, tokenizer: Tokenizer) -> NDArray[np.int32]:
    if isinstance(prefix, str):
        return read_prompt(prefix, field="prefix", tokenizer=tokenizer).tokens
    if prefix is None:
        return np.empty(0, dtype=np.int32)
    check_id(prefix, field="prefix", tokenizer=tokenizer)
    return np.array([prefix], dtype=np.int32)


def _texts(texts: Sequence[str], *, field: str, tokenizer: Tokenizer) -> tuple[NDArray[np.int32], ...]:
    return tuple(read_prompt(text, field=f"{field}.{j}", tokenizer=tokenizer).tokens for j, text in enumerate(texts))


def _plans(documents: Sequence[Document], *, body: ScoreRequest) -> list[ScoringPlan]:
    """One plan for each reply, in order."""
    pairs = [(document.context, text) for document in documents for text in document.texts]
    return [
        ScoringPlan(
            tokens=text,
            num_scored=len(text) if len(context) else len(text) - 1,
            unit=body.unit,
            lists_tokens=bool(body.return_),
            extras=body.extras,
            sequence=i if body.depth else UNSET,
        )
        for i, (context, text) in enumerate(pairs)
    ]


def _nest(parts: list[bytes], *, group_sizes: Sequence[int], depth: int) -> bytes:
    """The answer from the JSON of its replies."""
    if depth == 2:
        rest = iter(parts)
        parts = [_array(list(islice(rest, size))) for size in group_sizes]
    return _array(parts) if depth else parts[0]


def _array(parts: Sequence[bytes]) -> bytes:
    return b"[" + b",".join(parts) + b"]"


def _summary(scorings: Sequence[Scoring]) -> dict[str, Any]:
    """For the log: counts and times, no text."""
    ended = [one.live.ended for one in scorings]
    timings = [one.timings for one in ended if one is not None]
    return {
        "sequences": len(scorings),
        "scored_tokens": sum(one.num_done for one in scorings),
        "finish_reasons": ["unfinished" if one is None else one.finish_reason for one in ended],
        "queue_ms": max((one.queue_ms for one in timings), default=None),
        "prefill_ms": max((one.prefill_ms for one in timings), default=None),
    }
