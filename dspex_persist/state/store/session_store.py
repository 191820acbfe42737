"""SessionStore: the log of sessions in one SQLite file that this process owns. `open_groups` opens it."""

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final, NoReturn, TypeAlias, TypeVar, get_args

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from dspex_persist import clock
from dspex_persist.infra import forks
from dspex_persist.infra.interrupts import interrupts
from dspex_persist.infra.logs import get_logger
from dspex_persist.state.anchor import Anchor, Head
from dspex_persist.state.denials import Denial
from dspex_persist.state.errors import (
    CheckpointError,
    FileChangedError,
    Hint,
    InvalidArgumentError,
    NotADatabaseError,
    OutcomeUnknownError,
    ReadFailedError,
    StateError,
    StorageError,
    quote,
)
from dspex_persist.state.groups import CACHE_SIZE_BYTES, Groups
from dspex_persist.state.log_store import LogStore, UnwritableError, WouldWaitError
from dspex_persist.state.meter import FileFigures, Meter
from dspex_persist.state.options import SessionOptions, check_count, check_seconds
from dspex_persist.state.session_state import SessionState
from dspex_persist.state.side_files import open_side_file
from dspex_persist.state.store import denials as stored_denials
from dspex_persist.state.store import executions as stored_executions
from dspex_persist.state.store import log, log_reader, migrate, outcomes, recovery
from dspex_persist.state.store import sessions as stored_sessions
from dspex_persist.state.store.engine import (
    Durability,
    OwnershipLock,
    checkpoint,
    code_of,
    open_readers,
    open_writer,
    read_error,
    resolved,
    roll_back,
    snapshot,
    sqlite_of,
    transaction,
    warn_of_others,
)
from dspex_persist.state.store.guard import FileGuard
from dspex_persist.state.store.stored import StoredLog
from dspex_persist.state.unit_of_work import UnitOfWork

R = TypeVar("R")

_logger: Final = get_logger(__name__)

_CERTAIN_ABORTS = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_BUSY})
# Errors caused by the rows of one job, whatever else is in its group. Such rows never reach the disk.
_OF_ONE_JOB = (sqlite3.IntegrityError, sqlite3.DataError, sqlite3.InterfaceError, sqlite3.ProgrammingError)

_LOCKED = "another program holds the write lock of the database; let it finish, and repeat the call"


@dataclass(frozen=True, slots=True)
class StoreOptions(SessionOptions):
    """The options of a store in a file.

    Attributes:
        durability: "full" syncs each group to disk; with "normal" a power cut may lose the last commits.
        cache_size_bytes: How much memory the cached sessions may take.
        retention_keep_versions: Automatic pruning keeps at least this many versions of each variable.
        retention_age_s: Automatic pruning removes only history older than this many seconds.
        retention_ended_sessions_s: Automatic pruning removes sessions that ended more than this many seconds ago.
        warn_size_bytes: Log a warning when the file grows above this size.
        denials_kept: How many entries about refused calls to keep, the newest.
    """

    durability: Durability = "full"
    cache_size_bytes: int = CACHE_SIZE_BYTES
    retention_keep_versions: int | None = None
    retention_age_s: float | None = None
    retention_ended_sessions_s: float | None = None
    warn_size_bytes: int | None = None
    denials_kept: int = 10_000

    def __post_init__(self) -> None:
        # Not super(): `slots=True` creates a new class, and super() would refer to the original one.
        SessionOptions.__post_init__(self)
        if self.durability not in get_args(Durability):
            raise InvalidArgumentError("durability", f"{quote(self.durability)} is neither 'full' nor 'normal'")
        check_count("cache_size_bytes", self.cache_size_bytes)
        check_count("denials_kept", self.denials_kept)
        for name in ("retention_age_s", "retention_ended_sessions_s"):
            if getattr(self, name) is not None:
                check_seconds(name, getattr(self, name))
        for name in ("retention_keep_versions", "warn_size_bytes"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))


