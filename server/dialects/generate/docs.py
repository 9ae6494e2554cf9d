"""How POST /generate is described in /openapi.json: requests, replies and a stream, by example."""

from typing import Any

from msgspec.structs import replace

from server.dialects.generate.replies import Details, GenerateEvent, GenerateReply, PromptToken, TokenInfo
from server.dialects.generate.schema import GenerateRequest
from server.protocol.messages import Timings
from server.web import openapi

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
_TOKEN = TokenInfo(32, " ", -0.25, special=False)
_TOP = [_TOKEN, TokenInfo(10, "\n", -1.75, special=False)]
_PREFILL = [PromptToken(73, "I", None), PromptToken(116, "t", -0.5)]
_DETAILS = Details("length", 1, 2, 42, None, -0.25, Timings(0.1, 2.5, 4.0), "0c6f1d2e9a51-float32-cpu-0.1.0")
_ALL_DETAILS = replace(_DETAILS, prefill=_PREFILL, tokens=[_TOKEN], top_tokens=[_TOP])


def _docs() -> dict[str, Any]:
    body = openapi.body(GenerateRequest, examples=_REQUESTS)
    ok = openapi.ok(GenerateReply, example=GenerateReply(" ", _ALL_DETAILS))
    one = ok["content"]["application/json"]["schema"]
    ok["content"]["application/json"]["schema"] = {
        "anyOf": [one, {"type": "array", "items": one}],
        "description": "one reply; an array for a list of inputs or for n > 1, the n of the first input first",
    }
    ok["content"]["text/event-stream"] = openapi.events([GenerateEvent(1, _TOKEN, " ", _DETAILS)])
    return {"openapi_extra": body, "responses": {200: ok, **openapi.errors(*openapi.ENDPOINT_ERRORS)}}


DOCS = _docs()
