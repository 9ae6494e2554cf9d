"""Tests of when requests are traced, and of how an application and a whole server send spans to a collector."""

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.app import create_app
from server.config import ConfigError, Settings
from server.operation.tracing import open_tracing
from server.runtime import package_version
from tests.support.guarded_app import TRACE, TRACEPARENT
from tests.support.http_harness import make_bundle, make_link
from tests.support.live_server import live_server

pytest.importorskip("opentelemetry.sdk", reason="tracing is an extra: pip install 'allattn[otel]'")
from google.protobuf.json_format import MessageToDict
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[3]
SECRET = "the secret prompt"
BODY = {"inputs": SECRET, "parameters": {"max_new_tokens": 4}}


COLLECTOR = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_SERVICE_NAME": "x"},
        COLLECTOR | {"OTEL_SDK_DISABLED": "true"},
        COLLECTOR | {"OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_tracing_is_off_unless_a_collector_is_named(environ):
    assert open_tracing(environ) is None


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"OTEL_TRACES_EXPORTER": "jaeger"}, "OTEL_TRACES_EXPORTER = 'jaeger'; allowed: otlp, none"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "OTEL_EXPORTER_OTLP_PROTOCOL = 'grpc'; allowed: http/protobuf"),
    ],
)
def test_a_wrong_variable_is_named(environ, message):
    with pytest.raises(ConfigError, match=message):
        open_tracing(COLLECTOR | environ)


WITHOUT_EXTRA = (
    "import sys; sys.modules['opentelemetry.sdk'] = sys.modules['opentelemetry.exporter'] = None; "
    "from server.__main__ import main"
)


def python(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environ}, capture_output=True, text=True, check=False, timeout=60
    )


def test_where_it_is_off_nothing_of_it_is_imported():
    code = "import os, sys, server.__main__ as m; print(m.open_tracing(os.environ), *sys.modules)"
    done = python(code)
    assert done.stdout.startswith("None "), done.stderr
    loaded = done.stdout.split()
    assert not [name for name in loaded if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter"))]


def test_frameworks_do_not_trace_on_their_own():
    """FastAPI traces on its own if the process has a tracer provider."""
    code = """
import asyncio, httpx
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from tests.support.http_harness import make_link, post
exporter = InMemorySpanExporter()
trace.set_tracer_provider(TracerProvider())
trace.get_tracer_provider().add_span_processor(SimpleSpanProcessor(exporter))
print(asyncio.run(post("/generate", {"inputs": "a"})), exporter.get_finished_spans())
"""
    done = python(code, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    assert done.stdout == "<Response [200 OK]> ()\n", done.stderr


def test_a_collector_without_the_extra_is_one_line_and_status_2():
    done = python(f"{WITHOUT_EXTRA}; sys.exit(main([]))", **COLLECTOR)
    assert done.returncode == 2
    assert done.stderr == (
        "allattn: OTEL_EXPORTER_OTLP_ENDPOINT is set, but OpenTelemetry's SDK is not installed: "
        "pip install 'allattn[otel]', or unset it\n"
    )


def test_the_server_starts_without_the_extra_where_no_collector_is_named(tmp_path):
    done = python(f"{WITHOUT_EXTRA}; sys.exit(main(['--bundle', {str(tmp_path / 'nowhere')!r}]))")
    assert done.returncode == 1  # the server went on until it found no bundle
    assert "nowhere" in done.stderr


async def test_a_collector_that_hangs_holds_up_neither_requests_nor_the_end(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")  # else its thread would live on in later tests
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "1")
        monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "4")
        monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "2")
        tracing = open_tracing(os.environ)
        assert tracing is not None
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        app = create_app(settings=Settings(), bundle=make_bundle(), link=make_link(), tracing=tracing)
        started = time.monotonic()
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            for _ in range(20):
                assert (await client.post("/generate", json=BODY)).status_code == 200
        tracing.close(timeout_s=0.1)
        assert time.monotonic() - started < 0.9


# a whole server


@contextmanager
def collector() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Give the URL of a collector, and the resource spans that it has received, as dicts."""
    received: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.extend(MessageToDict(ExportTraceServiceRequest.FromString(body))["resourceSpans"])
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", received
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.slow
def test_a_server_sends_its_spans_to_the_collector_the_last_ones_when_it_ends(monkeypatch):
    with collector() as (address, received):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")  # the server sends no span before its end
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
        with live_server(ROOT / "bundles/default", "--num-rows", "2") as url:
            before = time.time_ns()
            httpx.post(f"{url}/generate", json=BODY, headers={"traceparent": TRACEPARENT}, timeout=60)
            with httpx.stream("POST", f"{url}/generate", json=BODY | {"stream": True}, timeout=60) as reply:
                request_id = reply.headers["x-request-id"]
                reply.read()
            after = time.time_ns()
            assert not received
    (resource,) = received
    facts = {one["key"]: one["value"]["stringValue"] for one in resource["resource"]["attributes"]}
    assert (facts["service.name"], facts["service.version"]) == ("allattn", package_version())
    assert facts["deployment.environment.name"] == "test"
    spans = resource["scopeSpans"][0]["spans"]
    assert sorted(span["name"] for span in spans) == sorted(["POST /generate", "queue", "prefill", "decode"] * 2)
    assert all(before < int(span["startTimeUnixNano"]) < after for span in spans)
    for span in (one for one in spans if one["name"] == "decode"):
        assert int(span["endTimeUnixNano"]) > int(span["startTimeUnixNano"])
    told = [one["attributes"] for one in spans if one["name"] == "POST /generate"]
    ids = {one["value"]["stringValue"] for span in told for one in span if one["key"] == "allattn.request_id"}
    assert ids == {TRACE, request_id}
    assert SECRET not in str(received)


@pytest.mark.slow
def test_a_server_without_its_collector_serves_and_ends_as_ever(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
        with live_server(ROOT / "bundles/default", "--num-rows", "2") as url:
            for _ in range(5):
                assert httpx.post(f"{url}/generate", json=BODY, timeout=60).status_code == 200
            asked = time.monotonic()
    assert time.monotonic() - asked < 10
