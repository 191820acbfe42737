"""ToolRunner: runs each execution as a transaction, from its journal entry to its verdict.

It lives on one event loop, its home, which also times the executions. Users' code never runs there: not the tools, not
the validators of their arguments, not the `__str__` of what they raise.
"""

import asyncio
import contextlib
import functools
import json
import random
from collections.abc import Callable, Coroutine, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Final, TypeVar, cast

from dspex_persist.infra import tracing
from dspex_persist.infra.mailbox import Reply
from dspex_persist.state import commands, values
from dspex_persist.state.budgets import NO_BUDGET, Budget
from dspex_persist.state.commands import Command
from dspex_persist.state.commands.executions import REPEATABLE, Begun, Verdict
from dspex_persist.state.errors import (
    EngineClosedError,
    ExecutionEndedError,
    IdempotencyConflictError,
    LimitExceededError,
    MissingVariablesError,
    SessionBusyError,
    StateError,
    ToolArgumentError,
    ToolInterruptedError,
    ToolNotFoundError,
    ToolTimedOutError,
    UnavailableError,
)
from dspex_persist.state.limits import Limits
from dspex_persist.state.meter import Meter, RunnerFigures
from dspex_persist.state.model import (
    CONCURRENCY,
    RECORDING_ID,
    TRANSACTION,
    Concurrency,
    ExecutionStatus,
    JournalEntry,
    Origin,
    RegisteredTool,
    ToolOutcome,
    ToolSpec,
    Value,
)
from dspex_persist.state.peers import Peers
from dspex_persist.state.provider import Submits
from dspex_persist.state.tools import traced
from dspex_persist.state.tools.catalog import Catalog
from dspex_persist.state.tools.chunks import Emit, Outlet
from dspex_persist.state.tools.endings import Endings
from dspex_persist.state.tools.execution import Execution
from dspex_persist.state.tools.failures import (
    RaisedError,
    raised_of,
    recorded_error,
    reported_error,
    status_of,
)
from dspex_persist.state.tools.home import Home
from dspex_persist.state.tools.of_pools import Asked, ToolsOfPools
from dspex_persist.state.tools.ports import RunnableTool
from dspex_persist.state.tools.requests import ToolRequest
from dspex_persist.state.tools.results import NOTHING, result_value
from dspex_persist.state.tools.running import Running
from dspex_persist.state.tools.session import ToolSession, current_session
from dspex_persist.state.tools.spending import Spending
from dspex_persist.state.tools.turns import Place, Turns

R = TypeVar("R")
_MOST_DEPTH: Final = 16
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.002, 0.25
_JOIN_PAUSE_S: Final = 0.02
_LONGEST_LOOK_S: Final = 0.25
_MOST_JOINS: Final = 1_000
_ENTRY_BYTES: Final = 500
_REFUSALS: Final = (
    ToolNotFoundError,
    ToolArgumentError,
    MissingVariablesError,
    IdempotencyConflictError,
    SessionBusyError,
)
"""Errors of a request that is refused before an execution begins."""


