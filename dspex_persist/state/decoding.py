"""What is stored of a session and makes no sense, as an edit or the disk has changed it: only what needs it fails."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Final

from dspex_persist.infra.logs import get_logger
from dspex_persist.infra.traces import trace_of
from dspex_persist.state.errors import DamagedSessionError, StateError

_logger: Final = get_logger(__name__)


@contextlib.contextmanager
def decoding(session_id: str, is_clear: Callable[[Exception], bool]) -> Iterator[None]:
    """Convert exceptions while decoding what is stored of this session to `DamagedSessionError`.

    Args:
        session_id: The session.
        is_clear: Says which errors already say what is wrong, apart from `StateError`.
    """
    try:
        yield
    except StateError:
        raise
    except Exception as error:
        if is_clear(error):
            raise
        raise damaged(session_id, error) from error


@contextlib.contextmanager
def in_database() -> Iterator[None]:
    """Have the errors of a block say that what is damaged is in a database that servers share."""
    try:
        yield
    except DamagedSessionError as error:
        if error.kind == "database":
            raise
        raise DamagedSessionError(error.session_id, error.reason, "database") from error.__cause__


def damaged(session_id: str, error: Exception) -> DamagedSessionError:
    """Log the exception, and return the error for the caller."""
    # As text, because exception renderers may show local variables, which hold users' values.
    _logger.error("session cannot be read", session_id=session_id, traceback=trace_of(error))
    release_frames(error)
    return DamagedSessionError(session_id, type(error).__name__)


def release_frames(error: BaseException | None) -> None:
    """Drop the tracebacks: their frames hold open cursors, which keep SQLite from checkpointing the WAL."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
