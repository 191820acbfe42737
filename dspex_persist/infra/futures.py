"""Futures made of others."""

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

    made.add_done_callback(lambda each: future.cancel() if each.cancelled() else None)
    future.add_done_callback(settle)
    return made
