"""The record of one HTTP request and its response, which middlewares and endpoints share."""

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from server.requests.results import WorkSummary

KEY = "exchange"  # key of the record in the state of a request


@dataclass
class Exchange:
    """Ids, status and summary of one request and its response."""

    request_id: str  # the client's id or a new one; an endpoint replaces it by the id in the body
    trace_id: str | None  # of the client's traceparent
    status: int | None = None  # of the response, once it has ended
    summary: Callable[[], WorkSummary] | None = None  # set by endpoints that use the engine


def exchange_of(scope: MutableMapping[str, Any]) -> Exchange:
    """Return the record of the request with this ASGI scope, for example `request.scope`."""
    exchange = scope["state"][KEY]
    assert isinstance(exchange, Exchange)
    return exchange


def add_exchange(scope: MutableMapping[str, Any], exchange: Exchange) -> None:
    """Store the record for `exchange_of`."""
    scope.setdefault("state", {})[KEY] = exchange
