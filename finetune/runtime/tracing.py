"""Write OpenTelemetry spans that show what requests and jobs spend their time on.

OpenTelemetry is imported only if its standard environment variables configure it: ``OTEL_EXPORTER_OTLP_ENDPOINT`` (or
``OTEL_EXPORTER_OTLP_TRACES_ENDPOINT``) is the address that spans are sent to over HTTP; ``OTEL_TRACES_EXPORTER=console`` prints
them, and ``none`` or ``OTEL_SDK_DISABLED=true`` switches them off. ``OTEL_SERVICE_NAME``, ``OTEL_RESOURCE_ATTRIBUTES``,
``OTEL_TRACES_SAMPLER`` and the other standard variables are read by OpenTelemetry itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from finetune.distribution import install_command
from finetune.errors import InvalidInput, MissingExtra

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_EXPORTERS = ("otlp", "console", "none")
_SERVICE = "finetune"

Attributes = Mapping[str, str | int | float | bool]


class Tracing:
    """Writer of OpenTelemetry spans. Times are seconds since the Unix epoch."""

    def __init__(self, provider: Any) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer(_SERVICE)

    def begin(self, name: str, headers: Mapping[str, str]) -> Any:
        """Start a span for a request and return it; it belongs to the trace that the request's headers name, if they name one."""
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind

        return self._tracer.start_span(name, context=extract(headers), kind=SpanKind.SERVER)

    def add(self, name: str, began: float, ended: float, attributes: Attributes, parent: Any = None) -> Any:
        """Write a span that has already ended, and return it so that it can be the parent of others."""
        from opentelemetry.trace import set_span_in_context

        context = None if parent is None else set_span_in_context(parent)
        span = self._tracer.start_span(name, context=context, start_time=_nanoseconds(began), attributes=dict(attributes))
        span.end(_nanoseconds(ended))
        return span

    def stop(self) -> None:
        """Send the spans that are still queued, and shut the exporter down."""
        self._provider.shutdown()


def tracing_from_environment(environment: Mapping[str, str] = os.environ) -> Tracing | None:
    """Return the writer of spans that the environment variables configure; None if they configure none.

    Raises:
        MissingExtra: the OpenTelemetry packages are not installed.
        InvalidInput: ``OTEL_TRACES_EXPORTER`` is none of the known exporters.
    """
    asked = environment.get("OTEL_TRACES_EXPORTER", "") or ("otlp" if any(map(environment.get, _ENDPOINTS)) else "none")
    if asked not in _EXPORTERS:
        raise InvalidInput(f"OTEL_TRACES_EXPORTER={asked!r}: must be one of {', '.join(_EXPORTERS)}")
    if asked == "none" or environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        exporter = _exporter(asked)
    except ModuleNotFoundError as error:
        raise MissingExtra(f"spans for OpenTelemetry need {error.name}: {install_command('otel')}") from None
    named = "OTEL_SERVICE_NAME" in environment or "service.name=" in environment.get("OTEL_RESOURCE_ATTRIBUTES", "")
    provider = TracerProvider(resource=Resource.create({} if named else {"service.name": _SERVICE}))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracing(provider)


def _exporter(name: str) -> Any:
    if name == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        # The exporter's default is the object that sys.stdout was when its module was first imported.
        return ConsoleSpanExporter(out=sys.stdout, formatter=lambda span: span.to_json(indent=None) + os.linesep)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter()


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
