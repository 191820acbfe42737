"""Futures, and what else takes the outcome of work that another thread does."""

import contextlib
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any, Generic, Protocol, TypeVar, cast

A = TypeVar("A")
B = TypeVar("B")
E_contra = TypeVar("E_contra", bound=BaseException, contravariant=True)


class Ticket(Protocol[E_contra]):
    """The receiver of the outcome of queued work."""

    def begin(self) -> bool:
        """Mark the work as running. Returns False if it was cancelled; afterwards it cannot be."""

    def settle(self, result: Any, error: E_contra | None) -> None:
        """Deliver the result, or the error if there is one. Called once, after `begin` returned True."""


class TicketFuture(Future[A]):
    """The ticket of a caller that does not wait now."""

    def begin(self) -> bool:
        """See `Ticket`."""
        return self.set_running_or_notify_cancel()

    def settle(self, result: Any, error: BaseException | None) -> None:
        """See `Ticket`."""
        # The caller may have settled its future already, which must not harm the others of the group.
        with contextlib.suppress(InvalidStateError):
            if error is None:
                self.set_result(result)
            else:
                self.set_exception(error)


class Blocked(Generic[A]):
    """The ticket of a caller that waits at once: a raw lock costs a fifth of a future.

    Callers whose outcomes are there at the same time may wake each other, one after the other. If all of them woke at
    once, each would wait again, for the interpreter.

    Attributes:
        following: Who is to be woken by the caller of this one; None for nobody.
    """

    __slots__ = ("_error", "_lock", "_result", "following")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()
        self._result: Any = None
        self._error: BaseException | None = None
        self.following: Blocked[Any] | None = None

    def begin(self) -> bool:
        """See `Ticket`."""
        return True

    def settle(self, result: Any, error: BaseException | None) -> None:
        """See `Ticket`."""
        self.keep(result, error)
        self.wake()

    def keep(self, result: Any, error: BaseException | None) -> None:
        """Have the outcome ready for the caller, whom somebody else wakes."""
        self._result, self._error = result, error

    def wake(self) -> None:
        """Wake the caller, whose outcome is there. To do so again has no effect."""
        try:  # noqa: SIM105 - `suppress` takes longer than all the rest
            self._lock.release()
        except RuntimeError:
            pass

    def wait(self) -> A:
        """Wait for the outcome; return the result, or raise the error. Call it once."""
        try:
            self._lock.acquire()
        finally:
            following, self.following = self.following, None
            if following is not None:
                following.wake()
        # The traceback of the error refers to this frame, and to those of the callers, which have this object: neither
        # may refer to the error.
        result, error = self._result, self._error
        self._result = self._error = None
        try:
            if error is not None:
                raise error
            return cast(A, result)
        finally:
            del error


def failed(error: BaseException) -> "Future[Any]":
    """Return a future that has already failed with `error`."""
    future: Future[Any] = Future()
    future.set_exception(error)
    return future


def settled(result: A) -> "Future[A]":
    """Return a future that has this result already."""
    future: Future[A] = Future()
    future.set_result(result)
    return future


def mapped(future: "Future[A]", change: Callable[[A], B]) -> "Future[B]":
    """Return a future of `change(result)`. Cancelling it cancels `future`."""
    derived: Future[B] = Future()

    def settle(finished: "Future[A]") -> None:
        if finished.cancelled():
            derived.cancel()
        elif derived.set_running_or_notify_cancel():
            error = finished.exception()
            if error is not None:
                derived.set_exception(error)
            else:
                derived.set_result(change(finished.result()))

    # Done futures keep their callbacks: with a strong reference the two, and their results, would form a cycle.
    source = weakref.ref(future)

    def cancel(each: "Future[B]") -> None:
        awaited = source() if each.cancelled() else None
        if awaited is not None:
            awaited.cancel()

    derived.add_done_callback(cancel)
    future.add_done_callback(settle)
    return derived
