"""Home: the event loop that runs all executions and their timeouts."""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from functools import cached_property
from typing import Any, TypeVar

from dspex_persist.infra.mailbox import LoopMailbox, Reply
from dspex_persist.infra.threads import DaemonThreads, LoopThread
from dspex_persist.state.errors import EngineClosedError

R = TypeVar("R")


class Home:
    """The caller's event loop or, without one, a separate loop on a thread that starts on first use."""

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._given = loop
        self._own = LoopThread("dspex-persist-executions")

    @cached_property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop, running."""
        return self._given or self._own.loop

    @cached_property
    def mailbox(self) -> LoopMailbox:
        """Delivers callbacks from other threads to the loop."""
        return LoopMailbox(self.loop)

    def start(self, coroutine: Coroutine[Any, Any, R]) -> "Future[R]":
        """Run a coroutine on the loop; callable from any thread.

        Raises:
            EngineClosedError: The loop has ended.
        """
        try:
            return self.mailbox.start(coroutine)
        except RuntimeError:
            coroutine.close()
            raise EngineClosedError() from None

    def run(self, coroutine: Coroutine[Any, Any, R]) -> R:
        """Run a coroutine on the loop, and wait for its result; callable from any other thread.

        Raises:
            EngineClosedError: The loop has ended.
        """
        try:
            blocked = self.mailbox.start_blocked(coroutine)
        except RuntimeError:
            coroutine.close()
            raise EngineClosedError() from None
        return blocked.wait()

    async def on_thread(self, function: Callable[[], R], name: str) -> R:
        """Call a function on a new thread, so that a slow one occupies neither the loop nor a thread of a pool."""
        thread = DaemonThreads(1, name)
        try:
            return await self.on_pool(thread, function)
        finally:
            thread.close()

    async def on_pool(self, threads: DaemonThreads, function: Callable[[], R]) -> R:
        """Call a function on one of the threads, and wait for its result on the loop."""
        reply: Reply[R] = Reply(self.mailbox)
        threads.start(function, reply)
        try:
            return await reply
        finally:
            # The reply refers to its error, whose traceback refers to this frame: this breaks the cycle.
            del reply

    def close(self) -> None:
        """End the separate loop and cancel what runs there; the caller's loop continues."""
        self._own.close()
