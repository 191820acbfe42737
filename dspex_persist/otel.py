"""Traces with OpenTelemetry: what `infra.tracing` is a port to, and how spans leave the process.

The only module that imports OpenTelemetry. Only what runs with `otel` imports this one.
"""

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Final, TextIO

from opentelemetry import trace
from opentelemetry.context import Context, attach, get_current
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter, SpanExportResult
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from dspex_persist import clock
from dspex_persist.infra import tracing
from dspex_persist.infra.logs import get_logger
from dspex_persist.infra.tracing import Attributes, Kind, Place, Span

SCHEMA_URL: Final = "https://opentelemetry.io/schemas/1.37.0"
"""The version of the semantic conventions that the names of spans and attributes are from.

The first with `gen_ai.provider.name`, and the last before the attributes of rpcs were renamed.
"""
_NAME: Final = "dspex-persist"
_KINDS: Final = {Kind.INTERNAL: SpanKind.INTERNAL, Kind.SERVER: SpanKind.SERVER, Kind.CLIENT: SpanKind.CLIENT}
_PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_HEADERS: Final = ("traceparent", "tracestate")
_LIBRARIES: Final = ("opentelemetry.exporter", "opentelemetry.sdk._shared_internal")
"""The loggers that report, each time, that spans could not be sent."""
_NANOS: Final = 1000

_logger: Final = get_logger(__name__)


class TracingError(ValueError):
    """The variables of OpenTelemetry ask for something that is not there."""


class OtelTracer:
    """The `Tracer` of a provider of OpenTelemetry."""

    def __init__(self, provider: trace.TracerProvider, version: str) -> None:
        self._tracer = provider.get_tracer(_NAME, version, schema_url=SCHEMA_URL)
        self._propagator = TraceContextTextMapPropagator()

    @contextmanager
    def span(
        self,
        name: str,
        attributes: Attributes,
        *,
        kind: Kind = Kind.INTERNAL,
        below: Place | None = None,
        judges: bool = True,
    ) -> Iterator[Span]:
        """See `Tracer.span`."""
        context = below if isinstance(below, Context) else None
        # Neither the text nor the traceback of an exception: they may quote values.
        with self._tracer.start_as_current_span(
            name, context, _KINDS[kind], attributes, record_exception=False, set_status_on_exception=False
        ) as started:
            span = _OtelSpan(started)
            try:
                yield span
            except BaseException as error:
                if judges:
                    span.fail(type(error).__name__)
                raise

    def past(
        self,
        name: str,
        attributes: Attributes,
        below: Place,
        began: datetime,
        ended: datetime,
        *,
        kind: Kind = Kind.INTERNAL,
        error_type: str | None = None,
    ) -> None:
        """See `Tracer.past`."""
        context = below if isinstance(below, Context) else None
        span = self._tracer.start_span(name, context, _KINDS[kind], attributes, start_time=_nanos_of(began))
        if error_type is not None:
            _OtelSpan(span).fail(error_type)
        span.end(_nanos_of(ended))

    def here(self) -> Place | None:
        """See `Tracer.here`."""
        context = get_current()
        return context if trace.get_current_span(context).get_span_context().is_valid else None

    def sent(self, metadata: Sequence[tuple[str, str | bytes]]) -> Place | None:
        """See `Tracer.sent`."""
        carrier = {key: text for key, text in metadata if key in _HEADERS and isinstance(text, str)}
        if not carrier:
            return None
        # An empty one, because what is current here has nothing to do with the caller.
        context = self._propagator.extract(carrier, Context())
        return context if trace.get_current_span(context).get_span_context().is_valid else None

    def enter(self, place: Place | None) -> None:
        """See `Tracer.enter`."""
        if isinstance(place, Context):
            attach(place)

    @property
    def current(self) -> Span:
        """See `Tracer.current`."""
        return _OtelSpan(trace.get_current_span())


class _OtelSpan:
    __slots__ = ("_span",)

    def __init__(self, span: trace.Span) -> None:
        self._span = span

    def set(self, attributes: Attributes) -> None:
        """See `Span.set`."""
        self._span.set_attributes(attributes)

    def event(self, name: str, attributes: Attributes) -> None:
        """See `Span.event`."""
        self._span.add_event(name, attributes)

    def fail(self, error_type: str = "") -> None:
        """See `Span.fail`."""
        if error_type:
            self._span.set_attribute("error.type", error_type)
        self._span.set_status(Status(StatusCode.ERROR))


def _nanos_of(moment: datetime) -> int:
    return clock.to_micros(moment) * _NANOS