class ToolRunner:
    """Executes tools over a store.

    `execute` is a coroutine for the home loop. All other threads use `submit`, and must not wait for its future on the
    home loop, which would block it. A tool's code may wait for another tool: that one runs on a thread or a loop that
    the first does not occupy.

    Args:
        store: Runs commands.
        home: The event loop of the executions.
        tools: The tools of this process, by name.
        registered: Returns the runnable form of a tool that a worker has registered.
        limits: The limits of parameters, results, journals and the number of executions.
        budget: What the recorded LM calls of each session may use.
        meter: Counts executions and LM calls; None not to count.
        pools: Pools whose workers may have tools that they register only when they are called for a session.
        peers: The other servers of the sessions; None if there are none.

    Attributes:
        catalog: The tools that can be executed.
        running: The executions that run in this process.
    """

    def __init__(
        self,
        store: Submits,
        home: Home,
        tools: Mapping[str, RunnableTool],
        *,
        registered: Callable[[RegisteredTool], RunnableTool],
        limits: Limits,
        budget: Budget = NO_BUDGET,
        meter: Meter | None = None,
        pools: Iterable[Asked] = (),
        peers: Peers | None = None,
    ) -> None:
        self._meter = meter
        self.store = store
        self.limits = limits
        self.budget = budget
        self.spending = Spending.of(store)
        self._home = home
        if meter is not None:
            self.spending.meter = meter
        self._endings = Endings(store, home, self.spending, meter, is_shared=peers is not None)
        self.catalog = Catalog(self._endings, tools, registered, ToolsOfPools(pools, limits.tools_per_session))
        self.running = Running(home, self._endings, peers)
        self._turns = Turns(limits.queued_executions)
        self._count = 0
        self._peers = peers

    def start(self, coroutine: Coroutine[Any, Any, R]) -> "Future[R]":
        """Run a coroutine of the runner on its home loop; callable from any thread."""
        return self._home.start(coroutine)

    def submit(
        self, request: ToolRequest, emit: Emit | None = None, *, asker_id: str | None = None
    ) -> "Future[ToolOutcome]":
        """Execute a tool; callable from any thread.

        Args:
            request: What to execute.
            emit: Receives the chunks of a streaming tool, on the home loop.
            asker_id: See `execute`.

        Returns:
            A future of the outcome. It fails with the errors of `execute`, and with `EngineClosedError` if the runner
            is closed first.
        """
        return self.start(self._execute_until_closed(request, emit, asker_id))

    def run(self, request: ToolRequest, *, asker_id: str | None = None) -> ToolOutcome:
        """Execute a tool as `submit` does, and wait for its outcome; callable from any thread but that of the loop."""
        return self._home.run(self._execute_until_closed(request, None, asker_id))

    async def _execute_until_closed(self, request: ToolRequest, emit: Emit | None, asker_id: str | None) -> ToolOutcome:
        traffic = self._home.mailbox.traffic
        traffic.calls += 1
        try:
            return await self.execute(request, emit, asker_id=asker_id)
        except asyncio.CancelledError:
            if not self._endings.draining:
                # The caller cancelled the future.
                raise
            raise EngineClosedError() from None
        finally:
            traffic.calls -= 1

    def figures(self) -> RunnerFigures:
        """Return what runs now; from any thread."""
        sessions, count = list(self.running.sessions.values()), self._count
        opened = sum(each.request.tool == TRANSACTION and RECORDING_ID not in each.metadata for each in sessions)
        begun = sum(each.execution.parent is None for each in sessions)
        return RunnerFigures(len(sessions) - opened, max(0, count - begun), opened)

    def drain(self) -> None:
        """Count executions cancelled from now on as interrupted by the server, not as given up by the client."""
        self._endings.draining = True

    # Executing

    def execute(
        self,
        request: ToolRequest,
        emit: Emit | None = None,
        *,
        asker_id: str | None = None,
        tool: RunnableTool | None = None,
    ) -> Coroutine[Any, Any, ToolOutcome]:
        """Execute a tool, with retries after conflicts as far as its options allow.

        Args:
            request: What to execute.
            emit: Receives the chunks of a streaming tool.
            asker_id: The execution whose code sent the request and waits for it, if it came over a wire, or from the
                block of a transaction; for tools of this process the context has it.
            tool: What to run; by default the tool that the request names.

        Returns:
            The outcome, including every failure of the tool and every fault of the request.

        Raises:
            SessionNotFoundError: There is no such session.
            StateError: The store failed, or a limit is exceeded.
        """
        tracer = tracing.tracer()
        if tracer is None:
            return self._execute_request(request, emit, asker_id, tool)
        execute = functools.partial(self._execute_request, request, emit, asker_id, tool)
        return traced.executing(tracer, execute, request, is_tool=tool is None)

    async def _execute_request(
        self, request: ToolRequest, emit: Emit | None, asker_id: str | None, tool: RunnableTool | None
    ) -> ToolOutcome:
        if self._count >= self.limits.executions:
            raise LimitExceededError("number of executions", self._count + 1, self.limits.executions, "executions")
        if asker_id is not None:
            current_session.set(self.running.known.get(asker_id))
        _check_depth(current_session.get())
        self._count += 1
        request = self._timed(request)
        place = self._turns.place(request, current_session.get(), asker_id)
        if tool is not None and not tool.takes_turns:
            # In no line, and no session demands more than that.
            place.concurrency = Concurrency.REJECT
        try:
            if emit is not None:
                request = request._replace(outlet=Outlet(emit))
            tool = tool or await self.catalog.find_or_ask(request, asker_id)
            if tool.spec.concurrency is not None:
                place.join(await self._strictest(request, tool.spec.concurrency))
            arguments = await self._bind(request, tool)
            await place.turn()
            await self._check_required(request, tool)
            outcome = await self._execute(request, tool, arguments, place)
            if tool.spec.streaming or tool.result_type:
                return replace(outcome, streamed=tool.spec.streaming, result_type=tool.result_type)
            return outcome
        except ToolTimedOutError as error:
            # No execution of this request has begun: binding was too slow, or another one ran under its key.
            return ToolOutcome(ExecutionStatus.TIMED_OUT, None, error, error.error_code)
        except _REFUSALS as error:
            # A missing session is the more important error; this raises it.
            await self._submit(commands.ListTools(request.session_id), request.origin)
            if self._meter is not None:
                self._meter.not_begun(error)
            return ToolOutcome(None, None, error, error.error_code)
        finally:
            self._count -= 1
            place.leave()

    async def _strictest(self, request: ToolRequest, concurrency: Concurrency) -> Concurrency:
        """Return the stricter of what a tool and its session demand."""
        state = await self._submit(commands.ReadState(request.session_id), request.origin)
        stated = state.session.metadata.get(CONCURRENCY)
        return Concurrency.strictest(concurrency, Concurrency(stated) if stated else None)

    async def execute_within(self, execution_id: str, request: ToolRequest, *, plainly: bool = False) -> ToolOutcome:
        """Execute a tool as part of a running execution, on behalf of the process that runs that one.

        Args:
            execution_id: The running execution.
            request: What to execute.
            plainly: Whether the outcome has an error of the engine as it was raised, as in the same process, and not
                as the failure of a tool.

        Raises:
            ExecutionNotFoundError: No such execution is running.
            ExecutionElsewhereError: Another server runs it.
            ExecutionEndedError: It ended before the tool did.
        """
        parent = await self.running.seek(execution_id)
        parent.execution.check_is_of(request.session_id)
        try:
            result = await self._execute_joined(parent, request)
        except ExecutionEndedError:
            raise
        except _REFUSALS as error:
            return ToolOutcome(None, None, error, error.error_code, execution_id)
        except Exception as error:  # noqa: BLE001 -- users' code: the caller gets whatever it raises
            raised, failure = raised_of(error)
            is_plain = plainly and isinstance(raised, StateError)
            reported = cast(StateError, raised) if is_plain else reported_error(execution_id, raised, failure)
            quotable = parent.execution.quotable()
            return ToolOutcome(status_of(raised), None, reported, reported.error_code, execution_id, quotable=quotable)
        return ToolOutcome(
            ExecutionStatus.COMMITTED,
            result,
            execution_id=execution_id,
            attempts=1,
            result_type=self.result_type_of(request.tool),
        )

    async def _execute_joined(self, parent: ToolSession, request: ToolRequest) -> Value:
        """Run the call as a separate task, so that its caller gets an error when the end of the parent cancels it."""
        task = self._home.loop.create_task(self._conduct_joined(parent, request))
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError:
            task.cancel()
            # Nobody is left to hear how it ends. If nobody asked for its error, asyncio would log it.
            task.add_done_callback(_disregard)
            raise
        if task.cancelled():
            raise ExecutionEndedError(parent.execution_id, parent.execution.ended or ExecutionStatus.CANCELLED.value)
        return task.result()

    async def _conduct_joined(self, parent: ToolSession, request: ToolRequest) -> Value:
        try:
            result = await self._child_result(parent, request)
        finally:
            # The session may have ended meanwhile, which only the store knows; nothing is kept then.
            if not await self.running.still_runs(parent):
                raise ExecutionEndedError(parent.execution_id, parent.execution.ended or "its session ended")
        return result

    def _timed(self, request: ToolRequest) -> ToolRequest:
        """Return the request with its deadline; its time starts now."""
        if request.timeout_s is None:
            return request
        return request._replace(until=self._home.loop.time() + request.timeout_s)

    async def _prepare(self, request: ToolRequest, within: Execution) -> tuple[RunnableTool, Mapping[str, object]]:
        """Find a tool that another one calls, and bind its arguments. All checks come before the execution begins."""
        tool = await self.catalog.find(request)
        arguments = await self._bind(request, tool)
        await self._check_required(request, tool, within)
        return tool, arguments

    async def _bind(self, request: ToolRequest, tool: RunnableTool) -> Mapping[str, object]:
        """Bind the arguments for the first attempt, within the deadline of the request."""
        size_bytes = sum(each.size_bytes for each in request.parameters.values())
        most = self.limits.execution_size_bytes
        if size_bytes > most:
            raise LimitExceededError("size of the parameters in bytes", size_bytes, most, "execution_size_bytes")
        if request.until is None or tool.binds_at_once(size_bytes):
            return await tool.bind(request.parameters)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(request.until):
                return await tool.bind(request.parameters)
        # Raised outside the `with`: the TimeoutError as its context would keep the task alive, in a cycle.
        raise ToolTimedOutError("", f"to read its arguments took longer than {request.timeout_s:.3g} s")

    async def _check_required(self, request: ToolRequest, tool: RunnableTool, within: Execution | None = None) -> None:
        """Raise `MissingVariablesError` unless the session has the variables that the tool requires."""
        required = tool.spec.required_variables
        if not required:
            return
        query = commands.GetVariables(request.session_id, required)
        present = within.run(query, request.origin) if within else await self._submit(query, request.origin)
        if present.missing:
            raise MissingVariablesError(request.tool, ", ".join(present.missing))

    async def _execute(
        self, request: ToolRequest, tool: RunnableTool, arguments: Mapping[str, object], place: Place
    ) -> ToolOutcome:
        attempt, joins, pause_s = 1, 0, _FIRST_PAUSE_S
        retry_of, awaited = None, ""
        while True:
            begun = await self._begin(request, tool, attempt, retry_of=retry_of, place=place, awaited=awaited)
            if begun.concurrency is not None:
                # The session demands more than the tool does.
                place.join(begun.concurrency)
                await place.turn()
                continue
            if begun.busy is not None:
                place.check_waits_for(begun.busy)
                await self._await_end(request, begun.busy.id, "it has not had its turn")
                continue
            if begun.recorded is not None:
                if self._meter is not None:
                    self._meter.repeated()
                return await _repeat(request, tool, begun.recorded)
            if begun.running is not None:
                joined = await self._join(begun.running.id, request)
                if joined is not None and joined.status not in REPEATABLE:
                    return joined
                awaited = begun.running.id
                joins += self._peers is None
                if joins > _MOST_JOINS:
                    raise UnavailableError(
                        f"execution {begun.running.id} has this key and has not been cleared away yet"
                    )
                continue
            place.execution_id = begun.execution_id
            outcome = await self._attempt(request, tool, arguments, begun, attempt)
            again = outcome.status is ExecutionStatus.CONFLICT and attempt <= tool.spec.retries
            # Chunks that the client has received cannot be withdrawn.
            if not again or (request.outlet is not None and request.outlet.used):
                return outcome
            attempt, retry_of = attempt + 1, outcome.execution_id
            # Random, so that executions that conflicted do not do so again.
            await asyncio.sleep(random.uniform(0, pause_s))
            pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)

    async def _join(self, execution_id: str, request: ToolRequest) -> ToolOutcome | None:
        """Wait for a running execution and return its outcome, or None if the request has to begin again."""
        running = self.running.sessions.get(execution_id)
        if running is None or running.done is None:
            if self._peers is None:
                # It is just ending, or its client is just leaving; the store knows which in a moment.
                await asyncio.sleep(_JOIN_PAUSE_S)
            else:
                await self._await_end(request, execution_id, "it runs already under this key, and has not ended")
            return None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(request.until):
                return await asyncio.shield(running.done)
        most_s = request.timeout_s
        reason = f"it runs already under this key, and has not ended in the {most_s:.3g} s that its caller waits"
        raise ToolTimedOutError(execution_id, reason)

    async def _await_end(self, request: ToolRequest, execution_id: str, reason: str) -> None:
        """Wait until an execution of another server has ended, within the deadline of a request.

        Raises:
            ToolTimedOutError: The deadline has passed, for a reason that begins like this one.
        """
        pause_s = _JOIN_PAUSE_S
        while True:
            state = await self._submit(commands.ReadState(request.session_id), request.origin)
            if execution_id not in state.executions:
                return
            left_s = pause_s if request.until is None else request.until - self._home.loop.time()
            if left_s <= 0:
                waited = f"in the {request.timeout_s:.3g} s that its caller waits"
                raise ToolTimedOutError("", f"{reason} {waited}: {execution_id} is running on another server")
            await asyncio.sleep(min(pause_s, left_s))
            pause_s = min(pause_s * 1.5, _LONGEST_LOOK_S)

    async def _begin(
        self,
        request: ToolRequest,
        tool: RunnableTool,
        attempt: int,
        parent: Execution | None = None,
        retry_of: str | None = None,
        place: Place | None = None,
        awaited: str = "",
    ) -> Begun:
        has_turn = place is not None and place.has_turn and self._peers is not None
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
            place.concurrency if place is not None else Concurrency.OPTIMISTIC,
            tracing.trace_id(),
            self.catalog.turns() if has_turn else None,
            awaited,
        )
        origin = request.origin
        if origin.idempotency_key is not None:
            # The command carries the execution's key. With a key in the origin, too, the store would record `Begun` as
            # the outcome of the request.
            origin = replace(origin, idempotency_key=None)
        if command.json_length > values.LONG_JSON:
            ahead = values.ReadAhead(self.limits)
            read = functools.partial(command.read_ahead, ahead, lambda _: None)
            await self._home.on_thread(read, "dspex-persist-arguments")
        reply = self._endings.submit_here(command, origin)
        try:
            return await reply
        except asyncio.CancelledError:
            # The caller has gone. If the execution begins all the same, it has to end.
            reply.add_done_callback(functools.partial(self._abandon, command, origin))
            raise
        finally:
            # It refers to its error, whose traceback refers to this frame: this breaks the cycle.
            del reply

    def _abandon(self, command: commands.BeginExecution, origin: Origin, reply: Reply[Begun]) -> None:
        if reply.cancelled() or reply.exception() is not None or reply.result().snapshot is None:
            return
        verdict = Verdict(reply.result().execution_id, self._endings.cancelled_status, attempt=command.attempt)
        self._endings.record(commands.FinishExecution(command.session_id, verdict), origin)

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
            lambda command: self.store.submit(command, request.origin).result(),
        )
        session = ToolSession(self, execution, request, attempt, begun.seed, current_session.get())
        session.done = self._home.loop.create_future()
        traced.begun(session)
        outcome = None
        self.running.add(session)
        try:
            outcome = await self._conduct(tool, arguments, session)
        finally:
            session.done.set_result(outcome)
            # The outcome refers to its error, whose frames refer to the session: this breaks the cycle.
            session.done = None
            del self.running.sessions[session.execution_id]
        if request.outlet is not None and request.outlet.broken is not None:
            raise request.outlet.broken
        return outcome

    async def _conduct(self, tool: RunnableTool, arguments: Mapping[str, object], session: ToolSession) -> ToolOutcome:
        """Run the code of an execution, then end it."""
        try:
            result = await self._invoke(tool, arguments, session)
            if session.calling is not None:
                raise RuntimeError(f"it ended while {session.calling.execution.tool!r}, which it called, was running")
            verdict = session.verdict(ExecutionStatus.COMMITTED, result)
        except asyncio.CancelledError:
            self._endings.end_without_waiting(session, session.verdict(self._endings.cancelled_status))
            raise
        except Exception as error:  # noqa: BLE001 -- users' code: whatever it raises ends the execution
            raised, failure = raised_of(error)
            broken = session.outlet is not None and session.outlet.broken is not None
            status = ExecutionStatus.CANCELLED if broken else status_of(raised)
            if session.over_because:
                status = ExecutionStatus.INTERRUPTED
            verdict = session.verdict(status, failure=failure)
            try:
                return await self._endings.end(session, verdict, raised)
            finally:
                # Its traceback refers to this frame: without this, the two would keep each other alive.
                del raised
        return await self._endings.end(session, verdict)

    # Calls from tool to tool

    def call(self, caller: ToolSession, request: ToolRequest) -> "Future[Value]":
        """Execute a tool as part of its caller's execution; callable from any thread."""
        return self.start(self._execute_child(caller, request))

    def result_type_of(self, tool: str) -> str:
        """Return the `result_type` of a tool of this process; "" for other tools."""
        own = self.catalog.own.get(tool)
        return own.result_type if own is not None else ""

    def exposed_tools(self) -> tuple[ToolSpec, ...]:
        """Return the tools of this process that workers may call."""
        return tuple(tool.spec for tool in self.catalog.own.values() if tool.spec.exposed)

    async def _execute_child(self, parent: ToolSession, request: ToolRequest) -> Value:
        """Execute a tool as part of its caller's execution; returns its result, or raises what its code raised."""
        try:
            return await self._child_result(parent, request)
        except RaisedError as error:
            raised = error.error
        try:
            raise raised
        finally:
            # As in `_conduct`.
            del raised

    def _child_result(self, parent: ToolSession, request: ToolRequest) -> Coroutine[Any, Any, Value]:
        tracer = tracing.tracer()
        if tracer is None:
            return self._execute_called(parent, request)
        return traced.called(tracer, functools.partial(self._execute_called, parent, request), request)

    async def _execute_called(self, parent: ToolSession, request: ToolRequest) -> Value:
        # One at a time for each caller: savepoints nest, so interleaved calls could not be undone separately.
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
                # The caller returned without waiting for this call.
                self._endings.end_without_waiting(session, session.verdict(ExecutionStatus.ABORTED))
                execution.check_running()
            session.task = asyncio.current_task()
            traced.begun(session)
            parent.calling = session
            self.running.add(session)
            try:
                return await self._conduct_child(tool, arguments, session, execution)
            finally:
                del self.running.sessions[session.execution_id]
                # The task keeps its exception, whose frames refer to the session: this breaks the cycle.
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
                # Its code has raised nothing then: whoever waited for it has gone.
                failure = None if isinstance(raised, asyncio.CancelledError) else failure
                self._endings.end_without_waiting(session, session.verdict(status, failure=failure))
                # As in `_conduct`.
                del raised
            raise
        child.close(ExecutionStatus.COMMITTED.value)
        verdict = session.verdict(ExecutionStatus.COMMITTED, result)
        parent.children.extend([verdict, *child.children])
        self._endings.count(session, verdict)
        return result

    async def _invoke(self, tool: RunnableTool, arguments: Mapping[str, object], session: ToolSession) -> Value:
        """Run the tool's code within its timeout and the caller's deadline; returns its result."""
        request, own_s = session.request, tool.spec.timeout_s
        left_s = None if request.until is None else max(0.0, request.until - self._home.loop.time())
        timeout_s = min((each for each in (own_s, left_s) if each is not None), default=None)
        session.timeout_s = timeout_s
        limit = session.limit = asyncio.timeout(timeout_s)
        try:
            async with limit:
                return await _run(tool, arguments, session)
        except TimeoutError:
            if not limit.expired():
                raise
        finally:
            # It refers to the task, and the traceback of the task's exception to this frame: this breaks the cycle.
            session.limit = None
            del limit
        # Raised outside the `except`, for the same reason as in `_bind`.
        if session.over_because:
            raise ToolInterruptedError(session.execution_id, session.over_because)
        whose, most_s = "", own_s
        if timeout_s != own_s:
            whose, most_s = ", which is how long its caller waits", request.timeout_s
        raise ToolTimedOutError(session.execution_id, f"it took longer than {most_s:.3g} s{whose}")

    async def _submit(self, command: Command[R], origin: Origin) -> R:
        return await self._endings.submit_here(command, origin)


