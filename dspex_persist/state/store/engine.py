"""Opening the database file: ownership, the driver's settings, transactions, and the meaning of its errors."""

import errno
import fcntl
import os
import sqlite3
import stat
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Literal, Protocol, TypeAlias, cast
from urllib.parse import quote
from weakref import WeakKeyDictionary

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError, DisconnectionError
from sqlalchemy.pool import QueuePool, StaticPool

from dspex_persist.infra import forks, holder
from dspex_persist.infra.file_status import Identity
from dspex_persist.infra.interrupts import interrupts
from dspex_persist.infra.logs import get_logger
from dspex_persist.spelling import did_you_mean
from dspex_persist.state.conditions import value_holds
from dspex_persist.state.errors import DatabaseInUseError, Hint, NotADatabaseError, ReadFailedError, printable
from dspex_persist.state.side_files import open_side_file, reported
from dspex_persist.state.store import inherited
from dspex_persist.state.values.json_text import mended

Durability: TypeAlias = Literal["full", "normal"]
TakeSnapshot: TypeAlias = Callable[[Engine], AbstractContextManager[Connection]]
_SYNCHRONOUS = {"full": 2, "normal": 1}
LOCK_WAIT_S: Final = 10.0
"""How long SQLite waits for a lock that another program holds."""
WAL_LIMIT_BYTES: Final = 64 * 1024 * 1024
"""A larger WAL is truncated to this size once all of it is in the database."""

SIDE_FILES: Final = ("-wal", "-shm", "-journal")
"""The suffixes of the files that SQLite keeps next to a database."""
_DAMAGED: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_logger: Final = get_logger(__name__)


def identity_of(status: os.stat_result) -> Identity:
    """Return the identity of the file with this `stat`."""
    return Identity(status.st_dev, status.st_ino)


_IN_MEMORY: Final = ("memory:", ":memory:")


def refuse_name(path: Path) -> None:
    """Raise `NotADatabaseError` for a name that cannot be meant as a database: a file next to one, or `:memory:`."""
    if str(path) in _IN_MEMORY:
        reason = "it is not a file, but stands for sessions in memory"
        raise NotADatabaseError(str(path), reason).advising(Hint.CONNECT_IN_MEMORY)
    target = resolved(path)
    file = path if path.name == target.name else target
    for suffix in (*SIDE_FILES, ".anchor", ".lock"):
        if not file.name.endswith(suffix) or file.name == suffix:
            continue
        database = file.with_name(file.name.removesuffix(suffix))
        # Other programs may use the suffixes of our files, too.
        if suffix in SIDE_FILES or database.is_file():
            reason = f"its name is that of a file next to a database; {did_you_mean(str(database), spell=str)}"
            raise NotADatabaseError(str(path), reason)


def resolved(path: Path) -> Path:
    """Return the absolute path of a database, without symbolic links, which SQLite follows as well.

    SQLite keeps the WAL next to the file itself, so all code uses this one name from here on, even if the working
    directory changes.

    Raises:
        NotADatabaseError: The path cannot be resolved, is not UTF-8, or is a folder.
    """
    try:
        target = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        # RuntimeError: a cycle of links.
        raise NotADatabaseError(str(path), str(error)) from error
    if any("\ud800" <= each <= "\udfff" for each in str(target)):
        reason = "SQLite has names in UTF-8 only: rename what is not, or use another folder"
        raise NotADatabaseError(str(target), reason)
    if not target.name:
        raise NotADatabaseError(str(path), "it is a folder: name a file in it")
    return target


