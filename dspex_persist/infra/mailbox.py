"""Callbacks from other threads into an event loop, with one wake-up for all that come at about the same time."""

import asyncio
import contextlib
import contextvars
import functools
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import CancelledError, Future
from typing import Any, Final, Generic, TypeVar

from dspex_persist.infra.futures import Blocked, Ticket, TicketFuture
from dspex_persist.infra.traffic import traffic_of

R = TypeVar("R")

SLICE: Final = 8
"""How many low-priority callbacks run before the loop gets to do other work."""


class LoopMailbox:
    """Runs posted callbacks on one event loop, which it wakes once for all callbacks posted in the meantime.

    Callbacks of `post`, which answer calls, run before those of `waker`, which run in slices: a change may have
    thousands of watchers, and other calls must not wait for all of them.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.traffic = traffic_of(loop)
        self._posted: deque[Callable[[], object]] = deque()
        self._patient: deque[_Waker] = deque()
        self._slicing = False
        self._woken = False

    def post(self, callback: Callable[[], object]) -> None:
        """Run `callback` on the loop soon; callable from any thread."""
        self._posted.append(callback)
        self._wake_loop()

    def start(self, coroutine: Coroutine[Any, Any, R]) -> Future[R]:
        """Run a coroutine on the loop, in a task with the caller's context; callable from any thread.

        Cancelling the future cancels the task.

        Raises:
            RuntimeError: The loop is closed.
        """
        started: _Started[R] = _Started(self)
        self._start(coroutine, started.follow)
        return started

    def start_blocked(self, coroutine: Coroutine[Any, Any, R]) -> Blocked[R]:
        """Do the same as `start` for a caller that waits at once."""
        blocked: Blocked[R] = Blocked()
        self._start(coroutine, lambda task: task.add_done_callback(functools.partial(_settle, blocked)))
        return blocked

    def _start(self, coroutine: Coroutine[Any, Any, R], begun: "Callable[[asyncio.Task[R]], object]") -> None:
        if self._loop.is_closed():
            raise RuntimeError("the event loop is closed")
        self.post(functools.partial(contextvars.copy_context().run, self._begin, coroutine, begun))

    def _begin(self, coroutine: Coroutine[Any, Any, R], begun: "Callable[[asyncio.Task[R]], object]") -> None:
        begun(self._loop.create_task(coroutine))

    def waker(self, callback: Callable[[], object]) -> Callable[[], None]:
        """Return a function that runs `callback` on the loop, with low priority.

        The function can be called from any thread, any number of times. Calls before the callback's turn count as one.
        """
        return _Waker(self, callback)

    def _post_patient(self, waker: "_Waker") -> None:
        self._patient.append(waker)
        self._wake_loop()

    def _wake_loop(self) -> None:
        if not self._woken:
            self._woken = True
            # The loop is closed only at the end of the process, when no call is waiting.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._run_posted)

    def _run_posted(self) -> None:
        # Before reading the queue: a callback posted after the last read has to wake the loop again.
        self._woken = False
        posted = self._posted
        while posted:
            posted.popleft()()
        if self._patient and not self._slicing:
            self._slicing = True
            self._loop.call_soon(self._run_slice)

    def _run_slice(self) -> None:
        for _ in range(min(SLICE, len(self._patient))):
            self._patient.popleft().run()
        self._slicing = bool(self._patient)
        if self._slicing:
            # Later, so that whatever these callbacks have woken, and new work, runs first.
            self._loop.call_soon(self._run_slice)

    def call_soon(self, callback: Callable[[], object]) -> None:
        """Run `callback` in the loop's next iteration; call this on the loop's thread."""
        self._loop.call_soon(callback)

    def new_waiter(self) -> "asyncio.Future[None]":
        """Return a future of the loop."""
        return self._loop.create_future()

    def reply(self, future: Future[R]) -> "Reply[R]":
        """Return a reply that ends as `future` does."""
        return _Following(self, future)

    async def result(self, future: Future[R]) -> R:
        """Wait for `future` and return its result. Cancelling the wait cancels the future, unless it is running."""
        try:
            if future.done():
                return future.result()
            waiter = self.new_waiter()

            def wake() -> None:
                if not waiter.done():
                    waiter.set_result(None)

            future.add_done_callback(lambda _: self.post(wake))
            try:
                await waiter
            except asyncio.CancelledError:
                future.cancel()
                raise
            return future.result()
        finally:
            # The future refers to its error, whose traceback refers to this frame: this breaks the cycle.
            del future


class Reply(Generic[R]):
    """A future that any thread settles and one coroutine of the mailbox's loop awaits.

    It has the methods of `concurrent.futures.Future`, and costs a tenth, because no thread can wait for it. Cancelling
    the task that awaits it cancels it, unless `begin` was called before. All methods except `begin` and `settle` must
    be called on the loop's thread.
    """

    __slots__ = ("_callbacks", "_cancelled", "_claim", "_done", "_error", "_mailbox", "_result", "_waiter")

    def __init__(self, mailbox: LoopMailbox) -> None:
        self._mailbox = mailbox
        # Acquired once: by `begin` or by `cancel`, whichever comes first.
        self._claim = threading.Lock()
        self._waiter: asyncio.Future[None] | None = None
        self._callbacks: list[Callable[[Reply[R]], object]] = []
        self._result: R | None = None
        self._error: BaseException | None = None
        self._done = self._cancelled = False

    def begin(self) -> bool:
        """Mark it as running, from any thread. Returns False if it was cancelled."""
        return self._claim.acquire(blocking=False)

    def settle(self, result: Any, error: BaseException | None) -> None:
        """Deliver the result or the error on the loop; from any thread, after `begin`."""
        self._result, self._error = result, error
        self._mailbox.post(self._deliver)

    def settle_here(self, result: Any, error: BaseException | None) -> None:
        """Deliver the result or the error at once, on the loop's thread, without `begin`."""
        self._claim.acquire(blocking=False)
        self._result, self._error = result, error
        self._deliver()

    def _deliver(self) -> None:
        self._done = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback(self)

    def cancel(self) -> bool:
        """Cancel it unless it is running. Returns whether it is cancelled."""
        if not self._cancelled and self._claim.acquire(blocking=False):
            self._cancelled = True
            self._deliver()
        return self._cancelled

    def cancelled(self) -> bool:
        """Whether it was cancelled."""
        return self._cancelled

    def done(self) -> bool:
        """Whether it has a result or an error, or was cancelled."""
        return self._done

    def exception(self) -> BaseException | None:
        """The error, if it ended with one."""
        return self._error

    def result(self) -> R:
        """Return the result, or raise the error; `asyncio.CancelledError` if it was cancelled."""
        try:
            if self._cancelled:
                raise asyncio.CancelledError
            if self._error is not None:
                raise self._error
            return self._result  # type: ignore[return-value]
        finally:
            # Breaks a reference cycle: the error's traceback refers to this frame.
            del self

    def add_done_callback(self, callback: Callable[["Reply[R]"], object]) -> None:
        """Call `callback` with it on the loop once it is done, or at once if it is done."""
        if self._done:
            callback(self)
        else:
            self._callbacks.append(callback)

    def __await__(self) -> Generator[Any, None, R]:
        try:
            if not self._done:
                self._waiter = self._mailbox.new_waiter()
                try:
                    yield from self._waiter
                except asyncio.CancelledError:
                    self.cancel()
                    raise
            return self.result()
        finally:
            del self


