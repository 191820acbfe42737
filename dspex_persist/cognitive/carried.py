"""Carried tools: tools of this process, on sessions that are on a server which does not have them.

Such a tool runs here, in a transaction of the server: it reads from a snapshot, its writes take effect together when it
returns, and a conflict repeats it as often as the tool allows. The server's journal has it as an execution of the tool
"transaction", with the tool's name in its metadata. If a tool that it calls fails, it fails, too.
"""

import asyncio
import contextvars
import random
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from datetime import datetime
from functools import partial
from random import Random
from typing import Any, Final, TypeVar, Unpack, cast
from uuid import UUID

from dspex_persist import clock
from dspex_persist.cognitive.records import result_of
from dspex_persist.infra.futures import failed
from dspex_persist.infra.threads import is_on_loop, on_new_thread
from dspex_persist.state import values
from dspex_persist.state.abilities import ExecutesTools, StreamsTools, Transaction, Transacts
from dspex_persist.state.around import Around
from dspex_persist.state.budgets import NO_BUDGET, Budget
from dspex_persist.state.commands import Command, ExecuteTool
from dspex_persist.state.errors import (
    DerivationError,
    ExecutionConflictError,
    ExecutionEndedError,
    LimitExceededError,
    RuleViolatedError,
    StateError,
    ToolArgumentError,
    ToolInterruptedError,
    TransactionEndedError,
    UnsupportedError,
)
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import ExecutionStatus, Origin, ToolOutcome, ToolSpec, Value
from dspex_persist.state.provider import TOOL_TIMEOUT_S, StateProvider, Who, fault_of
from dspex_persist.state.tools.failures import raised_of, reported_error
from dspex_persist.state.tools.ports import ToolCode, ToolKind
from dspex_persist.state.tools.results import checked, result_value
from dspex_persist.state.tools.session import ToolSession, current_session

R = TypeVar("R")

NAME: Final = "tool"
"""The key of the transaction's metadata that has the tool's name."""


