"""How POST /v1/completions is described in /openapi.json: requests, replies and a stream, by example."""

from typing import Any

from server.dialects.openai.replies import Choice, Completion, Logprobs, Usage
from server.dialects.openai.schema import CompletionRequest
from server.errors import Cancelled, InvalidField, ModelNotFound
from server.web import openapi

_REQUESTS: dict[str, dict[str, Any]] = {
    "a text": {"model": "default", "prompt": "It was a", "max_tokens": 64, "temperature": 0.8},
    "until a line ends": {"prompt": "It was a", "stop": "\n", "temperature": 0},
    "several choices": {"prompt": ["It was", "Rain fell"], "n": 2, "best_of": 4, "seed": 42},
    "scores of the prompt": {"prompt": [73, 116], "max_tokens": 0, "echo": True, "logprobs": 1},
    "a stream": {"prompt": "It was a", "stream": True, "stream_options": {"include_usage": True}},
}
_LOGPROBS = Logprobs(["I", "t"], [None, -0.5], [None, {" ": -0.25, "t": -0.5}], [0, 1])
_USAGE = Usage(2, 0, 2)


def _completion(choices: list[Choice], usage: Usage | None) -> Completion:
    fingerprint = "0c6f1d2e9a51-float32-cpu-chunk64-0.1.0"
    return Completion("cmpl-6f1c0e4a", "text_completion", 1_764_000_000, "default", fingerprint, choices, usage)


def _docs() -> dict[str, Any]:
    body = openapi.body(CompletionRequest, examples=_REQUESTS)
    ok = openapi.ok(Completion, example=_completion([Choice(0, "It", _LOGPROBS, "length")], _USAGE))
    events = [_completion([Choice(0, " dark")], None), _completion([Choice(0, " night", None, "stop")], None)]
    stream = openapi.events([*events, _completion([], _USAGE)])
    ok["content"]["text/event-stream"] = {**stream, "example": stream["example"] + "data: [DONE]\n\n"}
    errors = [one for one in openapi.ENDPOINT_ERRORS if not isinstance(one, InvalidField)]
    invalid = InvalidField.of("temperature", value=3, allowed="it should be at least 0 and at most 2")
    cancelled = Cancelled("cancelled: 4096 of 30000 tokens had been scored")
    missing = ModelNotFound.of("gpt", name="default")
    return {"openapi_extra": body, "responses": {200: ok, **openapi.errors(*errors, invalid, cancelled, missing)}}


DOCS = _docs()
