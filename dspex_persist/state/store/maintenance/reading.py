"""Ask a file: its history, and recordings of its sessions."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dspex_persist.state.recording import Header, RecordedCommit
from dspex_persist.state.store.engine import open_readers
from dspex_persist.state.store.history import recordings
from dspex_persist.state.store.history.answers import StoredAudit
from dspex_persist.state.store.maintenance.opening import explained, reading, refuse_missing, refuse_older


def open_audit(path: Path, *, reveal: bool = False) -> StoredAudit:
    """The history in a file, to be asked: read only, beside a server that writes to it. Close it when you are done."""
    with explained(path), ExitStack() as undo:
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
    """A session's log in a file, read as it is taken: read only, beside a server that writes to it."""
    with reading(path) as readers:
        refuse_older(path)
        yield recordings.read_session(readers, session_id, started=started, reveal=reveal)
