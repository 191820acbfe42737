"""ToolRunner: each execution is a transaction, from its journal entry to its verdict.

It lives on one event loop, its home, which keeps the time of all executions. Tools' own code never runs there, nor does
whatever reads their arguments or asks what they raised.
"""

import asyncio
import contextlib
import functools
import json
import random
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final, TypeVar
from weakref import WeakValueDictionary

from dspex_persist.spelling import closest, did_you_mean
from dspex_persist.state import commands, values
from dspex_persist.state.commands import Command
from dspex_persist.state.commands.executions import Begun, Verdict
from dspex_persist.state.errors import (
    EngineClosedError,
    ExecutionEndedError,
    ExecutionNotFoundError,
    IdempotencyConflictError,
    LimitExceededError,
    MissingVariablesError,
    SessionNotFoundError,
    ToolArgumentError,
    ToolNotFoundError,
    ToolTimedOutError,
    UnavailableError,
)
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import (
    ExecutionStatus,
    JournalEntry,
    Origin,
    RegisteredTool,
    ToolOutcome,
    Value,
)
from dspex_persist.state.provider import Submit
from dspex_persist.state.tools.chunks import Emit, Outlet
from dspex_persist.state.tools.endings import Endings
from dspex_persist.state.tools.execution import Execution
from dspex_persist.state.tools.failures import (
    RaisedError,
    raised_of,
    status_of,
    told,
)
from dspex_persist.state.tools.home import Home
from dspex_persist.state.tools.ports import RunnableTool
from dspex_persist.state.tools.requests import ToolRequest
from dspex_persist.state.tools.results import NOTHING, result_value
from dspex_persist.state.tools.session import ToolSession, asking

R = TypeVar("R")
_DEEPEST: Final = 16
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.002, 0.25
_JOIN_PAUSE_S: Final = 0.02
_MOST_JOINS: Final = 1_000
_ENTRY_BYTES: Final = 500
_ANEW: Final = (ExecutionStatus.CANCELLED, ExecutionStatus.INTERRUPTED, ExecutionStatus.CONFLICT)
"""How an execution may have ended that whoever waited for it begins again."""
_REFUSALS: Final = (ToolNotFoundError, ToolArgumentError, MissingVariablesError, IdempotencyConflictError)
"""What is wrong with a request before anything has begun."""


