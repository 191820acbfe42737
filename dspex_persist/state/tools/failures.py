"""Exceptions of users' code: contained where they are raised, and described for the journal and the caller."""

import asyncio
import concurrent.futures
import contextlib
import os
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from dspex_persist.infra.traces import remove_marks
from dspex_persist.state.errors import (
    RemoteToolError,
    StateError,
    ToolFailedError,
    ToolPoolError,
    ToolTimedOutError,
    WorkerTimeoutError,
)
from dspex_persist.state.model import ExecutionStatus, Failure, JournalEntry

_MESSAGE_LENGTH, _TRACE_LENGTH = 10_000, 100_000
_PACKAGE: Final = Path(__file__).parents[2]
_BETWEEN: Final = (
    *(f"{_PACKAGE / layer}{os.sep}" for layer in ("cognitive", "compat", "infra", "state")),
    *(f"{folder}{os.sep}" for folder in (*asyncio.__path__, *concurrent.futures.__path__)),
    contextlib.__file__,
)
"""Files whose frames lie between a tool's code and its caller; tracebacks leave them out."""


class RaisedError(Exception):
    """An exception of a tool's code, with its description for the journal.

    The description is made on the thread that ran the code, because an exception's `__str__` is users' code, too.
    """

    def __init__(self, error: Exception, failure: Failure) -> None:
        super().__init__()
        self.error = error
        self.failure = failure


class AbortedError(Exception):
    """The client of a transaction has taken it back."""


