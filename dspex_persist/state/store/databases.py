"""Reading the past of a PostgreSQL database, without being one of its servers. It creates and changes nothing."""

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Engine

from dspex_persist.addresses import shown
from dspex_persist.state.audit import AuditSource
from dspex_persist.state.provider import Progress, silent
from dspex_persist.state.recording import Header, RecordedCommit
from dspex_persist.state.store import verify
from dspex_persist.state.store.engine import snapshot
from dspex_persist.state.store.history import recordings
from dspex_persist.state.store.history.answers import StoredAudit
from dspex_persist.state.store.maintenance.checks import CheckReport, check_jobs, checked
from dspex_persist.state.store.postgres import objects, schema
from dspex_persist.state.store.postgres.connections import Database
from dspex_persist.state.store.verify import Problem


@contextmanager
def open_readers(url: str) -> Iterator[Engine]:
    """Have connections for reading. A standby will do, too.

    Raises:
        InvalidArgumentError: The URL is malformed.
        UnavailableError: The database cannot be reached.
        OpenError: It has no sessions of this project, or those of another release.
    """
    readers = _readers(url)
    try:
        yield readers
    finally:
        readers.dispose()


def _readers(url: str) -> Engine:
    database = Database(url, writes=False)
    database.refuse_poolers()
    readers = database.readers()
    try:
        with snapshot(readers) as connection:
            schema.check(connection, database)
    except BaseException:
        readers.dispose()
        raise
    return readers


def open_audit(url: str, *, reveal: bool = False) -> AuditSource:
    """Open the history for queries; see `open_readers` for the errors."""
    readers = _readers(url)
    return StoredAudit(readers, reveal=reveal, on_close=readers.dispose)


@contextmanager
def open_recording(
    url: str, session_id: str, *, started: int | None = None, reveal: bool = False
) -> Iterator[tuple[Header, Iterator[RecordedCommit]]]:
    """Open a session's log; see `recordings.read_session` for the arguments, and `open_readers` for the errors."""
    with open_readers(url) as readers:
        yield recordings.read_session(readers, session_id, started=started, reveal=reveal)


def check(url: str, progress: Progress = silent, jobs: int | None = None) -> CheckReport:
    """Check a whole database, as `maintenance.check` checks a file: its schema, its references, its log.

    Servers go on meanwhile. `jobs`: see `maintenance.check`. See `open_readers` for the errors.
    """
    check_jobs(jobs)
    with open_readers(url) as readers:
        with snapshot(readers) as connection:
            jobs = jobs or verify.jobs_for(objects.size_bytes(connection))
        return checked(shown(url), readers, None, _own_problems(readers), progress, jobs, {"url": url})


def _own_problems(readers: Engine) -> Iterator[Problem]:
    for problems_in in (objects.schema_problems, objects.reference_problems):
        with snapshot(readers) as connection:
            yield from (Problem(*each) for each in problems_in(connection))
