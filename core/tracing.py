"""OpenTelemetry traces, sent to NIGHTPRESS_OTLP_ENDPOINT. Without an endpoint, OpenTelemetry is not imported and a span does nothing.

A job is one trace. It begins with the request that submitted the job, whose trace context is stored with the job, and ends with the
commit of the last attempt. A child has no network: it reports in frames what it did and when, and its supervisor sends the spans.
"""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Literal, Protocol

from nightpress.core.errors import ErrorCode, NightpressError

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import SpanKind, Tracer

_STANDARD = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
Value = str | int | float | bool
Kind = Literal["internal", "server", "producer", "consumer"]


class SpanNotes(Protocol):
    """The changes that callers may make to an open span."""

    def update_name(self, name: str) -> None: ...

    def set_attributes(self, attributes: Mapping[str, Value]) -> None: ...


class _Off:
    def update_name(self, name: str) -> None: ...

    def set_attributes(self, attributes: Mapping[str, Value]) -> None: ...


#: a span that is not sent anywhere
NOT_TRACED: SpanNotes = _Off()
_sender: "_Sender | None" = None


def configure_tracing(endpoint: str, service: str) -> None:
    """Send this process's spans to `endpoint` (OTLP over HTTP). Empty: to the endpoint in OpenTelemetry's own variables, if any.

    Called once by each entry point. `service`: the process's role, e.g. `api`. Raises invalid_request if OpenTelemetry is not installed.
    """
    global _sender
    if endpoint or any(os.environ.get(name) for name in _STANDARD):
        _sender = _Sender(endpoint, service)


@contextmanager
def span(
    name: str,
    attributes: Mapping[str, Value] | None = None,
    *,
    parent: str | None = None,
    kind: Kind = "internal",
    started_ns: int | None = None,
) -> Iterator[SpanNotes]:
    """Record a span around the block. An exception that leaves the block marks the span as failed.

    `parent`: the W3C `traceparent` of a span in another process; None: the current span of this thread or task, if there is one.
    `started_ns`: the start in Unix nanoseconds, if the work began before this call.
    """
    if _sender is None:
        yield NOT_TRACED
        return
    context = _sender.context_of(parent)
    with _sender.own.start_as_current_span(
        name, context, _sender.kind(kind), attributes, start_time=started_ns
    ) as started:
        yield started


def record_span(
    name: str,
    started_ns: int,
    ended_ns: int | None = None,
    attributes: Mapping[str, Value] | None = None,
    *,
    parent: str | None = None,
    kind: Kind = "internal",
    of_child: bool = False,
) -> None:
    """Record a span that has ended. Times are Unix nanoseconds; `ended_ns` None: now. `of_child`: the child did the work."""
    if _sender is not None:
        tracer = _sender.child if of_child else _sender.own
        past = tracer.start_span(
            name, _sender.context_of(parent), _sender.kind(kind), attributes, start_time=started_ns
        )
        past.end(ended_ns or time.time_ns())


def traceparent() -> str | None:
    """The current span as a W3C `traceparent`, for a job's row, a message or a request; None if tracing is off or no span is open."""
    return None if _sender is None else _sender.traceparent()


class _Sender:
    """The only code that uses OpenTelemetry."""

    def __init__(self, endpoint: str, service: str) -> None:
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise NightpressError(
                ErrorCode.INVALID_REQUEST,
                f"An endpoint for traces is set, but OpenTelemetry is not installed: {error}.",
                hint="Install nightpress[telemetry], or unset NIGHTPRESS_OTLP_ENDPOINT and OTEL_EXPORTER_OTLP_ENDPOINT.",
            ) from error
        # OpenTelemetry's standard variables configure the rest: headers, certificates, timeouts, sampling.
        address = f"{endpoint.rstrip('/')}/v1/traces" if endpoint else None
        processor = BatchSpanProcessor(OTLPSpanExporter(endpoint=address))

        def tracer(part: str) -> "Tracer":
            about = {"service.name": f"nightpress-{part}", "service.version": version("nightpress")}
            resource = Resource.create({**about, "process.pid": os.getpid()} if part == service else about)
            provider = TracerProvider(resource=resource)
            provider.add_span_processor(processor)
            return provider.get_tracer("nightpress")

        self.own, self.child = tracer(service), tracer("child")
        self._kinds = trace.SpanKind
        self._propagator = TraceContextTextMapPropagator()

    def kind(self, name: Kind) -> "SpanKind":
        return self._kinds[name.upper()]

    def context_of(self, parent: str | None) -> "Context | None":
        return self._propagator.extract({"traceparent": parent}) if parent else None

    def traceparent(self) -> str | None:
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier)
        return carrier.get("traceparent")