class _Started(TicketFuture[R]):
    """The future of a coroutine that runs on the loop; `asyncio.run_coroutine_threadsafe` wakes the loop for each."""

    def __init__(self, mailbox: LoopMailbox) -> None:
        super().__init__()
        self._mailbox = mailbox
        self._task: asyncio.Task[R] | None = None

    def follow(self, task: "asyncio.Task[R]") -> None:
        """End as the task of the coroutine does; called on the loop's thread."""
        self._task = task
        task.add_done_callback(self._take)
        if self.cancelled():
            task.cancel()

    def cancel(self) -> bool:
        """See `Future`. The task is cancelled on its loop."""
        is_cancelled = super().cancel()
        if is_cancelled:
            self._mailbox.post(self._cancel_task)
        return is_cancelled

    def _cancel_task(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _take(self, task: "asyncio.Task[R]") -> None:
        self._task = None
        if task.cancelled():
            super().cancel()
        _settle(self, task)


def _settle(ticket: Ticket[BaseException], task: "asyncio.Task[Any]") -> None:
    """Settle the ticket of a task that has ended."""
    if ticket.begin():
        error = CancelledError() if task.cancelled() else task.exception()
        ticket.settle(None if error is not None else task.result(), error)


class _Waker:
    """Waits in the mailbox once, however often it is called before its turn."""

    __slots__ = ("_callback", "_mailbox", "_waits")

    def __init__(self, mailbox: LoopMailbox, callback: Callable[[], object]) -> None:
        self._mailbox = mailbox
        self._callback = callback
        self._waits = False

    def __call__(self) -> None:
        if not self._waits:
            self._waits = True
            self._mailbox._post_patient(self)

    def run(self) -> None:
        """Run the callback."""
        # Before the callback reads anything: later changes need another run.
        self._waits = False
        self._callback()


class _Following(Reply[R]):
    """A reply that ends as a future does. Cancelling it cancels the future."""

    __slots__ = ("_future",)

    def __init__(self, mailbox: LoopMailbox, future: Future[R]) -> None:
        super().__init__(mailbox)
        self._future: Future[R] | None = future
        if future.done():
            self._take()
        else:
            future.add_done_callback(lambda _: mailbox.post(self._take))

    def _take(self) -> None:
        # Done futures keep their callbacks, which refer to this: without it, the two would keep each other alive.
        future, self._future = self._future, None
        if future is None:
            return
        if future.cancelled():
            self._cancelled = True
        else:
            self._error = future.exception()
            self._result = None if self._error is not None else future.result()
        self._deliver()

    def cancel(self) -> bool:
        """See `Reply`."""
        if self._future is not None:
            self._future.cancel()
        return self.cancelled()

    def cancelled(self) -> bool:
        """See `Reply`. True as soon as the future is cancelled."""
        return self._cancelled if self._future is None else self._future.cancelled()
