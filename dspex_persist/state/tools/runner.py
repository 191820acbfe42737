"""Running tools: each execution is a transaction, from its journal entry to its verdict.

A `ToolRunner` lives on one event loop, its home, which keeps the time of all executions. Tools' own code never runs
there: plain functions and generators run on a bounded number of threads, asynchronous ones on an event loop of their
own, and so does whatever reads their arguments or asks what they raised. A tool that computes, blocks, or ends what it
runs on stops nobody else.
"""

import asyncio
import contextlib
import contextvars
import functools
import json
import random
from collections.abc import Coroutine, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

from dspex_persist.infra.logs import get_logger
from dspex_persist.infra.threads import DaemonThreads, LoopThread
from dspex_persist.state import commands, values
from dspex_persist.state.commands import Command
from dspex_persist.state.commands.executions import Begun, Finished, Verdict
from dspex_persist.state.errors import (
    EngineClosedError,
    ExecutionConflictError,
    ExecutionEndedError,
    ExecutionNotFoundError,
    IdempotencyConflictError,
    InternalError,
    InvalidValueError,
    LimitExceededError,
    MissingVariablesError,
    QueueFullError,
    RemoteToolError,
    SessionNotFoundError,
    StateError,
    StorageError,
    ToolArgumentError,
    ToolInterruptedError,
    ToolNotFoundError,
    ToolTimedOutError,
    UnavailableError,
    closest,
    quote,
)
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import (
    ExecutionStatus,
    Origin,
    RecordedExecution,
    RegisteredTool,
    ToolOutcome,
    Value,
)
from dspex_persist.state.provider import Submit
from dspex_persist.state.tools.execution import Execution
from dspex_persist.state.tools.failures import (
    RaisedError,
    contained,
    failure_of,
    let_go_with,
    raised_of,
    status_of,
    told,
)
from dspex_persist.state.tools.home import Home
from dspex_persist.state.tools.ports import Emit, RemoteCall, RemotePort, ToolCode, ToolKind
from dspex_persist.state.tools.requests import IDEMPOTENCY_KEY, ToolRequest
from dspex_persist.state.tools.results import NOTHING, Chunks, checked, result_value
from dspex_persist.state.tools.session import ToolSession, asking

R = TypeVar("R")
_logger: Final = get_logger(__name__)
_DEEPEST: Final = 16
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.002, 0.25
_LARGE_BYTES: Final = 100_000
_JOIN_PAUSE_S: Final = 0.02
_MOST_JOINS: Final = 1_000
_SAY_AGAIN_S: Final = 5.0
_LONG_WAIT_S: Final = 5.0
_ENTRY_BYTES: Final = 500
_ANEW: Final = (ExecutionStatus.CANCELLED, ExecutionStatus.INTERRUPTED, ExecutionStatus.CONFLICT)
"""How an execution may have ended that whoever waited for it begins again."""
_REFUSALS: Final = (ToolNotFoundError, ToolArgumentError, MissingVariablesError, IdempotencyConflictError)
"""What is wrong with a request before anything has begun."""


@dataclass(eq=False, slots=True)
class _Job:
    """A request with its tool, and the arguments for its first attempt. `until`: when, on the home loop, whoever asked
    stops waiting. `broken`: what kept its chunks from being handed out."""

    request: ToolRequest
    tool: ToolCode | RegisteredTool
    arguments: Mapping[str, object]
    until: float | None = None
    emit: Emit | None = None
    emitted: bool = False
    broken: Exception | None = None

    async def hand_out(self, chunk: Value) -> None:
        """Give a chunk to whoever asked; returns when it has been taken."""
        assert self.emit is not None, "only called where there is somebody to take it"
        self.emitted = True
        try:
            await self.emit(chunk)
        except Exception as error:
            self.broken = error
            raise


