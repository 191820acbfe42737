"""From the writer's thread into an event loop, with one wake-up for a whole group."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

R = TypeVar("R")


class LoopMailbox:
    """Runs posted callbacks on one event loop. However many are posted before it gets to them, it is woken once."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._posted: deque[Callable[[], object]] = deque()
        self._woken = False

    def post(self, callback: Callable[[], object]) -> None:
        """Have `callback` run on the loop soon; from any thread."""
        self._posted.append(callback)
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

    async def result(self, future: Future[R]) -> R:
        """Wait for `future`. If the waiting call is cancelled, so is the future, unless its turn has come already."""
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
