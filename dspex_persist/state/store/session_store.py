"""SessionStore: the log of sessions in one SQLite file that this process owns. `open_groups` opens it for work."""

import contextlib
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NoReturn, TypeAlias, get_args

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from dspex_persist import clock
from dspex_persist.infra import forks
from dspex_persist.infra.logs import get_logger
from dspex_persist.state.errors import (
    CheckpointError,
    FileChangedError,
    Hint,
    InvalidArgumentError,
    NotADatabaseError,
    OutcomeUnknownError,
    ReadFailedError,
    StorageError,
    quote,
)
from dspex_persist.state.groups import CACHE_SIZE_BYTES, GroupMoment, Groups, Job, unit_of
from dspex_persist.state.log_store import LogStore, UnwritableError
from dspex_persist.state.model import CommitChanges, JournalEntry, VariableVersion
from dspex_persist.state.options import SessionOptions, check_count, check_seconds
from dspex_persist.state.session_state import SessionState
from dspex_persist.state.store import damage, log, log_reader, migrate, outcomes, recovery
from dspex_persist.state.store import executions as stored_executions
from dspex_persist.state.store import sessions as stored_sessions
from dspex_persist.state.store import variables as stored_variables
from dspex_persist.state.store.anchor import Anchor, Head
from dspex_persist.state.store.engine import (
    Durability,
    OwnershipLock,
    checkpoint,
    open_beside,
    open_readers,
    open_writer,
    read_error,
    resolved,
    snapshot,
    warn_of_others,
)
from dspex_persist.state.store.guard import FileGuard
from dspex_persist.state.unit_of_work import Drafts, RecordedOutcome, UnitOfWork, VersionQuery

_logger: Final = get_logger(__name__)

_CERTAIN_ABORTS = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_BUSY})
# What the rows of one job bring about, whatever else is in its group: they never reach the disk.
_OF_ONE_JOB = (sqlite3.IntegrityError, sqlite3.DataError, sqlite3.InterfaceError, sqlite3.ProgrammingError)

_LOCKED = "another program holds the lock for writing to the database; have it finish, and repeat the call"


_PAGE_BYTES = 4 * 1024 * 1024
"""How much of a whole series of jobs waits in memory, roughly; at most that of 64 jobs."""


@dataclass(frozen=True, slots=True)
class StoreOptions(SessionOptions):
    """How a store behaves. `cache_size_bytes` bounds the sessions in memory; times are seconds."""

    durability: Durability = "full"
    cache_size_bytes: int = CACHE_SIZE_BYTES
    retention_keep_versions: int | None = None
    retention_age_s: float | None = None
    retention_ended_sessions_s: float | None = None
    warn_size_bytes: int | None = None

    def __post_init__(self) -> None:
        # Not super(): a dataclass with slots is another class than the one that its methods were written in.
        SessionOptions.__post_init__(self)
        if self.durability not in get_args(Durability):
            raise InvalidArgumentError("durability", f"{quote(self.durability)} is neither 'full' nor 'normal'")
        check_count("cache_size_bytes", self.cache_size_bytes)
        for name in ("retention_age_s", "retention_ended_sessions_s"):
            if getattr(self, name) is not None:
                check_seconds(name, getattr(self, name))
        for name in ("retention_keep_versions", "warn_size_bytes"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))


