"""How endpoints are described in /openapi.json: bodies, replies and errors, each with an example. Knows no endpoint."""

from typing import Any

import msgspec
from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from server.errors import (
    BodyTooLarge,
    Draining,
    EngineDown,
    ErrorReply,
    InternalError,
    InvalidField,
    MalformedRequest,
    QueueFull,
    ServerError,
    Starting,
    error_reply,
    retry_headers,
)
from server.replies import GenerateEvent, GenerateReply, HealthReply, ScoreReply
from server.schemas import GenerateRequest, RequestBody, ScoreRequest

REF = "#/components/schemas/"

UNAVAILABLE = (
    Starting("the model is being loaded"),
    Draining("the server is shutting down"),
    EngineDown("the engine has failed: out of memory"),
)
ENDPOINT_ERRORS = (
    MalformedRequest("the body is not JSON: expected value at line 1 column 1"),
    BodyTooLarge("the body is larger than 33554432 bytes"),
    InvalidField.of("parameters.temperature", value=3, allowed="it should be at least 0 and at most 2"),
    QueueFull("288 sequences are running or waiting and 1 more were asked for; the limit is 288"),
    InternalError("the engine gave up: the logits of this sequence are not finite"),
    *UNAVAILABLE,
)


def body(model: type[RequestBody], *, example: dict[str, Any]) -> dict[str, Any]:
    """For `openapi_extra`: the JSON body an endpoint reads by itself."""
    content = {"application/json": {"schema": {"$ref": REF + model.__name__}, "example": example}}
    return {"requestBody": {"required": True, "content": content}}


def ok(reply: type[msgspec.Struct], *, example: msgspec.Struct) -> dict[str, Any]:
    """The description of a JSON answer."""
    return {
        "description": (reply.__doc__ or "").split("\n")[0],
        "content": {"application/json": {"schema": _ref(reply), "example": msgspec.to_builtins(example)}},
    }


def events(example: list[msgspec.Struct]) -> dict[str, Any]:
    """The description of a stream."""
    lines = "".join(f"data: {msgspec.json.encode(event).decode()}\n\n" for event in example)
    return {"schema": {"type": "string", "format": "event-stream"}, "example": lines}


def errors(*examples: ServerError) -> dict[int | str, dict[str, Any]]:
    """For `responses`: one entry a status, with an example for each way to come to it."""
    responses: dict[int | str, dict[str, Any]] = {}
    for error in examples:
        entry = responses.setdefault(
            error.status,
            {
                "description": (type(error).__doc__ or "").split("\n")[0],
                "content": {"application/json": {"schema": _ref(ErrorReply), "examples": {}}},
            },
        )
        value = msgspec.to_builtins(error_reply(error, request_id="6f1c0e4a"))
        entry["content"]["application/json"]["examples"][error.code] = {"value": value}
        if retry_headers(error):
            entry["headers"] = {name: {"schema": {"type": "string"}} for name in retry_headers(error)}
    return responses


def install(app: FastAPI) -> None:
    """Add the schemas that `body`, `ok` and `errors` refer to."""
    plain = app.openapi

    def with_components() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = plain()
            schema.setdefault("components", {}).setdefault("schemas", {}).update(_components())
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = with_components  # type: ignore[method-assign]


def _ref(reply: type[msgspec.Struct]) -> dict[str, str]:
    return {"$ref": REF + reply.__name__}


def _components() -> dict[str, Any]:
    replies = (GenerateReply, GenerateEvent, ScoreReply, HealthReply, ErrorReply)
    _, structs = msgspec.json.schema_components(replies, ref_template=REF + "{name}")
    _, models = models_json_schema(
        [(model, "validation") for model in (GenerateRequest, ScoreRequest)], ref_template=REF + "{model}"
    )
    return {**structs, **models["$defs"]}