class CarriedTools(Around, StreamsTools):
    """A server's state that executes tools of this process as well, unless the server has tools of the same names.

    Args:
        provider: The state on the server.
        tools: The tools, by name.
    """

    def __init__(self, provider: StateProvider, tools: Mapping[str, ToolCode]) -> None:
        super().__init__(provider)
        served = {spec.name for spec in ExecutesTools.of(provider).list_tools()}
        self._tools = {name: code for name, code in tools.items() if name not in served}

    def submit(self, command: Command[R], origin: Origin | None = None) -> Future[R]:
        """See `StateProvider.submit`. A carried tool runs on a thread of its own."""
        if not isinstance(command, ExecuteTool) or command.tool not in self._tools:
            return self.provider.submit(command, origin)
        fault = fault_of(command, origin)
        if fault is not None:
            return failed(fault)
        # The caller's context variables hold in the tool's thread, too.
        run = partial(contextvars.copy_context().run, self._execute, command, origin)
        return cast("Future[R]", on_new_thread(run, f"dspex-persist-{command.tool}"))

    def list_tools(self, session_id: str = "") -> tuple[ToolSpec, ...]:
        """See `ExecutesTools.list_tools`."""
        served = ExecutesTools.of(self.provider).list_tools(session_id)
        return (*served, *(code.spec for code in self._tools.values()))

    def stream_tool(
        self,
        session_id: str,
        tool: str,
        parameters: Mapping[str, object] | None = None,
        *,
        metadata: Mapping[str, str] | None = None,
        **who: Unpack[Who],
    ) -> Iterator[object]:
        """See `StreamsTools.stream_tool`. What a carried tool yields comes when it has committed."""
        if tool not in self._tools:
            served = StreamsTools.of(self.provider)
            yield from served.stream_tool(session_id, tool, parameters, metadata=metadata, **who)
            return
        outcome = self.execute_tool(session_id, tool, parameters, metadata=metadata, **who)
        result = result_of(outcome)
        if outcome.streamed:
            yield from cast("list[object]", result)
        elif result is not None:
            yield result

    def _execute(self, command: ExecuteTool, origin: Origin | None) -> ToolOutcome:
        code, origin = self._tools[command.tool], origin or self.default_origin(command.cause)
        if origin.idempotency_key is not None:
            raise UnsupportedError(
                f"an idempotency key for tool {command.tool!r}, which runs in this process on a session of a server",
                "have the server execute the tool: serve --tools",
            )
        for attempt in range(1, code.spec.retries + 2):
            outcome = self._attempt(code, command, origin, attempt)
            if outcome.status is not ExecutionStatus.CONFLICT:
                break
        return outcome

    def _attempt(self, code: ToolCode, command: ExecuteTool, origin: Origin, attempt: int) -> ToolOutcome:
        spec = code.spec
        try:
            arguments = code.bind(command.parameters, _LIMITS)
        except (ToolArgumentError, LimitExceededError) as error:
            return ToolOutcome(None, error=error, error_code=error.error_code)
        limits = [each for each in (command.timeout_s, spec.timeout_s) if each is not None]
        transaction = Transacts.of(self.provider).begin_transaction(
            command.session_id,
            isolation=spec.isolation,
            timeout_s=min(limits, default=TOOL_TIMEOUT_S),
            metadata={**command.metadata, NAME: spec.name},
            origin=origin,
        )
        session = CarriedSession(self.provider, transaction, self._tools, command.metadata, origin, attempt)
        facts: dict[str, Any] = {"execution_id": transaction.execution_id, "attempts": attempt}
        try:
            result = _run(code, session, arguments)
            if session.failure is not None:
                raise session.failure
        except BaseException as error:  # noqa: BLE001 - a tool's code: the outcome has it
            transaction.abort(error)
            if isinstance(error, ExecutionConflictError):
                return ToolOutcome(ExecutionStatus.CONFLICT, error=error, error_code=error.error_code, **facts)
            reported = reported_error(transaction.execution_id, *raised_of(error))
            return ToolOutcome(ExecutionStatus.FAILED, error=reported, error_code=reported.error_code, **facts)
        try:
            sequence = transaction.commit()
        except ExecutionConflictError as error:
            return ToolOutcome(ExecutionStatus.CONFLICT, error=error, error_code=error.error_code, **facts)
        except StateError as error:
            return _refused(error, facts)
        facts |= {"commit_sequence": sequence, "streamed": spec.streaming, "result_type": code.result_type}
        return ToolOutcome(ExecutionStatus.COMMITTED, result, **facts)


_LIMITS: Final = Limits()


def _refused(error: StateError, facts: dict[str, Any]) -> ToolOutcome:
    """Return the outcome of a tool whose transaction did not commit, as the server reports those of its own tools."""
    execution_id, status = str(facts["execution_id"]), ExecutionStatus.FAILED
    reported: StateError = error
    if isinstance(error, RuleViolatedError | DerivationError):
        reported = reported_error(execution_id, *raised_of(error))
        reported.__cause__ = error
    elif isinstance(error, TransactionEndedError) and error.status == ExecutionStatus.INTERRUPTED:
        status = ExecutionStatus.INTERRUPTED
        reported = ToolInterruptedError(execution_id, "the session ended while the tool ran; nothing was written")
    return ToolOutcome(status, error=reported, error_code=reported.error_code, **facts)


def _run(code: ToolCode, session: "CarriedSession", arguments: Mapping[str, object]) -> Value:
    """Run a tool's code on this thread; returns its result, or the list of what it yielded."""
    token = current_session.set(cast(ToolSession, session))
    try:
        started = code.start(cast(ToolSession, session), arguments)
        if code.kind is ToolKind.COROUTINE:
            started = asyncio.run(started)
        elif code.kind is ToolKind.GENERATOR:
            started = list(started)
        elif code.kind is ToolKind.ASYNC_GENERATOR:
            started = asyncio.run(_all_of(started))
        return checked(code.spec.name, result_value(started, "result"), _LIMITS)
    finally:
        current_session.reset(token)


