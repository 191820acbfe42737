"""Transactions of clients: executions whose code is the client's own, which reads and writes from outside."""

import asyncio
import weakref
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any, TypeVar, cast

from dspex_persist.infra.futures import failed
from dspex_persist.infra.threads import is_on_loop, on_new_thread
from dspex_persist.state import commands
from dspex_persist.state.abilities import Transaction, checked_kind, part_of, transaction_ended
from dspex_persist.state.commands import Command
from dspex_persist.state.errors import (
    ExecutionEndedError,
    ExecutionNotFoundError,
    ForkedProcessError,
    StateError,
    ToolFailedError,
    TransactionEndedError,
)
from dspex_persist.state.model import (
    ExecutionStatus,
    Failure,
    Isolation,
    Origin,
    ToolOutcome,
    ToolSpec,
    Value,
)
from dspex_persist.state.tools.failures import AbortedError, RaisedError, failure_of
from dspex_persist.state.tools.home import Home
from dspex_persist.state.tools.ports import RunnableTool
from dspex_persist.state.tools.requests import ToolRequest, request_of
from dspex_persist.state.tools.results import NOTHING
from dspex_persist.state.tools.runner import ToolRunner
from dspex_persist.state.tools.session import ToolSession
from dspex_persist.state.tools.touched import may_block

R = TypeVar("R")


class _ClientCode(RunnableTool):
    """What stands for a tool in a transaction: it waits until the client has decided how that ends."""

    def __init__(self, name: str, isolation: Isolation, *, takes_turns: bool) -> None:
        super().__init__(ToolSpec(name, isolation=isolation))
        self.takes_turns = takes_turns
        loop = asyncio.get_running_loop()
        self.session: asyncio.Future[ToolSession] = loop.create_future()
        self.decision: asyncio.Future[None] = loop.create_future()
        # If the execution is cancelled in the same moment, nobody asks for the error.
        self.decision.add_done_callback(_take_error)

    @property
    def where(self) -> Mapping[str, str]:
        """Nowhere: nobody can call it."""
        return {}

    async def bind(self, parameters: Mapping[str, Value]) -> Mapping[str, object]:
        """Return no arguments."""
        return {}

    async def run(self, session: ToolSession, arguments: Mapping[str, object]) -> Value:
        """Wait for the decision; raises what the client's code raised."""
        if not self.session.done():
            self.session.set_result(session)
        await self.decision
        return NOTHING


