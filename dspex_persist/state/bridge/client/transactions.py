"""BridgedTransaction: a transaction on a server."""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, Final, Protocol, TypeVar

import grpc

from dspex_persist.infra.futures import failed
from dspex_persist.state import commands, values
from dspex_persist.state.abilities import Transaction, checked_kind, part_of, transaction_ended
from dspex_persist.state.bridge.generated import dspex_persist_audit_pb2 as pb
from dspex_persist.state.bridge.generated.dspex_persist_audit_pb2_grpc import AuditServiceStub
from dspex_persist.state.bridge.headers import EXECUTION_ID, EXECUTION_STATUS, Headers
from dspex_persist.state.bridge.inherited import OneProcess
from dspex_persist.state.bridge.status import error_of_call, error_of_write, is_from_server, is_lost
from dspex_persist.state.bridge.transaction_service import FAILURE
from dspex_persist.state.commands import Command
from dspex_persist.state.errors import (
    EngineClosedError,
    ExecutionConflictError,
    ExecutionEndedError,
    ExecutionNotFoundError,
    OutcomeUnknownError,
    StateError,
    ToolTimedOutError,
    TransactionEndedError,
)
from dspex_persist.state.model import UNKNOWN, ExecutionStatus, Origin
from dspex_persist.state.tools.failures import failure_of
from dspex_persist.state.tools.touched import touched_by

R = TypeVar("R")

_ENDS: Final[Mapping[type[StateError], str]] = {
    ExecutionConflictError: ExecutionStatus.CONFLICT,
    OutcomeUnknownError: UNKNOWN,
    TransactionEndedError: ExecutionStatus.INTERRUPTED,
    ToolTimedOutError: ExecutionStatus.TIMED_OUT,
}
"""How a transaction has ended, by the error of its commit."""


class SubmitWithin(Protocol):
    """Sends a command as part of an execution."""

    def __call__(self, command: Command[R], origin: Origin, execution_id: str) -> Future[R]: ...


