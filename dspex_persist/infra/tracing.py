"""Tracing: the port through which this package makes spans. Knows no OpenTelemetry.

It is off until `use` is called. Then `tracer()` is None, nothing makes a span, and no library for that is imported.
"""

import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from enum import Enum
from typing import Final, Protocol, TypeAlias

Attributes: TypeAlias = Mapping[str, str | int | float | bool]
"""Facts about a span. They never have values of users."""
Headers: TypeAlias = tuple[tuple[str, str], ...]

_API: Final = "opentelemetry.trace"


class Kind(Enum):
    """Which side of a call a span is."""

    INTERNAL = "internal"
    SERVER = "server"
    CLIENT = "client"


class Place(Protocol):
    """A place in a trace, below which spans can be made. Usable from any thread."""


class Span(Protocol):
    """A span that has begun."""

    def set(self, attributes: Attributes) -> None:
        """Add attributes."""

    def event(self, name: str, attributes: Attributes) -> None:
        """Add an event that happens now."""

    def fail(self, error_type: str = "") -> None:
        """Mark the span as failed, with the type of the error if there is one; never with its text."""


class Tracer(Protocol):
    """Makes spans. Which of them are kept is its decision."""

    def span(
        self,
        name: str,
        attributes: Attributes,
        *,
        kind: Kind = Kind.INTERNAL,
        below: Place | None = None,
        judges: bool = True,
    ) -> AbstractContextManager[Span]:
        """Make a span, the current one of the code in the block.

        Args:
            name: Its name, one of few.
            attributes: What is known at its beginning.
            kind: Which side of a call it is.
            below: Where, if that is not the current place.
            judges: Whether it has failed if the block raises.
        """

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
        """Make a span of something that is over; if it has failed, with the type of its error."""

    def here(self) -> Place | None:
        """Return the current place; None outside of every trace."""

    def sent(self, metadata: Sequence[tuple[str, str | bytes]]) -> Place | None:
        """Return the place that a caller has named in the metadata of its call, or None."""

    def enter(self, place: Place | None) -> None:
        """Make a place the current one of this context, for good."""

    @property
    def current(self) -> Span:
        """The current span; outside of every trace, one that keeps nothing."""


_tracer: Tracer | None = None


def use(tracer: Tracer | None) -> None:
    """Make spans with a tracer from now on; with None, none any more."""
    global _tracer
    _tracer = tracer


def tracer() -> Tracer | None:
    """Return what makes spans; None while tracing is off."""
    return _tracer


def here() -> Place | None:
    """Return the current place; None outside of every trace, and while tracing is off."""
    return None if _tracer is None else _tracer.here()


def trace_id() -> str:
    """Return the id of the current trace, as W3C writes it; "" outside of every trace, and while tracing is off."""
    found = None if _tracer is None else _context()
    return "" if found is None else f"{found.trace_id:032x}"


def ids() -> tuple[str, str] | None:
    """Return the ids of the current trace and span, as W3C writes them; None outside of every trace.

    Also of a trace of the program's own: it is enough that the program has imported OpenTelemetry.
    """
    found = _context()
    return None if found is None else (f"{found.trace_id:032x}", f"{found.span_id:016x}")


def headers() -> Headers:
    """Return the headers that name the current place to the server of a call (W3C Trace Context); () outside of traces.

    Like `ids`, they are also about a trace of the program's own.
    """
    found = _context()
    if found is None:
        return ()
    parent = ("traceparent", f"00-{found.trace_id:032x}-{found.span_id:016x}-{found.trace_flags & 1:02x}")
    state = found.trace_state.to_header()
    return (parent, ("tracestate", state)) if state and state.isascii() else (parent,)


class _SpanContext(Protocol):
    trace_id: int
    span_id: int
    trace_flags: int
    trace_state: "_TraceState"
    is_valid: bool


class _TraceState(Protocol):
    def to_header(self) -> str: ...


def _context() -> "_SpanContext | None":
    """Return the context of the current span, if the process has imported what could make it current."""
    api = sys.modules.get(_API)
    # While that is being imported it has nothing yet.
    current = getattr(api, "get_current_span", None)
    if current is None:
        return None
    context: _SpanContext = current().get_span_context()
    return context if context.is_valid else None
