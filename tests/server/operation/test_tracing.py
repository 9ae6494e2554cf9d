"""Tests of the spans of requests to the application over a fake engine; spans are kept in memory."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.app import create_app
from server.config import Settings
from server.operation.tracing import Tracing
from tests.support.fake_link import TIMINGS, FakeLink
from tests.support.guarded_app import PARENT, TRACE, TRACEPARENT, ends, log_lines
from tests.support.http_harness import SCRIPT, eventually, make_bundle, make_link, serving_app

__all__ = ["log_lines"]  # a fixture

pytest.importorskip("opentelemetry.sdk", reason="tracing is an extra: pip install 'allattn[otel]'")
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as gen_ai
from opentelemetry.semconv.attributes import (
    error_attributes,
    http_attributes,
    network_attributes,
    server_attributes,
    url_attributes,
    user_agent_attributes,
)
from opentelemetry.trace import SpanKind, StatusCode

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[3]
SECRET = "the secret prompt"
BODY = {"inputs": SECRET, "parameters": {"max_new_tokens": 4}}


class Traced:
    """The application over a fake engine, with the spans that have ended."""

    def __init__(self, link: FakeLink | None = None) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.app = create_app(
            settings=Settings(), bundle=make_bundle(), link=link or make_link(), tracing=Tracing(provider)
        )

    async def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server:81") as client:
            return await client.request(method, path, **options)

    @property
    def spans(self) -> list[ReadableSpan]:
        return sorted(self._exporter.get_finished_spans(), key=lambda span: span.start_time or 0)

    @property
    def span(self) -> ReadableSpan:
        """Return the only span of a request."""
        (span,) = [span for span in self.spans if span.kind == SpanKind.SERVER]
        return span

    @property
    def phases(self) -> list[ReadableSpan]:
        return [span for span in self.spans if span.kind != SpanKind.SERVER]


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


async def test_a_generation_is_a_span_after_the_conventions():
    traced = Traced()
    reply = await traced.request("POST", "/generate", json=BODY, headers={"User-Agent": "tester/1"})
    assert reply.status_code == 200
    span = traced.span
    assert (span.name, span.kind, span.status.status_code) == ("POST /generate", SpanKind.SERVER, StatusCode.UNSET)
    assert span.parent is None
    assert attributes(span) == {
        http_attributes.HTTP_REQUEST_METHOD: "POST",
        http_attributes.HTTP_ROUTE: "/generate",
        http_attributes.HTTP_RESPONSE_STATUS_CODE: 200,
        url_attributes.URL_PATH: "/generate",
        url_attributes.URL_SCHEME: "http",
        server_attributes.SERVER_ADDRESS: "server",
        server_attributes.SERVER_PORT: 81,
        network_attributes.NETWORK_PROTOCOL_VERSION: "1.1",
        "client.address": "127.0.0.1",
        user_agent_attributes.USER_AGENT_ORIGINAL: "tester/1",
        gen_ai.GEN_AI_OPERATION_NAME: "text_completion",
        gen_ai.GEN_AI_PROVIDER_NAME: "allattn",
        gen_ai.GEN_AI_REQUEST_MODEL: "tiny",
        gen_ai.GEN_AI_RESPONSE_MODEL: "tiny",
        gen_ai.GEN_AI_RESPONSE_FINISH_REASONS: ("length",),
        gen_ai.GEN_AI_USAGE_INPUT_TOKENS: len(SECRET),
        gen_ai.GEN_AI_USAGE_OUTPUT_TOKENS: 4,
        "allattn.request_id": reply.headers["x-request-id"],
        "allattn.sequences": 1,
        "allattn.queue_ms": TIMINGS.queue_ms,
        "allattn.prefill_ms": TIMINGS.prefill_ms,
        "allattn.decode_ms": TIMINGS.decode_ms,
    }


@pytest.mark.parametrize("stream", [False, True])
async def test_what_the_engine_did_is_three_child_spans_one_after_the_other(stream):
    traced = Traced(make_link(step_s=0.002))
    await traced.request("POST", "/generate", json=BODY | {"stream": stream})
    phases, whole = traced.phases, traced.span
    assert [span.name for span in phases] == ["queue", "prefill", "decode"]
    assert [(span.end_time - span.start_time) / 1e6 for span in phases] == [1, 2, 3]
    assert [span.start_time for span in phases[1:]] == [span.end_time for span in phases[:-1]]
    assert all(span.parent == whole.context for span in phases)
    assert whole.start_time <= phases[0].start_time
    assert phases[-1].end_time <= whole.end_time


async def test_sequences_that_overlap_are_not_drawn_as_if_they_did_not():
    traced = Traced()
    await traced.request("POST", "/generate", json=BODY | {"inputs": ["a", "b"]})
    assert not traced.phases
    told = attributes(traced.span)
    assert (told["allattn.sequences"], told["allattn.decode_ms"]) == (2, TIMINGS.decode_ms)
    assert told[gen_ai.GEN_AI_RESPONSE_FINISH_REASONS] == ("length", "length")


async def test_a_scoring_is_a_span_too():
    traced = Traced()
    await traced.request("POST", "/score", json={"inputs": "abc"})
    told = attributes(traced.span)
    assert (told[gen_ai.GEN_AI_OPERATION_NAME], told["allattn.scored_tokens"]) == ("score", 2)
    assert gen_ai.GEN_AI_USAGE_OUTPUT_TOKENS not in told
    assert [span.name for span in traced.phases] == ["queue", "prefill"]


async def test_a_completion_of_an_openai_client_is_a_span_too():
    traced = Traced()
    await traced.request("POST", "/v1/completions", json={"model": "tiny", "prompt": "ab", "max_tokens": 3})
    told = attributes(traced.span)
    assert traced.span.name == "POST /v1/completions"
    assert (told[gen_ai.GEN_AI_USAGE_INPUT_TOKENS], told[gen_ai.GEN_AI_USAGE_OUTPUT_TOKENS]) == (2, 3)


# the trace, and the log


async def test_the_span_is_a_child_of_the_clients_and_the_log_has_the_same_trace(log_lines):
    traced = Traced()
    headers = {"traceparent": TRACEPARENT, "tracestate": "vendor=1"}
    reply = await traced.request("POST", "/generate", json=BODY, headers=headers)
    span = traced.span
    assert f"{span.context.trace_id:032x}" == TRACE == reply.headers["x-request-id"]
    assert f"{span.parent.span_id:016x}" == PARENT
    assert span.context.trace_state.get("vendor") == "1"
    (line,) = ends(log_lines)
    assert (line["request_id"], line["trace_id"]) == (TRACE, TRACE)


async def test_without_a_trace_of_the_client_the_new_one_is_the_requests_id(log_lines):
    traced = Traced()
    reply = await traced.request("POST", "/generate", json=BODY, headers={"traceparent": "nonsense"})
    trace = f"{traced.span.context.trace_id:032x}"
    assert reply.headers["x-request-id"] == trace
    assert [(line["request_id"], line["trace_id"]) for line in ends(log_lines)] == [(trace, trace)]


async def test_an_id_of_the_client_stands_beside_the_trace(log_lines):
    traced = Traced()
    await traced.request("POST", "/generate", json=BODY | {"request_id": "mine-1"}, headers={"X-Request-Id": "other"})
    (line,) = ends(log_lines)
    assert (line["request_id"], line["trace_id"]) == ("mine-1", f"{traced.span.context.trace_id:032x}")
    assert attributes(traced.span)["allattn.request_id"] == "mine-1"


async def test_what_the_client_does_not_sample_is_not_traced_and_keeps_its_id():
    traced = Traced()
    reply = await traced.request("POST", "/generate", json=BODY, headers={"traceparent": TRACEPARENT[:-1] + "0"})
    assert (reply.status_code, reply.headers["x-request-id"]) == (200, TRACE)
    assert not traced.spans


# failures


async def test_a_mistake_of_the_client_is_no_error_of_the_server():
    traced = Traced()
    await traced.request("POST", "/generate", json={"inputs": ""})
    assert attributes(traced.span)[http_attributes.HTTP_RESPONSE_STATUS_CODE] == 422
    assert traced.span.status.status_code == StatusCode.UNSET
    assert gen_ai.GEN_AI_REQUEST_MODEL not in attributes(traced.span)


async def test_an_answer_of_the_kind_500_is_an_error():
    link = make_link()
    link.state = "failed"
    traced = Traced(link)
    await traced.request("POST", "/generate", json=BODY)
    assert attributes(traced.span)[error_attributes.ERROR_TYPE] == "503"
    assert traced.span.status.status_code == StatusCode.ERROR


async def test_a_bug_is_an_error_of_which_nothing_is_quoted():
    traced = Traced()

    @traced.app.post("/bug")
    async def bug() -> None:
        raise ValueError(SECRET)

    reply = await traced.request("POST", "/bug")
    assert reply.status_code == 500
    assert attributes(traced.span)[error_attributes.ERROR_TYPE] == "500"
    assert SECRET not in traced.span.to_json()


async def test_a_stream_that_fails_after_its_status_is_an_error():
    link = make_link(hang_after=2)
    traced = Traced(link)
    request = asyncio.create_task(traced.request("POST", "/generate", json=BODY | {"stream": True}))
    await eventually(lambda: link.num_hanging)
    link.end_all("error", error="out of memory")
    assert (await request).status_code == 200
    assert attributes(traced.span)[error_attributes.ERROR_TYPE] == "unfinished"
    assert traced.span.status.status_code == StatusCode.ERROR
    assert not traced.phases


async def test_a_client_that_leaves_is_a_499_and_no_error():
    link = make_link(hang_after=2)
    traced = Traced(link)
    async with serving_app(traced.app) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        data = json.dumps(BODY | {"stream": True}).encode()
        writer.write(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
        await eventually(lambda: link.num_hanging)
        writer.close()
        await eventually(lambda: traced.spans)
    assert attributes(traced.span)[http_attributes.HTTP_RESPONSE_STATUS_CODE] == 499
    assert traced.span.status.status_code == StatusCode.UNSET


async def test_a_request_that_the_server_cancels_is_one_whose_client_has_left(log_lines):
    link = make_link(hang_after=2)
    traced = Traced(link)
    request = asyncio.create_task(traced.request("POST", "/generate", json=BODY))
    await eventually(lambda: link.num_hanging)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert attributes(traced.span)[http_attributes.HTTP_RESPONSE_STATUS_CODE] == 499
    assert [line["status"] for line in ends(log_lines)] == [499]


async def test_names_of_spans_are_few_whatever_clients_send():
    traced = Traced()
    await traced.request("GET", "/no/such/17?key=secret")
    await traced.request("BREW", "/generate", headers={"Host": "x:" + "9" * 5000})
    await traced.request("DELETE", "/requests/17")
    assert {span.name for span in traced.spans} == {"GET", "HTTP /generate", "DELETE /requests/{request_id:path}"}
    assert attributes(traced.spans[1])[http_attributes.HTTP_REQUEST_METHOD] == "_OTHER"
    assert not any("secret" in span.to_json() for span in traced.spans)


async def test_no_text_is_in_a_span():
    traced = Traced()
    for body in (BODY, BODY | {"stream": True}, BODY | {"inputs": [SECRET, SECRET]}):
        await traced.request("POST", "/generate", json=body)
    told = "".join(span.to_json() for span in traced.spans)
    assert SECRET not in told
    assert SCRIPT[:4] not in told


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready", "/healthz", "/readyz", "/metrics"])
async def test_probes_are_not_traced(path):
    traced = Traced()
    assert (await traced.request("GET", path)).status_code == 200
    assert not traced.spans
