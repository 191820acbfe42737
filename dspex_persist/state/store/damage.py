"""Damaged rows: only the calls that need them fail."""

import sqlite3
from contextlib import AbstractContextManager
from typing import Final

from sqlalchemy.exc import DBAPIError

from dspex_persist.infra.logs import get_logger
from dspex_persist.infra.traces import trace_of
from dspex_persist.state.decoding import decoding, release_frames
from dspex_persist.state.errors import ReadFailedError, StateError
from dspex_persist.state.log_store import OF_GROUPS

_logger: Final = get_logger(__name__)

DRIVER_ERRORS: Final[list[type[Exception]]] = [DBAPIError, sqlite3.Error]
"""What the drivers in use raise: another driver adds its own."""


def own_errors() -> tuple[type[Exception], ...]:
    """Return the errors that already say what is wrong."""
    return (StateError, *DRIVER_ERRORS)


def reading(session_id: str) -> AbstractContextManager[None]:
    """Convert exceptions while decoding rows of this session to `DamagedSessionError`."""
    return decoding(session_id, lambda error: isinstance(error, (*DRIVER_ERRORS, *OF_GROUPS)))


def unreadable(path: str, error: Exception) -> ReadFailedError:
    """Do the same for rows whose session is unknown."""
    _logger.error("rows cannot be read", path=path, traceback=trace_of(error))
    release_frames(error)
    reason = f"it has damaged rows ({type(error).__name__}): check it, or restore a backup"
    return ReadFailedError(path, reason)
