"""Invoker: where the code of this process's tools runs.

Plain functions and generators run on a bounded number of threads, asynchronous ones on an event loop of their own. A
tool that computes, blocks, or ends what it runs on stops nobody else.
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
from dspex_persist.state.tools.failures import contained, let_go_with
from dspex_persist.state.tools.home import Home
from dspex_persist.state.tools.ports import ToolCode, ToolKind
from dspex_persist.state.tools.results import checked, result_value
from dspex_persist.state.tools.session import ToolSession, asking

_LONG_WAIT_S: Final = 5.0

_logger: Final = get_logger(__name__)


class Invoker:
    """Calls tools' code on up to `threads` threads, and on a loop. Used on the home loop."""

    def __init__(self, home: Home, threads: int, limits: Limits) -> None:
        self.home = home
        self.limits = limits
        self._threads = DaemonThreads(threads, "dspex-persist-tool")
        self._loop = LoopThread("dspex-persist-tools")
        # What runs code at the moment, on the bounded threads and on the loop.
        self._on_threads, self._on_loop = set[ToolSession](), set[ToolSession]()
        self._said_at = -_LONG_WAIT_S

    async def invoke(self, code: ToolCode, session: ToolSession, arguments: Mapping[str, object]) -> Value:
        """Run a tool's code; its result, or the list of what it yields."""
        session.is_async = code.kind.is_async
        # What the caller has set (dspy.context, a log's bindings) holds in the tool's thread, too.
        context = contextvars.copy_context()
        context.run(asking.set, session)
        waiting = self.home.loop.call_later(_LONG_WAIT_S, self._say_waits, session)
        try:
            if session.is_async:
                return await self._run_on_loop(session, self._run_async(code, session, arguments), context)
            run = functools.partial(context.run, self._run_sync, code, session, arguments)
            return await self._run_on_thread(session, run)
        finally:
            waiting.cancel()

    def close(self) -> None:
        """End idle threads and the loop. Nobody waits for code that goes on all the same."""
        self._threads.close()
        self._loop.close()

    async def _run_on_loop(
        self, session: ToolSession, run: Coroutine[Any, Any, Value], context: contextvars.Context
    ) -> Value:
        result = self.home.mailbox.result
        if not session.aside:
            return await result(context.run(self._loop.start, run))
        # Whoever asked may be waiting on the tools' loop itself.
        loop = LoopThread(f"dspex-persist-{session.execution_id}")
        try:
            return await result(context.run(loop.start, run))
        finally:
            loop.close(wait_s=0)

    async def _run_on_thread(self, session: ToolSession, run: Callable[[], Value]) -> Value:
        if session.asker is None:
            return await self.home.mailbox.result(self._threads.submit(run))
        # Who asked may be waiting on one of the bounded threads: who is asked must not wait for one.
        return await self.home.on_thread(run, f"dspex-persist-{session.execution_id}")

    def _run_sync(self, code: ToolCode, session: ToolSession, arguments: Mapping[str, object]) -> Value:
        """On a thread of its own."""
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
        """On the tools' loop."""
        with let_go_with(asyncio.get_running_loop()), self._at_work(session), contained(asyncio.CancelledError):
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
        """Have it known whose code runs where only so much of it can run at a time."""
        session.started = True
        place = self._on_loop if session.is_async else self._on_threads
        if session.asker is None:
            place.add(session)
        try:
            yield
        finally:
            place.discard(session)

    def _say_waits(self, session: ToolSession) -> None:
        """Say in the log that an execution has been waiting for its turn to run, and what for; not all of them do."""
        now = self.home.loop.time()
        if session.started or session.cancelled or now < self._said_at + _LONG_WAIT_S:
            return
        self._said_at = now
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