# Closing any descriptor of a file drops all POSIX locks that the process holds on it, including SQLite's. Another
# process that then opens the file finds no locks, and removes its WAL when it closes it. SQLite takes care of this for
# its own descriptors. For ours, we check the identity of a file before we open it, so that we never open one that this
# process owns, and we close our one descriptor of it only when the process has no other.
class _Gate:
    """A lock held while files are checked, opened or closed, so that no file is opened between a check and its use.

    A forked child inherits none of its parent's open files, except those that could not be closed.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        forks.register(self)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with forks.busy(), self._lock:
            yield

    def forked(self, *, quiet: bool) -> None:
        """See `forks.ForkListener`."""
        self._lock = threading.Lock()
        _parked.clear()
        if quiet:
            _owned.clear()


gate: Final = _Gate()
"""The gate of this process."""
_owned: Final[dict[Identity, int]] = {}
"""The owned files, and the process that owns each."""
_parked: Final[list[int]] = []
"""Descriptors of released files that this process still has open elsewhere."""
_connections: Final[WeakKeyDictionary[Engine, inherited.Connections]] = WeakKeyDictionary()


class OwnershipLock:
    """Makes this process the only owner of a database, from before it touches the file until SQLite has closed it.

    There are three locks, because each alone has a gap. The lock file next to the database tells others who the owner
    is, and keeps them from touching anything; but it can be removed, and a hard link has a different one. A lock on the
    database itself (flock, which SQLite does not use) stays with the file wherever it is moved, but works only on
    Linux: on other systems it conflicts with SQLite's own locks. Checking either lock means opening a file, which this
    process must not do to a file that it already owns; so there is a table of those.

    Until `announce` is called, nothing next to the database has changed: a refused file stays as it was.
    """

    def __init__(self, path: Path, *, create: bool = False, replace: bool = False) -> None:
        """Take the locks.

        Args:
            path: The database.
            create: Create the file if it does not exist, readable only by its owner.
            replace: Another file will replace it, so it does not matter next to which of its names the WAL is.

        Raises:
            DatabaseInUseError: Another owner has the file.
            NotADatabaseError: The file cannot be opened or locked.
        """
        self._pid = os.getpid()
        self._is_announced = False
        refuse_name(path)
        name = resolved(path)
        with gate(), _named(path), reported(name):
            _refuse_own(name)
            if create:
                _refuse_nowhere(path)
            self._lock_file = _LockFile(name)
            try:
                self._identity, self._file = _take(name, create, replace)
            except BaseException:
                self._lock_file.close_untouched()
                raise
            _owned[self._identity] = self._pid

    @property
    def file(self) -> int | None:
        """The descriptor of the database that holds the lock; None on systems where there is none."""
        return self._file

    def announce(self, address: str = "") -> None:
        """Write the owner's pid, and its address if it is a server, to the lock file, for errors of other processes."""
        self._is_announced = True
        self._lock_file.write(holder.own_text(address))

    def release(self) -> None:
        """Release the locks. By now SQLite has closed the file, unless there are still readers."""
        if os.getpid() != self._pid:
            # In a forked child: the locks belong to the parent.
            return
        with gate():
            _owned.pop(self._identity, None)
            if self._file is not None:
                fcntl.flock(self._file, fcntl.LOCK_UN)
                _parked.append(self._file)
            _close_parked()
        if self._is_announced:
            self._lock_file.write(b"")
            self._lock_file.close()
        else:
            self._lock_file.close_untouched()


class _LockFile:
    """The locked file next to a database. Its text informs other processes; the lock works without it."""

    def __init__(self, database: Path) -> None:
        self._path = database.with_name(f"{database.name}.lock")
        while not self._take(database):
            # The process that created this file was refused and has removed it, so a lock on it has no effect.
            forks.close(self._file)

    def _take(self, database: Path) -> bool:
        self._made = not os.path.lexists(self._path)
        self._file = open_side_file(database, ".lock")
        try:
            _lock_side_file(database, self._file)
            return os.fstat(self._file).st_nlink > 0
        except BaseException:
            forks.close(self._file)
            raise

    def write(self, text: bytes) -> None:
        # A full disk must not keep the owner from starting.
        with suppress(OSError):
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, text, 0)

    def close(self) -> None:
        forks.close(self._file)

    def close_untouched(self) -> None:
        """Leave the file as it was; remove it if this process created it."""
        if self._made:
            with suppress(OSError):
                self._path.unlink()
        self.close()


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Let errors name the file as the caller did."""
    try:
        yield
    except (DatabaseInUseError, NotADatabaseError) as error:
        error.path = printable(str(path))
        raise


def _lock_side_file(path: Path, file: int) -> None:
    with reported(path, ".lock"):
        if _is_taken(file):
            text = os.pread(file, holder.TEXT_MAX_BYTES, 0)
            raise DatabaseInUseError(str(path), holder.pid_of(text), holder.address_of(text))


def _refuse_own(path: Path) -> None:
    with suppress(OSError):
        pid = _owned.get(identity_of(path.stat()))
        if pid is not None:
            raise DatabaseInUseError(str(path), pid)


def _refuse_nowhere(path: Path) -> None:
    """Create no folders for a mistyped path, and no file where a link of unknown origin points to."""
    if not path.parent.is_dir():
        advice = f"make it first: mkdir -p {path.parent}"
        if path.parts[0].startswith("~"):
            advice = "~ is a home only to a shell: use Path(...).expanduser()"
        raise NotADatabaseError(str(path), f"there is no folder {path.parent}; {advice}")
    if path.is_symlink() and not path.exists():
        reason = f"it is a link to {path.readlink()}, which does not exist; remove the link, or name that file itself"
        raise NotADatabaseError(str(path), reason)


def _take(path: Path, create: bool, replace: bool) -> tuple[Identity, int | None]:
    """Lock the database itself; return its identity, and the descriptor that holds the lock (None if not on Linux)."""
    with reported(path):
        if create and not os.path.lexists(path):
            # A new file has no locks yet, so this descriptor may be closed.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            reason = os.strerror(errno.EISDIR) if path.is_dir() else "it is not a regular file"
            raise NotADatabaseError(str(path), reason)
        identity = identity_of(status)
        if sys.platform != "linux":
            if not replace:
                _refuse_second_name(path, status)
            return identity, None
        file = forks.own(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW))
        # Not owned yet, but closing it could already drop SQLite's locks.
        _parked.append(file)
        try:
            identity = identity_of(os.fstat(file))
            if identity in _owned or _is_taken(file):
                raise DatabaseInUseError(str(path), _owned.get(identity))
            if not replace:
                _refuse_second_name(path, status)
            _parked.remove(file)
        finally:
            _close_parked()
    return identity, file


def _is_taken(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _close_parked() -> None:
    """Close the parked descriptors that can be closed without dropping SQLite's locks."""
    for file in _parked.copy():
        if not _has_another(file):
            _parked.remove(file)
            forks.close(file)


