"""Damaged rows, which an edit or the disk has changed: only the calls that need them fail."""

import contextlib
import sqlite3
from collections.abc import Iterator
from typing import Final

from sqlalchemy.exc import DBAPIError

from dspex_persist.infra.logs import get_logger
from dspex_persist.infra.traces import trace_of
from dspex_persist.state.errors import DamagedSessionError, ReadFailedError, StateError

_logger: Final = get_logger(__name__)

DRIVER_ERRORS: Final[list[type[Exception]]] = [DBAPIError, sqlite3.Error]
"""What the drivers in use raise: another driver adds its own."""


def own_errors() -> tuple[type[Exception], ...]:
    """Return the errors that already say what is wrong."""
    return (StateError, *DRIVER_ERRORS)


@contextlib.contextmanager
def reading(session_id: str) -> Iterator[None]:
    """Convert exceptions while decoding rows of this session to `DamagedSessionError`."""
    try:
        yield
    except own_errors():
        raise
    except Exception as error:
        raise damaged(session_id, error) from error


def damaged(session_id: str, error: Exception) -> DamagedSessionError:
    """Log the exception, and return the error for the caller."""
    # As text, because exception renderers may show local variables, which hold users' values.
    _logger.error("session cannot be read", session_id=session_id, traceback=trace_of(error))
    _release_frames(error)
    return DamagedSessionError(session_id, type(error).__name__)


def unreadable(path: str, error: Exception) -> ReadFailedError:
    """Do the same for rows whose session is unknown."""
    _logger.error("rows cannot be read", path=path, traceback=trace_of(error))
    _release_frames(error)
    reason = f"it has damaged rows ({type(error).__name__}): check the file, or restore a backup"
    return ReadFailedError(path, reason)


def _release_frames(error: BaseException | None) -> None:
    """Drop the tracebacks: their frames hold open cursors, which keep SQLite from checkpointing the WAL."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
