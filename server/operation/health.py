"""GET /health with its probes, GET /info (the model, the engine, the limits) and GET /model/spans."""

import math
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import msgspec
from fastapi import Response
from msgspec import Struct

from server.dialects.generate.schema import Parameters
from server.dialects.sampling import MAX_STOP_CHARS
from server.errors import Starting
from server.protocol.json import encode
from server.protocol.messages import LinkState
from server.requests.service import Service
from server.runtime import package_version
from server.web import openapi
from server.web.endpoint import Endpoint, Handler

LIMITS = (
    "max_waiting",
    "max_waiting_tokens",
    "max_body_bytes",
    "max_behind",
    "timeout_s",
)  # settings that a client's request can run into


class EngineHealth(Struct, frozen=True):
    """The engine process and its last signs of life."""

    pid: int | None
    heartbeat_age_s: float | None
    last_step_age_s: float | None
    restarts: int  # since the server started


class RowsHealth(Struct, frozen=True):
    """Used and free rows of the batch."""

    used: int
    free: int


class QueueHealth(Struct, frozen=True):
    """Sequences that wait for a row."""

    requests: int  # sequences
    tokens: int  # prompt tokens that are still to be read


class ModelHealth(Struct, frozen=True):
    """The served model."""

    name: str
    hash: str


class HealthReply(Struct, frozen=True):
    """The answer to GET /health."""

    state: LinkState
    failure: str
    engine: EngineHealth
    rows: RowsHealth
    queue: QueueHealth
    model: ModelHealth


def _health_handler(service: Service) -> Handler:
    async def health() -> Response:
        return Response(encode(_health(service)), media_type="application/json")

    return health


def _live(_service: Service) -> Handler:
    async def live() -> Response:
        return _json({"status": "live"})

    return live


def _ready(service: Service) -> Handler:
    async def ready() -> Response:
        if error := service.unavailable():
            raise error
        return _json({"status": "ready"})

    return ready


def _info_handler(service: Service) -> Handler:
    async def info() -> Response:
        return _json(_info(service))

    return info


def _spans_handler(service: Service) -> Handler:
    async def spans() -> Response:
        return _json(_spans(service))

    return spans


def _json(answer: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(answer), media_type="application/json")


def _health(service: Service) -> HealthReply:
    link, num_rows = service.link, service.settings.num_rows
    return HealthReply(
        state=link.state,
        failure=link.failure,
        engine=EngineHealth(
            pid=link.ready.pid if link.ready else None,
            heartbeat_age_s=_finite(link.heartbeat_age_s),
            last_step_age_s=_finite(link.last_step_age_s),
            restarts=link.restarts,
        ),
        rows=RowsHealth(used=link.rows_used, free=num_rows - link.rows_used),
        queue=QueueHealth(requests=link.num_waiting, tokens=link.tokens_waiting),
        model=ModelHealth(service.bundle.path.resolve().name, service.bundle.hash),
    )


def _finite(seconds: float) -> float | None:
    """Returns None instead of infinity, which stands for no heartbeat or step yet."""
    return seconds if math.isfinite(seconds) else None


def _info(service: Service) -> dict[str, Any]:
    bundle, ready, settings = service.bundle, service.link.ready, service.settings
    return {
        "model": {
            "name": bundle.path.resolve().name,
            "hash": bundle.hash,
            "num_parameters": bundle.config.num_parameters,
            "config": bundle.config.model_dump(),
            "tokenizer": {
                "kind": bundle.tokenizer.kind,
                "vocab_size": bundle.tokenizer.vocab_size,
                "eos_id": bundle.tokenizer.eos_id,
            },
            "training": bundle.training,
            "card": bundle.card,
        },
        "engine": None if ready is None else ready.facts.as_dict(),
        "limits": {
            "max_inputs": service.admission.max_sequences,
            "max_stop_chars": MAX_STOP_CHARS,
            **{name: getattr(settings, name) for name in LIMITS},
        },
        "defaults": Parameters().model_dump(),
        "fingerprint": service.fingerprint,
        "version": package_version(),
        "versions": {name: version(name) for name in ("torch", "fastapi", "uvicorn")},
    }


def _spans(service: Service) -> dict[str, Any]:
    """Returns how far each head looks back, for a picture."""
    config, ready = service.bundle.config, service.link.ready
    if ready is None:
        raise service.unavailable() or Starting("the model is being loaded")
    return {
        "max_span": config.max_span,
        "span_ramp": config.span_ramp,
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "num_persistent": config.num_persistent,
        "spans": ready.facts.spans,
        "state_bytes_per_row": ready.facts.state_bytes_per_row,
    }


_EXAMPLE = HealthReply(
    "ready",
    "",
    EngineHealth(4242, 0.3, 0.004, 0),
    RowsHealth(3, 29),
    QueueHealth(0, 0),
    ModelHealth("default", "0c6f1d2e"),
)


def _get(path: str, summary: str, make: Callable[[Service], Handler], **more: Any) -> Endpoint:
    return Endpoint(method="GET", path=path, tag="others", summary=summary, make=make, **more)


ENDPOINTS = (
    _get("/health", "State in full", _health_handler, reply=_EXAMPLE),
    _get("/health/live", "This process answers", _live),
    _get("/healthz", "", _live, in_schema=False),
    _get("/health/ready", "Work is taken", _ready, errors=openapi.UNAVAILABLE),
    _get("/readyz", "", _ready, in_schema=False),
    _get("/info", "The model, the limits and the defaults", _info_handler),
    _get("/model/spans", "How far each head looks back", _spans_handler, errors=openapi.UNAVAILABLE),
)
