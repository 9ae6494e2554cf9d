"""How endpoints are described in /openapi.json: bodies, replies and errors, each with an example; and the page /docs.

Knows no endpoint.
"""

import base64
import hashlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
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
    RequestTimeout,
    ServerError,
    Starting,
    Unauthorized,
    error_reply,
    retry_headers,
)
from server.web.body import RequestBody

REF = "#/components/schemas/"

SWAGGER = "https://cdn.jsdelivr.net/npm/swagger-ui-dist@5/"

UNAVAILABLE = (
    Starting("the model is being loaded"),
    Draining("the server is shutting down"),
    EngineDown("the engine has failed: out of memory"),
)
ENDPOINT_ERRORS = (
    MalformedRequest("the body is not JSON: expected value at line 1 column 1"),
    RequestTimeout("there was no answer within the 2.5 s of timeout_s"),
    BodyTooLarge("the body is larger than 33554432 bytes"),
    InvalidField.of("parameters.temperature", value=3, allowed="it should be at least 0 and at most 2"),
    QueueFull("288 sequences are running or waiting and 1 more were asked for; the limit is 288"),
    InternalError("the engine gave up: the logits of this sequence are not finite"),
    *UNAVAILABLE,
)


ReplyForm = Callable[[dict[str, Any]], dict[str, Any]]  # from the schema of a reply to that of the answer


def one_reply(schema: dict[str, Any]) -> dict[str, Any]:
    """The form of an answer that is one reply."""
    return schema


def body(model: type[RequestBody], *, examples: Mapping[str, Any]) -> dict[str, Any]:
    """For `openapi_extra`: the JSON body an endpoint reads by itself, with examples by name."""
    shown = {name: {"value": value} for name, value in examples.items()}
    content = {"application/json": {"schema": {"$ref": REF + model.__name__}, "examples": shown}}
    return {"requestBody": {"required": True, "content": content}}


def ok(reply: type[msgspec.Struct], *, example: msgspec.Struct) -> dict[str, Any]:
    """The description of a JSON answer."""
    return {
        "description": (reply.__doc__ or "").split("\n")[0],
        "content": {"application/json": {"schema": _ref(reply), "example": msgspec.to_builtins(example)}},
    }


def events(example: str) -> dict[str, Any]:
    """The description of a stream."""
    return {"schema": {"type": "string", "format": "event-stream"}, "example": example}


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


def install(app: FastAPI, *, requests: Sequence[type[RequestBody]], replies: Sequence[type[msgspec.Struct]]) -> None:
    """Add the schemas that `body`, `ok` and `errors` refer to, and the page /docs."""
    components = _components(requests, replies)

    def add_components(schema: dict[str, Any]) -> None:
        schema.setdefault("components", {}).setdefault("schemas", {}).update(components)

    _amend(app, add_components)
    html, policy = _docs_page(app)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(html, headers={"Content-Security-Policy": policy})


def require_bearer(app: FastAPI, *, open_paths: Collection[str]) -> None:
    """Say that all but `open_paths` want an API key, and what the answer is without one."""
    refusal = errors(Unauthorized("send an API key, as Authorization: Bearer KEY"))[401]

    def add_scheme(schema: dict[str, Any]) -> None:
        schema["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"bearer": []}]
        for path, operations in schema["paths"].items():
            for operation in operations.values():
                if path in open_paths:
                    operation["security"] = []
                else:
                    operation["responses"]["401"] = refusal

    _amend(app, add_scheme)


def _amend(app: FastAPI, change: Callable[[dict[str, Any]], None]) -> None:
    """Have `change` done once, to the finished document."""
    plain = app.openapi
    amended: list[dict[str, Any]] = []

    def openapi() -> dict[str, Any]:
        if not amended:
            schema = plain()
            change(schema)
            amended.append(schema)
        return amended[0]

    app.openapi = openapi  # type: ignore[method-assign]


def _docs_page(app: FastAPI) -> tuple[str, str]:
    """Swagger's page, and the policy that lets it load Swagger, run its one inline script and do nothing else."""
    page = get_swagger_ui_html(
        openapi_url="openapi.json",  # relative: it holds behind a proxy's prefix too
        title=app.title,
        swagger_js_url=SWAGGER + "swagger-ui-bundle.js",
        swagger_css_url=SWAGGER + "swagger-ui.css",
        swagger_favicon_url="data:,",
    )
    html = bytes(page.body).decode()
    scripts = re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{one}'" for one in hashes)
    policy = (
        f"default-src 'none'; connect-src 'self'; img-src data:; script-src {SWAGGER} {allowed}; "
        f"style-src {SWAGGER} 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html, policy


def _ref(reply: type[msgspec.Struct]) -> dict[str, str]:
    return {"$ref": REF + reply.__name__}


def _components(requests: Sequence[type[RequestBody]], replies: Sequence[type[msgspec.Struct]]) -> dict[str, Any]:
    _, structs = msgspec.json.schema_components([*replies, ErrorReply], ref_template=REF + "{name}")
    _, models = models_json_schema([(model, "validation") for model in requests], ref_template=REF + "{model}")
    return {**structs, **models.get("$defs", {})}
