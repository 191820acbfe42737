"""The one place that reads the wall clock, so that freezegun and replays can set it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_source: ContextVar[Callable[[], datetime] | None] = ContextVar("dspex_persist_clock", default=None)


def now() -> datetime:
    """The current wall-clock time, aware, UTC."""
    source = _source.get()
    return datetime.now(UTC) if source is None else source()


@contextmanager
def reading(source: Callable[[], datetime]) -> Iterator[None]:
    """Have `now` ask `source` instead: in this context, and in the tasks and tools that are begun from it."""
    token = _source.set(source)
    try:
        yield
    finally:
        _source.reset(token)


def to_micros(moment: datetime) -> int:
    """Microseconds since the epoch, exactly (a float would round)."""
    return (moment - _EPOCH) // _MICROSECOND


def from_micros(micros: int) -> datetime:
    """The aware UTC time of `micros` microseconds since the epoch."""
    return _EPOCH + timedelta(microseconds=micros)
