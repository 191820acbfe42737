"""Rows that make no sense, because somebody or the disk has changed the file: what needs them fails, nothing else."""

import contextlib
import sqlite3
from collections.abc import Iterator
from typing import Final

from sqlalchemy.exc import DBAPIError

from dspex_persist.infra.logs import get_logger
from dspex_persist.infra.traces import trace_of
from dspex_persist.state.errors import DamagedSessionError, ReadFailedError, StateError

_logger: Final = get_logger(__name__)

OWN_ERRORS: Final = (StateError, DBAPIError, sqlite3.Error)
"""What says itself what is wrong."""


@contextlib.contextmanager
def reading(session_id: str) -> Iterator[None]:
    """What cannot be made of rows of this session is a `DamagedSessionError`."""
    try:
        yield
    except OWN_ERRORS:
        raise
    except Exception as error:
        raise damaged(session_id, error) from error


def damaged(session_id: str, error: Exception) -> DamagedSessionError:
    """What a caller is told of that; the log has the rest."""
    # As text: a renderer of exceptions may show local variables, and those are users' values.
    _logger.error("session cannot be read", session_id=session_id, traceback=trace_of(error))
    _let_go(error)
    return DamagedSessionError(session_id, type(error).__name__)


def unreadable(path: str, error: Exception) -> ReadFailedError:
    """The same where nobody knows whose rows they are."""
    _logger.error("rows cannot be read", path=path, traceback=trace_of(error))
    _let_go(error)
    reason = f"what is there makes no sense ({type(error).__name__}): check the file, or restore a backup"
    return ReadFailedError(path, reason)


def _let_go(error: BaseException | None) -> None:
    """Of the frames that it came through: they hold cursors, and a cursor in use keeps the WAL from being taken in."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