class SessionStore(StoredLog, LogStore):
    """The log in an open file. `readers` are its read-only connections; `head` is its last commit."""

    driver_errors = (DBAPIError, sqlite3.Error)
    takes_pages = True

    def __init__(self, path: Path, options: StoreOptions | None = None, meter: Meter | None = None) -> None:
        self.options = options or StoreOptions()
        self._observe = None if meter is None else meter.observe_commit
        # The head and the keys after the group that is being written.
        self._appended: tuple[Head, log.Keys] | None = None
        with contextlib.ExitStack() as undo:
            self._lock = OwnershipLock(path, create=True)
            undo.callback(self._lock.release)
            # Errors name the file as the caller did.
            self.path, self._name = resolved(path), path
            with forks.busy():
                self._open_file(undo)
                warn_of_others(self.path)
            undo.pop_all()

    def announce(self, address: str) -> None:
        """Tell other processes at which address this one serves the file: their errors name it."""
        self._lock.announce(address)

    def _open_file(self, undo: contextlib.ExitStack) -> None:
        try:
            # Before any file is created next to it, or changed.
            inspected = recovery.inspect(self.path, self._name)
        except ReadFailedError as error:
            raise NotADatabaseError(str(self._name), error.reason) from error
        self._lock.announce()
        self.readers = open_readers(self.path)
        undo.callback(self.readers.dispose)
        self._writer = open_writer(self.path, self.options.durability)
        undo.callback(self._writer.dispose)
        try:
            self._anchor = Anchor(open_side_file(self.path, ".anchor"))
            undo.callback(self._anchor.close)
            migrate.upgrade(self._writer, self._name)
            self._connection = self._writer.connect()
            with transaction(self._connection):
                self.head = recovery.recover(self._connection, self._anchor.read(), self._name, inspected)
                self._keys = log.Keys.of(self._connection)
                self._last_at = clock.from_micros(log_reader.last_own_time(self._connection))
                self._guard = FileGuard(self.path, self._name, self._connection, self._lock.file)
        except (DBAPIError, sqlite3.Error) as error:
            cause = read_error(self.path, error)
            raise NotADatabaseError(str(self._name), cause.reason).advising(cause.advice) from error
        except OSError as error:
            raise NotADatabaseError(str(self._name), error.strerror or str(error)) from error

    @property
    def sequence(self) -> int:
        """The number of the last durable commit."""
        return self.head.sequence

    @property
    def last_at(self) -> datetime:
        """The time of the last commit that was not imported, as of opening the file."""
        return self._last_at

    # Writing

    @contextlib.contextmanager
    def group(self, *, wait: bool = True) -> Iterator[None]:
        """One SQLite transaction, which is durable when the context ends."""
        self._appended = None
        may_be_stored = False
        try:
            self._look()
            with self._reported(wait), transaction(self._connection, wait=wait, observe=self._observe):
                self._guard.look_inside(self._connection, self.head)
                yield
                if self._appended is None:
                    roll_back(self._connection)
                may_be_stored = self._appended is not None
        except (StateError, UnwritableError, WouldWaitError):
            raise
        except Exception as error:
            if may_be_stored:
                raise OutcomeUnknownError(f"{error!r} while writing {self._name}") from error
            raise
        except BaseException as error:
            if may_be_stored or not interrupts.keep(error):
                raise
            raise StorageError("an exception of another thread interrupted it") from error
        self._finish()

    @contextlib.contextmanager
    def _reported(self, wait: bool) -> Iterator[None]:
        try:
            yield
        except (DBAPIError, sqlite3.Error) as error:
            if not wait and code_of(error) == sqlite3.SQLITE_BUSY:
                raise WouldWaitError from error
            failure = self._settle(error)
            if isinstance(_original(error), _OF_ONE_JOB):
                raise UnwritableError(failure) from error
            raise failure from error

    def _finish(self) -> None:
        """Check a group that SQLite has committed, and note it."""
        try:
            self._note_group()
        except StateError:
            raise
        except BaseException as error:
            if interrupts.keep(error):
                self._note_group()
            elif self._appended is not None and isinstance(error, Exception):
                raise OutcomeUnknownError(f"{error!r} while writing {self._name}") from error
            else:
                raise

    def _note_group(self) -> None:
        self._note_written()
        if self._appended is not None:
            self.head, self._keys = self._appended
            if self.options.durability == "full":
                self._write_anchor(self.head)

    def append(self, units: Sequence[UnitOfWork], touched: Sequence[SessionState]) -> None:
        """Write the units and the expiries into the group's transaction."""
        head, keys = self._appended or (self.head, self._keys.copy())
        writer = log.LogWriter(self._connection, head, keys)
        for unit in units:
            writer.add(unit)
        writer.flush()
        for state in touched:
            log.save_expiry(self._connection, state)
        self._appended = writer.head, keys

    def actor_of(self, sequence: int) -> str:
        """See `LogStore.actor_of`."""
        return stored_sessions.actor_of(self._connection, sequence)

    def stored_by(self, identity: str) -> Mapping[int, int]:
        """See `LogStore.stored_by`."""
        return stored_sessions.stored_by(self._connection, identity)

    def note_import(self, first: int, last: int) -> None:
        """See `LogStore.note_import`."""
        log.note_import(self._connection, first, last)

    def check(self) -> None:
        """Raise `FileChangedError` if the file was moved, replaced, or written to by another program."""
        self._look()
        try:
            if self._guard.has_news(self._connection):
                with transaction(self._connection):
                    self._guard.look_inside(self._connection, self.head)
                    roll_back(self._connection)
        except (DBAPIError, sqlite3.Error) as error:
            # Nothing had to be written; the next write reports the error.
            _logger.warning("file not checked", reason=str(read_error(self.path, error)))

    def _look(self) -> None:
        change = self._guard.look()
        if change is not None:
            is_complete = not self._guard.has_moved() and self._save_wal()
            advice = Hint.OPEN_AGAIN if is_complete else Hint.PUT_BACK_FILE
            raise FileChangedError(str(self._name), change).advising(advice)

    def _save_wal(self) -> bool:
        """Copy the WAL into the database when only the WAL's name is gone and SQLite still has it open."""
        try:
            return checkpoint(self._writer, "FULL")
        except (DBAPIError, sqlite3.Error):
            return False

    def _note_written(self) -> None:
        """Before acknowledging a write, check that it is in the file with that name."""
        self._look()
        self._guard.note_written()

    def _settle(self, error: DBAPIError | sqlite3.Error) -> StorageError:
        """Return the error for a group that SQLite has certainly rolled back; raise if that is not certain."""
        original = _original(error)
        code = getattr(original, "sqlite_errorcode", None)
        if not isinstance(original, _OF_ONE_JOB) and (code is None or (code & 0xFF) not in _CERTAIN_ABORTS):
            self._raise_unknown(original)
        # SQLITE_FULL rolls back automatically; otherwise the end of the transaction has. Either way none is open now.
        if sqlite_of(self._connection).in_transaction:
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

    def size_bytes(self) -> int:
        """Return the size of the file and its WAL."""
        return self._size("") + self._size("-wal")

    def _size(self, suffix: str) -> int:
        # There may be no WAL.
        with contextlib.suppress(OSError):
            return self.path.with_name(self.path.name + suffix).stat().st_size
        return 0

    def figures(self) -> FileFigures:
        """Return the sizes of the file, and how many live sessions it has."""
        disk = os.statvfs(self.path.parent)
        with snapshot(self.readers) as connection:
            live = stored_sessions.count_live(connection)
        return FileFigures(self._size(""), self._size("-wal"), disk.f_bavail * disk.f_frsize, live)

    def count_with_access(self) -> int:
        """Return how many live sessions have rules of access."""
        with snapshot(self.readers) as connection:
            return stored_sessions.count_with_access(connection)

    # Housekeeping

    def unfinished(self) -> Mapping[str, Sequence[str]]:
        """Return the executions of live sessions that have not ended."""
        with snapshot(self.readers) as connection:
            return stored_executions.unfinished(connection)

    def expired(self, now: datetime, limit: int) -> list[str]:
        """Return the ids of sessions whose saved expiry is past."""
        with snapshot(self.readers) as connection:
            return stored_sessions.expired(connection, now, limit)

    def reclaim(self, before: datetime, is_watched: Callable[[int], bool]) -> None:
        """Delete the outcomes recorded before a time. The history of ended sessions stays."""
        self._write_beside(lambda connection: outcomes.forget(connection, before))

    def keep_denials(self, denials: Sequence[Denial], most: int) -> None:
        """See `LogStore.keep_denials`."""
        try:
            self._write_beside(lambda connection: stored_denials.keep(connection, denials, most))
        except OutcomeUnknownError as error:
            # Whether these were counted is no reason to end; the next commit reports a disk that is broken.
            if sqlite_of(self._connection).in_transaction:
                raise
            raise StorageError(error.reason) from error

    def forget_denials(self, before: datetime) -> int:
        """See `LogStore.forget_denials`."""
        return self._write_beside(lambda connection: stored_denials.forget(connection, before))

    def _write_beside(self, write: Callable[[Connection], R]) -> R:
        """Write something that is not a part of the log, in a transaction of its own."""
        self._look()
        try:
            with transaction(self._connection):
                self._guard.look_inside(self._connection, self.head)
                result = write(self._connection)
        except (DBAPIError, sqlite3.Error) as error:
            raise self._settle(error) from error
        self._note_written()
        return result

    def close(self) -> None:
        """Copy the WAL into the database, write the anchor, and close the file.

        Raises:
            CheckpointError: The WAL could not be copied. No commit is lost; it is copied at the next start.
        """
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
        """Close the file without writing anything more, after an unknown outcome."""
        with contextlib.suppress(Exception):
            self.readers.dispose()
        with contextlib.suppress(Exception):
            # A transaction that is still open would keep the file locked.
            roll_back(self._connection)
        for release in (self._anchor.close, self._lock.release):
            with contextlib.suppress(OSError):
                release()


FileGroups: TypeAlias = Groups[SessionStore]
"""The sessions of a database file."""


def open_groups(path: Path, options: StoreOptions | None = None, meter: Meter | None = None) -> FileGroups:
    """Open a database file, which this process then owns, and create it if it does not exist.

    Args:
        path: The file.
        options: Durability, limits, TTLs and retention.
        meter: Counts what happens; None not to count.

    Raises:
        OpenError: Another process owns the file, or it is not a readable database of this project.
    """
    store = SessionStore(path, options, meter)
    try:
        with forks.busy():
            return Groups(store, store.options, cache_size_bytes=store.options.cache_size_bytes, meter=meter)
    except (OutcomeUnknownError, ReadFailedError, FileChangedError) as error:
        store.abandon()
        # The error's usual advice is to repeat the write, which does not apply here.
        advice = error.advice if isinstance(error, FileChangedError) else None
        raise NotADatabaseError(str(path), error.sentence).advising(advice) from error
    except BaseException:
        store.abandon()
        raise


def _original(error: Exception) -> object:
    """Return the driver's error inside one of SQLAlchemy's."""
    return getattr(error, "orig", error)