def _has_another(file: int) -> bool:
    """Whether the process has the file open elsewhere, too; True if that cannot be determined."""
    identity = identity_of(os.fstat(file))
    try:
        others = {int(name) for name in os.listdir("/dev/fd")}.difference(_parked)  # noqa: PTH208 -- names, not paths
    except OSError:
        return True
    for other in others:
        with suppress(OSError):
            if identity_of(os.fstat(other)) == identity:
                return True
    return False


def _refuse_second_name(path: Path, status: os.stat_result) -> None:
    """Refuse a hard link if another name of the file has a WAL, which SQLite would not find by this name."""
    for name in _other_names(path, identity_of(status)) if status.st_nlink > 1 else ():
        with suppress(OSError):
            if Path(f"{name}-wal").stat().st_size:
                reason = f"{name} is the same file, and {name}-wal holds commits: open it by that name"
                raise NotADatabaseError(str(path), reason)


def warn_of_others(path: Path) -> None:
    """Log a warning if the file's mode gives others access, or if it has several names."""
    status = path.stat()
    if status.st_mode & 0o066:
        mode = f"{stat.S_IMODE(status.st_mode):04o}"
        _logger.warning("others can read or write the database", db=str(path), mode=mode, hint=f"chmod 600 {path}")
    if status.st_nlink > 1:
        hint = "SQLite keeps the WAL next to the name by which the file was opened: always use the same name"
        _logger.warning("the database has several names", db=str(path), names=status.st_nlink, hint=hint)


def _other_names(path: Path, identity: Identity) -> list[Path]:
    with suppress(OSError), os.scandir(path.parent) as entries:
        return [
            Path(entry.path)
            for entry in entries
            if entry.name != path.name and identity_of(entry.stat(follow_symlinks=False)) == identity
        ]
    return []


def open_writer(path: Path, durability: Durability = "full") -> Engine:
    """Return an engine with the only connection that writes and checkpoints. Its transactions are BEGIN IMMEDIATE."""
    name = resolved(path)
    connections = inherited.Connections(name)

    def connect() -> sqlite3.Connection:
        connections.check()
        with gate():
            # `_begin` starts transactions; the driver must not start any automatically.
            connection = sqlite3.connect(
                name, isolation_level=None, check_same_thread=False, timeout=LOCK_WAIT_S, factory=inherited.Connection
            )
            connections.add(connection)
            # With this, SQLite opens the files next to the database; see untouched.py.
            _set_and_assert(connection, durability)
        return connection

    # One connection for the life of the engine: SQLite's WAL-reset bug needs a second one that writes.
    engine = create_engine("sqlite://", creator=connect, poolclass=StaticPool)

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        driver = sqlite_of(connection)
        # Inside of `transaction` the driver has begun one, which statements of SQLAlchemy's join.
        if not driver.in_transaction:
            driver.execute("BEGIN IMMEDIATE")

    return engine