class StoredSessions:
    """What units of work ask for, read from a given connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def load(self, session_id: str) -> SessionState | None:
        """The live session's state. What cannot be made of its rows fails the calls on this session alone."""
        with damage.reading(session_id):
            return stored_sessions.load(self._connection, session_id)

    def find_version(self, state: SessionState, variable_id: str, version: int) -> VariableVersion | None:
        """One committed version."""
        key = state.keys.get(variable_id)
        with damage.reading(state.session.id):
            return stored_variables.find_version(self._connection, key, version) if key is not None else None

    def history(self, state: SessionState, query: VersionQuery) -> list[VariableVersion] | None:
        """Committed versions, newest first; None if the session never had the variable."""
        variable = state.find(query.identifier) if query.as_of is None else None
        key = state.keys.get(variable.id) if variable is not None else None
        if key is None:
            key = stored_variables.find_key(self._connection, state.key, query.identifier, query.as_of)
        with damage.reading(state.session.id):
            return stored_variables.history(self._connection, key, query) if key is not None else None

    def find_outcome(self, session_id: str, key: str) -> RecordedOutcome | None:
        """What was answered under an idempotency key."""
        return outcomes.find(self._connection, session_id, key)

    def find_execution(self, state: SessionState, key: str) -> JournalEntry | None:
        """The last execution under an idempotency key that has ended."""
        with damage.reading(state.session.id):
            return stored_executions.find_by_key(self._connection, state.key, key)


