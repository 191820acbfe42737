"""The one place that reads the wall clock, so that freezegun and replays can set it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
# With the time that the machine slept, where there is such a clock.
_STEADY = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
_BEGAN, _BEGAN_S = datetime.now(UTC), time.clock_gettime(_STEADY)
EARLIEST = datetime(1, 1, 2, tzinfo=UTC)
LATEST = datetime(9999, 12, 30, tzinfo=UTC)
"""The times that can be told in every time zone."""
_source: ContextVar[Callable[[], datetime] | None] = ContextVar("dspex_persist_clock", default=None)


def now() -> datetime:
    """The current wall-clock time, aware, UTC."""
    source = _source.get()
    return _wall() if source is None else source()


def _wall() -> datetime:
    return datetime.now(UTC)


def steady() -> datetime:
    """A time that nobody sets: the wall clock's when the process began, and since then only what has really passed.

    What lives for a while is measured with it, so that nothing ends because the wall clock jumps. Where a test or a
    replay has set the time, it is that time.
    """
    if _source.get() is not None or datetime is not _REAL[0] or now is not _REAL[1]:
        return now()
    return _BEGAN + timedelta(seconds=time.clock_gettime(_STEADY) - _BEGAN_S)


# In a tuple, where freezegun does not look for what it replaces.
_REAL = (datetime, now)


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


_EARLIEST, _LATEST = to_micros(EARLIEST), to_micros(LATEST)


def from_micros(micros: int) -> datetime:
    """The aware UTC time of `micros` microseconds since the epoch."""
    return _EPOCH + timedelta(microseconds=micros)


def nearest_time(micros: int) -> datetime:
    """The same of what a file has; where no calendar has such a time, the nearest that can be told in every time zone.

    An import took such times once, and whoever reads them must not fail.
    """
    return from_micros(min(max(micros, _EARLIEST), _LATEST))
