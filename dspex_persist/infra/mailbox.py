"""From the writer's thread into an event loop, with one wake-up for a whole group."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final, TypeVar

R = TypeVar("R")

SLICE: Final = 8
"""How many of those that can wait run before the loop turns to whatever else there is."""


class LoopMailbox:
    """Runs posted callbacks on one event loop. However many are posted before it gets to them, it is woken once.

    Those that answer somebody (`post`) go before those of `waker`, which come in slices: thousands may watch what one
    call has changed, and nobody else is to wait for all of them.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._posted: deque[Callable[[], object]] = deque()
        self._patient: deque[_Waker] = deque()
        self._slicing = False
        self._woken = False

    def post(self, callback: Callable[[], object]) -> None:
        """Have `callback` run on the loop soon; from any thread."""
        self._posted.append(callback)
        self._wake_loop()

    def waker(self, callback: Callable[[], object]) -> Callable[[], None]:
        """What has `callback` run on the loop when others have had their turn; from any thread, as often as need be."""
        return _Waker(self, callback)

    def _post_patient(self, waker: "_Waker") -> None:
        self._patient.append(waker)
        self._wake_loop()

    def _wake_loop(self) -> None:
        if not self._woken:
            self._woken = True
            # The loop is closed only at the end of the process, when nobody waits any more.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._run_posted)

    def _run_posted(self) -> None:
        # Before the first look: whoever posts after the last one wakes the loop again.
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
            # Not now: what these have woken runs first, and whatever else has come.
            self._loop.call_soon(self._run_slice)

    async def result(self, future: Future[R]) -> R:
        """Wait for `future`. If the waiting call is cancelled, so is the future, unless its turn has come already."""
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
            # The traceback of an error knows this frame, and the future the error.
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
        """Its turn has come."""
        # Before it looks at anything: whoever calls from here on has something that it may not see.
        self._waits = False
        self._callback()
