"""Spans of the calls that a server answers, and of those that a process makes (gRPC)."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from dspex_persist.infra import tracing
from dspex_persist.infra.tracing import Attributes, Headers, Kind, Place, Span

R = TypeVar("R")

_OK: Final = 0
_CANCELLED: Final = 1
# UNKNOWN, DEADLINE_EXCEEDED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE and DATA_LOSS: the others are the client's doing.
_FAULTS: Final = frozenset((2, 4, 12, 13, 14, 15))


def _nothing(_message: object) -> Attributes:
    return {}


def _nowhere() -> Place | None:
    return None


@dataclass(frozen=True, slots=True)
class CallSpans:
    """How the calls that a server answers are traced.

    A call belongs to the trace that its metadata name.

    Attributes:
        attributes_of: Returns facts about a request.
        below: Returns where calls belong that name no trace.
        begins: Whether calls that then belong nowhere begin a trace; without, they have no span.
    """

    attributes_of: Callable[[Any], Attributes] = _nothing
    below: Callable[[], Place | None] = _nowhere
    begins: bool = True


class TracedRpc:
    """Makes spans for the calls of one rpc.

    Args:
        rpc: Its full name.
        listen: The address of the server.
        spans: How its calls are traced.
        tracer: Makes the spans.
    """

    def __init__(self, rpc: str, listen: str, spans: CallSpans, tracer: tracing.Tracer) -> None:
        self._name, self._facts = _named(rpc, listen)
        self._spans = spans
        self._tracer = tracer

    def handler(self, handle: Callable[..., Awaitable[R]]) -> Callable[..., Awaitable[R]]:
        """Wrap what answers a call."""

        async def traced(request: Any, context: Any) -> R:
            sent = context.invocation_metadata() or ()
            place = self._tracer.sent(sent)
            if place is None:
                place = self._spans.below()
            answering = handle(request, context)
            # The exception that gRPC gets keeps this frame alive.
            request = None
            if place is None and not self._spans.begins:
                return await answering
            with self._tracer.span(self._name, self._facts, kind=Kind.SERVER, below=place, judges=False) as span:
                is_cancelled = False
                try:
                    return await answering
                except asyncio.CancelledError:
                    is_cancelled = True
                    raise
                finally:
                    _end(span, context.code(), is_cancelled=is_cancelled)

        return traced

    def parser(self, parse: Callable[[bytes], R]) -> Callable[[bytes], R]:
        """Wrap what parses a request."""

        def traced(serialized: bytes) -> R:
            request = parse(serialized)
            self._tracer.current.set(self._spans.attributes_of(request))
            return request

        return traced


@contextmanager
def calling(
    rpc: str, address: str, attributes: Attributes, code_of: Callable[[BaseException], Any]
) -> Iterator[Headers]:
    """Make a span around a call to another process; yields the headers that tell it the place.

    Args:
        rpc: The full name of the rpc.
        address: Where it goes.
        attributes: More facts.
        code_of: Returns the status code with which a call ended that raised, or None if it had none.
    """
    tracer = tracing.tracer()
    if tracer is None:
        yield ()
        return
    name, facts = _named(rpc, address)
    with tracer.span(name, {**facts, **attributes}, kind=Kind.CLIENT) as span:
        try:
            yield tracing.headers()
        except Exception as error:
            code = code_of(error)
            if code is not None:
                span.set({"rpc.grpc.status_code": _number_of(code)})
            raise
        span.set({"rpc.grpc.status_code": _OK})


def _named(rpc: str, address: str) -> tuple[str, dict[str, str | int]]:
    service, _, method = rpc.rpartition(".")
    facts: dict[str, str | int] = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method}
    address = address.rpartition("://")[2]
    host, _, port = address.rpartition(":")
    if address.startswith("unix:") or not port.isdigit():
        facts["server.address"] = address.removeprefix("unix:")
    else:
        facts["server.address"] = host.strip("[]")
        if port != "0":
            facts["server.port"] = int(port)
    return f"{service}/{method}", facts


def _number_of(code: Any) -> int:
    return code if isinstance(code, int) else int(code.value[0])


def _end(span: Span, code: Any, *, is_cancelled: bool) -> None:
    """Note with which status a call has ended; gRPC has none for one that succeeded, or whose client has gone."""
    number = (_CANCELLED if is_cancelled else _OK) if code is None else _number_of(code)
    span.set({"rpc.grpc.status_code": number})
    if number in _FAULTS:
        span.fail(getattr(code, "name", ""))