async def _all_of(chunks: Any) -> list[object]:
    return [chunk async for chunk in chunks]


class CarriedSession:
    """The session of a carried tool: what `ToolSession` is to a tool that runs beside its state."""

    is_durable = True
    is_far = True

    def __init__(
        self,
        store: StateProvider,
        transaction: Transaction,
        tools: Mapping[str, ToolCode],
        metadata: Mapping[str, str],
        origin: Origin,
        attempt: int,
    ) -> None:
        self.store = store
        self.session_id = transaction.session_id
        self.execution_id = transaction.execution_id
        self.metadata = dict(metadata)
        self.attempt = attempt
        self.failure: BaseException | None = None
        """The error of a tool that it has called."""
        self.random: Random = random.Random(f"{self.execution_id}:random")
        self._uuids = random.Random(f"{self.execution_id}:uuid")
        self._transaction = transaction
        self._tools = tools
        self._origin = origin

    @property
    def cancelled(self) -> bool:
        """Whether the transaction has ended."""
        return bool(self._transaction.status)

    def run(self, command: Command[R], *, reason: str | None = None) -> R:
        """Run a command inside the transaction."""
        origin = None
        if reason is not None:
            origin = Origin(self._origin.actor, self.execution_id, self._origin.source, reason=reason)
        try:
            return self._transaction.submit(command, origin).result()
        except TransactionEndedError as error:
            raise ExecutionEndedError(error.execution_id, error.status) from None

    def now(self) -> datetime:
        """Return the time."""
        return clock.now()

    def uuid(self) -> UUID:
        """Return a new UUID."""
        return UUID(int=self._uuids.getrandbits(128), version=4)

    def log(self, message: str, **fields: object) -> None:
        """Do nothing: the server's journal has no log of a transaction."""

    def check_budgets(self, own: Budget = NO_BUDGET) -> None:
        """Check the budgets of the session; the server knows none of the tool."""
        self._transaction.check_budgets()

    def record(self, kind: str, entry: Mapping[str, Any]) -> None:
        """Record an input from outside in the transaction's journal entry."""
        self._transaction.record(kind, entry)

    def publish(self, identifier: str, value: object, metadata: Mapping[str, str] | None = None) -> int:
        """Refuse it: a transaction publishes nothing before it commits."""
        raise UnsupportedError(
            "publish in a tool that runs in this process on a session of a server",
            "have the server execute the tool: serve --tools",
        )

    def exposed_tools(self) -> tuple[ToolSpec, ...]:
        """Return the tools of the server that workers may call."""
        return tuple(spec for spec in ExecutesTools.of(self.store).list_tools() if spec.exposed)

    def call(self, tool: str, arguments: Mapping[str, object]) -> Any:
        """Run another tool in the same transaction; on an event loop, return an awaitable of its result."""
        code = self._tools.get(tool)
        parameters = values.encode_arguments(arguments)
        if code is None:
            run: Callable[[], Any] = partial(self._call_served, tool, parameters)
        else:
            run = partial(self._call_carried, code, parameters)
        return asyncio.to_thread(run) if is_on_loop() else run()

    def _call_carried(self, code: ToolCode, parameters: Mapping[str, Value]) -> Any:
        try:
            return values.decode_loosely(_run(code, self, code.bind(parameters, _LIMITS)), code.result_type)
        except BaseException as error:
            # A transaction cannot take back a part of what it has written.
            self.failure = error
            raise

    def _call_served(self, tool: str, parameters: Mapping[str, Value]) -> Any:
        return result_of(self._transaction.run(ExecuteTool(self.session_id, tool, parameters)))
