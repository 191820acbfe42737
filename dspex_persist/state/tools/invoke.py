"""Invoker: runs the code of the tools of this process.

Plain functions and generators run on a bounded number of threads, asynchronous ones on a separate event loop. So a tool
that computes, blocks, or ends its thread or loop does not stop the executions of others.
"""

import asyncio
import contextlib
import contextvars
import functools
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from dspex_persist.infra.logs import get_logger
from dspex_persist.infra.threads import DaemonThreads, LoopThread
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import Value
from dspex_persist.state.tools.chunks import Chunks
from dspex_persist.state.tools.failures import contained, discarded_with
from dspex_persist.state.tools.home import Home
from dspex_persist.state.tools.ports import ToolCode, ToolKind
from dspex_persist.state.tools.results import checked, result_value
from dspex_persist.state.tools.session import ToolSession, current_session

_LONG_WAIT_S: Final = 5.0

_logger: Final = get_logger(__name__)


class Invoker:
    """Calls tools' code on up to `threads` threads, and on an event loop. Used on the home loop."""

    def __init__(self, home: Home, threads: int, limits: Limits) -> None:
        self.home = home
        self.limits = limits
        self._threads = DaemonThreads(threads, "dspex-persist-tool")
        self._loop = LoopThread("dspex-persist-tools")
        # The sessions whose code is running, on the bounded threads and on the loop.
        self._on_threads, self._on_loop = set[ToolSession](), set[ToolSession]()
        # All sessions, the oldest first, and when they came; one timer for all of them looks who is waiting to run.
        self._came: dict[ToolSession, float] = {}
        self._looks = False
        self._warned_at = -_LONG_WAIT_S

    async def invoke(self, code: ToolCode, session: ToolSession, arguments: Mapping[str, object]) -> Value:
        """Run a tool's code; returns its result, or the list of its chunks."""
        session.is_async = code.kind.is_async
        # The caller's context variables (dspy.context, bound log fields) hold in the tool's thread, too.
        context = contextvars.copy_context()
        context.run(current_session.set, session)
        self._came[session] = self.home.loop.time()
        if not self._looks:
            self._look_later()
        try:
            if session.is_async:
                return await self._run_on_loop(session, self._run_async(code, session, arguments), context)
            run = functools.partial(context.run, self._run_sync, code, session, arguments)
            return await self._run_on_thread(session, run)
        finally:
            self._came.pop(session, None)

    def close(self) -> None:
        """End idle threads and the loop, without waiting for code that is still running."""
        self._threads.close()
        self._loop.close()

    async def _run_on_loop(
        self, session: ToolSession, run: Coroutine[Any, Any, Value], context: contextvars.Context
    ) -> Value:
        result = self.home.mailbox.result
        if not session.aside:
            return await result(context.run(self._loop.start, run))
        # The asker may be blocking the tools' loop while it waits.
        loop = LoopThread(f"dspex-persist-{session.execution_id}")
        try:
            return await result(context.run(loop.start, run))
        finally:
            loop.close(wait_s=0)

    async def _run_on_thread(self, session: ToolSession, run: Callable[[], Value]) -> Value:
        if session.asker is None:
            return await self.home.on_pool(self._threads, run)
        # The asker may be waiting on one of the bounded threads: if this call waited for one, too, all could hang.
        return await self.home.on_thread(run, f"dspex-persist-{session.execution_id}")

    def _run_sync(self, code: ToolCode, session: ToolSession, arguments: Mapping[str, object]) -> Value:
        """Run plain code; called on a tool's thread."""
        with self._at_work(session), contained():
            started = code.start(session, arguments)
            if code.kind is ToolKind.FUNCTION:
                return checked(code.spec.name, result_value(started, "result"), self.limits)
            chunks = Chunks(code.spec.name, self.limits)
            with contextlib.closing(started):
                for chunk in started:
                    session.execution.check_running()
                    value = chunks.add(result_value(chunk, "chunk"))
                    if session.outlet is not None:
                        self.home.start(session.outlet.hand_out(value)).result()
            return chunks.result()

    async def _run_async(self, code: ToolCode, session: ToolSession, arguments: Mapping[str, object]) -> Value:
        """Run asynchronous code; called on the tools' loop."""
        with discarded_with(asyncio.get_running_loop()), self._at_work(session), contained(asyncio.CancelledError):
            started = code.start(session, arguments)
            if code.kind is ToolKind.COROUTINE:
                return checked(code.spec.name, result_value(await started, "result"), self.limits)
            chunks = Chunks(code.spec.name, self.limits)
            async with contextlib.aclosing(started):
                async for chunk in started:
                    session.execution.check_running()
                    value = chunks.add(result_value(chunk, "chunk"))
                    if session.outlet is not None:
                        await asyncio.wrap_future(self.home.start(session.outlet.hand_out(value)))
            return chunks.result()

    @contextmanager
    def _at_work(self, session: ToolSession) -> Iterator[None]:
        """Count the session as running, for the warning of those that wait."""
        session.started = True
        place = self._on_loop if session.is_async else self._on_threads
        if session.asker is None:
            place.add(session)
        try:
            yield
        finally:
            place.discard(session)
            session.returned()

    def _look_later(self) -> None:
        """Look when the oldest session has been there for `_LONG_WAIT_S` seconds."""
        self._looks = bool(self._came)
        if self._came:
            self.home.loop.call_at(next(iter(self._came.values())) + _LONG_WAIT_S, self._look)

    def _look(self) -> None:
        now = self.home.loop.time()
        for session, came in list(self._came.items()):
            if session.started or came + _LONG_WAIT_S <= now:
                del self._came[session]
                self._warn_of_wait(session, now)
        self._look_later()

    def _warn_of_wait(self, session: ToolSession, now: float) -> None:
        """Log that an execution has been waiting to run, at most once in `_LONG_WAIT_S` seconds."""
        if session.started or session.cancelled or now < self._warned_at + _LONG_WAIT_S:
            return
        self._warned_at = now
        at_work = list(self._on_loop if session.is_async else self._on_threads)
        _logger.warning(
            "tools wait for their turn",
            execution_id=session.execution_id,
            tool=session.request.tool,
            waited_s=_LONG_WAIT_S,
            waits_for="the event loop of asynchronous tools" if session.is_async else "one of tool_threads",
            running=len(at_work),
            running_though_ended=sum(each.cancelled for each in at_work),
        )