@dataclass(eq=False, slots=True)
class _Running:
    """An execution under way; `done` is set when it has ended, to its outcome, or None if nobody learnt it."""

    session: ToolSession
    done: "asyncio.Future[ToolOutcome | None]"


class ToolRunner:
    """Executes the `tools` of this process, and through `remote` those that sessions' workers have registered.

    `execute` is a coroutine of the runner's home loop: `home`, else a loop of its own on a thread of its own. From any
    other thread use `submit`; whoever waits there must not be on the home loop, which would then wait for itself. A
    tool's code may: what it asks for runs on a thread, or a loop, that it does not hold.
    """

    def __init__(
        self,
        submit: Submit,
        tools: Mapping[str, ToolCode],
        *,
        threads: int = 64,
        limits: Limits | None = None,
        remote: RemotePort | None = None,
        home: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self.submit_command = submit
        self.limits = limits or Limits()
        self.tools = dict(tools)
        self._remote = remote
        self._threads = DaemonThreads(threads, "dspex-persist-tool")
        self._tools_loop = LoopThread("dspex-persist-tools")
        self._home = Home(home)
        self._running: dict[str, _Running] = {}
        # What runs code at the moment, on the bounded threads and on the tools' loop.
        self._on_threads, self._on_loop = set[ToolSession](), set[ToolSession]()
        self._said_at = -_LONG_WAIT_S
        self._count = 0
        self._draining = False

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
            # By whoever cancelled the future, who does not look any more, or by `close`.
            raise EngineClosedError() from None

    def find(self, execution_id: str) -> Execution:
        """A running execution; `ExecutionNotFoundError` otherwise."""
        return self._session_of(execution_id).execution

    def is_running(self, execution_id: str) -> bool:
        """Whether `find` would find it."""
        return execution_id in self._running

    def circuit_of(self, tool: RegisteredTool) -> str:
        """Whether calls to a tool elsewhere are let through: closed, open, half_open."""
        return self._remote.state_of(tool.address) if self._remote is not None else "closed"

    def drain(self) -> None:
        """What is cancelled from here on was interrupted by the server's end, not given up by its client."""
        self._draining = True

    def close(self) -> None:
        """Interrupt what runs, end idle threads and the loops. Nobody waits for code that goes on all the same: it can
        keep nothing any more."""
        self._draining = True
        self._threads.close()
        self._home.close()
        self._tools_loop.close()

    def _session_of(self, execution_id: str) -> ToolSession:
        running = self._running.get(execution_id)
        if running is None:
            raise ExecutionNotFoundError(execution_id)
        return running.session

    def _find_asker(self, execution_id: str) -> ToolSession | None:
        """Whose code runs, though it may have ended."""
        running = self._running.get(execution_id)
        if running is not None:
            return running.session
        at_work = (*self._on_threads, *self._on_loop)
        return next((each for each in at_work if each.execution_id == execution_id), None)

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
            asking.set(self._find_asker(asked_by))
        _check_depth(asking.get())
        self._count += 1
        try:
            job = await self._prepare(request, asking.get(), emit)
            outcome = await self._execute(job)
            return replace(outcome, streamed=job.tool.spec.streaming, result_type=_result_type(job.tool))
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
        own = self.tools.get(request.tool)
        return ToolOutcome(
            ExecutionStatus.COMMITTED,
            result,
            execution_id=execution_id,
            attempts=1,
            result_type=_result_type(own) if own is not None else "",
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

    async def _prepare(
        self,
        request: ToolRequest,
        asker: ToolSession | None,
        emit: Emit | None = None,
        within: Execution | None = None,
    ) -> _Job:
        """Everything that can be refused before anything is begun."""
        until = None if request.timeout_s is None else self._home.loop.time() + request.timeout_s
        tool = await self._find_tool(request)
        size_bytes = sum(each.size_bytes for each in request.parameters.values())
        most = self.limits.execution_size_bytes
        if size_bytes > most:
            raise LimitExceededError("size of the parameters in bytes", size_bytes, most, "execution_size_bytes")
        for name, value in request.parameters.items():
            _check_parameter(request.tool, name, value, self.limits)
        # Whether they are the right ones a tool elsewhere says itself.
        arguments = {} if isinstance(tool, RegisteredTool) else await self._bind(tool, request, until, asker)
        required = tool.spec.required_variables
        if required:
            query = commands.GetVariables(request.session_id, required)
            found = within.run(query, request.origin) if within else await self._submit(query, request.origin)
            if found.missing:
                raise MissingVariablesError(request.tool, ", ".join(found.missing))
        return _Job(request, tool, arguments, until, emit)

    async def _bind(
        self, tool: ToolCode, request: ToolRequest, until: float | None, asker: ToolSession | None
    ) -> Mapping[str, object]:
        """New arguments, for one attempt."""
        size_bytes = sum(value.size_bytes for value in request.parameters.values())
        if tool.reads_plainly and size_bytes < _LARGE_BYTES:
            return tool.bind(request.parameters)
        # Reading a large one takes as long as a hundred calls, and users' code as long as it likes: the loop is
        # everybody's. A thread for this alone, as those of the tools may be taken, and not by what is going to return.
        thread = DaemonThreads(1, "dspex-persist-arguments")
        try:
            async with asyncio.timeout_at(until):
                return await self._home.mailbox.result(
                    thread.submit(functools.partial(_bound, tool, request.parameters))
                )
        except TimeoutError as error:
            reason = f"to read its arguments took longer than {request.timeout_s:.3g} s"
            raise ToolTimedOutError("", reason) from error
        finally:
            thread.close()

    async def _find_tool(self, request: ToolRequest) -> ToolCode | RegisteredTool:
        own = self.tools.get(request.tool)
        if own is not None:
            # Whether there is such a session, whoever begins the execution is told.
            return own
        registered = await self._submit(commands.ListTools(request.session_id), request.origin)
        found = registered.get(request.tool)
        if found is None:
            names = sorted({*self.tools, *registered})
            meant = closest(request.tool, names)
            hint = f"did you mean {meant}?" if meant else f"there are: {', '.join(names[:20]) or 'none'}"
            raise ToolNotFoundError(request.tool, hint)
        return found

    async def _execute(self, job: _Job) -> ToolOutcome:
        attempt, joins, pause_s = 1, 0, _FIRST_PAUSE_S
        retry_of = None
        while True:
            begun = await self._begin(job, attempt, retry_of=retry_of)
            if begun.recorded is not None:
                return await _repeat(job, begun.recorded)
            if begun.running is not None:
                joined = await self._join(begun.running.id, job)
                if joined is not None and joined.status not in _ANEW:
                    return joined
                joins += 1
                if joins > _MOST_JOINS:
                    raise UnavailableError(
                        f"execution {begun.running.id} has this key and has not been cleared away yet"
                    )
                continue
            outcome = await self._attempt(job, begun, attempt)
            again = outcome.status is ExecutionStatus.CONFLICT and attempt <= job.tool.spec.retries
            # What has been handed out cannot be taken back.
            if not again or job.emitted:
                return outcome
            attempt, retry_of = attempt + 1, outcome.execution_id
            # Drawn, so that those who met do not meet again.
            await asyncio.sleep(random.uniform(0, pause_s))
            pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)

    async def _join(self, execution_id: str, job: _Job) -> ToolOutcome | None:
        """Wait for a running execution; its outcome. None if it has to be asked for again."""
        running = self._running.get(execution_id)
        if running is None:
            # It has just ended, or its client has just gone: a moment later the store knows which.
            await asyncio.sleep(_JOIN_PAUSE_S)
            return None
        try:
            async with asyncio.timeout_at(job.until):
                return await asyncio.shield(running.done)
        except TimeoutError as error:
            most_s = job.request.timeout_s
            reason = f"it runs already under this key, and has not ended in the {most_s:.3g} s that its caller waits"
            raise ToolTimedOutError(execution_id, reason) from error

    async def _begin(
        self, job: _Job, attempt: int, parent: Execution | None = None, retry_of: str | None = None
    ) -> Begun:
        request, tool = job.request, job.tool
        command = commands.BeginExecution(
            request.session_id,
            request.tool,
            request.parameters,
            request.metadata,
            tool.spec.isolation,
            attempt,
            parent.id if parent is not None else None,
            request.idempotency_key if parent is None else None,
            tool.worker_id if isinstance(tool, RegisteredTool) else "",
            retry_of,
        )
        origin = request.origin
        if origin.idempotency_key is not None:
            # The execution's own key is in the command: that of its outcome is none of the store's.
            origin = replace(origin, idempotency_key=None)
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
        verdict = Verdict(future.result().execution_id, self._gone(), attempt=command.attempt)
        self._say(commands.FinishExecution(command.session_id, verdict), origin)

    async def _attempt(self, job: _Job, begun: Begun, attempt: int) -> ToolOutcome:
        request = job.request
        execution = Execution.begin(
            request.session_id,
            request.tool,
            job.tool.spec.isolation,
            begun,
            request.origin,
            lambda command: self.submit_command(command, request.origin).result(),
        )
        session = ToolSession(self, execution, request, attempt, begun.seed, asking.get())
        outcome = None
        with self._listed(session) as running:
            try:
                outcome = await self._conduct(job, session)
            finally:
                running.done.set_result(outcome)
        if job.broken is not None:
            raise job.broken
        return outcome

    @contextmanager
    def _listed(self, session: ToolSession) -> Iterator[_Running]:
        """Have the execution found while it runs."""
        running = self._running[session.execution_id] = _Running(session, self._home.loop.create_future())
        try:
            yield running
        finally:
            del self._running[session.execution_id]

    async def _conduct(self, job: _Job, session: ToolSession) -> ToolOutcome:
        """Run the code of an execution, then end it."""
        try:
            result = await self._invoke(job, session)
            if session.calling is not None:
                raise RuntimeError(f"it ended while {session.calling.execution.tool!r}, which it called, was running")
            verdict = session.verdict(ExecutionStatus.COMMITTED, result)
        except asyncio.CancelledError:
            self._end_without_waiting(session, session.verdict(self._gone()))
            raise
        except Exception as error:  # noqa: BLE001 -- users' code: whatever it raises is its verdict
            raised, failure = raised_of(error)
            status = status_of(raised) if job.broken is None else ExecutionStatus.CANCELLED
            verdict = session.verdict(status, failure=failure)
            return await self._end(session, verdict, raised)
        return await self._end(session, verdict)

    def _gone(self) -> ExecutionStatus:
        return ExecutionStatus.INTERRUPTED if self._draining else ExecutionStatus.CANCELLED

    # Ending

    async def _end(self, session: ToolSession, verdict: Verdict, raised: BaseException | None = None) -> ToolOutcome:
        command = self._closing(session, verdict)
        future = self.submit_command(command, session.origin)
        try:
            finished = await self._home.mailbox.result(future)
        except asyncio.CancelledError:
            # If its turn had come it is committed, or not, as it would have been anyway.
            if future.cancelled():
                self._end_without_waiting(session, replace(verdict, status=self._gone(), result=None))
            raise
        except (SessionNotFoundError, ExecutionEndedError):
            reason = "the session ended while the tool ran; nothing was written"
            error = ToolInterruptedError(session.execution_id, reason)
            return ToolOutcome(
                ExecutionStatus.INTERRUPTED, None, error, error.error_code, error.execution_id, None, session.attempt
            )
        except StateError as error:
            self._owe(session, verdict, error)
            raise
        return _outcome(verdict, finished, raised)

    def _end_without_waiting(self, session: ToolSession, verdict: Verdict) -> None:
        self._say(self._closing(session, verdict), session.origin)

    def _closing(self, session: ToolSession, verdict: Verdict) -> commands.FinishExecution:
        """The command that ends an execution, after which its code is refused everything, and what it called is ended
        with it."""
        execution = session.execution
        execution.close(verdict.status.value)
        for called in session.below():
            called.execution.close(verdict.status.value)
            execution.children.append(called.verdict(verdict.status))
            execution.children.extend(called.execution.children)
            if called.task is not None:
                called.task.cancel()
        return execution.finish(verdict)

    def _say(self, command: commands.FinishExecution, origin: Origin) -> None:
        """Have the journal say how an execution ended that wrote nothing; later, if the store has no room now."""

        def settled(future: "Future[Finished]") -> None:
            error = None if future.cancelled() else future.exception()
            if isinstance(error, StorageError | QueueFullError):
                again = functools.partial(self._say, command, origin)
                self._home.mailbox.post(lambda: self._home.loop.call_later(_SAY_AGAIN_S, again))
            elif isinstance(error, InternalError) and command != _bare(command):
                self._say(_bare(command), origin)

        self.submit_command(command, origin).add_done_callback(settled)

    def _owe(self, session: ToolSession, verdict: Verdict, error: StateError) -> None:
        """The store did not take the end: what the execution wrote is lost, but its journal entry is not."""
        if isinstance(error, StorageError | QueueFullError | InternalError):
            failed = replace(verdict, status=ExecutionStatus.FAILED, result=None, failure=failure_of(error))
            command = session.execution.finish(failed)
            self._say(_bare(command) if isinstance(error, InternalError) else command, session.origin)

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
        raise raised

    async def _child_result(self, parent: ToolSession, request: ToolRequest) -> Value:
        async with parent.turn:
            execution = parent.execution
            execution.check_running()
            _check_depth(parent)
            job = await self._prepare(request, parent, within=execution)
            begun = await self._begin(job, 1, execution)
            child = execution.begin_child(begun, request.tool)
            session = ToolSession(self, child, request, 1, begun.seed, parent)
            if execution.ended:
                # It did not wait for what it called.
                self._end_without_waiting(session, session.verdict(ExecutionStatus.ABORTED))
                execution.check_running()
            session.task = asyncio.current_task()
            parent.calling = session
            try:
                with self._listed(session):
                    return await self._conduct_child(job, session, execution)
            finally:
                parent.calling = None

    async def _conduct_child(self, job: _Job, session: ToolSession, parent: Execution) -> Value:
        child = session.execution
        try:
            result = await self._invoke(job, session)
            with parent.overlay.lock:
                parent.overlay.note_ended(_ENTRY_BYTES + session.journal_bytes + result.size_bytes)
        except BaseException as error:
            if not parent.ended:
                raised, failure = raised_of(error)
                child.undo()
                status = ExecutionStatus.FAILED if isinstance(raised, Exception) else ExecutionStatus.CANCELLED
                self._end_without_waiting(session, session.verdict(status, failure=failure))
            raise
        child.close(ExecutionStatus.COMMITTED.value)
        parent.children.extend([session.verdict(ExecutionStatus.COMMITTED, result), *child.children])
        return result

    # Running code

    async def _invoke(self, job: _Job, session: ToolSession) -> Value:
        """Run the tool's code, within its time; its result."""
        own_s = job.tool.spec.timeout_s
        left_s = None if job.until is None else max(0.0, job.until - self._home.loop.time())
        timeout_s = min((each for each in (own_s, left_s) if each is not None), default=None)
        try:
            async with asyncio.timeout(timeout_s) as limit:
                if isinstance(job.tool, RegisteredTool):
                    result = await self._call_remote(job, job.tool, session, timeout_s)
                else:
                    result = await self._call(job, job.tool, session)
        except TimeoutError as error:
            if limit.expired():
                whose, most_s = "", own_s
                if timeout_s != own_s:
                    whose, most_s = ", which is how long its caller waits", job.request.timeout_s
                raise ToolTimedOutError(session.execution_id, f"it took longer than {most_s:.3g} s{whose}") from error
            raise
        return result

    async def _call(self, job: _Job, tool: ToolCode, session: ToolSession) -> Value:
        arguments = job.arguments
        if session.attempt > 1:
            # What the code did to those of the attempt before is undone, too.
            arguments = await self._bind(tool, job.request, None, session.asker)
        session.is_async = tool.kind.is_async
        # What the caller has set (dspy.context, a log's bindings) holds in the tool's thread, too.
        context = contextvars.copy_context()
        context.run(asking.set, session)
        place = self._run_on_loop if session.is_async else self._run_on_thread
        waiting = self._home.loop.call_later(_LONG_WAIT_S, self._say_waits, session)
        try:
            return await place(job, tool, session, arguments, context)
        finally:
            waiting.cancel()

    async def _run_on_loop(
        self,
        job: _Job,
        tool: ToolCode,
        session: ToolSession,
        arguments: Mapping[str, object],
        context: contextvars.Context,
    ) -> Value:
        run = self._run_async(job, tool, session, arguments)
        if not session.aside:
            return await self._home.mailbox.result(context.run(self._tools_loop.start, run))
        # Whoever asked may be waiting on the tools' loop itself.
        loop = LoopThread(f"dspex-persist-{session.execution_id}")
        try:
            return await self._home.mailbox.result(context.run(loop.start, run))
        finally:
            loop.close(wait_s=0)

    async def _run_on_thread(
        self,
        job: _Job,
        tool: ToolCode,
        session: ToolSession,
        arguments: Mapping[str, object],
        context: contextvars.Context,
    ) -> Value:
        run = functools.partial(context.run, self._run_sync, job, tool, session, arguments)
        if session.asker is None:
            return await self._home.mailbox.result(self._threads.submit(run))
        # Who asked may be waiting on one of the bounded threads: who is asked must not wait for one.
        thread = DaemonThreads(1, f"dspex-persist-{session.execution_id}")
        try:
            return await self._home.mailbox.result(thread.submit(run))
        finally:
            thread.close()

    def _say_waits(self, session: ToolSession) -> None:
        """Say in the log that an execution has been waiting for its turn to run, and what for; not all of them do."""
        now = self._home.loop.time()
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

    def _run_sync(self, job: _Job, tool: ToolCode, session: ToolSession, arguments: Mapping[str, object]) -> Value:
        """On a thread of its own."""
        with self._at_work(session), contained():
            started = tool.start(session, arguments)
            if tool.kind is ToolKind.FUNCTION:
                return checked(tool.spec.name, result_value(started, "result"), self.limits)
            chunks = Chunks(tool.spec.name, self.limits)
            with contextlib.closing(started):
                for chunk in started:
                    session.execution.check_running()
                    value = chunks.add(result_value(chunk, "chunk"))
                    if job.emit is not None:
                        self.start(job.hand_out(value)).result()
            return chunks.result()

    async def _run_async(
        self, job: _Job, tool: ToolCode, session: ToolSession, arguments: Mapping[str, object]
    ) -> Value:
        """On the tools' loop."""
        with let_go_with(asyncio.get_running_loop()), self._at_work(session), contained(asyncio.CancelledError):
            started = tool.start(session, arguments)
            if tool.kind is ToolKind.COROUTINE:
                return checked(tool.spec.name, result_value(await started, "result"), self.limits)
            chunks = Chunks(tool.spec.name, self.limits)
            async with contextlib.aclosing(started):
                async for chunk in started:
                    session.execution.check_running()
                    value = chunks.add(result_value(chunk, "chunk"))
                    if job.emit is not None:
                        await asyncio.wrap_future(self.start(job.hand_out(value)))
            return chunks.result()

    async def _call_remote(
        self, job: _Job, tool: RegisteredTool, session: ToolSession, timeout_s: float | None
    ) -> Value:
        request = job.request
        if not tool.address or self._remote is None:
            reason = (
                f'worker {quote(tool.worker_id)} registered it without metadata["address"], so nobody can reach it'
                if not tool.address
                else "tools in other processes are for servers"
            )
            raise RemoteToolError(tool.spec.name, tool.address or "nowhere", reason)
        call = RemoteCall(
            tool,
            session.session_id,
            session.execution_id,
            request.parameters,
            {name: text for name, text in request.metadata.items() if name != IDEMPOTENCY_KEY},
            timeout_s,
            request.style,
        )
        if not tool.spec.streaming:
            return checked(tool.spec.name, await self._remote.execute(call) or NOTHING, self.limits)
        chunks = Chunks(tool.spec.name, self.limits)

        async def take(chunk: Value) -> None:
            session.execution.check_running()
            chunks.add(chunk)
            if job.emit is not None:
                await job.hand_out(chunk)

        await self._remote.stream(call, take)
        return chunks.result()

    async def _submit(self, command: Command[R], origin: Origin) -> R:
        return await self._home.mailbox.result(self.submit_command(command, origin))


async def _repeat(job: _Job, recorded: RecordedExecution) -> ToolOutcome:
    """The recorded outcome again, its chunks included."""
    result = recorded.result or NOTHING
    if job.emit is not None and job.tool.spec.streaming:
        for chunk in json.loads(result.json):
            await job.hand_out(result_value(chunk, "chunk"))
    return ToolOutcome(
        ExecutionStatus.COMMITTED, result, None, "", recorded.id, recorded.sequence, recorded.attempt, repeated=True
    )


def _bare(command: commands.FinishExecution) -> commands.FinishExecution:
    """The same without what the code has put into it: something in it cannot be kept, and nobody knows what."""

    def bare(verdict: Verdict) -> Verdict:
        return Verdict(verdict.execution_id, verdict.status, failure=verdict.failure, attempt=verdict.attempt)

    return replace(command, verdict=bare(command.verdict), children=tuple(map(bare, command.children)))


def _outcome(verdict: Verdict, finished: Finished, raised: BaseException | None) -> ToolOutcome:
    status, execution_id = finished.status, verdict.execution_id
    if status is ExecutionStatus.COMMITTED:
        return ToolOutcome(status, verdict.result, None, "", execution_id, finished.sequence, verdict.attempt)
    if status is ExecutionStatus.CONFLICT:
        error: StateError = ExecutionConflictError(execution_id, ", ".join(map(str, finished.conflicts)))
    else:
        error = told(execution_id, raised, verdict.failure)
    return ToolOutcome(status, None, error, error.error_code, execution_id, None, verdict.attempt)


def _bound(tool: ToolCode, parameters: Mapping[str, Value]) -> Mapping[str, object]:
    """On a thread of its own: whatever code of the tool's own raises, the arguments will not do."""
    try:
        return tool.bind(parameters)
    except StateError:
        raise
    except BaseException as error:  # noqa: BLE001 -- users' code
        raise ToolArgumentError(tool.spec.name, ", ".join(parameters), failure_of(error).type) from None


def _check_depth(asker: ToolSession | None) -> None:
    """Tools that ask for tools without end have an end."""
    if asker is not None and asker.depth + 1 >= _DEEPEST:
        raise LimitExceededError("depth of calls from tool to tool", asker.depth + 2, _DEEPEST, "")


def _check_parameter(tool: str, name: str, value: Value, limits: Limits) -> None:
    try:
        values.parse_json(value.json, name=name, limits=limits)
    except InvalidValueError as error:
        raise ToolArgumentError(tool, name, error.reason) from error
    values.check_binary_size(name, len(value.binary or b""), limits)


def _result_type(tool: ToolCode | RegisteredTool) -> str:
    return "" if isinstance(tool, RegisteredTool) else tool.result_type