@contextmanager
def transaction(
    connection: Connection, *, wait: bool = True, observe: Callable[[float], object] | None = None
) -> Iterator[None]:
    """Run the block in a transaction of the writing connection. Commit at its end, roll back if it raises.

    The driver begins and ends the transaction, in a tenth of SQLAlchemy's time. Statements of SQLAlchemy's on the
    connection are part of it. The block may roll back by `roll_back`.

    Args:
        connection: A connection of `open_writer`.
        wait: Whether to wait up to `LOCK_WAIT_S` while another program writes.
        observe: Told how long the COMMIT took, in seconds, if there was anything to commit.

    Raises:
        sqlite3.Error: SQLite reported an error.
        DBAPIError: The same, in a statement of SQLAlchemy's.
    """
    driver = sqlite_of(connection)
    try:
        if wait:
            driver.execute("BEGIN IMMEDIATE")
        else:
            _begin_at_once(driver)
        yield
        _commit(connection, driver, observe if driver.in_transaction else None)
    except BaseException:
        roll_back(connection)
        raise


def _commit(connection: Connection, driver: sqlite3.Connection, observe: Callable[[float], object] | None) -> None:
    try:
        began = time.perf_counter() if observe is not None else 0.0
        if connection.in_transaction():
            connection.commit()
        else:
            driver.commit()
        if observe is not None:
            observe(time.perf_counter() - began)
    except (DBAPIError, sqlite3.Error):
        raise
    except BaseException as error:
        # Raised by another thread in this one, which waits nowhere as long as here: if SQLite has committed by now, the
        # group must not count as failed.
        if driver.in_transaction or not interrupts.keep(error):
            raise
        roll_back(connection)


def _begin_at_once(driver: sqlite3.Connection) -> None:
    driver.execute("PRAGMA busy_timeout = 0")
    try:
        driver.execute("BEGIN IMMEDIATE")
    finally:
        driver.execute(f"PRAGMA busy_timeout = {round(LOCK_WAIT_S * 1000)}")


def roll_back(connection: Connection) -> None:
    """Roll back the connection's transaction, if there is one."""
    transaction = connection.get_transaction()
    if transaction is not None:
        # Even one that a failed COMMIT has ended: SQLAlchemy refuses every statement until it is rolled back.
        transaction.rollback()
    # If SQLAlchemy's transaction ended with an error, SQLite's may still be open.
    sqlite_of(connection).rollback()


class Driver(Protocol):
    """What the statements of the store call on a driver's connection, to a file or to a database."""

    def execute(self, statement: str, parameters: Sequence[object] = ..., /) -> Any:
        """Run a statement; return its cursor."""

    def executemany(self, statement: str, rows: Iterable[Sequence[object]], /) -> Any:
        """Run a statement once for each row."""


def driver_of(connection: Connection) -> Driver:
    """Return the driver's connection. SQLAlchemy takes longer to prepare a small statement than SQLite to run it."""
    driver = connection.connection.dbapi_connection
    assert driver is not None, "an open connection has the driver's"
    return cast(Driver, driver)


def sqlite_of(connection: Connection) -> sqlite3.Connection:
    """Return the driver's connection to a file."""
    driver = connection.connection.dbapi_connection
    assert isinstance(driver, sqlite3.Connection), "an open connection has the driver's"
    return driver


def _set_and_assert(connection: sqlite3.Connection, durability: Durability) -> None:
    """Set the pragmas that our guarantees depend on, and check them: a pragma without effect reports no error."""
    wanted = _SYNCHRONOUS[durability]
    mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
    connection.execute(f"PRAGMA synchronous = {wanted}")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA cache_size = -16384")
    connection.execute(f"PRAGMA journal_size_limit = {WAL_LIMIT_BYTES}")
    synchronous = connection.execute("PRAGMA synchronous").fetchone()[0]
    foreign_keys = connection.execute("PRAGMA foreign_keys").fetchone()[0]
    if (mode, synchronous, foreign_keys) != ("wal", wanted, 1):
        connection.close()
        raise sqlite3.OperationalError(
            f"SQLite did not apply the settings (journal_mode {mode}, synchronous {synchronous}, "
            f"foreign_keys {foreign_keys}); is the file on a network file system?"
        )


