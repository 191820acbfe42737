"""The one place that reads the wall clock, so that freezegun and replays can set it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
# Includes the time that the machine was suspended, on systems that have such a clock.
_STEADY = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
_BEGAN, _BEGAN_S = datetime.now(UTC), time.clock_gettime(_STEADY)
EARLIEST = datetime(1, 1, 2, tzinfo=UTC)
LATEST = datetime(9999, 12, 30, tzinfo=UTC)
"""The range of times that every time zone can represent."""
_source: ContextVar[Callable[[], datetime] | None] = ContextVar("dspex_persist_clock", default=None)


def now() -> datetime:
    """Return the current wall-clock time, aware and in UTC."""
    source = _source.get()
    return _wall() if source is None else source()


def _wall() -> datetime:
    return datetime.now(UTC)


def steady() -> datetime:
    """Return a time that never jumps: the wall clock at the start of the process plus the time elapsed since then.

    Lifetimes are measured with it, so that a jump of the wall clock expires nothing. If a test or a replay has set the
    time, this returns that time.
    """
    if _source.get() is not None or datetime is not _REAL[0] or now is not _REAL[1]:
        return now()
    return _BEGAN + timedelta(seconds=time.clock_gettime(_STEADY) - _BEGAN_S)


# In a tuple, because freezegun replaces module attributes.
_REAL = (datetime, now)


@contextmanager
def reading(source: Callable[[], datetime]) -> Iterator[None]:
    """Have `now` call `source` instead, in this context and in the tasks and tools started from it."""
    token = _source.set(source)
    try:
        yield
    finally:
        _source.reset(token)


def to_micros(moment: datetime) -> int:
    """Return the microseconds since the epoch, exactly (a float would round)."""
    return (moment - _EPOCH) // _MICROSECOND


_EARLIEST, _LATEST = to_micros(EARLIEST), to_micros(LATEST)


def from_micros(micros: int) -> datetime:
    """Return the aware UTC time `micros` microseconds after the epoch."""
    return _EPOCH + timedelta(microseconds=micros)


def nearest_time(micros: int) -> datetime:
    """Return the time of `micros` as stored in a file, moved into the range from EARLIEST to LATEST.

    Earlier releases imported times outside this range, and reading such a file must not fail.
    """
    return from_micros(min(max(micros, _EARLIEST), _LATEST))