class SessionStore(StoredSessions, LogStore):
    """The log in an open file. `readers` are connections to read it with; `head` is its last commit."""

    driver_errors = (DBAPIError, sqlite3.Error)

    def __init__(self, path: Path, options: StoreOptions | None = None) -> None:
        self.options = options or StoreOptions()
        # What the group that is being written will have made of the head and the keys.
        self._appended: tuple[Head, log.Keys] | None = None
        with contextlib.ExitStack() as undo:
            self._lock = OwnershipLock(path, create=True)
            undo.callback(self._lock.release)
            # Errors name the file as its user does.
            self.path, self._name = resolved(path), path
            with forks.busy():
                self._open_file(undo)
                warn_of_others(self.path)
            undo.pop_all()

    def _open_file(self, undo: contextlib.ExitStack) -> None:
        try:
            # Before anything is made beside the file, or changed.
            inspected = recovery.inspect(self.path, self._name)
        except ReadFailedError as error:
            raise NotADatabaseError(str(self._name), error.reason) from error
        self._lock.announce()
        self.readers = open_readers(self.path)
        undo.callback(self.readers.dispose)
        self._writer = open_writer(self.path, self.options.durability)
        undo.callback(self._writer.dispose)
        try:
            self._anchor = Anchor(open_beside(self.path, ".anchor"))
            undo.callback(self._anchor.close)
            migrate.upgrade(self._writer, self._name)
            self._connection = self._writer.connect()
            with self._connection.begin():
                self.head = recovery.recover(self._connection, self._anchor.read(), self._name, inspected)
                self._keys = log.Keys(self._connection)
                self._last_at = clock.from_micros(log_reader.last_own_time(self._connection))
                self._guard = FileGuard(self.path, self._name, self._connection, self._lock.file)
        except (DBAPIError, sqlite3.Error) as error:
            found = read_error(self.path, error)
            raise NotADatabaseError(str(self._name), found.reason).advising(found.advice) from error
        except OSError as error:
            raise NotADatabaseError(str(self._name), error.strerror or str(error)) from error

    @property
    def sequence(self) -> int:
        """The number of the last durable commit."""
        return self.head.sequence

    @property
    def last_at(self) -> datetime:
        """The time of the last commit of this file's own, as of opening it."""
        return self._last_at

    # Writing

    @contextlib.contextmanager
    def group(self) -> Iterator[None]:
        """One SQLite transaction, made durable at its end."""
        self._look()
        self._appended = None
        try:
            with self._connection.begin() as transaction:
                self._guard.look_inside(self._connection, self.head)
                yield
                if self._appended is None:
                    transaction.rollback()
        except (DBAPIError, sqlite3.Error) as error:
            failure = self._settle(error)
            if isinstance(_original(error), _OF_ONE_JOB):
                raise UnwritableError(failure) from error
            raise failure from error
        self._note_written()
        if self._appended is not None:
            self.head, self._keys = self._appended
            if self.options.durability == "full":
                self._write_anchor(self.head)

    def append(self, units: Sequence[UnitOfWork], touched: Sequence[SessionState]) -> None:
        """Write the units, and the expiries, into the transaction of the group."""
        keys = self._keys.copy()
        writer = log.LogWriter(self._connection, self.head, keys)
        for unit in units:
            writer.add(unit)
        writer.flush()
        for state in touched:
            log.save_expiry(self._connection, state)
        self._appended = writer.head, keys

    def check(self) -> None:
        """Raise `FileChangedError` where the file is not what it was any more, or others have written to it."""
        self._look()
        try:
            if self._guard.has_news(self._connection):
                with self._connection.begin() as transaction:
                    self._guard.look_inside(self._connection, self.head)
                    transaction.rollback()
        except (DBAPIError, sqlite3.Error) as error:
            # Nothing was to be written. Who writes next, hears of it.
            _logger.warning("file not checked", reason=str(read_error(self.path, error)))

    def _look(self) -> None:
        wrong = self._guard.look()
        if wrong is not None:
            is_home = not self._guard.has_moved() and self._bring_home()
            raise FileChangedError(str(self._name), wrong).advising(Hint.OPEN_AGAIN if is_home else Hint.PUT_BACK_FILE)

    def _bring_home(self) -> bool:
        """Only what is beside the file is gone, and SQLite has it open still: have all of it in the file."""
        try:
            return checkpoint(self._writer, "FULL")
        except (DBAPIError, sqlite3.Error):
            return False

    def _note_written(self) -> None:
        """Before anything that was written is acknowledged: it must be in the file of that name."""
        self._guard.note_written()
        self._look()

    def write_whole(self, jobs: Iterable[Job]) -> list[Any]:
        """Run the jobs in order, all of them in one transaction, however many there are; the results that are not None.

        The first that fails is raised, and so is what `jobs` itself raises: then nothing is left of any of them. What
        they stage goes into the transaction page by page, so that memory never holds all of it. Of what they change,
        nobody may have anything in memory.
        """
        drafts, keys = Drafts(self), self._keys.copy()
        results: list[Any] = []
        try:
            with self.group():
                head = self._write_pages(jobs, drafts, keys, results)
                if head.sequence > self.head.sequence:
                    log.note_import(self._connection, self.head.sequence + 1, head.sequence)
                for state in drafts.states.values():
                    if state is not None and state.lease is not None:
                        log.save_expiry(self._connection, state)
                self._appended = head, keys
        except UnwritableError as refused:
            raise refused.error from refused
        return results

    def _write_pages(self, jobs: Iterable[Job], drafts: Drafts, keys: log.Keys, results: list[Any]) -> Head:
        rest, head, more = iter(jobs), self.head, True
        while more:
            writer = log.LogWriter(self._connection, head, keys)
            more = self._fill_page(rest, writer, drafts, results)
            writer.flush()
            head = writer.head
            # They are in the transaction now, where whoever asks finds them.
            drafts.versions.clear()
            drafts.executions.clear()
        return head

    def _fill_page(self, rest: Iterator[Job], writer: log.LogWriter, drafts: Drafts, results: list[Any]) -> bool:
        """Have the writer take in about `_PAGE_BYTES`; whether there may be more jobs."""
        at, size_bytes = GroupMoment.after(self._last_at), 0
        for job in rest:
            unit = unit_of(self.options, drafts, job.origin, at, writer.head.sequence + 1)
            result = job.command.apply(unit)
            if unit.has_changes():
                writer.add(unit)
            if result is not None:
                results.append(result)
            size_bytes += _PAGE_BYTES // 64 + sum(change.variable.value.size_bytes for change in unit.versions)
            if size_bytes > _PAGE_BYTES:
                return True
        return False

    def _settle(self, error: DBAPIError | sqlite3.Error) -> StorageError:
        """After an error of SQLite: make sure that nothing of the group is left, or say that nobody can know."""
        original = _original(error)
        code = getattr(original, "sqlite_errorcode", None)
        if not isinstance(original, _OF_ONE_JOB) and (code is None or (code & 0xFF) not in _CERTAIN_ABORTS):
            self._raise_unknown(original)
        # SQLITE_FULL has rolled back by itself; for anything else the transaction's end has. Both must be true now.
        driver = self._connection.connection.dbapi_connection
        if driver is None or driver.in_transaction:
            self._raise_unknown(original)
        reason = _LOCKED if isinstance(code, int) and code & 0xFF == sqlite3.SQLITE_BUSY else str(original)
        _logger.warning("group failed", reason=reason)
        return StorageError(reason)

    def _raise_unknown(self, original: object) -> NoReturn:
        raise OutcomeUnknownError(f"SQLite reported {original!s} while writing {self._name}")

    def _write_anchor(self, head: Head) -> None:
        try:
            self._anchor.write(head)
        except OSError as error:
            raise OutcomeUnknownError(f"{self._name}.anchor: {error.strerror or error}") from error

    # Reading, from any thread

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[StoredSessions]:
        """The file as of one moment."""
        with snapshot(self.readers) as connection:
            yield StoredSessions(connection)

    def changes_after(self, state: SessionState, after: int, most_commits: int = 64) -> list[CommitChanges]:
        """The session's next commits."""
        with snapshot(self.readers) as connection, damage.reading(state.session.id):
            return log_reader.changes_after(connection, state, after, most_commits)

    def size_bytes(self) -> int:
        """What the file and its WAL take on the disk."""
        total = 0
        for suffix in ("", "-wal"):
            # The WAL may not be there, or not any more.
            with contextlib.suppress(OSError):
                total += self.path.with_name(self.path.name + suffix).stat().st_size
        return total

    # Housekeeping

    def unfinished(self) -> Mapping[str, Sequence[str]]:
        """The executions of live sessions that have not ended."""
        with snapshot(self.readers) as connection:
            return stored_executions.unfinished(connection)

    def expired(self, now: datetime, limit: int) -> list[str]:
        """The ids of sessions whose expiry, as saved, is past."""
        with snapshot(self.readers) as connection:
            return stored_sessions.expired(connection, now, limit)

    def reclaim(self, before: datetime, is_watched: Callable[[int], bool]) -> None:
        """Forget the answers that were given before that time; the rest is history."""
        self._look()
        try:
            with self._connection.begin():
                self._guard.look_inside(self._connection, self.head)
                outcomes.forget(self._connection, before)
        except (DBAPIError, sqlite3.Error) as error:
            raise self._settle(error) from error
        self._note_written()

    def close(self) -> None:
        """Bring the WAL into the file, remember the head, let the file go."""
        try:
            with forks.busy():
                self.readers.dispose()
                self._connection.close()
                checkpoint(self._writer)
                self._anchor.write(self.head)
        except (DBAPIError, sqlite3.Error, OSError) as error:
            raise CheckpointError(str(self._name), str(error)) from error
        finally:
            self._writer.dispose()
            self._anchor.close()
            self._lock.release()

    def abandon(self) -> None:
        """Let the file go without another write: after an outcome that is unknown."""
        with contextlib.suppress(Exception):
            self.readers.dispose()
        for release in (self._anchor.close, self._lock.release):
            with contextlib.suppress(OSError):
                release()


FileGroups: TypeAlias = Groups[SessionStore]
"""The sessions of a database file."""


def open_groups(path: Path, options: StoreOptions | None = None) -> FileGroups:
    """The sessions of a database file, which this process then owns; the file is made where it is missing.

    Raises `OpenError` for a file that is in use, is no database of ours, ...
    """
    store = SessionStore(path, options)
    try:
        with forks.busy():
            return Groups(store, store.options, cache_size_bytes=store.options.cache_size_bytes)
    except (OutcomeUnknownError, ReadFailedError, FileChangedError) as error:
        store.abandon()
        # To repeat a write is no advice here.
        advice = error.advice if isinstance(error, FileChangedError) else None
        raise NotADatabaseError(str(path), error.sentence).advising(advice) from error
    except BaseException:
        store.abandon()
        raise


def _original(error: Exception) -> object:
    """The driver's own error in one of SQLAlchemy's."""
    return getattr(error, "orig", error)
