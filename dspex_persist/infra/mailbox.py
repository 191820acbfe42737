"""Callbacks from the writer's thread into an event loop, with one wake-up for a whole group."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final, TypeVar

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
        self._posted: deque[Callable[[], object]] = deque()
        self._patient: deque[_Waker] = deque()
        self._slicing = False
        self._woken = False

    def post(self, callback: Callable[[], object]) -> None:
        """Run `callback` on the loop soon; callable from any thread."""
        self._posted.append(callback)
        self._wake_loop()

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

    async def result(self, future: Future[R]) -> R:
        """Wait for `future` and return its result. Cancelling the wait cancels the future, unless it is running."""
        try:
            if future.done():
                return future.result()
            waiter: asyncio.Future[None] = self._loop.create_future()

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
