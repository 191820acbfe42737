"""LentSession: what a tool's code can do in a worker, where its execution is the server's.

It is a `ToolSession`, whose execution reads and writes through the server.
"""

import asyncio
import contextvars
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from datetime import datetime
from functools import partial
from types import SimpleNamespace
from typing import Any, Final, TypeVar, cast

import grpc

from dspex_persist.infra.threads import is_on_loop
from dspex_persist.state import commands
from dspex_persist.state.bridge.client.state import BridgedState
from dspex_persist.state.bridge.generated import dspex_persist_audit_pb2 as audit_pb
from dspex_persist.state.bridge.headers import EXECUTION_ID
from dspex_persist.state.bridge.lent import KIND, PUBLISH, RAISED, Entries
from dspex_persist.state.bridge.rpcs.base import Rpc
from dspex_persist.state.bridge.rpcs.tools import EXECUTE_TOOL
from dspex_persist.state.bridge.rpcs.variables import publish_request
from dspex_persist.state.bridge.status import error_of_call
from dspex_persist.state.budgets import NO_BUDGET, Budget
from dspex_persist.state.commands import Command
from dspex_persist.state.errors import ExecutionEndedError, ExecutionNotFoundError, ToolFailedError
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import Origin, ToolOutcome, ToolSpec, Value
from dspex_persist.state.provider import Submits
from dspex_persist.state.tools.execution import Execution
from dspex_persist.state.tools.ports import RunnableTool
from dspex_persist.state.tools.requests import ToolRequest
from dspex_persist.state.tools.results import NOTHING
from dspex_persist.state.tools.session import ToolSession
from dspex_persist.state.tools.spending import Spending
from dspex_persist.state.tools.touched import touched_by

R = TypeVar("R")

# The code of a tool waits for the server without a limit, as it would for the server's memory.
_PATIENCE_S: Final = 1e6
# Lines that come together are sent together, and those of a short tool with its answer.
_SEND_AFTER_S: Final = 0.005

_PUBLISH: Final[Rpc[Any, Any]] = Rpc(
    command=commands.PublishVariable,
    rpc="SetVariable",
    request_of=publish_request,
    headers_of=lambda _: {PUBLISH: "1"},
    command_of=lambda request, _: request,
    response_of=lambda response, _: response,
    result_of=lambda _, response, _trailer: response.new_version,
)
_EXECUTE: Final[Rpc[Any, Any]] = Rpc(
    command=commands.ExecuteTool,
    request_of=EXECUTE_TOOL.request_of,
    headers_of=lambda _: {RAISED: "1"},
    command_of=EXECUTE_TOOL.command_of,
    response_of=EXECUTE_TOOL.response_of,
    result_of=EXECUTE_TOOL.result_of,
)


class Callback(BridgedState):
    """The server, at the private address of this worker.

    Args:
        target: The address, or the URL of the server.
        timeout_s: How long to wait for an answer, in seconds.
        actor: Who makes the changes.
    """

    def __init__(self, target: str, *, timeout_s: float = _PATIENCE_S, actor: str = "worker") -> None:
        super().__init__(target, timeout_s=timeout_s, actor=actor, breaker=None)

    def _rpc_of(self, command: Command[Any]) -> Rpc[Any, Any] | None:
        own = {commands.PublishVariable: _PUBLISH, commands.ExecuteTool: _EXECUTE}
        return own.get(type(command)) or super()._rpc_of(command)

    def run_within(self, command: Command[R], origin: Origin, execution_id: str) -> R:
        """Run a command as part of an execution."""
        self.check_open()
        result: R = self._attempt(command, origin, execution_id).run()
        return result

    def call_within(
        self, command: commands.ExecuteTool, origin: Origin, execution_id: str, read: Callable[[ToolOutcome], Value]
    ) -> Future[Value]:
        """Execute a tool as part of an execution. Cancelling the future cancels the tool.

        Args:
            command: What to execute.
            origin: Who asks for it.
            execution_id: The execution.
            read: Returns the result, or raises what the tool has raised.
        """
        future: Future[Value] = Future()
        request, headers = _EXECUTE.request_of(command), self._headers_of(_EXECUTE, origin, execution_id, command)
        call = self._stub.ExecuteTool.future(request, metadata=headers)

        def settle(_: object) -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                if call.code() is not grpc.StatusCode.OK:
                    raise error_of_call(call, self._target)
                future.set_result(read(_EXECUTE.result_of(command, call.result(), lambda _: None)))
            except BaseException as error:  # noqa: BLE001 -- the caller gets whatever the tool has raised
                future.set_exception(error)

        future.add_done_callback(lambda each: call.cancel() if each.cancelled() else None)
        call.add_done_callback(settle)
        return future

    def check_budgets(self, execution_id: str, own: Budget) -> None:
        """Have the server check the budgets of an execution's session, and of the tool in it."""
        request = audit_pb.CheckBudgetRequest(
            execution_id=execution_id, max_tokens=own.max_tokens, max_cost=own.max_cost
        )
        try:
            self._beside.CheckBudget(request, metadata=((EXECUTION_ID, execution_id),))
        except grpc.RpcError as error:
            raise error_of_call(error, self._target) from None

    def keep(self, execution_id: str, text: str, then: Callable[[], None]) -> None:
        """Have the journal of an execution keep something. `then` is called on any thread, even if that failed."""
        request = audit_pb.RecordInputsRequest(execution_id=execution_id, kind=KIND, entries_json=[text])
        call = self._beside.RecordInputs.future(request, metadata=((EXECUTION_ID, execution_id),))
        call.add_done_callback(lambda _: then())


