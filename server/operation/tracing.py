"""OpenTelemetry tracing: whether it is on, where spans go, and that nobody waits for them. Knows no request.

It is on where the standard variables name a collector, and is set up by the same variables: OTEL_EXPORTER_OTLP_*,
OTEL_TRACES_SAMPLER, OTEL_BSP_*, OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_SDK_DISABLED. Where it is off,
nothing of OpenTelemetry is imported but the API, which FastAPI imports.
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
LAST_SPANS_S = 2.0  # for the collector to take what is left at the end
NAME = "allattn"


class Tracing:
    """Spans on their way to a collector: in batches, from a thread, dropped where it does not take them."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider

    def install(self, app: FastAPI, *, model: str) -> None:
        """Have a span of each request to `app`. To be called last: what is installed later is not in it."""
        from server.operation.request_spans import RequestSpans

        app.add_middleware(RequestSpans, tracer=self._provider.get_tracer(NAME, package_version()), model=model)

    def close(self, timeout_s: float = LAST_SPANS_S) -> None:
        """Send what is left; a collector that does not take it in time loses it. Blocks for so long at most."""
        last = threading.Thread(target=self._provider.shutdown, daemon=True)
        last.start()
        last.join(timeout_s)


def open_tracing(environ: Mapping[str, str]) -> Tracing | None:
    """What the standard variables ask for; None where they name no collector. `environ`: that of this process.

    Raises:
        ConfigError: they ask for what there is not, or OpenTelemetry's SDK is not installed.
    """
    endpoint = next((name for name in ENDPOINTS if environ.get(name)), None)
    if endpoint is None or environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    exporter = environ.get("OTEL_TRACES_EXPORTER") or "otlp"
    if exporter == "none":
        return None
    if exporter != "otlp":
        raise ConfigError(f"OTEL_TRACES_EXPORTER = {exporter!r}; allowed: otlp, none")
    named = next((name for name in PROTOCOLS if environ.get(name)), None)
    if named is not None and environ[named] != PROTOCOL:
        raise ConfigError(f"{named} = {environ[named]!r}; allowed: {PROTOCOL}")
    try:
        from server.operation.request_spans import make_provider
    except ModuleNotFoundError as missing:
        if not (missing.name or "").startswith("opentelemetry"):
            raise
        why = f"{endpoint} is set, but OpenTelemetry's SDK is not installed"
        raise ConfigError(f"{why}: pip install 'allattn[otel]', or unset it") from None
    try:
        return Tracing(make_provider(name=NAME, version=package_version()))
    except ValueError as error:  # a value of one of its other variables
        raise ConfigError(f"OpenTelemetry cannot be set up: {error}") from None
