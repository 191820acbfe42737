"""Endings: ends executions in the store, and reports the outcome to their callers."""

import asyncio
import functools
from concurrent.futures import Future
from dataclasses import replace
from functools import cached_property
from typing import Final

from dspex_persist.infra.mailbox import Reply
from dspex_persist.state import commands
from dspex_persist.state.commands.executions import Verdict
from dspex_persist.state.errors import (
    ExecutionConflictError,
    ExecutionEndedError,
    InternalError,
    OutcomeUnknownError,
    QueueFullError,
    SessionNotFoundError,
    StateError,
    StorageError,
    ToolInterruptedError,
    UnavailableError,
)
from dspex_persist.state.meter import Meter
from dspex_persist.state.model import (
    RECORDING_ID,
    UNKNOWN,
    ExecutionStatus,
    Failure,
    Origin,
    ToolOutcome,
)
from dspex_persist.state.provider import SubmitHere, Submits
from dspex_persist.state.tools.failures import failure_of, reported_error
from dspex_persist.state.tools.home import Home
from dspex_persist.state.tools.session import ToolSession
from dspex_persist.state.tools.spending import Spending

SESSION_ENDED: Final = "the session ended while the tool ran; nothing was written"
SEEMED_DEAD: Final = "other servers took this one for dead while the tool ran; nothing was written"
_ENDED: Final = "the session ended while the tool ran, or its server seemed dead to others; nothing was written"
_RETRY_S: Final = 5.0


class Endings:
    """Has the store end executions.

    Attributes:
        draining: Whether the server is shutting down. A cancelled execution then counts as interrupted by the server,
            not as given up by its client.
    """

    def __init__(
        self, store: Submits, home: Home, spending: Spending, meter: Meter | None = None, *, is_shared: bool = False
    ) -> None:
        self._meter = meter
        # What may be recorded later. A log that others share can be away, and come back.
        self._later = (StorageError, QueueFullError, *((UnavailableError, OutcomeUnknownError) if is_shared else ()))
        self._store = store
        self._home = home
        self._spending = spending
        self.draining = False

    @cached_property
    def submit_here(self) -> SubmitHere:
        """Has the store carry out commands, for coroutines of the home loop."""
        return self._store.on_loop(self._home.mailbox)

    @property
    def cancelled_status(self) -> ExecutionStatus:
        """The status of an execution that is cancelled now."""
        return ExecutionStatus.INTERRUPTED if self.draining else ExecutionStatus.CANCELLED

    async def end(self, session: ToolSession, verdict: Verdict, raised: BaseException | None = None) -> ToolOutcome:
        """End an execution whose code has returned or raised.

        Args:
            session: The session of the execution.
            verdict: How the code ended. The store may turn a commit into a conflict.
            raised: The exception of the code, if it raised one.

        Returns:
            The outcome to report to the caller.

        Raises:
            StateError: The store could not record the end.
        """
        command = self._closing(session, verdict)
        reply = self.submit_here(command, session.origin)
        try:
            final = await reply
        except asyncio.CancelledError:
            # If the writer had already started on the command, the cancellation does not affect it.
            if reply.cancelled():
                self.end_without_waiting(session, verdict._replace(status=self.cancelled_status, result=None))
            else:
                reply.add_done_callback(functools.partial(self._note_refusal, session, verdict))
            raise
        except (SessionNotFoundError, ExecutionEndedError) as refusal:
            error = _interruption(session.execution_id, refusal, raised)
            session.execution.correct(ExecutionStatus.INTERRUPTED.value)
            self._note_end(session, None)
            self.count(session, verdict._replace(status=ExecutionStatus.INTERRUPTED))
            return ToolOutcome(
                ExecutionStatus.INTERRUPTED, None, error, error.error_code, error.execution_id, None, session.attempt
            )
        except StateError as error:
            self._record_failure(session, verdict, error)
            raise
        finally:
            # It refers to its error, whose traceback refers to this frame: this breaks the cycle.
            del reply
        session.execution.correct(final.status.value)
        self._note_end(session, final.sequence)
        self.count(session, final)
        outcome = _outcome(final, raised)
        return outcome if raised is None else replace(outcome, quotable=session.execution.quotable())

    def count(self, session: ToolSession, verdict: Verdict) -> None:
        """Count an execution that has ended."""
        if self._meter is not None:
            is_recording = RECORDING_ID in session.request.metadata
            tool, status = session.execution.tool, verdict.status
            self._meter.ended(tool, status, verdict.duration_us, is_recording=is_recording)

    def end_without_waiting(self, session: ToolSession, verdict: Verdict) -> None:
        """End an execution that writes nothing and whose caller has gone, or hears of the end in another way."""
        self.count(session, verdict)
        self.record(self._closing(session, verdict), session.origin, session)

    def _closing(self, session: ToolSession, verdict: Verdict) -> commands.FinishExecution:
        """Close an execution and the ones it called, so that their code can do no more; the command that ends them."""
        execution = session.execution
        execution.close(verdict.status.value)
        for called in session.below():
            called.execution.close(verdict.status.value)
            reason = f"it was running when {execution.id}, which waited for it, ended: {verdict.status.value}"
            failure = Failure("ExecutionEndedError", reason) if verdict.failure is not None else None
            ended = called.verdict(verdict.status, failure=failure)
            execution.children.append(ended)
            self.count(called, ended)
            execution.children.extend(called.execution.children)
            if called.task is not None:
                called.task.cancel()
        return execution.finish(verdict)

    def record(self, command: commands.FinishExecution, origin: Origin, session: ToolSession | None = None) -> None:
        """Record in the journal how an execution ended that wrote nothing. Retries while the store has no room."""

        def settled(future: "Future[Verdict]") -> None:
            error = None if future.cancelled() else future.exception()
            if isinstance(error, self._later):
                again = functools.partial(self.record, command, origin, session)
                self._home.mailbox.post(lambda: self._home.loop.call_later(_RETRY_S, again))
            elif isinstance(error, InternalError) and command != _bare(command):
                self.record(_bare(command), origin, session)
            elif session is not None:
                self._note_end(session, None if error is not None or future.cancelled() else future.result().sequence)

        self._store.submit(command, origin).add_done_callback(settled)

    def _note_end(self, session: ToolSession, sequence: int | None) -> None:
        """Note the commit since which the journal has what its LM calls have used; None if it has none of it."""
        self._spending.end(session.execution.session_key, session.execution_id, sequence)

    def _note_refusal(self, session: ToolSession, verdict: Verdict, reply: Reply[Verdict]) -> None:
        error = reply.exception()
        if isinstance(error, StateError):
            self._record_failure(session, verdict, error)
        elif error is None:
            self._note_end(session, reply.result().sequence)
            self.count(session, reply.result())

    def _record_failure(self, session: ToolSession, verdict: Verdict, error: StateError) -> None:
        """Keep the journal entry of an execution whose end the store refused; its writes are lost."""
        is_known = not isinstance(error, OutcomeUnknownError)
        session.execution.correct(ExecutionStatus.FAILED.value if is_known else UNKNOWN)
        if isinstance(error, (*self._later, InternalError)):
            failed = verdict._replace(status=ExecutionStatus.FAILED, result=None, failure=failure_of(error))
            self.count(session, failed)
            command = session.execution.finish(failed)
            self.record(_bare(command) if isinstance(error, InternalError) else command, session.origin, session)
        else:
            self._note_end(session, None)


