"""A stand-in for a collector of traces: takes OTLP over gRPC on a port of this machine, and keeps the spans."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)

C = TypeVar("C", bound="Collector")


@dataclass(frozen=True)
class Received:
    """A span as the collector got it."""

    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict[str, Any]
    events: list[tuple[str, dict[str, Any]]]
    failed: bool
    message: str
    schema_url: str
    resource: dict[str, Any] = field(repr=False)
    scope: str = ""


class Collector(TraceServiceServicer):
    """Keeps every span that it gets.

    Attributes:
        raw: The messages, as bytes.
    """

    def __init__(self) -> None:
        self.raw: list[bytes] = []
        self._spans: list[Received] = []
        self._lock = threading.Lock()
        self.endpoint = ""

    def Export(self, request: Any, _context: object) -> Any:
        with self._lock:
            self.raw.append(request.SerializeToString())
            self._spans += _spans_in(request)
        return pb.ExportTraceServiceResponse()

    @property
    def spans(self) -> list[Received]:
        with self._lock:
            return list(self._spans)


class HangingCollector(Collector):
    """Answers nothing until `goes_on` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.goes_on = threading.Event()

    def Export(self, request: Any, context: object) -> Any:
        self.goes_on.wait()
        return super().Export(request, context)


@contextmanager
def collecting(collector: C) -> Iterator[C]:
    """Let a collector take spans at its `endpoint`."""
    server = grpc.server(ThreadPoolExecutor(4))
    add_TraceServiceServicer_to_server(collector, server)
    collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(None).wait()


def _spans_in(request: Any) -> Iterator[Received]:
    for of_resource in request.resource_spans:
        resource = _plain(of_resource.resource.attributes)
        for of_scope in of_resource.scope_spans:
            for span in of_scope.spans:
                yield Received(
                    span.name,
                    type(span).SpanKind.Name(span.kind).removeprefix("SPAN_KIND_").lower(),
                    span.trace_id.hex(),
                    span.span_id.hex(),
                    span.parent_span_id.hex(),
                    _plain(span.attributes),
                    [(event.name, _plain(event.attributes)) for event in span.events],
                    span.status.code == span.status.STATUS_CODE_ERROR,
                    span.status.message,
                    of_scope.schema_url,
                    resource,
                    of_scope.scope.name,
                )


def _plain(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}
