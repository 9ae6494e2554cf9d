"""The span of a request, after OpenTelemetry's conventions for HTTP servers and generative models. Knows no endpoint.

No text of a request is in it, nor the query of its URL. Nothing is done for a token. FastAPI has spans of its own; they
stay off, for they end before the counts of an answer are known, take a client that leaves for a failure of the server,
and a stream that failed for a success.
"""

import time
from collections.abc import Iterator
from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.propagate import extract
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.requests.results import WorkSummary
from server.web.exchange import exchange_of

PROVIDER = "allattn"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE"})
UNTRACED = frozenset({"/health", "/health/live", "/health/ready", "/healthz", "/readyz", "/metrics"})  # asked for ever
MAX_PORT_DIGITS = 5  # the client names the port
FAILURES = frozenset({"error", "unfinished"})  # endings of sequences whose answer had begun


def make_provider(*, name: str, version: str) -> TracerProvider:
    """What sends spans to the collector of the standard variables. Raises ValueError where one of them is wrong."""
    given = OTELResourceDetector().detect().attributes  # of OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES
    resource = Resource.create({SERVICE_NAME: name, SERVICE_VERSION: version, **given})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)  # there is no exit, see server.__main__.run
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


class RequestSpans:
    """Stands before the application as a traced proxy would: each request gets a span, and goes on as its child.

    So the trace that RequestLog reads off `traceparent` is that of the span, also where the client sent none.
    """

    def __init__(self, app: ASGIApp, *, tracer: Tracer, model: str) -> None:
        self._app = app
        self._tracer = tracer
        self._model = model

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http" or scope["path"] in UNTRACED:
            await self._app(scope, receive, send)
            return
        scope = {**scope, "headers": list(scope["headers"]), "state": dict(scope.get("state", {}))}
        headers = MutableHeaders(scope=scope)
        span = self._tracer.start_span(
            _name(scope), context=extract(headers), kind=SpanKind.SERVER, attributes=_of_request(scope, headers=headers)
        )
        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier, set_span_in_context(span))
        headers.update(carrier)
        answer = _Answer(send)
        try:
            await self._app(scope, receive, answer.send)
        finally:
            self._end(span, scope=scope, answer=answer)

    def _end(self, span: Span, *, scope: Scope, answer: "_Answer") -> None:
        if not span.is_recording():
            return
        exchange = exchange_of(scope)
        if route := getattr(scope.get("route"), "path", None):
            span.update_name(f"{_name(scope)} {route}")
            span.set_attribute("http.route", route)
        summary = None if exchange.summary is None else exchange.summary()
        status = exchange.status or 500
        span.set_attributes({"allattn.request_id": exchange.request_id, "http.response.status_code": status})
        if summary is not None:
            span.set_attributes(dict(_of_work(summary, model=self._model)))
        if status >= 500:
            _fail(span, str(status))
        elif status == 200 and summary and (failed := FAILURES.intersection(summary.finish_reasons)):
            _fail(span, min(failed))
        if summary is not None:
            self._add_phases(span, summary, answer=answer)
        span.end()

    def _add_phases(self, span: Span, summary: WorkSummary, *, answer: "_Answer") -> None:
        """Child spans of what the engine did for a single sequence; those of several overlap, and nobody tells when.

        A stream begins to answer once its sequence is submitted, all else once it has ended.
        """
        durations = [(name.removesuffix("_ms"), ms) for name, ms in summary.longest_ms.items()]
        known = [(phase, round(ms * 1e6)) for phase, ms in durations if ms is not None]
        if summary.sequences != 1 or not known or answer.began is None:
            return
        start = answer.began if answer.is_stream else answer.began - sum(ns for _, ns in known)
        for phase, ns in known:
            child = self._tracer.start_span(phase, context=set_span_in_context(span), start_time=start)
            start += ns
            child.end(start)


class _Answer:
    """What is seen of an answer on its way: that it begins."""

    def __init__(self, send: Send) -> None:
        self.began: int | None = None  # ns since the epoch
        self.is_stream = False
        self._send = send

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.began = time.time_ns()
            self.is_stream = Headers(raw=message["headers"]).get("content-type", "").startswith("text/event-stream")
        await self._send(message)


def _name(scope: Scope) -> str:
    """One of few, whatever the client calls its method."""
    return scope["method"] if scope["method"] in METHODS else "HTTP"


def _of_request(scope: Scope, *, headers: Headers) -> dict[str, Any]:
    """What is known before there is an answer."""
    host, _, port = headers.get("host", "").rpartition(":")
    if not (port.isdecimal() and len(port) <= MAX_PORT_DIGITS):  # of an IPv6 address, or none was named
        host, port = headers.get("host", ""), ""
    client = scope.get("client")
    known = {
        "http.request.method": scope["method"] if scope["method"] in METHODS else "_OTHER",
        "url.path": scope["path"],
        "url.scheme": scope.get("scheme", "http"),
        "server.address": host,
        "server.port": int(port) if port else None,
        "network.protocol.version": scope.get("http_version"),
        "client.address": client[0] if client else None,
        "user_agent.original": headers.get("user-agent"),
    }
    return {name: value for name, value in known.items() if value not in (None, "")}


def _of_work(summary: WorkSummary, *, model: str) -> Iterator[tuple[str, Any]]:
    """What an endpoint that had the engine work says at the end."""
    yield "gen_ai.operation.name", "text_completion" if summary.generates else "score"
    yield "gen_ai.provider.name", PROVIDER
    yield "gen_ai.request.model", model
    yield "gen_ai.response.model", model
    yield "gen_ai.response.finish_reasons", summary.finish_reasons
    if summary.prompt_tokens is not None and summary.generated_tokens is not None:
        yield "gen_ai.usage.input_tokens", summary.prompt_tokens
        yield "gen_ai.usage.output_tokens", summary.generated_tokens
    yield "allattn.sequences", summary.sequences
    if summary.scored_tokens is not None:
        yield "allattn.scored_tokens", summary.scored_tokens
    for name, longest in summary.longest_ms.items():
        if longest is not None:
            yield f"allattn.{name}", longest


def _fail(span: Span, kind: str) -> None:
    span.set_attribute("error.type", kind)
    span.set_status(Status(StatusCode.ERROR))