class BridgedTransaction(Transaction):
    """A transaction on a server, which lasts no longer than the connection.

    Args:
        session_id: The session.
        execution_id: Its id.
        stream: The call that began it, and ends with it.
        stub: The audit service.
        submit: Sends commands.
        origin: Who began it.
        target: The server, for errors.
        timeout_s: How long to wait for the answer to a commit.
        on_end: Called when it has ended, before its caller knows.
    """

    def __init__(
        self,
        session_id: str,
        execution_id: str,
        stream: Any,
        stub: AuditServiceStub,
        submit: SubmitWithin,
        origin: Origin,
        target: str,
        timeout_s: float,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(session_id, execution_id)
        self._on_end = on_end
        self._stream = stream
        self._stub = stub
        self._submit = submit
        self._origin = origin
        self._target = target
        self._timeout_s = timeout_s
        self._headers: Headers = ((EXECUTION_ID, execution_id),)
        self._here = OneProcess(target, stream)
        self._status = ""
        self._lock = threading.Lock()
        self._is_ending = False

    @property
    def status(self) -> str:
        """See `Transaction.status`."""
        if not self._status and self._here.refusal is None and self._stream.done():
            trailers = dict(self._stream.trailing_metadata() or ())
            known = trailers.get(EXECUTION_STATUS)
            self._end(str(known or ExecutionStatus.INTERRUPTED.value))
        return self._status

    def _end(self, status: str) -> None:
        self._status = self._status or status
        self._on_end()
        self._here.close()
        self._stream.cancel()

    def _ended(self) -> TransactionEndedError:
        return transaction_ended(self.execution_id, self.status)

    def submit(self, command: Command[R], origin: Origin | None = None) -> Future[R]:
        """See `Transaction.submit`."""
        future: Future[R] = Future()
        # It cannot be cancelled: the server may be carrying it out.
        future.set_running_or_notify_cancel()
        try:
            self._here.check()
            if not isinstance(command, commands.ExecuteTool):
                # The server would carry it out outside of the transaction.
                touched_by(command)
            if self._is_ending or self.status:
                raise self._ended()
        except StateError as error:
            future.set_exception(error)
            return future
        sent = self._submit(command, part_of(self._origin, origin), self.execution_id)
        sent.add_done_callback(lambda answered: self._settle(future, answered))
        return future

    def _settle(self, future: Future[Any], answered: Future[Any]) -> None:
        error = answered.exception()
        if error is None:
            future.set_result(answered.result())
            return
        if isinstance(error, ExecutionNotFoundError | ExecutionEndedError):
            error = self._ended()
        elif isinstance(error, OutcomeUnknownError):
            # The server may have it, or not: the transaction cannot go on, and nothing of it is written.
            self._end(ExecutionStatus.INTERRUPTED.value)
            error = self._ended()
        elif self.status:
            error = self._ended()
        future.set_exception(error)

    def submit_record(self, kind: str, entry: Mapping[str, Any]) -> Future[None]:
        """See `Transaction.submit_record`. It is sent once: if the connection breaks, the transaction ends."""
        try:
            text = values.encode(entry, "map", name=checked_kind(kind)).json
        except StateError as error:
            return failed(error)
        request = pb.RecordInputsRequest(execution_id=self.execution_id, kind=kind, entries_json=[text])
        return self._ask(self._stub.RecordInputs, request)

    def submit_check_budgets(self) -> Future[None]:
        """See `Transaction.submit_check_budgets`."""
        return self._ask(self._stub.CheckBudget, pb.CheckBudgetRequest(execution_id=self.execution_id))

    def _ask(self, rpc: Any, request: Any) -> Future[None]:
        """Call an rpc on the transaction, which goes on."""
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()

        def settle(call: Any) -> None:
            error = self._error_of(call)
            if isinstance(error, OutcomeUnknownError):
                self._end(ExecutionStatus.INTERRUPTED.value)
            if isinstance(error, OutcomeUnknownError | ExecutionNotFoundError | ExecutionEndedError):
                error = self._ended()
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

        try:
            self._here.check()
            if self._is_ending or self.status:
                raise self._ended()
            self._call(rpc, request, settle)
        except StateError as error:
            future.set_exception(error)
        return future

    def submit_commit(self) -> Future[int]:
        """See `Transaction.submit_commit`."""
        future: Future[int] = Future()
        future.set_running_or_notify_cancel()

        def settle(call: Any) -> None:
            error = self._error_of(call)
            if error is None:
                self._end(ExecutionStatus.COMMITTED.value)
                future.set_result(call.result().sequence)
                return
            if isinstance(error, ExecutionNotFoundError):
                error = self._ended()
            self._end(str(_ENDS.get(type(error), ExecutionStatus.FAILED)))
            future.set_exception(error)

        try:
            self._begin_end()
            request = pb.CommitTransactionRequest(execution_id=self.execution_id)
            self._call(self._stub.CommitTransaction, request, settle)
        except StateError as error:
            future.set_exception(error)
        return future

    def submit_abort(self, error: BaseException | None = None) -> Future[None]:
        """See `Transaction.submit_abort`."""
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()
        failure = FAILURE.message_of(failure_of(error)) if error is not None else None
        status = ExecutionStatus.ABORTED if failure is None else ExecutionStatus.FAILED

        def settle(_call: Any) -> None:
            # Whatever the server has answered, the transaction ends with its stream.
            self._end(status.value)
            future.set_result(None)

        try:
            self._begin_end()
            request = pb.AbortTransactionRequest(execution_id=self.execution_id, failure=failure)
            self._call(self._stub.AbortTransaction, request, settle)
        except TransactionEndedError:
            future.set_result(None)
        except StateError as refusal:
            future.set_exception(refusal)
        return future

    def _begin_end(self) -> None:
        self._here.check()
        with self._lock:
            if self._is_ending or self.status:
                raise self._ended()
            self._is_ending = True

    def _call(self, rpc: Any, request: Any, settle: Callable[[Any], None]) -> None:
        try:
            call = rpc.future(request, timeout=self._timeout_s, metadata=self._headers)
        except ValueError:
            # The channel is closed.
            raise EngineClosedError() from None
        call.add_done_callback(settle)

    def _error_of(self, call: Any) -> StateError | None:
        code = call.code()
        if code is grpc.StatusCode.OK:
            return None
        if is_from_server(call) or not is_lost(call):
            return error_of_call(call, self._target)
        unknown = error_of_write(call, self._target)
        if isinstance(unknown, OutcomeUnknownError):
            return unknown
        # It was not sent. Without a connection, there is no transaction.
        return transaction_ended(self.execution_id, ExecutionStatus.INTERRUPTED.value)
