"""The record of one HTTP exchange that everybody around a request reads and writes: its names, status and summary."""

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from server.requests.results import WorkSummary

KEY = "exchange"  # where the record stands in the state of a request


@dataclass
class Exchange:
    """What is known of one request and its answer."""

    request_id: str  # the client's or a new one; an endpoint may set another that the body names
    trace_id: str | None  # of the client's traceparent
    status: int | None = None  # of the answer, once the exchange has ended
    summary: Callable[[], WorkSummary] | None = None  # set by an endpoint that has the engine work


def exchange_of(scope: MutableMapping[str, Any]) -> Exchange:
    """The record of the request that an ASGI scope belongs to; `request.scope` of a Request is one."""
    exchange = scope["state"][KEY]
    assert isinstance(exchange, Exchange)
    return exchange


def add_exchange(scope: MutableMapping[str, Any], exchange: Exchange) -> None:
    """Put the record where `exchange_of` finds it."""
    scope.setdefault("state", {})[KEY] = exchange
