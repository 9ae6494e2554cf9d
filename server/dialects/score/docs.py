"""How POST /score is described in /openapi.json: every form of its request, its reply and its stream, by example."""

from typing import Any

import msgspec

from server.dialects.score.replies import ScoredToken, ScoreEvent, ScoreReply, TopToken
from server.dialects.score.schema import ScoreRequest
from server.errors import Cancelled
from server.web import openapi

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
_LISTED = msgspec.structs.replace(_PLAIN, tokens=[_FIRST, _SECOND])


def _docs() -> dict[str, Any]:
    body = openapi.body(ScoreRequest, examples=_REQUESTS)
    ok = openapi.ok(ScoreReply, example=_LISTED)
    one = ok["content"]["application/json"]["schema"]
    ok["content"]["application/json"]["schema"] = {
        "anyOf": [one, _array_of(one), _array_of(_array_of(one))],
        "description": "one reply; an array for a list of inputs or for continuations; of arrays for both",
    }
    ok["content"]["text/event-stream"] = openapi.events([ScoreEvent(1, 1, tokens=[_FIRST, _SECOND], reply=_PLAIN)])
    errors = openapi.errors(*openapi.ENDPOINT_ERRORS, Cancelled("cancelled: 4096 of 30000 tokens had been scored"))
    return {"openapi_extra": body, "responses": {200: ok, **errors}}


def _array_of(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": schema}


DOCS = _docs()
