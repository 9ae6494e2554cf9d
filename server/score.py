"""POST /score: the log-probability of documents of any length, in one pass each, and what it means in every unit."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from msgspec import UNSET
from numpy.typing import NDArray

from model import scoring
from model.tokenizer import StreamingDecoder, Tokenizer
from server import openapi
from server.connection import beside_the_loop, read_body, while_connected
from server.errors import Draining
from server.messages import Ended, Score, Scores
from server.prompts import check_id, is_list_of_inputs, num_inputs, read_prompt, read_prompts
from server.replies import ScoredToken, ScoreReply, encode
from server.schemas import ScoreRequest, parse
from server.service import LiveSequence, Service

_EXAMPLE = ScoreReply(2, 2, 2, 1, -3.0, 4.48, 20.09, 2.164, 2.164, 2.164, is_greedy=False)
_DOCS: dict[str, Any] = {
    "openapi_extra": openapi.body(ScoreRequest, example={"inputs": "It was a dark night.", "return": ["tokens"]}),
    "responses": {200: openapi.ok(ScoreReply, example=_EXAMPLE), **openapi.errors(*openapi.ENDPOINT_ERRORS)},
}


def score_router(service: Service) -> APIRouter:
    """The endpoint that scores texts."""
    router = APIRouter(tags=["score"])

    @router.post("/score", summary="Perplexity of texts of any length", **_DOCS)
    async def score(request: Request) -> Response:
        return await _answer(request, service=service)

    return router


async def _answer(request: Request, *, service: Service) -> Response:
    raw = await read_body(request, max_bytes=service.settings.max_body_bytes)
    body = await beside_the_loop(lambda: parse(raw, model=ScoreRequest), size=len(raw))
    service.check_admission(num_inputs(body.inputs))  # before the work of tokenising
    documents = await beside_the_loop(lambda: _documents(body, service=service), size=len(raw))
    live = service.submit([one.message(service.new_id()) for one in documents])
    request.state.summary = lambda: {
        "sequences": len(documents),
        "scored_tokens": sum(one.num_scored for one in documents),
        "finish_reasons": ["unfinished" if one.ended is None else one.ended.finish_reason for one in live],
    }
    want_tokens = "tokens" in body.return_
    jobs = [
        _score(document, live=one, service=service, want_tokens=want_tokens)
        for document, one in zip(documents, live, strict=True)
    ]
    replies = await while_connected(request.receive, jobs)
    answer = encode(replies if is_list_of_inputs(body.inputs) else replies[0])
    return Response(answer, media_type="application/json")


class _Document:
    """One text to score, behind a prefix that is only read. The ids of both lie in one array."""

    def __init__(self, prefix: NDArray[np.int32], tokens: NDArray[np.int32]) -> None:
        self._all = np.concatenate([prefix, tokens])
        self.tokens = self._all[len(prefix) :]
        self.num_unasked = max(len(prefix) - 1, 0)  # scores that the engine gives for the prefix
        self.num_scored = len(tokens) - (len(prefix) == 0)  # all tokens but one that has nothing before it

    def message(self, id: str) -> Score:
        """What the engine is told."""
        return Score(id=id, tokens=self._all.astype("<i4", copy=False).tobytes())


def _documents(body: ScoreRequest, *, service: Service) -> list[_Document]:
    """One document for each input. Raises InvalidField."""
    tokenizer = service.tokenizer
    prefix = np.empty(0, dtype=np.int32)
    if isinstance(body.prefix, str):
        prefix = read_prompt(body.prefix, field="prefix", tokenizer=tokenizer).tokens
    elif body.prefix is not None:
        check_id(body.prefix, field="prefix", tokenizer=tokenizer)
        prefix = np.array([body.prefix], dtype=np.int32)
    return [_Document(prefix, prompt.tokens) for prompt in read_prompts(body.inputs, tokenizer=tokenizer)]


async def _score(document: _Document, *, live: LiveSequence, service: Service, want_tokens: bool) -> ScoreReply:
    """Collect the figures of one document. Raises Draining where the server ends first, and as LiveSequence does."""
    parts: list[Scores] = []
    with live:
        async for message in live:
            if isinstance(message, Ended):
                break
            assert isinstance(message, Scores)
            parts.append(message)
    assert live.ended is not None
    if live.ended.finish_reason != "scored":
        raise Draining(f"scoring was cut short: {live.ended.finish_reason}")
    service.metrics.count_finished(
        "scored",
        seconds=time.perf_counter() - live.submitted,
        queue_s=live.ended.timings.queue_ms / 1000,
        scored_tokens=document.num_scored,
    )
    logprobs = np.frombuffer(b"".join(part.logprobs for part in parts), dtype="<f4")[document.num_unasked :]
    ranks = np.frombuffer(b"".join(part.ranks for part in parts), dtype="<i4")[document.num_unasked :]
    assert len(logprobs) == len(ranks) == document.num_scored
    return await beside_the_loop(
        lambda: _reply(document, logprobs, ranks, tokenizer=service.tokenizer, want_tokens=want_tokens),
        size=document.tokens.nbytes,
    )


def _reply(
    document: _Document,
    logprobs: NDArray[np.float32],  # [num_scored]
    ranks: NDArray[np.int32],  # [num_scored]
    *,
    tokenizer: Tokenizer,
    want_tokens: bool,
) -> ScoreReply:
    scored = document.tokens[len(document.tokens) - document.num_scored :]
    figures = scoring.Score.of(tokenizer, scored.tolist(), logprobs.tolist())
    return ScoreReply(
        num_tokens=figures.num_tokens,
        num_bytes=figures.num_bytes,
        num_chars=figures.num_chars,
        num_words=figures.num_words,
        logprob=figures.logprob,
        perplexity=figures.perplexity,
        word_perplexity=figures.word_perplexity,
        bits_per_token=figures.bits_per_token,
        bits_per_byte=figures.bits_per_byte,
        bits_per_char=figures.bits_per_char,
        is_greedy=not ranks.any(),
        tokens=_tokens(document, logprobs.tolist(), ranks.tolist(), tokenizer=tokenizer) if want_tokens else UNSET,
    )


def _tokens(
    document: _Document, logprobs: Sequence[float], ranks: Sequence[int], *, tokenizer: Tokenizer
) -> list[ScoredToken]:
    """Every token of the text, the first without figures where nothing came before it."""
    decoder = StreamingDecoder(tokenizer)
    ids = document.tokens.tolist()
    texts = [decoder.add(token) for token in ids]
    texts[-1] += decoder.finish()
    unscored: list[None] = [None] * (len(texts) - len(logprobs))
    columns = zip(ids, texts, [*unscored, *logprobs], [*unscored, *ranks], strict=True)
    return [ScoredToken(*column) for column in columns]
