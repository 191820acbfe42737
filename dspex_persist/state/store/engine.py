"""Opening the file: the ownership lock, the driver's settings, who begins a transaction and how."""

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, TypeAlias
from urllib.parse import quote

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.pool import QueuePool, StaticPool

from dspex_persist.state.errors import DatabaseInUseError, NotADatabaseError

Durability: TypeAlias = Literal["full", "normal"]
_SYNCHRONOUS = {"full": 2, "normal": 1}


class OwnershipLock:
    """The lock that makes this process the owner of a database. It lives beside it and holds the owner's pid.

    A separate file, because SQLite's own locks are lost when any descriptor of the database file is closed.
    """

    def __init__(self, database: Path) -> None:
        self._file = open_beside(database, ".lock")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(self._file, 32, 0).strip()
            os.close(self._file)
            raise DatabaseInUseError(str(database), int(pid) if pid.isdigit() else None) from None
        # The pid is told to who comes second, no more: a disk without room must not keep the owner from starting.
        with suppress(OSError):
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, str(os.getpid()).encode(), 0)

    def release(self) -> None:
        """Let others own the database."""
        with suppress(OSError):
            os.ftruncate(self._file, 0)
        os.close(self._file)


def open_beside(database: Path, suffix: str) -> int:
    """A descriptor of a private file of ours beside the database; `NotADatabaseError` where there can be none."""
    path = database.with_name(database.name + suffix)
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise NotADatabaseError(str(database), f"{path.name}: {error.strerror}") from error


def create_private(path: Path) -> None:
    """Make the database file (0600) and its folder (0700) where they are missing; SQLite's side files follow suit."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise NotADatabaseError(str(path), error.strerror or str(error)) from error


def open_writer(path: Path, durability: Durability = "full") -> Engine:
    """An engine with the one connection that writes and checkpoints; every transaction is BEGIN IMMEDIATE."""

    def connect() -> sqlite3.Connection:
        # The driver must not guess when a transaction starts: `_begin` says so.
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
        _set_and_assert(connection, durability)
        return connection

    # One connection for the life of the engine: a second one that writes is what the WAL-reset bug needs.
    engine = create_engine("sqlite://", creator=connect, poolclass=StaticPool)

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # By the driver: SQLAlchemy's way to a statement costs more than the statement.
        connection.connection.cursor().execute("BEGIN IMMEDIATE")

    return engine


def _set_and_assert(connection: sqlite3.Connection, durability: Durability) -> None:
    """Set what the promises rest on, and read it back: a pragma that does not take says nothing."""
    wanted = _SYNCHRONOUS[durability]
    mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
    connection.execute(f"PRAGMA synchronous = {wanted}")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA cache_size = -16384")
    connection.execute("PRAGMA journal_size_limit = 67108864")
    synchronous = connection.execute("PRAGMA synchronous").fetchone()[0]
    foreign_keys = connection.execute("PRAGMA foreign_keys").fetchone()[0]
    if (mode, synchronous, foreign_keys) != ("wal", wanted, 1):
        connection.close()
        raise sqlite3.OperationalError(
            f"SQLite did not take the settings (journal_mode {mode}, synchronous {synchronous}, "
            f"foreign_keys {foreign_keys}); is the file on a network file system?"
        )


def open_readers(path: Path, size: int = 4) -> Engine:
    """An engine of read-only connections; each transaction is one snapshot. Keep them short: they hold the WAL."""

    def connect() -> sqlite3.Connection:
        uri = f"file:{quote(str(path.absolute()))}?mode=ro"
        return sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, timeout=10)

    engine = create_engine("sqlite://", creator=connect, poolclass=QueuePool, pool_size=size, max_overflow=0)

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.connection.cursor().execute("BEGIN")

    return engine


@contextmanager
def snapshot(readers: Engine) -> Iterator[Connection]:
    """A short read transaction."""
    with readers.begin() as connection:
        yield connection


def checkpoint(writer: Engine) -> None:
    """Bring the whole WAL into the file and empty it, as far as readers allow."""
    raw = writer.raw_connection()
    try:
        raw.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)")
    finally:
        raw.close()