class OpenTransaction:
    """A transaction that has begun, for coroutines of the runner's home loop."""

    def __init__(self, code: _ClientCode, session: ToolSession, execution: "asyncio.Task[ToolOutcome]") -> None:
        self.session = session
        self._code = code
        self._execution = execution

    @classmethod
    async def begin(
        cls,
        runner: ToolRunner,
        request: ToolRequest,
        isolation: Isolation,
        asker_id: str | None = None,
        *,
        takes_turns: bool = True,
    ) -> "OpenTransaction":
        """Begin a transaction, when it is its turn.

        Args:
            runner: Runs it.
            request: Who begins it, on which session.
            isolation: What others must not change until it commits.
            asker_id: The execution whose code waits for it, if one does.
            takes_turns: Whether it follows the concurrency that its session demands.

        Raises:
            StateError: It could not begin.
        """
        code = _ClientCode(request.tool, isolation, takes_turns=takes_turns)
        execution = asyncio.get_running_loop().create_task(runner.execute(request, tool=code, asker_id=asker_id))
        execution.add_done_callback(_take_error)
        try:
            await asyncio.wait((code.session, execution), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            execution.cancel()
            raise
        if code.session.done():
            return cls(code, code.session.result(), execution)
        outcome = execution.result()
        raise outcome.error or ToolFailedError(outcome.execution_id, outcome.error_code)

    async def commit(self) -> int:
        """Commit it; returns the number of the commit.

        Raises:
            ExecutionConflictError: Others have changed what it depends on.
            RuleViolatedError: A rule of the session does not hold after its changes.
            TransactionEndedError: It has ended before.
            StateError: The store failed.
        """
        self._check_undecided()
        self._code.decision.set_result(None)
        outcome = await self.outcome()
        if outcome.commit_sequence is not None:
            return outcome.commit_sequence
        if outcome.status is ExecutionStatus.INTERRUPTED:
            raise transaction_ended(outcome.execution_id, outcome.status.value)
        error = outcome.error or ToolFailedError(outcome.execution_id, outcome.error_code)
        # What refuses the changes is about the client's own code: no tool has failed.
        raise error.__cause__ if isinstance(error.__cause__, StateError) else error

    async def abort(self, failure: Failure | None = None) -> None:
        """End it without writing anything; does nothing if it has ended.

        Args:
            failure: The exception of the client's code, for the journal.
        """
        if not (self._code.decision.done() or self._execution.done()):
            error = ToolFailedError(self.session.execution_id, "")
            self._code.decision.set_exception(AbortedError() if failure is None else RaisedError(error, failure))
        await asyncio.wait((self._execution,))

    def _check_undecided(self) -> None:
        if self._code.decision.done() or self._execution.done():
            raise transaction_ended(self.session.execution_id, self.session.execution.ended)

    async def outcome(self) -> ToolOutcome:
        """Wait for its end. Cancelling this does not cancel the transaction."""
        return await asyncio.shield(self._execution)

    def cancel(self) -> None:
        """End it because its client has gone."""
        self._execution.cancel()


def _take_error(ended: "asyncio.Future[Any]") -> None:
    """Keep asyncio from logging an error that nobody waits for: the journal has it."""
    if not ended.cancelled():
        ended.exception()


class LocalTransaction(Transaction):
    """A transaction in this process."""

    def __init__(self, runner: ToolRunner, home: Home, opened: OpenTransaction) -> None:
        session = opened.session
        super().__init__(session.session_id, session.execution_id)
        self._runner = runner
        self._home = home
        self._opened = opened
        self._session = session
        self._forgotten = weakref.finalize(self, home.mailbox.post, opened.cancel)
        self._forgotten.atexit = False

    @property
    def status(self) -> str:
        """See `Transaction.status`."""
        return self._session.execution.ended

    def _ended(self) -> TransactionEndedError:
        return transaction_ended(self.execution_id, self.status)

    def _check_running(self) -> None:
        try:
            self._session.execution.check_running()
        except ExecutionEndedError:
            raise self._ended() from None
        except ForkedProcessError:
            raise ForkedProcessError("the transaction") from None

    def submit(self, command: Command[R], origin: Origin | None = None) -> Future[R]:
        """See `Transaction.submit`."""
        origin = part_of(self._session.origin, origin)
        if isinstance(command, commands.ExecuteTool):
            return cast(Future[R], self._execute(command, origin))
        if is_on_loop() and may_block(command):
            name = f"dspex-persist-{self.execution_id}"
            return on_new_thread(lambda: self._run(command, origin), name)
        future: Future[R] = Future()
        try:
            future.set_result(self._run(command, origin))
        except StateError as error:
            future.set_exception(error)
        return future

    def _run(self, command: Command[R], origin: Origin) -> R:
        try:
            return self._session.execution.run(command, origin)
        except ExecutionEndedError:
            raise self._ended() from None
        except ForkedProcessError:
            raise ForkedProcessError("the transaction") from None

    def _execute(self, command: commands.ExecuteTool, origin: Origin) -> Future[Any]:
        try:
            command.check()
            self._check_running()
            return self._home.start(self._execute_within(request_of(command, origin)))
        except StateError as error:
            return failed(error)

    async def _execute_within(self, request: ToolRequest) -> ToolOutcome:
        try:
            return await self._runner.execute_within(self.execution_id, request)
        except (ExecutionNotFoundError, ExecutionEndedError):
            raise self._ended() from None

    def submit_record(self, kind: str, entry: Mapping[str, Any]) -> Future[None]:
        """See `Transaction.submit_record`."""
        future: Future[None] = Future()
        try:
            self._check_running()
            self._session.record(checked_kind(kind), entry)
            future.set_result(None)
        except StateError as error:
            future.set_exception(error)
        return future

    def submit_check_budgets(self) -> Future[None]:
        """See `Transaction.submit_check_budgets`."""
        future: Future[None] = Future()
        try:
            self._check_running()
            self._session.check_budgets()
            future.set_result(None)
        except StateError as error:
            future.set_exception(error)
        return future

    def submit_commit(self) -> Future[int]:
        """See `Transaction.submit_commit`."""
        try:
            self._check_running()
            future = self._home.start(self._opened.commit())
        except StateError as error:
            return failed(error)
        self._forgotten.detach()
        return future

    def submit_abort(self, error: BaseException | None = None) -> Future[None]:
        """See `Transaction.submit_abort`."""
        self._forgotten.detach()
        future: Future[None] = Future()
        if self.status:
            future.set_result(None)
            return future
        failure = failure_of(error) if error is not None else None
        try:
            self._check_running()
            return self._home.start(self._opened.abort(failure))
        except StateError as refusal:
            return failed(refusal)
