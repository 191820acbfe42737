"""Futures made of others."""

import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

A = TypeVar("A")
B = TypeVar("B")


def failed(error: BaseException) -> "Future[Any]":
    """A future that has failed already."""
    future: Future[Any] = Future()
    future.set_exception(error)
    return future


def mapped(future: "Future[A]", change: Callable[[A], B]) -> "Future[B]":
    """The future of what `change` makes of the result. Cancelling it cancels `future`."""
    made: Future[B] = Future()

    def settle(finished: "Future[A]") -> None:
        if finished.cancelled():
            made.cancel()
        elif made.set_running_or_notify_cancel():
            error = finished.exception()
            if error is not None:
                made.set_exception(error)
            else:
                made.set_result(change(finished.result()))

    # Futures keep their callbacks when they are done: two that know each other would be kept with what they end in.
    source = weakref.ref(future)

    def cancel(each: "Future[B]") -> None:
        waited_for = source() if each.cancelled() else None
        if waited_for is not None:
            waited_for.cancel()

    made.add_done_callback(cancel)
    future.add_done_callback(settle)
    return made