def _disregard(task: "asyncio.Task[Any]") -> None:
    if not task.cancelled():
        task.exception()


async def _run(tool: RunnableTool, arguments: Mapping[str, object], session: ToolSession) -> Value:
    """Run the tool's code, for a later attempt with new arguments: the one before may have changed the others."""
    if session.attempt > 1:
        arguments = await tool.bind(session.request.parameters)
    return await tool.run(session, arguments)


async def _repeat(request: ToolRequest, tool: RunnableTool, recorded: JournalEntry) -> ToolOutcome:
    """Return the recorded outcome again, and deliver its chunks again."""
    if recorded.status is not ExecutionStatus.COMMITTED:
        error = recorded_error(recorded)
        return ToolOutcome(
            recorded.status, None, error, error.error_code, recorded.id, None, recorded.attempt, repeated=True
        )
    result = recorded.result or NOTHING
    if request.outlet is not None and tool.spec.streaming:
        for chunk in json.loads(result.json):
            await request.outlet.hand_out(result_value(chunk, "chunk"))
    return ToolOutcome(
        ExecutionStatus.COMMITTED, result, None, "", recorded.id, recorded.sequence, recorded.attempt, repeated=True
    )


def _check_depth(asker: ToolSession | None) -> None:
    """Stop tools that call each other without end."""
    if asker is not None and asker.depth + 1 >= _MOST_DEPTH:
        raise LimitExceededError("depth of calls from tool to tool", asker.depth + 2, _MOST_DEPTH, "")