class LentExecution:
    """What an `Execution` is in the server's process. The server checks whatever it is asked.

    Attributes:
        key: What calls of this process name as their execution: its id, or what the server has told instead.
    """

    def __init__(
        self,
        execution_id: str,
        session_id: str,
        tool: str,
        server: Callback,
        parent: "LentExecution | None",
        key: str = "",
    ) -> None:
        self.id = execution_id
        self.key = key or execution_id
        self.session_id = session_id
        self.tool = tool
        self.parent = parent
        self.status = ""
        self.overlay = SimpleNamespace(lock=threading.RLock())
        self._server = server

    @property
    def ended(self) -> str:
        """How it ended, alone or with an enclosing one; "" while it runs."""
        return self.status or (self.parent.ended if self.parent is not None else "")

    def close(self, status: str) -> None:
        """End it: from now on, everything that its code does is refused."""
        self.status = self.status or status

    def check_running(self) -> None:
        """Raise `ExecutionEndedError` if it has ended."""
        if self.ended:
            raise ExecutionEndedError(self.id, self.ended)

    def check_can_publish(self, _identifier: str) -> None:
        """Raise if it has ended. The server knows what it has written."""
        self.check_running()

    def run(self, command: Command[R], origin: Origin) -> R:
        """Run a command in the execution."""
        command.check()
        self.check_running()
        touched_by(command)
        return self.ask(command, origin)

    def ask(self, command: Command[R], origin: Origin) -> R:
        """Have the server run a command in the execution."""
        try:
            return self._server.run_within(command, origin, self.key)
        except ExecutionNotFoundError:
            raise self.gone() from None

    def gone(self) -> ExecutionEndedError:
        """Note that the server has ended it, and return the error for its code."""
        self.close("ended")
        return ExecutionEndedError(self.id, self.ended)


class WorkerHost:
    """The host of the sessions in a worker: calls of other tools go through the server, which sends them back here.

    Args:
        server: The server.
        tools: The tools of this process, by name.
        limits: The limits of values and journals.
    """

    def __init__(self, server: Callback, tools: Mapping[str, RunnableTool], limits: Limits) -> None:
        self.store: Submits = server
        self.limits = limits
        self.server = server
        # The server counts, and checks.
        self.spending = Spending()
        self.budget = NO_BUDGET
        self._tools = tools

    def call(self, caller: ToolSession, request: ToolRequest) -> Future[Value]:
        """See `Host.call`."""
        lent = cast(LentSession, caller)
        # The context variables of the caller hold in the tool, too.
        lent.context = contextvars.copy_context()
        command = commands.ExecuteTool(request.session_id, request.tool, request.parameters)
        return self.server.call_within(command, caller.origin, lent.lent.key, partial(_result_of, lent))

    def result_type_of(self, tool: str) -> str:
        """See `Host.result_type_of`."""
        own = self._tools.get(tool)
        return own.result_type if own is not None else ""

    def exposed_tools(self) -> tuple[ToolSpec, ...]:
        """See `Host.exposed_tools`: the server has the same tools."""
        return tuple(tool.spec for tool in self._tools.values() if tool.spec.exposed)


def _result_of(caller: "LentSession", outcome: ToolOutcome) -> Value:
    if outcome.success:
        return outcome.result or NOTHING
    error = outcome.error or ToolFailedError(outcome.execution_id, outcome.error_code)
    if isinstance(error, ToolFailedError) and caller.raised:
        # What it raised in this process.
        raise caller.raised.popleft()
    raise error