def _interruption(execution_id: str, refusal: StateError, raised: BaseException | None) -> ToolInterruptedError:
    """Return the error for the caller of an execution that had ended before its code did."""
    if isinstance(raised, ToolInterruptedError):
        return raised
    # An execution also ends without its session, if its server was taken for dead.
    reason = SESSION_ENDED if isinstance(refusal, SessionNotFoundError) else _ENDED
    return ToolInterruptedError(execution_id, reason)


def _bare(command: commands.FinishExecution) -> commands.FinishExecution:
    """The command without what the tool's code contributed: the store cannot keep some part of that, unknown which."""

    def bare(verdict: Verdict) -> Verdict:
        return Verdict(verdict.execution_id, verdict.status, failure=verdict.failure, attempt=verdict.attempt)

    return replace(command, verdict=bare(command.verdict), children=tuple(map(bare, command.children)))


def _outcome(verdict: Verdict, raised: BaseException | None) -> ToolOutcome:
    status, execution_id = verdict.status, verdict.execution_id
    if status is ExecutionStatus.COMMITTED:
        return ToolOutcome(status, verdict.result, None, "", execution_id, verdict.sequence, verdict.attempt)
    if status is ExecutionStatus.CONFLICT:
        error: StateError = ExecutionConflictError(execution_id, ", ".join(map(str, verdict.conflicts)))
    else:
        error = reported_error(execution_id, raised, verdict.failure)
        error.__cause__ = verdict.refusal or error.__cause__
    return ToolOutcome(status, None, error, error.error_code, execution_id, None, verdict.attempt)
