"""Endings: how executions end, in the journal and for whoever asked."""

import asyncio
import functools
from concurrent.futures import Future
from dataclasses import replace
from typing import Final

from dspex_persist.state import commands
from dspex_persist.state.commands.executions import Verdict
from dspex_persist.state.errors import (
    ExecutionConflictError,
    ExecutionEndedError,
    InternalError,
    QueueFullError,
    SessionNotFoundError,
    StateError,
    StorageError,
    ToolInterruptedError,
)
from dspex_persist.state.model import (
    ExecutionStatus,
    Origin,
    ToolOutcome,
)
from dspex_persist.state.provider import Submit
from dspex_persist.state.tools.failures import (
    failure_of,
    told,
)
from dspex_persist.state.tools.home import Home
from dspex_persist.state.tools.session import ToolSession

_SAY_AGAIN_S: Final = 5.0


class Endings:
    """Has the store end executions. `draining`: whether what is cancelled from here on was interrupted by the server's
    end, not given up by its client."""

    def __init__(self, submit: Submit, home: Home) -> None:
        self._submit = submit
        self._home = home
        self.draining = False

    @property
    def gone(self) -> ExecutionStatus:
        """How an execution has ended that was cancelled."""
        return ExecutionStatus.INTERRUPTED if self.draining else ExecutionStatus.CANCELLED

    async def end(self, session: ToolSession, verdict: Verdict, raised: BaseException | None = None) -> ToolOutcome:
        """End an execution whose code has returned, or `raised`; how it has ended. Raises what a store raises."""
        command = self._closing(session, verdict)
        future = self._submit(command, session.origin)
        try:
            final = await self._home.mailbox.result(future)
        except asyncio.CancelledError:
            # If its turn had come it is committed, or not, as it would have been anyway.
            if future.cancelled():
                self.end_without_waiting(session, replace(verdict, status=self.gone, result=None))
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
        return _outcome(final, raised)

    def end_without_waiting(self, session: ToolSession, verdict: Verdict) -> None:
        """End an execution that has nothing to write, and whose caller is not there, or is told by others."""
        self.say(self._closing(session, verdict), session.origin)

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

    def say(self, command: commands.FinishExecution, origin: Origin) -> None:
        """Have the journal say how an execution ended that wrote nothing; later, if the store has no room now."""

        def settled(future: "Future[Verdict]") -> None:
            error = None if future.cancelled() else future.exception()
            if isinstance(error, StorageError | QueueFullError):
                again = functools.partial(self.say, command, origin)
                self._home.mailbox.post(lambda: self._home.loop.call_later(_SAY_AGAIN_S, again))
            elif isinstance(error, InternalError) and command != _bare(command):
                self.say(_bare(command), origin)

        self._submit(command, origin).add_done_callback(settled)

    def _owe(self, session: ToolSession, verdict: Verdict, error: StateError) -> None:
        """The store did not take the end: what the execution wrote is lost, but its journal entry is not."""
        if isinstance(error, StorageError | QueueFullError | InternalError):
            failed = replace(verdict, status=ExecutionStatus.FAILED, result=None, failure=failure_of(error))
            command = session.execution.finish(failed)
            self.say(_bare(command) if isinstance(error, InternalError) else command, session.origin)


def _bare(command: commands.FinishExecution) -> commands.FinishExecution:
    """The same without what the code has put into it: something in it cannot be kept, and nobody knows what."""

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
        error = told(execution_id, raised, verdict.failure)
    return ToolOutcome(status, None, error, error.error_code, execution_id, None, verdict.attempt)