@contextmanager
def discarded_with(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """End a coroutine quietly, by `GeneratorExit`, if its loop has been closed: there is no caller left."""
    try:
        yield
    except RaisedError:
        if loop.is_closed():
            raise GeneratorExit from None
        raise


@contextmanager
def contained(*let_out: type[BaseException]) -> Iterator[None]:
    """Turn whatever users' code raises into a `RaisedError`, so that it ends neither the process nor an event loop.

    Args:
        let_out: The exceptions that pass through unchanged.
    """
    try:
        yield
    except let_out:
        raise
    except BaseException as error:  # noqa: BLE001 -- users' code
        raised = _ordinary(error)
    else:
        return
    try:
        raise RaisedError(raised, failure_of(raised))
    finally:
        # Its traceback refers to this frame: without this, the two would keep each other alive.
        del raised


def _ordinary(error: BaseException) -> Exception:
    if isinstance(error, Exception):
        return error if _has_true_class(error) else RuntimeError("the tool raised an error that hides what it is")
    ordinary = RuntimeError(f"the tool raised {type(error).__name__}, which is no ordinary error")
    if isinstance(error, SystemExit | KeyboardInterrupt):
        ordinary = RuntimeError(f"the tool tried to end the process: {type(error).__name__}({_text_of(error)})")
    ordinary.__cause__ = error
    return ordinary


def _has_true_class(error: Exception) -> bool:
    """Whether `isinstance` answers truthfully: all code that handles the error relies on that, asyncio included."""
    try:
        return error.__class__ is type(error)
    except BaseException:  # noqa: BLE001 -- users' code
        return False


def raised_of(error: BaseException) -> tuple[BaseException, Failure | None]:
    """Return the exception that was raised, and its description for the journal; none for an `AbortedError`."""
    if isinstance(error, AbortedError):
        return error, None
    return (error.error, error.failure) if isinstance(error, RaisedError) else (error, failure_of(error))


def reported_error(execution_id: str, raised: BaseException | None, failure: Failure | None) -> StateError:
    """Return the error that the caller of a failed execution gets.

    It is the engine's own error, or a `ToolFailedError` with the type and text of what the tool's code raised. The
    traceback stays in the journal.
    """
    if isinstance(raised, RemoteToolError | ToolTimedOutError | ToolFailedError | ToolPoolError):
        return raised
    if isinstance(raised, AbortedError):
        return ToolFailedError(execution_id, "its client has aborted it")
    assert failure is not None, "an execution without commit and without conflict has failed"
    return ToolFailedError(execution_id, f"{failure.type}: {failure.message}", failure.type)


def recorded_error(entry: JournalEntry) -> StateError:
    """Return the error for a caller who gets the outcome of a failed execution from the journal."""
    failure = entry.failure or Failure("", entry.status.value)
    if entry.status is ExecutionStatus.TIMED_OUT:
        # What `ToolTimedOutError` adds to its reason.
        reason = failure.message.removeprefix("timed out: ").removesuffix("; nothing was written")
        return ToolTimedOutError(entry.id, reason)
    if entry.status is ExecutionStatus.ABORTED:
        return reported_error(entry.id, AbortedError(), None)
    if failure.type in ("", ToolFailedError.__name__):
        return ToolFailedError(entry.id, failure.message)
    return reported_error(entry.id, None, failure)


def status_of(error: BaseException) -> ExecutionStatus:
    """Return the status of an execution that ended with this error: timed out, aborted, or failed."""
    if isinstance(error, AbortedError):
        return ExecutionStatus.ABORTED
    timed_out = isinstance(error, ToolTimedOutError | WorkerTimeoutError)
    return ExecutionStatus.TIMED_OUT if timed_out else ExecutionStatus.FAILED


def _trace_of(error: BaseException) -> str:
    """The traceback of the error and of its causes, with the frames of users' code only."""
    trace = traceback.TracebackException.from_exception(error)
    _keep_users_frames(trace)
    remove_marks(trace)
    return "".join(trace.format())


def _keep_users_frames(trace: traceback.TracebackException) -> None:
    users = [frame for frame in trace.stack if not frame.filename.startswith(_BETWEEN)]
    trace.stack = traceback.StackSummary.from_list(users or trace.stack[-1:])
    for other in (trace.__cause__, trace.__context__, *(trace.exceptions or ())):
        if other is not None:
            _keep_users_frames(other)


_SECRETS: Final = "_dspex_persist_secrets"
_HIDDEN: Final = "***"


class _Secrets:
    """Texts that are not shown. It is an attribute of an error, and so it does not show them either."""

    __slots__ = ("texts",)

    def __init__(self, texts: frozenset[str]) -> None:
        self.texts = texts

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def conceal(error: BaseException, secrets: Iterable[str]) -> None:
    """Keep texts out of the journal that an error may quote, such as the key of a request that a provider refused.

    Args:
        error: The error. The journal also hides the texts where it has errors that this one causes.
        secrets: The texts.
    """
    texts = frozenset(secrets) | _secrets_of(error)
    if texts:
        with suppress(Exception):
            # Some classes have no room for it.
            vars(error)[_SECRETS] = _Secrets(texts)


def hidden(text: str, secrets: Iterable[str]) -> str:
    """Return a text in which asterisks replace secrets."""
    for secret in sorted(set(secrets), key=len, reverse=True):
        text = text.replace(secret, _HIDDEN)
    return text


def _secrets_of(error: BaseException) -> frozenset[str]:
    secrets = getattr(error, "__dict__", {}).get(_SECRETS)
    return secrets.texts if isinstance(secrets, _Secrets) else frozenset()


def _secrets_in(error: BaseException | None) -> set[str]:
    """Return the secrets of an error, and of those that have led to it."""
    secrets: set[str] = set()
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        each = left.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            secrets |= _secrets_of(each)
            left += (each.__cause__, each.__context__)
            left += each.exceptions if isinstance(each, BaseExceptionGroup) else ()
    return secrets


def failure_of(error: BaseException) -> Failure:
    """Return the type, the text and the traceback of an error, shortened, as the journal keeps them."""
    secrets = _secrets_in(error)
    try:
        trace = _trace_of(error)
    except BaseException as fault:  # noqa: BLE001 -- it calls users' code
        trace = f"it has no traceback: to write it raised {type(fault).__name__}"
    text, trace = hidden(_text_of(error), secrets), hidden(trace, secrets)
    fields = (type(error).__name__, _shortened(text, _MESSAGE_LENGTH), _shortened(trace, _TRACE_LENGTH))
    # A lone surrogate is not a character: no message can carry it.
    return Failure(*(each.encode(errors="backslashreplace").decode() for each in fields))


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException as fault:  # noqa: BLE001 -- users' code
        return f"it has no text: its __str__ raised {type(fault).__name__}"


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"
