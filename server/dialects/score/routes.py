"""POST /score: the log-probability of texts of any length, in one pass each, and what it means in every unit."""

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, cast

import msgspec
import numpy as np
from msgspec import UNSET, UnsetType
from msgspec.structs import replace
from numpy.typing import NDArray

from model.tokenizer import Tokenizer
from server.dialects.score.replies import ScoreEvent, ScoreReply, Unit, score_event, score_reply
from server.dialects.score.schema import ScoreRequest
from server.errors import Cancelled, InvalidField
from server.protocol.json import encode, encode_event
from server.protocol.messages import Extras, Generate, Score
from server.requests.prompts import check_id, is_list_of_inputs, read_prompt, read_prompts
from server.requests.results import ScoredToken, ScoreOutput, TextScore, TopToken, WorkSummary
from server.requests.scoring import Document, Scoring, ScoringPlan, summarise
from server.requests.service import LiveSequence, Service
from server.web import openapi
from server.web.endpoint import Endpoint
from server.web.engine_request import EngineRoad
from server.web.event_stream import Job


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What is left of a body once its inputs were read; they may be large."""

    unit: Unit
    lists_tokens: bool
    extras: Extras
    timeout_s: float | None
    group_sizes: list[int]  # texts of each document
    depth: int  # of the answer's arrays


@dataclass(frozen=True)
class ScorePlan:
    """A checked request."""

    service: Service
    documents: list[Document]
    asked: _Asked

    def messages(self, new_id: Callable[[], str]) -> list[Generate | Score]:
        """What the engine is told."""
        asked = self.asked
        return [one.message(new_id, extras=asked.extras, timeout_s=asked.timeout_s) for one in self.documents]

    def begin(self, live: list[LiveSequence], *, request_id: str) -> "ScoreWork":  # noqa: ARG002
        """The work of the sequences."""
        plans = [self._plan(document, text) for document in self.documents for text in document.texts]
        scorings = [Scoring(plan, live=one, service=self.service) for plan, one in zip(plans, live, strict=True)]
        return ScoreWork(scorings, self.asked)

    def _plan(self, document: Document, text: NDArray[np.int32]) -> ScoringPlan:
        return ScoringPlan(
            tokens=text,
            num_scored=len(text) if len(document.context) else len(text) - 1,
            lists_tokens=self.asked.lists_tokens,
            extras=self.asked.extras,
        )


class ScoreWork:
    """Live sequences, told in the words of /score."""

    def __init__(self, scorings: list[Scoring], asked: _Asked) -> None:
        self._scorings = scorings
        self._asked = asked

    def jobs(self) -> list[Job]:
        """What sends the events of each text."""
        numbers = range(len(self._scorings))
        encoders = [partial(self._encode_event, sequence=i if self._asked.depth else UNSET) for i in numbers]
        return [partial(one.run, encode=encode) for one, encode in zip(self._scorings, encoders, strict=True)]

    def folds(self) -> list[Coroutine[Any, Any, tuple[TextScore, list[bytes]]]]:
        """What gives the score of each text, and its list of tokens as JSON."""
        return [one.fold(encode=_entries) for one in self._scorings]

    async def reply(self, results: list[tuple[TextScore, list[bytes]]]) -> bytes:
        """The plain reply."""
        parts = [self._encode_reply(score, entries) for score, entries in results]
        return _nest(parts, group_sizes=self._asked.group_sizes, depth=self._asked.depth)

    def summary(self) -> WorkSummary:
        """For the log."""
        return summarise(self._scorings)

    def close(self) -> None:
        """Let go of all sequences."""
        for one in self._scorings:
            one.close()

    def _encode_event(self, output: ScoreOutput, *, sequence: int | UnsetType) -> bytes:
        asked = self._asked
        return encode_event(score_event(output, unit=asked.unit, lists_tokens=asked.lists_tokens, sequence=sequence))

    def _encode_reply(self, score: TextScore, entries: list[bytes]) -> bytes:
        head = encode(score_reply(score, unit=self._asked.unit))
        return b"".join((head[:-1], b',"tokens":[', b",".join(entries), b"]}")) if self._asked.lists_tokens else head


def _entries(output: ScoreOutput) -> bytes:
    """The inside of its list of tokens."""
    return msgspec.json.encode(output.tokens)[1:-1]


def _plan(body: ScoreRequest, service: Service) -> ScorePlan:
    documents = _documents(body, tokenizer=service.tokenizer)
    asked = _Asked(
        unit=body.unit,
        lists_tokens=bool(body.return_),
        extras=body.extras,
        timeout_s=service.deadline(body.timeout_s),
        group_sizes=[len(one.texts) for one in documents],
        depth=body.depth,
    )
    return ScorePlan(service, documents, asked)


def _documents(body: ScoreRequest, *, tokenizer: Tokenizer) -> list[Document]:
    """One document for each input. Raises InvalidField."""
    if body.extras.num_top > tokenizer.vocab_size:
        raise InvalidField.of("top", value=body.top, allowed=f"there are {tokenizer.vocab_size} tokens")
    prefix = _prefix(body.prefix, tokenizer=tokenizer)
    inputs = [prompt.tokens for prompt in read_prompts(body.inputs, field="inputs", tokenizer=tokenizer)]
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


def _nest(parts: list[bytes], *, group_sizes: Sequence[int], depth: int) -> bytes:
    """The answer from the JSON of its replies."""
    if depth == 2:
        rest = iter(parts)
        parts = [_array(list(islice(rest, size))) for size in group_sizes]
    return _array(parts) if depth else parts[0]


def _array(parts: Sequence[bytes]) -> bytes:
    return b"[" + b",".join(parts) + b"]"


_REQUESTS: dict[str, dict[str, Any]] = {
    "a text": {"inputs": "It was a dark night."},
    "several, with a prefix": {"inputs": ["It was", "Rain fell"], "prefix": "\n", "unit": "word"},
    "continuations": {"inputs": "It was a", "continuations": [" dark night", " bright day"]},
    "continuations of several": {"inputs": ["It", "We"], "continuations": [[" was", " is"], [" were"]]},
    "its tokens": {"inputs": "It was", "return": ["tokens", "top", "entropy", "memory_share"], "top": 2},
    "a stream": {"inputs": "It was a dark night.", "return": ["tokens"], "stream": True, "timeout_s": 60.0},
}
_TOP = [TopToken(116, "t", -0.3), TopToken(115, "s", -1.5)]
_FIRST = ScoredToken(73, "I", top=None, entropy=None, memory_share=None)
_SECOND = ScoredToken(116, "t", -0.3, 0, top=_TOP, entropy=0.9, memory_share=[0.12, 0.31])
_PLAIN = ScoreReply(1, 1, 1, 1, -0.3, 1.35, 1.35, 0.433, 0.433, 0.433, is_greedy=True)
_LISTED = replace(_PLAIN, tokens=[_FIRST, _SECOND])


def _form(schema: dict[str, Any]) -> dict[str, Any]:
    return {
        "anyOf": [schema, _array_of(schema), _array_of(_array_of(schema))],
        "description": "one reply; an array for a list of inputs or for continuations; of arrays for both",
    }


def _array_of(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": schema}


ENDPOINTS = (
    Endpoint(
        method="POST",
        path="/score",
        tag="score",
        summary="Perplexity of texts of any length, plainly or as a stream",
        make=EngineRoad(ScoreRequest, plan=_plan),
        body=ScoreRequest,
        examples=_REQUESTS,
        reply=_LISTED,
        form=_form,
        stream=encode_event(ScoreEvent(1, 1, tokens=[_FIRST, _SECOND], reply=_PLAIN)).decode(),
        events=(ScoreEvent,),
        errors=(*openapi.ENDPOINT_ERRORS, Cancelled("cancelled: 4096 of 30000 tokens had been scored")),
    ),
)