class ToolRunner:
    """Executes `tools`, and what `registered` makes of those that sessions' workers have registered, over the store
    that `submit` leads to.

    `execute` is a coroutine of its `home` loop. From any other thread use `submit`; whoever waits there must not be on
    the home loop, which would then wait for itself. A tool's code may: what it asks for runs on a thread, or a loop,
    that it does not hold.
    """

    def __init__(
        self,
        submit: Submit,
        home: Home,
        tools: Mapping[str, RunnableTool],
        *,
        registered: Callable[[RegisteredTool], RunnableTool],
        limits: Limits,
    ) -> None:
        self.submit_command = submit
        self.tools = dict(tools)
        self.limits = limits
        self._home = home
        self._endings = Endings(submit, home)
        self._registered = registered
        self._running: dict[str, ToolSession] = {}
        # Those, too, that have ended while their code goes on.
        self._sessions: WeakValueDictionary[str, ToolSession] = WeakValueDictionary()
        self._count = 0

    def start(self, coroutine: Coroutine[Any, Any, R]) -> "Future[R]":
        """Have a coroutine of the runner's run on its home loop; from any thread."""
        return self._home.start(coroutine)

    def submit(self, request: ToolRequest, emit: Emit | None = None) -> "Future[ToolOutcome]":
        """Execute a tool; from any thread. Chunks of one that streams go to `emit`, on the home loop.

        Its future fails with `EngineClosedError` if the runner is closed first.
        """
        return self.start(self._execute_until_closed(request, emit))

    async def _execute_until_closed(self, request: ToolRequest, emit: Emit | None) -> ToolOutcome:
        try:
            return await self.execute(request, emit)
        except asyncio.CancelledError:
            if not self._endings.draining:
                # By whoever cancelled the future.
                raise
            raise EngineClosedError() from None

    def find(self, execution_id: str) -> Execution:
        """A running execution; `ExecutionNotFoundError` otherwise."""
        return self._session_of(execution_id).execution

    def is_running(self, execution_id: str) -> bool:
        """Whether `find` would find it."""
        return execution_id in self._running

    def available(self, registered: Mapping[str, RegisteredTool]) -> dict[str, RunnableTool]:
        """All that can be executed where these are registered, by name: its own, which come first, and those."""
        others = {name: self._registered(tool) for name, tool in registered.items() if name not in self.tools}
        return self.tools | others

    def drain(self) -> None:
        """What is cancelled from here on was interrupted by the server's end, not given up by its client."""
        self._endings.draining = True

    def _session_of(self, execution_id: str) -> ToolSession:
        session = self._running.get(execution_id)
        if session is None:
            raise ExecutionNotFoundError(execution_id)
        return session

    # Executing

    async def execute(
        self, request: ToolRequest, emit: Emit | None = None, *, asked_by: str | None = None
    ) -> ToolOutcome:
        """Execute a tool, again if it may after a conflict; how it ended. Chunks of one that streams go to `emit`.

        `asked_by`: the execution whose code asks, where the context does not say so, because it came over a wire.

        Raises `SessionNotFoundError` and what a store raises; whatever the tool itself does wrong is in the outcome.
        """
        if self._count >= self.limits.executions:
            raise LimitExceededError("number of executions", self._count + 1, self.limits.executions, "executions")
        if asked_by is not None:
            asking.set(self._sessions.get(asked_by))
        _check_depth(asking.get())
        self._count += 1
        try:
            request = self._timed(request)
            if emit is not None:
                request = replace(request, outlet=Outlet(emit))
            tool, arguments = await self._prepare(request)
            outcome = await self._execute(request, tool, arguments)
            return replace(outcome, streamed=tool.spec.streaming, result_type=tool.result_type)
        except ToolTimedOutError as error:
            # Before there was an execution, or while another one ran under its key.
            return ToolOutcome(ExecutionStatus.TIMED_OUT, None, error, error.error_code)
        except _REFUSALS as error:
            # On a session that is not there, that is what is wrong first.
            await self._submit(commands.ListTools(request.session_id), request.origin)
            return ToolOutcome(None, None, error, error.error_code)
        finally:
            self._count -= 1

    async def execute_within(self, execution_id: str, request: ToolRequest) -> ToolOutcome:
        """Execute a tool as part of a running execution, for the process that runs that one."""
        parent = self._session_of(execution_id)
        parent.execution.check_is_of(request.session_id)
        try:
            result = await self._execute_joined(parent, request)
        except ExecutionEndedError:
            raise
        except _REFUSALS as error:
            return ToolOutcome(None, None, error, error.error_code, execution_id)
        except Exception as error:  # noqa: BLE001 -- users' code: whatever it raises is told to its caller
            raised, failure = raised_of(error)
            failed = told(execution_id, raised, failure)
            return ToolOutcome(status_of(raised), None, failed, failed.error_code, execution_id)
        return ToolOutcome(
            ExecutionStatus.COMMITTED,
            result,
            execution_id=execution_id,
            attempts=1,
            result_type=self.result_type_of(request.tool),
        )

    async def _execute_joined(self, parent: ToolSession, request: ToolRequest) -> Value:
        """As a task of its own: the end of the execution that it is part of cancels it, and its caller is to hear."""
        task = self._home.loop.create_task(self._conduct_joined(parent, request))
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError:
            task.cancel()
            raise
        if task.cancelled():
            raise ExecutionEndedError(parent.execution_id, parent.execution.ended or ExecutionStatus.CANCELLED.value)
        return task.result()

    async def _conduct_joined(self, parent: ToolSession, request: ToolRequest) -> Value:
        try:
            result = await self._child_result(parent, request)
        finally:
            # Its session may have ended meanwhile, of which only the store knows: then nothing is kept.
            if not await self._is_running(parent):
                raise ExecutionEndedError(parent.execution_id, parent.execution.ended or "its session ended")
        return result

    async def _is_running(self, session: ToolSession) -> bool:
        try:
            state = await self._submit(commands.ReadState(session.session_id), session.origin)
        except SessionNotFoundError:
            return False
        return session.execution_id in state.executions

    def _timed(self, request: ToolRequest) -> ToolRequest:
        """The request with the end of its time, which begins now."""
        if request.timeout_s is None:
            return request
        return replace(request, until=self._home.loop.time() + request.timeout_s)

    async def _prepare(
        self, request: ToolRequest, within: Execution | None = None
    ) -> tuple[RunnableTool, Mapping[str, object]]:
        """The tool, and the arguments for its first attempt: whatever can be refused is, before anything is begun."""
        tool = await self._find_tool(request)
        size_bytes = sum(each.size_bytes for each in request.parameters.values())
        most = self.limits.execution_size_bytes
        if size_bytes > most:
            raise LimitExceededError("size of the parameters in bytes", size_bytes, most, "execution_size_bytes")
        arguments = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(request.until):
                arguments = await tool.bind(request.parameters)
        if arguments is None:
            # Here, where that error is gone: it knows the task, whose result may be this one.
            raise ToolTimedOutError("", f"to read its arguments took longer than {request.timeout_s:.3g} s")
        required = tool.spec.required_variables
        if required:
            query = commands.GetVariables(request.session_id, required)
            found = within.run(query, request.origin) if within else await self._submit(query, request.origin)
            if found.missing:
                raise MissingVariablesError(request.tool, ", ".join(found.missing))
        return tool, arguments

    async def _find_tool(self, request: ToolRequest) -> RunnableTool:
        own = self.tools.get(request.tool)
        if own is not None:
            # Whether there is such a session, whoever begins the execution is told.
            return own
        registered = await self._submit(commands.ListTools(request.session_id), request.origin)
        found = registered.get(request.tool)
        if found is None:
            names = sorted({*self.tools, *registered})
            hint = did_you_mean(closest(request.tool, names), spell=str)
            hint = hint or f"there are: {', '.join(names[:20]) or 'none'}"
            raise ToolNotFoundError(request.tool, hint)
        return self._registered(found)

    async def _execute(self, request: ToolRequest, tool: RunnableTool, arguments: Mapping[str, object]) -> ToolOutcome:
        attempt, joins, pause_s = 1, 0, _FIRST_PAUSE_S
        retry_of = None
        while True:
            begun = await self._begin(request, tool, attempt, retry_of=retry_of)
            if begun.recorded is not None:
                return await _repeat(request, tool, begun.recorded)
            if begun.running is not None:
                joined = await self._join(begun.running.id, request)
                if joined is not None and joined.status not in _ANEW:
                    return joined
                joins += 1
                if joins > _MOST_JOINS:
                    raise UnavailableError(
                        f"execution {begun.running.id} has this key and has not been cleared away yet"
                    )
                continue
            outcome = await self._attempt(request, tool, arguments, begun, attempt)
            again = outcome.status is ExecutionStatus.CONFLICT and attempt <= tool.spec.retries
            # What has been handed out cannot be taken back.
            if not again or (request.outlet is not None and request.outlet.used):
                return outcome
            attempt, retry_of = attempt + 1, outcome.execution_id
            # Drawn, so that those who met do not meet again.
            await asyncio.sleep(random.uniform(0, pause_s))
            pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)

    async def _join(self, execution_id: str, request: ToolRequest) -> ToolOutcome | None:
        """Wait for a running execution; its outcome. None if it has to be asked for again."""
        running = self._running.get(execution_id)
        if running is None or running.done is None:
            # It has just ended, or its client has just gone: a moment later the store knows which.
            await asyncio.sleep(_JOIN_PAUSE_S)
            return None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(request.until):
                return await asyncio.shield(running.done)
        most_s = request.timeout_s
        reason = f"it runs already under this key, and has not ended in the {most_s:.3g} s that its caller waits"
        raise ToolTimedOutError(execution_id, reason)

    async def _begin(
        self,
        request: ToolRequest,
        tool: RunnableTool,
        attempt: int,
        parent: Execution | None = None,
        retry_of: str | None = None,
    ) -> Begun:
        command = commands.BeginExecution(
            request.session_id,
            request.tool,
            request.parameters,
            request.metadata,
            tool.spec.isolation,
            attempt,
            parent.id if parent is not None else None,
            request.idempotency_key if parent is None else None,
            tool.worker_id,
            retry_of,
        )
        origin = request.origin
        if origin.idempotency_key is not None:
            # The execution's own key is in the command: that of its outcome is none of the store's.
            origin = replace(origin, idempotency_key=None)
        if command.brings > values.MUCH:
            ahead = values.ReadAhead(self.limits)
            read = functools.partial(command.read_ahead, ahead, lambda _: None)
            await self._home.on_thread(read, "dspex-persist-arguments")
        future = self.submit_command(command, origin)
        try:
            return await self._home.mailbox.result(future)
        except asyncio.CancelledError:
            # Who asked has gone. What has begun all the same has to end.
            future.add_done_callback(functools.partial(self._abandon, command, origin))
            raise

    def _abandon(self, command: commands.BeginExecution, origin: Origin, future: "Future[Begun]") -> None:
        if future.cancelled() or future.exception() is not None or future.result().snapshot is None:
            return
        verdict = Verdict(future.result().execution_id, self._endings.gone, attempt=command.attempt)
        self._endings.say(commands.FinishExecution(command.session_id, verdict), origin)

    async def _attempt(
        self,
        request: ToolRequest,
        tool: RunnableTool,
        arguments: Mapping[str, object],
        begun: Begun,
        attempt: int,
    ) -> ToolOutcome:
        execution = Execution.begin(
            request.session_id,
            request.tool,
            tool.spec.isolation,
            begun,
            request.origin,
            lambda command: self.submit_command(command, request.origin).result(),
        )
        session = ToolSession(self, execution, request, attempt, begun.seed, asking.get())
        session.done = self._home.loop.create_future()
        outcome = None
        with self._listed(session):
            try:
                outcome = await self._conduct(tool, arguments, session)
            finally:
                session.done.set_result(outcome)
                # An outcome knows its error, and that frames which know the session.
                session.done = None
        if request.outlet is not None and request.outlet.broken is not None:
            raise request.outlet.broken
        return outcome

    @contextmanager
    def _listed(self, session: ToolSession) -> Iterator[None]:
        """Have the execution found while it runs."""
        self._running[session.execution_id] = self._sessions[session.execution_id] = session
        try:
            yield
        finally:
            del self._running[session.execution_id]

    async def _conduct(self, tool: RunnableTool, arguments: Mapping[str, object], session: ToolSession) -> ToolOutcome:
        """Run the code of an execution, then end it."""
        try:
            result = await self._invoke(tool, arguments, session)
            if session.calling is not None:
                raise RuntimeError(f"it ended while {session.calling.execution.tool!r}, which it called, was running")
            verdict = session.verdict(ExecutionStatus.COMMITTED, result)
        except asyncio.CancelledError:
            self._endings.end_without_waiting(session, session.verdict(self._endings.gone))
            raise
        except Exception as error:  # noqa: BLE001 -- users' code: whatever it raises is its verdict
            raised, failure = raised_of(error)
            broken = session.outlet is not None and session.outlet.broken is not None
            status = ExecutionStatus.CANCELLED if broken else status_of(raised)
            verdict = session.verdict(status, failure=failure)
            try:
                return await self._endings.end(session, verdict, raised)
            finally:
                # Its traceback knows this frame.
                del raised
        return await self._endings.end(session, verdict)

    # Calls from tool to tool

    def call(self, caller: ToolSession, request: ToolRequest) -> "Future[Value]":
        """Execute a tool as part of its caller's execution; from any thread."""
        return self.start(self._execute_child(caller, request))

    def result_type_of(self, tool: str) -> str:
        """The `result_type` of a tool of this process; "" of others."""
        own = self.tools.get(tool)
        return own.result_type if own is not None else ""

    async def _execute_child(self, parent: ToolSession, request: ToolRequest) -> Value:
        """Execute a tool as part of its caller's execution; its result, or what its code raised.

        One at a time for each caller: what one has staged could not be undone without that of another.
        """
        try:
            return await self._child_result(parent, request)
        except RaisedError as error:
            raised = error.error
        try:
            raise raised
        finally:
            # Its traceback knows this frame.
            del raised

    async def _child_result(self, parent: ToolSession, request: ToolRequest) -> Value:
        async with parent.turn:
            request = self._timed(request)
            execution = parent.execution
            execution.check_running()
            _check_depth(parent)
            tool, arguments = await self._prepare(request, execution)
            begun = await self._begin(request, tool, 1, execution)
            child = execution.begin_child(begun, request.tool)
            session = ToolSession(self, child, request, 1, begun.seed, parent)
            if execution.ended:
                # It did not wait for what it called.
                self._endings.end_without_waiting(session, session.verdict(ExecutionStatus.ABORTED))
                execution.check_running()
            session.task = asyncio.current_task()
            parent.calling = session
            try:
                with self._listed(session):
                    return await self._conduct_child(tool, arguments, session, execution)
            finally:
                # The task keeps how it ended, and what it raised the frames that know the session.
                parent.calling = session.task = None

    async def _conduct_child(
        self, tool: RunnableTool, arguments: Mapping[str, object], session: ToolSession, parent: Execution
    ) -> Value:
        child = session.execution
        try:
            result = await self._invoke(tool, arguments, session)
            with parent.overlay.lock:
                parent.overlay.note_ended(_ENTRY_BYTES + session.journal_bytes + result.size_bytes)
        except BaseException as error:
            if not parent.ended:
                raised, failure = raised_of(error)
                child.undo()
                status = ExecutionStatus.FAILED if isinstance(raised, Exception) else ExecutionStatus.CANCELLED
                self._endings.end_without_waiting(session, session.verdict(status, failure=failure))
                # Its traceback knows this frame.
                del raised
            raise
        child.close(ExecutionStatus.COMMITTED.value)
        parent.children.extend([session.verdict(ExecutionStatus.COMMITTED, result), *child.children])
        return result

    async def _invoke(self, tool: RunnableTool, arguments: Mapping[str, object], session: ToolSession) -> Value:
        """Run the tool's code, within its time; its result."""
        request, own_s = session.request, tool.spec.timeout_s
        left_s = None if request.until is None else max(0.0, request.until - self._home.loop.time())
        timeout_s = min((each for each in (own_s, left_s) if each is not None), default=None)
        try:
            async with asyncio.timeout(timeout_s) as limit:
                session.timeout_s = timeout_s
                if session.attempt > 1:
                    # What the code did to those of the attempt before is undone, too.
                    arguments = await tool.bind(request.parameters)
                return await tool.run(session, arguments)
        except TimeoutError:
            if not limit.expired():
                raise
        finally:
            # It knows the task, which keeps how it has ended; and the traceback of an error knows this frame.
            del limit
        # Here, where the other error is gone, which knows the task as well.
        whose, most_s = "", own_s
        if timeout_s != own_s:
            whose, most_s = ", which is how long its caller waits", request.timeout_s
        raise ToolTimedOutError(session.execution_id, f"it took longer than {most_s:.3g} s{whose}")

    async def _submit(self, command: Command[R], origin: Origin) -> R:
        return await self._home.mailbox.result(self.submit_command(command, origin))


async def _repeat(request: ToolRequest, tool: RunnableTool, recorded: JournalEntry) -> ToolOutcome:
    """The recorded outcome again, its chunks included."""
    result = recorded.result or NOTHING
    if request.outlet is not None and tool.spec.streaming:
        for chunk in json.loads(result.json):
            await request.outlet.hand_out(result_value(chunk, "chunk"))
    return ToolOutcome(
        ExecutionStatus.COMMITTED, result, None, "", recorded.id, recorded.sequence, recorded.attempt, repeated=True
    )


def _check_depth(asker: ToolSession | None) -> None:
    """Tools that ask for tools without end have an end."""
    if asker is not None and asker.depth + 1 >= _DEEPEST:
        raise LimitExceededError("depth of calls from tool to tool", asker.depth + 2, _DEEPEST, "")