class Tracing:
    """Makes spans of what this process does in a `with` block, and sends them.

    It makes none if OTEL_SDK_DISABLED says so. If the process has a tracer provider already, as the command
    opentelemetry-instrument makes one, that one makes them, and sends them wherever it likes.

    Args:
        version: The version of this package, which the spans name.
        flush_s: How long the end of the block may take to send the last ones, in seconds.

    Raises:
        TracingError: The variables of OpenTelemetry are wrong.
    """

    def __init__(self, version: str, flush_s: float) -> None:
        self._flush_s = flush_s
        self._tracer: OtelTracer | None = None
        self._flush: Callable[[], object] = lambda: None
        if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
            return
        found = trace.get_tracer_provider()
        if isinstance(found, trace.ProxyTracerProvider):
            # Who starts the process ends it, and says how long that may take.
            provider = TracerProvider(resource=_resource(version), shutdown_on_exit=False)
            for exporter in _exporters():
                provider.add_span_processor(BatchSpanProcessor(exporter))
            trace.set_tracer_provider(provider)
            found, self._flush = provider, provider.shutdown
        else:
            self._flush = getattr(found, "force_flush", self._flush)
        self._tracer = OtelTracer(found, version)

    def __enter__(self) -> None:
        if self._tracer is None:
            _logger.info("no traces are made", reason="OTEL_SDK_DISABLED is true")
        tracing.use(self._tracer)

    def __exit__(self, *_error: object) -> None:
        tracing.use(None)
        flushing = threading.Thread(target=self._flush, name="dspex-persist-traces", daemon=True)
        flushing.start()
        flushing.join(self._flush_s)
        if flushing.is_alive():
            _logger.warning("the last traces were not sent in time", waited_s=self._flush_s)


def _resource(version: str) -> Resource:
    # What the environment says has precedence.
    named, ours = OTELResourceDetector().detect().attributes, {SERVICE_NAME: _NAME, SERVICE_VERSION: version}
    return Resource.create({name: text for name, text in ours.items() if name not in named})


def _exporters() -> Iterator[SpanExporter]:
    text = os.environ.get("OTEL_TRACES_EXPORTER", "").strip() or "otlp"
    for name in dict.fromkeys(part.strip().lower() for part in text.split(",")):
        if name == "otlp":
            yield _Reporting(_otlp(), _endpoint())
        elif name == "console":
            yield _Console(sys.stderr)
        elif name != "none":
            raise TracingError(f"OTEL_TRACES_EXPORTER is {text!r}: it must be otlp, console or none")


def _otlp() -> SpanExporter:
    protocol = next((text for name in _PROTOCOLS if (text := os.environ.get(name, "").strip())), "grpc")
    try:
        if protocol == "grpc":
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

            return OTLPSpanExporter()
        if protocol == "http/protobuf":
            from opentelemetry.exporter.otlp.proto.http import trace_exporter as over_http

            exporter: SpanExporter = over_http.OTLPSpanExporter()
            return exporter
    except ImportError as error:
        package = f"opentelemetry-exporter-otlp-proto-{protocol.partition('/')[0]}"
        raise TracingError(f"OTLP over {protocol} needs {package}, which is not installed") from error
    raise TracingError(f"{_PROTOCOLS[1]} is {protocol!r}: it must be grpc or http/protobuf")


def _endpoint() -> str:
    text = next((text for name in _ENDPOINTS if (text := os.environ.get(name, ""))), "the default endpoint")
    # Without the password that it may have.
    return text.rpartition("@")[2]


class _Console(ConsoleSpanExporter):
    """Writes each span as a line of JSON."""

    def __init__(self, out: TextIO) -> None:
        super().__init__(out=out, formatter=lambda span: f"{span.to_json(indent=None)}\n")


class _Reporting(SpanExporter):
    """Sends spans by another exporter; says once that they cannot be sent, and once that they can again.

    A forked child sends nothing: its connection is that of its parent.
    """

    def __init__(self, exporter: SpanExporter, endpoint: str) -> None:
        self._exporter = exporter
        self._endpoint = endpoint
        self._pid = os.getpid()
        self._has_failed = False
        self._reasons = _Reasons()
        for name in _LIBRARIES:
            logger = logging.getLogger(name)
            logger.addHandler(self._reasons)
            logger.propagate = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send spans."""
        if os.getpid() != self._pid:
            return SpanExportResult.SUCCESS
        try:
            result = self._exporter.export(spans)
        except Exception as error:  # noqa: BLE001 -- a library's boundary, on a thread of its own
            result, self._reasons.last = SpanExportResult.FAILURE, type(error).__name__
        failed = result is not SpanExportResult.SUCCESS
        if failed != self._has_failed:
            self._has_failed = failed
            if failed:
                _logger.warning("traces cannot be sent", endpoint=self._endpoint, reason=self._reasons.last)
            else:
                _logger.info("traces are sent again", endpoint=self._endpoint)
        return result

    def shutdown(self) -> None:
        """Close the connection."""
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """See `SpanExporter.force_flush`."""
        return self._exporter.force_flush(timeout_millis)


class _Reasons(logging.Handler):
    """Keeps the last thing that a library has reported, instead of its lines for each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Any = ""

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler.emit`."""
        self.last = record.getMessage()
