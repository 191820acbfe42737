"""Home: the event loop that keeps the time of all executions."""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from functools import cached_property
from typing import Any, TypeVar

from dspex_persist.infra.mailbox import LoopMailbox
from dspex_persist.infra.threads import DaemonThreads, LoopThread
from dspex_persist.state.errors import EngineClosedError

R = TypeVar("R")


class Home:
    """The given loop, else one of its own, on a thread of its own that is started when it is first needed."""

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._given = loop
        self._own = LoopThread("dspex-persist-executions")

    @cached_property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop, running."""
        return self._given or self._own.loop

    @cached_property
    def mailbox(self) -> LoopMailbox:
        """From other threads into the loop."""
        return LoopMailbox(self.loop)

    def start(self, coroutine: Coroutine[Any, Any, R]) -> "Future[R]":
        """Have a coroutine run on the loop; from any thread. `EngineClosedError` once the loop has ended."""
        try:
            return asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        except RuntimeError:
            coroutine.close()
            raise EngineClosedError() from None

    async def on_thread(self, function: Callable[[], R], name: str) -> R:
        """Call a function on a thread of its own: it may take its time, and none of a bounded number is taken by it."""
        thread = DaemonThreads(1, name)
        try:
            return await self.mailbox.result(thread.submit(function))
        finally:
            thread.close()

    def close(self) -> None:
        """Cancel what runs on its own loop, and end that; a given one goes on."""
        self._own.close()
