"""Registration of endpoints: path, handler and description in /openapi.json.

Knows no dialect. Each module of endpoints lists them in a tuple ENDPOINTS; `server.app` registers them all.
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Response
from msgspec import Struct

from server.errors import ServerError
from server.requests.service import Service
from server.web import openapi
from server.web.body import RequestBody

Handler = Callable[..., Awaitable[Response]]


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """An HTTP endpoint with its handler and its documentation."""

    method: str
    path: str
    tag: str = ""  # the section of the documentation
    summary: str = ""
    make: Callable[[Service], Handler]  # makes the handler, which takes a Request or the path's parameters
    body: type[RequestBody] | None = None
    examples: Mapping[str, Any] = field(default_factory=dict)  # example bodies by name
    reply: Struct | None = None  # an example of the JSON reply
    form: openapi.ReplyForm = openapi.one_reply  # the schema of the whole body: one reply or arrays of replies
    stream: str | None = None  # an example of the response as server-sent events
    events: tuple[type[Struct], ...] = ()  # the types of its events
    errors: tuple[ServerError, ...] = ()  # an example of each possible error
    in_schema: bool = True  # whether /openapi.json describes the endpoint

    @property
    def structs(self) -> tuple[type[Struct], ...]:
        """The types of the endpoint's replies and events."""
        return (*(() if self.reply is None else (type(self.reply),)), *self.events)


def register(app: FastAPI, endpoints: Iterable[Endpoint], *, service: Service) -> None:
    """Add all endpoints to the application, with the schemas of their bodies and replies."""
    endpoints = list(endpoints)
    for endpoint in endpoints:
        app.add_api_route(
            endpoint.path,
            endpoint.make(service),
            methods=[endpoint.method],
            tags=[endpoint.tag],
            summary=endpoint.summary or None,
            include_in_schema=endpoint.in_schema,
            responses=_responses(endpoint),
            openapi_extra=None if endpoint.body is None else openapi.body(endpoint.body, examples=endpoint.examples),
        )
    bodies = dict.fromkeys(endpoint.body for endpoint in endpoints if endpoint.body is not None)
    structs = dict.fromkeys(struct for endpoint in endpoints for struct in endpoint.structs)
    openapi.install(app, requests=list(bodies), replies=list(structs))


def _responses(endpoint: Endpoint) -> dict[int | str, dict[str, Any]]:
    responses = openapi.errors(*endpoint.errors)
    if endpoint.reply is not None:
        ok = openapi.ok(type(endpoint.reply), example=endpoint.reply)
        content = ok["content"]["application/json"]
        content["schema"] = endpoint.form(content["schema"])
        if endpoint.stream is not None:
            ok["content"]["text/event-stream"] = openapi.events(endpoint.stream)
        responses[200] = ok
    return responses
