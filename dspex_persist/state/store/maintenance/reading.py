"""Open the history of a file, and recordings of its sessions."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dspex_persist.state.recording import Header, RecordedCommit
from dspex_persist.state.store.engine import open_readers
from dspex_persist.state.store.history import recordings
from dspex_persist.state.store.history.answers import StoredAudit
from dspex_persist.state.store.maintenance.opening import reading, refuse_missing, refuse_older, translated_errors


def open_audit(path: Path, *, reveal: bool = False) -> StoredAudit:
    """Open the history in a file, read-only; a server may write to the file meanwhile. Close it when you are done.

    Args:
        path: The database.
        reveal: Whether to show the values of sensitive variables.
    """
    with translated_errors(path), ExitStack() as undo:
        refuse_missing(path)
        readers = open_readers(path, size=1)
        undo.callback(readers.dispose)
        refuse_older(path)
        undo.pop_all()
    return StoredAudit(readers, reveal=reveal, on_close=readers.dispose)


@contextmanager
def open_recording(
    path: Path, session_id: str, *, started: int | None = None, reveal: bool = False
) -> Iterator[tuple[Header, Iterator[RecordedCommit]]]:
    """Open a session's log in a file, read-only; a server may write to the file meanwhile.

    Args:
        path: The database.
        session_id: The session.
        started: If several sessions had this id, the commit with which the wanted one began; None for the newest.
        reveal: Whether to include the values of sensitive variables.

    Yields:
        The header, and an iterator that reads the commits as it goes.

    Raises:
        NotInHistoryError: No session ever had this id.
        SessionPrunedError: Part of the session was pruned.
    """
    with reading(path) as readers:
        refuse_older(path)
        yield recordings.read_session(readers, session_id, started=started, reveal=reveal)