class LentSession(ToolSession):
    """The session of an execution that a worker runs.

    Args:
        host: The host.
        execution: The execution.
        request: The request.
        attempt: The number of the attempt.
        seed: The recorded seed.
        asker: The session whose code waits for this one, if it is in this process.

    Attributes:
        lent: The execution.
        context: The context variables of the code that has last called another tool.
        raised: What tools raised here that the code has called.
        has_ended: Set when the code has returned.
    """

    is_far = True

    def __init__(
        self,
        host: WorkerHost,
        execution: LentExecution,
        request: ToolRequest,
        attempt: int,
        seed: str,
        asker: "LentSession | None",
    ) -> None:
        super().__init__(host, cast(Execution, execution), request, attempt, seed, asker)
        self.lent = execution
        self.context: contextvars.Context | None = None
        self.raised: deque[BaseException] = deque(maxlen=16)
        self.has_ended = asyncio.Event()
        self._server = host.server
        self._loop = asyncio.get_running_loop()
        self._is_noted = False
        self._sending: asyncio.Event | None = None
        self._sent = [0, 0, 0]
        self._inputs: list[tuple[str, Any]] = []

    def returned(self) -> None:
        """See `ToolSession.returned`."""
        self._on_loop(self.has_ended.set)

    def now(self) -> datetime:
        """See `ToolSession.now`."""
        moment = super().now()
        self._note()
        return moment

    def log(self, message: str, **fields: object) -> None:
        """See `ToolSession.log`."""
        super().log(message, **fields)
        self._note()

    def record(self, kind: str, entry: Mapping[str, Any]) -> None:
        """See `ToolSession.record`."""
        with self.execution.overlay.lock:
            super().record(kind, entry)
            self._inputs.append((kind, self._recorded[kind][-1]))
        self._note()

    def _spend(self, call: Mapping[str, Any]) -> None:
        """Leave it to the server, which gets the call."""

    def check_budgets(self, own: Budget = NO_BUDGET) -> None:
        """See `ToolSession.check_budgets`. It waits for the server, which first gets the calls that were recorded."""
        self.lent.check_running()
        if not is_on_loop() or asyncio.get_running_loop() is not self._loop:
            asyncio.run_coroutine_threadsafe(self._sent_all(), self._loop).result()
        try:
            self._server.check_budgets(self.execution_id, own)
        except ExecutionNotFoundError:
            raise self.lent.gone() from None

    async def _sent_all(self) -> None:
        """Send what the journal has to keep, and wait until it has it."""
        self._send()
        while self._sending is not None:
            await self._sending.wait()

    def _publish(self, identifier: str, encoded: Value, metadata: Mapping[str, str] | None, reason: str | None) -> int:
        command = commands.PublishVariable(self.session_id, self.execution_id, identifier, encoded, metadata or {})
        command.check()
        self.lent.check_running()
        return cast(int, self.lent.ask(command, self._origin_for(reason)))

    # The journal

    def _note(self) -> None:
        if not self._is_noted:
            self._is_noted = True
            self._on_loop(lambda: self._loop.call_later(_SEND_AFTER_S, self._send))

    def _send(self) -> None:
        """Send what the journal has to keep. What comes meanwhile is sent afterwards."""
        if self._sending is not None or self.cancelled:
            return
        entries = self._unsent()
        if not entries:
            return
        sending = self._sending = asyncio.Event()

        def sent() -> None:
            self._sending = None
            sending.set()
            self._send()

        self._server.keep(self.execution_id, entries.written(), lambda: self._on_loop(sent))

    def _unsent(self) -> Entries:
        self._is_noted = False
        with self.execution.overlay.lock:
            lines, times, inputs = self._log[self._sent[0] :], self._times[self._sent[1] :], self._inputs
            self._inputs = []
            self._sent = [self._sent[0] + len(lines), self._sent[1] + len(times), 0]
        recorded: dict[str, list[Any]] = {}
        for kind, entry in inputs:
            recorded.setdefault(kind, []).append(entry)
        return Entries(lines, times, recorded)

    async def rest(self) -> str:
        """Return what the journal has to keep and has not been sent, once the code has returned."""
        while self._sending is not None:
            await self._sending.wait()
        entries = self._unsent()
        return entries.written() if entries else ""

    def _on_loop(self, callback: Callable[[], object]) -> None:
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:
            # The worker has ended.
            return