class _AtRest(inherited.Connection):
    """A connection to a file that no program has open, in a folder where this process cannot create files.

    To read a file in WAL mode, SQLite needs further files next to it. If it cannot create them, the file has to be
    opened as `immutable`. That is correct only until a program opens it for writing, so each read checks for that.
    """

    state: tuple[int, ...] | None


def _state_at_rest(path: Path) -> tuple[int, ...] | None:
    """Return values that change when the file is written to; None if it can be read in the usual way."""
    if any(os.path.lexists(f"{path}{suffix}") for suffix in SIDE_FILES) or _can_write(path.parent):
        return None
    status = path.stat()
    return (*identity_of(status), status.st_size, status.st_mtime_ns)


def _can_write(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)


def open_readers(path: Path, size: int = 4) -> Engine:
    """Return an engine with read-only connections, in which each transaction is a snapshot.

    Keep transactions short: the WAL grows while one is open.

    Args:
        path: The database.
        size: How many idle connections the pool keeps. If none is idle, another one is opened; callers never wait.
    """
    name = resolved(path)
    connections = inherited.Connections(name)

    def connect() -> sqlite3.Connection:
        connections.check()
        connection = open_one()
        connections.add(connection)
        connection.create_function("mended_json", 1, mended, deterministic=True)
        connection.create_function("value_holds", 4, value_holds, deterministic=True)
        return connection

    def open_one() -> inherited.Connection:
        uri = uri_of(name)
        try:
            with gate():
                state = _state_at_rest(name)
                if state is None:
                    return _touched(connect_to(uri))
                connection = sqlite3.connect(
                    f"{uri}&immutable=1", uri=True, isolation_level=None, check_same_thread=False, factory=_AtRest
                )
        except OSError as error:
            raise NotADatabaseError(str(path), error.strerror or str(error)) from error
        connection.state = state
        return connection

    url = URL.create("sqlite", database=str(name))
    engine = create_engine(url, creator=connect, poolclass=QueuePool, pool_size=size, max_overflow=-1)
    _connections[engine] = connections

    @event.listens_for(engine, "checkout")
    def _check_out(connection: Any, _record: Any, _proxy: Any) -> None:
        if isinstance(connection, _AtRest) and not _rests(name, connection):
            raise DisconnectionError

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        driver_of(connection).execute("BEGIN")

    return engine


def uri_of(path: Path) -> str:
    """Return the URI by which SQLite opens the file read-only."""
    return f"file:{quote(str(path))}?mode=ro"


def connect_to(uri: str) -> inherited.Connection:
    """Return a connection that starts no transactions automatically. The caller holds the gate."""
    return sqlite3.connect(
        uri, uri=True, isolation_level=None, check_same_thread=False, timeout=LOCK_WAIT_S, factory=inherited.Connection
    )


def _touched(connection: inherited.Connection) -> inherited.Connection:
    """Have SQLite open the files next to the database now, inside the gate, and not at the first read."""
    try:
        with closing(connection.cursor()) as cursor:
            cursor.execute("SELECT 1 FROM sqlite_schema").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


def _rests(path: Path, connection: _AtRest) -> bool:
    try:
        return _state_at_rest(path) == connection.state
    except OSError:
        return False


NAME: Final = "dspex_name"
"""The option of the readers of a database that is no file with its name."""
_snapshots: Final[WeakKeyDictionary[Engine, TakeSnapshot]] = WeakKeyDictionary()


def snapshots_by(readers: Engine, take: TakeSnapshot) -> None:
    """Have `snapshot` call `take`, which must not keep them, with these readers of a database that is no file."""
    _snapshots[readers] = take


def name_of(readers: Engine) -> str:
    """Return how errors name the file, or the database, of these readers."""
    return str(readers.get_execution_options().get(NAME) or readers.url.database)


@contextmanager
def snapshot(readers: Engine) -> Iterator[Connection]:
    """Open a short read transaction.

    Raises:
        ReadFailedError: SQLite could not read the file.
        NotADatabaseError: The file is damaged, or this process may not read it.
        UnavailableError: The database cannot be reached.
    """
    if (taken := _snapshots.get(readers)) is not None:
        with taken(readers) as connection:
            yield connection
        return
    path = Path(readers.url.database or "")
    # Before using the pool: in a forked child, its lock may be held by a thread that does not exist there.
    _connections[readers].check()
    try:
        with forks.busy(), readers.begin() as connection:
            yield connection
            driver = driver_of(connection)
            if isinstance(driver, _AtRest) and not _rests(path, driver):
                raise ReadFailedError(str(path), "another program opened it for writing meanwhile; repeat the call")
    except (DBAPIError, sqlite3.Error) as error:
        raise read_error(path, error) from error


