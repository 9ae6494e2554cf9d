"""Set-up of OpenTelemetry tracing. Knows no request.

Tracing is on if the standard variables name a collector. The same variables configure it: OTEL_EXPORTER_OTLP_*,
OTEL_TRACES_SAMPLER, OTEL_BSP_*, OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_SDK_DISABLED. If tracing is off, only
OpenTelemetry's API is imported, by FastAPI.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fastapi import FastAPI

from server.config import ConfigError
from server.runtime import package_version

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
PROTOCOL = "http/protobuf"
LAST_SPANS_S = 2.0  # the longest wait for the collector at shutdown
NAME = "allattn"


class Tracing:
    """The export of spans to a collector: in batches, from a thread, dropped if the collector does not accept them."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider

    def install(self, app: FastAPI, *, model: str) -> None:
        """Record a span of each request to `app`. Call it last: a span does not cover middlewares installed later."""
        from server.operation.request_spans import RequestSpans

        app.add_middleware(RequestSpans, tracer=self._provider.get_tracer(NAME, package_version()), model=model)

    def close(self, timeout_s: float = LAST_SPANS_S) -> None:
        """Send the remaining spans. Blocks for at most `timeout_s`; spans left after that are lost."""
        last = threading.Thread(target=self._provider.shutdown, daemon=True)
        last.start()
        last.join(timeout_s)


def open_tracing(environ: Mapping[str, str]) -> Tracing | None:
    """Return the tracing that the standard variables configure; None if they name no collector.

    Args:
        environ: the environment of this process.

    Raises:
        ConfigError: a variable has an unsupported value, or OpenTelemetry's SDK is not installed.
    """
    endpoint = next((name for name in ENDPOINTS if environ.get(name)), None)
    if endpoint is None or environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    exporter = environ.get("OTEL_TRACES_EXPORTER") or "otlp"
    if exporter == "none":
        return None
    if exporter != "otlp":
        raise ConfigError(f"OTEL_TRACES_EXPORTER = {exporter!r}; allowed: otlp, none")
    variable = next((name for name in PROTOCOLS if environ.get(name)), None)
    if variable is not None and environ[variable] != PROTOCOL:
        raise ConfigError(f"{variable} = {environ[variable]!r}; allowed: {PROTOCOL}")
    try:
        from server.operation.request_spans import make_provider
    except ModuleNotFoundError as missing:
        if not (missing.name or "").startswith("opentelemetry"):
            raise
        why = f"{endpoint} is set, but OpenTelemetry's SDK is not installed"
        raise ConfigError(f"{why}: pip install 'allattn[otel]', or unset it") from None
    try:
        return Tracing(make_provider(name=NAME, version=package_version()))
    except ValueError as error:  # another variable has a bad value
        raise ConfigError(f"OpenTelemetry cannot be set up: {error}") from None
