"""What users' code raises: contained where it runs, and told in the journal's words."""

import asyncio
import concurrent.futures
import contextlib
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from dspex_persist.infra.traces import leave_marks_out
from dspex_persist.state.errors import RemoteToolError, StateError, ToolFailedError, ToolTimedOutError
from dspex_persist.state.model import ExecutionStatus, Failure

_MESSAGE_LENGTH, _TRACE_LENGTH = 10_000, 100_000
_PACKAGE: Final = Path(__file__).parents[2]
_BETWEEN: Final = (
    *(f"{_PACKAGE / layer}{os.sep}" for layer in ("cognitive", "infra", "state")),
    *(f"{folder}{os.sep}" for folder in (*asyncio.__path__, *concurrent.futures.__path__)),
    contextlib.__file__,
)
"""The files of what stands between a tool's code and whoever asked for it."""


class RaisedError(Exception):
    """What a tool's code raised, with what the journal says of it, which was asked for where the code ran: an
    exception's text is users' code, too."""

    def __init__(self, error: Exception, failure: Failure) -> None:
        super().__init__()
        self.error = error
        self.failure = failure


@contextmanager
def let_go_with(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """A coroutine whose loop was closed under it is thrown away, by GeneratorExit; nobody is left to be told more."""
    try:
        yield
    except RaisedError:
        if loop.is_closed():
            raise GeneratorExit from None
        raise


@contextmanager
def contained(*let_out: type[BaseException]) -> Iterator[None]:
    """Users' code that raises anything has failed, no more: neither the process nor its loops are to end."""
    try:
        yield
    except let_out:
        raise
    except BaseException as error:  # noqa: BLE001 -- what this is about
        raised = _ordinary(error)
    else:
        return
    try:
        raise RaisedError(raised, failure_of(raised))
    finally:
        # Its traceback knows this frame.
        del raised


def _ordinary(error: BaseException) -> Exception:
    if isinstance(error, Exception):
        return error if _can_be_looked_at(error) else RuntimeError("the tool raised an error that hides what it is")
    told = RuntimeError(f"the tool raised {type(error).__name__}, which is no ordinary error")
    if isinstance(error, SystemExit | KeyboardInterrupt):
        told = RuntimeError(f"the tool tried to end the process: {type(error).__name__}({_text_of(error)})")
    told.__cause__ = error
    return told


def _can_be_looked_at(error: Exception) -> bool:
    """Whether `isinstance` says of it what it is, which everybody asks whom it is handed to, asyncio included."""
    try:
        return error.__class__ is type(error)
    except BaseException:  # noqa: BLE001 -- users' code
        return False


def raised_of(error: BaseException) -> tuple[BaseException, Failure]:
    """What was raised, and what the journal says of it."""
    return (error.error, error.failure) if isinstance(error, RaisedError) else (error, failure_of(error))


def told(execution_id: str, raised: BaseException | None, failure: Failure | None) -> StateError:
    """What clients are told of an execution that failed: what the engine itself says, or what the tool's code raised,
    without its traceback."""
    if isinstance(raised, RemoteToolError | ToolTimedOutError | ToolFailedError):
        return raised
    assert failure is not None, "what has neither committed nor met a conflict has failed"
    return ToolFailedError(execution_id, f"{failure.type}: {failure.message}", failure.type)


def status_of(error: BaseException) -> ExecutionStatus:
    return ExecutionStatus.TIMED_OUT if isinstance(error, ToolTimedOutError) else ExecutionStatus.FAILED


def _trace_of(error: BaseException) -> str:
    """The traceback, of users' code only: of the errors that led to it, too, as far as they were raised there."""
    told = traceback.TracebackException.from_exception(error)
    _keep_users_frames(told)
    leave_marks_out(told)
    return "".join(told.format())


def _keep_users_frames(told: traceback.TracebackException) -> None:
    users = [frame for frame in told.stack if not frame.filename.startswith(_BETWEEN)]
    told.stack = traceback.StackSummary.from_list(users or told.stack[-1:])
    for other in (told.__cause__, told.__context__, *(told.exceptions or ())):
        if other is not None:
            _keep_users_frames(other)


def failure_of(error: BaseException) -> Failure:
    try:
        trace = _trace_of(error)
    except BaseException as fault:  # noqa: BLE001 -- it asks users' code
        trace = f"it has no traceback: to write it raised {type(fault).__name__}"
    text = _text_of(error)
    told = (type(error).__name__, _shortened(text, _MESSAGE_LENGTH), _shortened(trace, _TRACE_LENGTH))
    # A lone surrogate is no character: no message can carry it.
    return Failure(*(each.encode(errors="backslashreplace").decode() for each in told))


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException as fault:  # noqa: BLE001 -- users' code, too
        return f"it has no text: its __str__ raised {type(fault).__name__}"


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"