def code_of(error: BaseException | None) -> int:
    """Return SQLite's primary error code, without the extended part; 0 if there is none."""
    return int(getattr(getattr(error, "orig", error), "sqlite_errorcode", 0)) & 0xFF


def read_error(path: Path, error: DBAPIError | sqlite3.Error) -> NotADatabaseError | ReadFailedError:
    """Convert an error that SQLite reported while reading the file."""
    original, code = getattr(error, "orig", error), code_of(error)
    if code in _DAMAGED:
        mixture = _mixture(path)
        advice = Hint.RESTORE_OVER if mixture else None
        return NotADatabaseError(str(path), f"{original}{mixture}").advising(advice)
    if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
        obstacle = _obstacle(path)
        if obstacle is not None:
            return NotADatabaseError(str(path), obstacle)
    return ReadFailedError(str(path), _shortage() or str(original))


def looking_error(path: Path, error: OSError) -> NotADatabaseError | ReadFailedError:
    """Convert an error that the operating system reported while the files were inspected."""
    obstacle = _obstacle(path)
    if obstacle is not None:
        return NotADatabaseError(str(path), obstacle)
    return ReadFailedError(str(path), _shortage() or error.strerror or str(error))


def _mixture(path: Path) -> str:
    """Return a note for the error if there is a WAL, which SQLite reads even if it belongs to another file."""
    try:
        if not Path(f"{path}-wal").stat().st_size:
            return ""
    except OSError:
        return ""
    return f"; if {path.name} was put there by hand, {path.name}-wal still belongs to the file before it"


def _obstacle(path: Path) -> str | None:
    """Return why this process cannot read the file; None if there is no known reason."""
    for file in (path, Path(f"{path}-wal"), Path(f"{path}-shm")):
        if os.path.lexists(file) and not os.access(file, os.R_OK):
            return f"this user may not read {file.name}; ask its owner for read permission, or for a backup"
    if not os.path.lexists(path):
        return "there is no such file"
    if os.path.lexists(f"{path}-wal") and not _can_write(path.parent):
        return (
            f"there are commits in {path.name}-wal, and to read them SQLite needs another file next to it, which it "
            f"cannot create in this folder: copy {path.name} and {path.name}-wal into a folder of yours and read the "
            "copy, or have its owner close it or make a backup"
        )
    return None


def _shortage() -> str | None:
    """Return a reason if the process has run out of descriptors; SQLite only reports that it cannot open a file."""
    try:
        os.close(os.open("/", os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            return "too many open files; close some, or raise the limit (ulimit -n)"
    return None


def checkpoint(writer: Engine, mode: Literal["TRUNCATE", "FULL"] = "TRUNCATE") -> bool:
    """Copy the WAL into the database, as far as open readers allow.

    Args:
        writer: The engine.
        mode: With "TRUNCATE" the WAL is empty afterwards; with "FULL" it stays.

    Returns:
        Whether all of it was copied.
    """
    raw = writer.raw_connection()
    try:
        busy, frames, done = raw.cursor().execute(f"PRAGMA wal_checkpoint({mode})").fetchone()
        return not busy and frames == done
    finally:
        raw.close()


def raw_rows(connection: Connection, statement: str, *parameters: object) -> Iterator[Any]:
    """Iterate over the driver's rows: SQLAlchemy's take several times as long."""
    rows: Iterator[Any] = driver_of(connection).execute(statement, parameters)
    return rows


def streamed_rows(connection: Connection, statement: str, *parameters: object) -> Iterator[Any]:
    """Iterate over rows that may be too many for memory, in the transaction of the connection.

    SQLite looks for each row when it is asked for it. Another database would send all of them at once.
    """
    stream = _stream_of(connection)
    return raw_rows(connection, statement, *parameters) if stream is None else stream(statement, parameters, False)


def named_rows(connection: Connection, statement: str, *parameters: object) -> Generator[Any, None, None]:
    """Iterate over such rows, which have the names of their columns. Close it before the end of the transaction."""
    stream = _stream_of(connection)
    if stream is not None:
        yield from stream(statement, parameters, True)
        return
    with closing(connection.exec_driver_sql(statement, parameters)) as rows:
        yield from rows


def _stream_of(connection: Connection) -> Callable[[str, Sequence[object], bool], Iterator[Any]] | None:
    return getattr(driver_of(connection), "stream", None)
