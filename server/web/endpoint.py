"""One registration of an endpoint: where it answers, what answers, and how /openapi.json describes it.

Knows no dialect. A package of endpoints lists them in a tuple ENDPOINTS; `server.app` adds them all.
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
    """What `register` needs to know of an endpoint."""

    method: str
    path: str
    tag: str = ""  # the section of the documentation
    summary: str = ""
    make: Callable[[Service], Handler]  # called once; the handler takes a Request or the path's parameters
    body: type[RequestBody] | None = None
    examples: Mapping[str, Any] = field(default_factory=dict)  # bodies by name
    reply: Struct | None = None  # an example of the JSON answer
    form: openapi.ReplyForm = openapi.one_reply  # what the answer is made of such replies
    stream: str | None = None  # an example of the answer as server-sent events
    events: tuple[type[Struct], ...] = ()  # what they hold
    errors: tuple[ServerError, ...] = ()  # an example for each way to fail
    in_schema: bool = True  # whether /openapi.json has it

    @property
    def structs(self) -> tuple[type[Struct], ...]:
        """What its answers are made of."""
        return (*(() if self.reply is None else (type(self.reply),)), *self.events)


def register(app: FastAPI, endpoints: Iterable[Endpoint], *, service: Service) -> None:
    """Add all endpoints to the application, with the schemas of their bodies and replies."""
    endpoints = list(endpoints)
    for one in endpoints:
        app.add_api_route(
            one.path,
            one.make(service),
            methods=[one.method],
            tags=[one.tag],
            summary=one.summary or None,
            include_in_schema=one.in_schema,
            responses=_responses(one),
            openapi_extra=None if one.body is None else openapi.body(one.body, examples=one.examples),
        )
    bodies = dict.fromkeys(one.body for one in endpoints if one.body is not None)
    structs = dict.fromkeys(struct for one in endpoints for struct in one.structs)
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
