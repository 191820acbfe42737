"""Calls that a server has admitted, and how many each identity may make. Used on one event loop; knows no rpcs."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from dspex_persist.errors import DspexError
from dspex_persist.infra.access.tokens import Identity


@dataclass(eq=False)
class TooManyCallsError(DspexError):
    """An identity makes more calls than it may. `limit` says how many, such as `100 calls per second`."""

    limit: str
    retry_in_s: float

    def __str__(self) -> str:
        return f"more than {self.limit}"


class Admission:
    """A call that was admitted, until it ends.

    Args:
        on_end: Called once, when it ends.
        task: The task of a stream, which `revoke` can end; None for a call with a single answer.
    """

    __slots__ = ("_on_end", "_revoked", "_task")

    def __init__(self, on_end: "Callable[[Admission], None]", task: "asyncio.Task[object] | None" = None) -> None:
        self._on_end = on_end
        self._task = task
        self._revoked: BaseException | None = None

    def revoke(self, error: Exception) -> None:
        """End the stream with an error."""
        if self._task is not None and self._revoked is None:
            self._revoked = error
            self._task.cancel()

    def end(self, error: BaseException | None = None) -> BaseException | None:
        """Note that the call ends, with an error or without one; returns the error to answer with."""
        task, self._task = self._task, None
        self._on_end(self)
        self._on_end = _nothing
        if self._revoked is None or not isinstance(error, asyncio.CancelledError):
            return error
        if task is not None:
            task.uncancel()
        return self._revoked


def _nothing(_: Admission) -> None:
    pass


class _Calls:
    """The calls of an identity."""

    __slots__ = ("at", "inflight", "left")

    def __init__(self, left: float, at: float) -> None:
        self.left = left
        """How many calls it may begin at once."""
        self.at = at
        self.inflight = 0


class CallCounts:
    """Counts the calls of each identity against its allowance.

    Args:
        now: Returns a time in seconds that never goes back.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._calls: dict[str, _Calls] = {}

    def begin(self, identity: Identity) -> bool:
        """Count a call; returns whether `end` has to be called.

        Raises:
            TooManyCallsError: It is one too many, and not counted.
        """
        rate, inflight = identity.allowance.rate, identity.allowance.inflight
        if not identity.allowance.counts_calls:
            return False
        now = self._now()
        calls = self._calls.get(identity.name)
        if calls is None:
            calls = self._calls[identity.name] = _Calls(1.0 if rate is None else max(1.0, rate), now)
        if inflight is not None and calls.inflight >= inflight:
            # One of them has to end first. Nobody knows when.
            raise TooManyCallsError(f"{inflight:,} calls in progress", _SOON_S)
        if rate is not None:
            calls.left = min(max(1.0, rate), calls.left + (now - calls.at) * rate)
            calls.at = now
            if calls.left < 1:
                raise TooManyCallsError(_rate_text(rate), (1 - calls.left) / rate)
            calls.left -= 1
        calls.inflight += 1
        return True

    def end(self, identity: Identity) -> None:
        """Note that a call has ended that was counted."""
        self._calls[identity.name].inflight -= 1


_SOON_S: Final = 0.1
_UNITS: Final = (("second", 1), ("minute", 60), ("hour", 3_600))


def _rate_text(rate: float) -> str:
    unit, calls = next((unit, rate * seconds) for unit, seconds in _UNITS if rate * seconds >= 1 or unit == "hour")
    return f"{calls:,.6g} calls per {unit}"
