"""Opening the file: who owns it, the driver's settings, who begins a transaction and how, what its errors mean."""

import errno
import fcntl
import os
import sqlite3
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeAlias
from urllib.parse import quote
from weakref import WeakKeyDictionary

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError, DisconnectionError
from sqlalchemy.pool import QueuePool, StaticPool

from dspex_persist.infra import forks, holder
from dspex_persist.infra.logs import get_logger
from dspex_persist.state.errors import DatabaseInUseError, Hint, NotADatabaseError, ReadFailedError, printable
from dspex_persist.state.store import inherited
from dspex_persist.state.store.conditions import value_holds
from dspex_persist.state.values.json_text import mended

Durability: TypeAlias = Literal["full", "normal"]
_SYNCHRONOUS = {"full": 2, "normal": 1}
LOCK_WAIT_S: Final = 10.0
"""How long SQLite tries to get a lock that another program has."""
WAL_LIMIT_BYTES: Final = 64 * 1024 * 1024
"""A WAL that grew larger is cut back to this once all of it is in the file."""

_SIDE_FILES: Final = ("-wal", "-shm", "-journal")
_DAMAGED: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_logger: Final = get_logger(__name__)


class Identity(NamedTuple):
    """What a file is, whatever it is called."""

    device: int
    inode: int


def identity_of(found: os.stat_result) -> Identity:
    """Whose `stat` this is."""
    return Identity(found.st_dev, found.st_ino)


def resolved(path: Path) -> Path:
    """The one name that a database has from here on, wherever the working directory goes and whatever links led to it.

    SQLite follows links as well, and keeps its WAL beside the file itself.
    """
    try:
        found = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        # RuntimeError: links in a circle.
        raise NotADatabaseError(str(path), str(error)) from error
    if any("\ud800" <= each <= "\udfff" for each in str(found)):
        raise NotADatabaseError(str(found), "SQLite has names in UTF-8 only: rename what is not, or use another folder")
    if not found.name:
        raise NotADatabaseError(str(path), "it is a folder: name a file in it")
    return found


# Closing any descriptor of a file drops all POSIX locks that the process has on it, those of SQLite included: somebody
# who then opens the file believes to be alone, and removes its WAL. SQLite knows that of its own descriptors. So a file
# that this process owns is known by its identity before it is opened, and our one descriptor of it is closed only when
# no other descriptor of it is left in the process.
class _Gate:
    """Held while files are looked at, opened or closed, so that none is opened between a look and what follows from it.

    In a child that is forked nothing is left of what its parent has opened, unless it could not be let go of.
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
"""The one of this process."""
_owned: Final[dict[Identity, int]] = {}
"""The files that are owned, and the process that does."""
_parked: Final[list[int]] = []
"""Descriptors of files that were given up, and that somebody in this process still has open."""
_connections: Final[WeakKeyDictionary[Engine, inherited.Connections]] = WeakKeyDictionary()


class OwnershipLock:
    """What makes this process the owner of a database, from before it touches the file until SQLite has let it go.

    Each of three locks has a hole that another one closes. The lock file beside it tells others who the owner is, and
    keeps them from touching anything; but it may be removed, and a hard link has another one. A lock of the file itself
    (flock, which SQLite does not look at) holds wherever the file goes; but only on Linux: elsewhere it is of one kind
    with SQLite's own locks, and would shut SQLite out. Both have to be asked by opening a file, which must not be done
    to one that this process owns already: that is what the table of those is for.

    Until `announce` is called nothing beside the database has changed: what is refused stays as it was.
    """

    def __init__(self, path: Path, *, create: bool = False, replace: bool = False) -> None:
        """`create`: make the file, for its owner's eyes only, where there is none.

        `replace`: another file takes its place, so that it does not matter which of its names its WAL is beside.
        """
        self._pid = os.getpid()
        self._is_announced = False
        name = resolved(path)
        with gate(), _named(path), _reported(name):
            _refuse_own(name)
            if create:
                _refuse_nowhere(path)
            self._beside = _LockFile(name)
            try:
                self._identity, self._file = _take(name, create, replace)
            except BaseException:
                self._beside.close_untouched()
                raise
            _owned[self._identity] = self._pid

    @property
    def file(self) -> int | None:
        """The descriptor of the database that holds the lock, as long as it does; None where none is needed."""
        return self._file

    def announce(self) -> None:
        """Write down who the owner is, for whoever comes second."""
        self._is_announced = True
        self._beside.write(holder.own_text())

    def release(self) -> None:
        """Let others own the database. By then SQLite has closed it, unless somebody is still reading."""
        if os.getpid() != self._pid:
            # In a child that was forked: the locks are its parent's.
            return
        with gate():
            _owned.pop(self._identity, None)
            if self._file is not None:
                fcntl.flock(self._file, fcntl.LOCK_UN)
                _parked.append(self._file)
            _close_parked()
        if self._is_announced:
            self._beside.write(b"")
            self._beside.close()
        else:
            self._beside.close_untouched()


class _LockFile:
    """The locked file beside a database. Its text is for others to read: without it the lock is as good."""

    def __init__(self, database: Path) -> None:
        self._path = database.with_name(f"{database.name}.lock")
        while not self._take(database):
            # Whoever made it was refused, and has removed it again: it keeps nobody out any more.
            forks.close(self._file)

    def _take(self, database: Path) -> bool:
        self._made = not os.path.lexists(self._path)
        self._file = open_beside(database, ".lock")
        try:
            _lock_beside(database, self._file)
            return os.fstat(self._file).st_nlink > 0
        except BaseException:
            forks.close(self._file)
            raise

    def write(self, text: bytes) -> None:
        # A disk without room must not keep the owner from starting.
        with suppress(OSError):
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, text, 0)

    def close(self) -> None:
        forks.close(self._file)

    def close_untouched(self) -> None:
        """Leave it as it was found; where it was not there, remove it."""
        if self._made:
            with suppress(OSError):
                self._path.unlink()
        self.close()


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors speak of the file as its user does."""
    try:
        yield
    except (DatabaseInUseError, NotADatabaseError) as error:
        error.path = printable(str(path))
        raise


def _lock_beside(path: Path, file: int) -> None:
    with _reported(path, ".lock"):
        if _is_taken(file):
            raise DatabaseInUseError(str(path), holder.pid_of(os.pread(file, holder.TEXT_MAX_BYTES, 0)))


@contextmanager
def _reported(path: Path, suffix: str = "") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        advice = Hint.READ_ONLY if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) else None
        name = f"{path.name}{suffix}: " if suffix else ""
        raise NotADatabaseError(str(path), f"{name}{error.strerror or error}").advising(advice) from error


def _refuse_own(path: Path) -> None:
    with suppress(OSError):
        pid = _owned.get(identity_of(path.stat()))
        if pid is not None:
            raise DatabaseInUseError(str(path), pid)


def _refuse_nowhere(path: Path) -> None:
    """Make no tree of folders for a slip in a path, and no file where a link of unknown origin points to."""
    if not path.parent.is_dir():
        advice = f"make it first: mkdir -p {path.parent}"
        if path.parts[0].startswith("~"):
            advice = "~ is a home only to a shell: use Path(...).expanduser()"
        raise NotADatabaseError(str(path), f"there is no folder {path.parent}; {advice}")
    if path.is_symlink() and not path.exists():
        reason = f"it is a link to {path.readlink()}, which does not exist; remove the link, or name that file itself"
        raise NotADatabaseError(str(path), reason)


def _take(path: Path, create: bool, replace: bool) -> tuple[Identity, int | None]:
    """Lock the file itself; its identity, and the descriptor that holds the lock (None where none is needed)."""
    with _reported(path):
        if create and not os.path.lexists(path):
            # Nobody can have a lock on what is new, so this one may be closed.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise NotADatabaseError(str(path), os.strerror(errno.EISDIR) if path.is_dir() else "it is no regular file")
        identity = identity_of(found)
        if sys.platform != "linux":
            if not replace:
                _refuse_second_name(path, found)
            return identity, None
        file = forks.own(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW))
        # Not ours yet, and not to be closed just so either.
        _parked.append(file)
        try:
            identity = identity_of(os.fstat(file))
            if identity in _owned or _is_taken(file):
                raise DatabaseInUseError(str(path), _owned.get(identity))
            if not replace:
                _refuse_second_name(path, found)
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
    """Close what can be closed without taking a lock from SQLite."""
    for file in _parked.copy():
        if not _has_another(file):
            _parked.remove(file)
            forks.close(file)


def _has_another(file: int) -> bool:
    """Whether the process has the file open elsewhere, too; it has if nobody can tell."""
    identity = identity_of(os.fstat(file))
    try:
        others = {int(name) for name in os.listdir("/dev/fd")}.difference(_parked)  # noqa: PTH208 -- many are looked at
    except OSError:
        return True
    for other in others:
        with suppress(OSError):
            if identity_of(os.fstat(other)) == identity:
                return True
    return False


def _refuse_second_name(path: Path, found: os.stat_result) -> None:
    """SQLite keeps the WAL beside the name that a file was opened by, and finds it by no other name."""
    for name in _other_names(path, identity_of(found)) if found.st_nlink > 1 else ():
        with suppress(OSError):
            if Path(f"{name}-wal").stat().st_size:
                reason = f"it is {name} as well, and {name}-wal holds commits: open it by that name"
                raise NotADatabaseError(str(path), reason)


def warn_of_others(path: Path) -> None:
    """Say what the file's mode lets others do, and what a second name of it may do."""
    found = path.stat()
    if found.st_mode & 0o066:
        mode = f"{stat.S_IMODE(found.st_mode):04o}"
        _logger.warning("others can read or write the database", db=str(path), mode=mode, hint=f"chmod 600 {path}")
    if found.st_nlink > 1:
        hint = "its WAL is beside the name that it was opened by: always use the same one"
        _logger.warning("the database has several names", db=str(path), names=found.st_nlink, hint=hint)


def _other_names(path: Path, identity: Identity) -> list[Path]:
    with suppress(OSError), os.scandir(path.parent) as entries:
        return [
            Path(entry.path)
            for entry in entries
            if entry.name != path.name and identity_of(entry.stat(follow_symlinks=False)) == identity
        ]
    return []


def open_beside(database: Path, suffix: str) -> int:
    """A descriptor of a private file of ours beside the database; `NotADatabaseError` where there can be none.

    In a folder that others can write to, something of theirs may lie there to have it overwritten, or what it points
    to: links are not followed, and what belongs to a stranger is not touched.
    """
    path = database.with_name(database.name + suffix)
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    with _reported(database, suffix):
        if path.is_symlink():
            raise NotADatabaseError(str(database), f"{path.name} is a link, which nobody of us made: remove it")
        file = os.open(path, flags, 0o600)
        try:
            _refuse_strange(database, path, os.fstat(file))
        except BaseException:
            os.close(file)
            raise
    # A child that outlives this process must not keep what it has locked.
    return forks.own(file)


def _refuse_strange(database: Path, path: Path, found: os.stat_result) -> None:
    folder = path.parent.stat()
    trusted = {0, os.geteuid(), folder.st_uid}
    with suppress(OSError):
        trusted.add(database.stat().st_uid)
    is_shared = found.st_nlink > 1 and folder.st_mode & 0o022
    if not stat.S_ISREG(found.st_mode) or is_shared:
        raise NotADatabaseError(str(database), f"{path.name} is not a file of its own: remove it")
    if found.st_uid not in trusted:
        raise NotADatabaseError(str(database), f"{path.name} belongs to another user ({found.st_uid}): remove it")


def open_writer(path: Path, durability: Durability = "full") -> Engine:
    """An engine with the one connection that writes and checkpoints; every transaction is BEGIN IMMEDIATE."""
    name = resolved(path)
    connections = inherited.Connections(name)

    def connect() -> sqlite3.Connection:
        connections.check()
        with gate():
            # The driver must not guess when a transaction starts: `_begin` says so.
            connection = sqlite3.connect(
                name, isolation_level=None, check_same_thread=False, timeout=LOCK_WAIT_S, factory=inherited.Connection
            )
            connections.add(connection)
            # This has SQLite open what is beside the file, see untouched.py.
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
    connection.execute(f"PRAGMA journal_size_limit = {WAL_LIMIT_BYTES}")
    synchronous = connection.execute("PRAGMA synchronous").fetchone()[0]
    foreign_keys = connection.execute("PRAGMA foreign_keys").fetchone()[0]
    if (mode, synchronous, foreign_keys) != ("wal", wanted, 1):
        connection.close()
        raise sqlite3.OperationalError(
            f"SQLite did not take the settings (journal_mode {mode}, synchronous {synchronous}, "
            f"foreign_keys {foreign_keys}); is the file on a network file system?"
        )


class _AtRest(inherited.Connection):
    """A connection to a file that nobody has open, in a folder where this process can make no file.

    SQLite reads a file in WAL mode with the help of files beside it. Where it can make none it has to be told that
    nothing changes (`immutable`). That is so only while nobody opens it for writing, which is looked at again.
    """

    state: tuple[int, ...] | None


def _state_at_rest(path: Path) -> tuple[int, ...] | None:
    """What tells a later state of the file from this one; None where it can be read the usual way."""
    if any(os.path.lexists(f"{path}{suffix}") for suffix in _SIDE_FILES) or _can_write(path.parent):
        return None
    found = path.stat()
    return (*identity_of(found), found.st_size, found.st_mtime_ns)


def _can_write(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)


def open_readers(path: Path, size: int = 4) -> Engine:
    """An engine of read-only connections; each transaction is one snapshot. Keep them short: they hold the WAL.

    `size`: how many stay open for the next ones. Nobody waits for a connection: who finds none opens one more.
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
        connection.connection.cursor().execute("BEGIN")

    return engine


def uri_of(path: Path) -> str:
    """How SQLite is told to open the file for reading only."""
    return f"file:{quote(str(path))}?mode=ro"


def connect_to(uri: str) -> inherited.Connection:
    """A connection that begins no transaction by itself. To be called inside the gate."""
    return sqlite3.connect(
        uri, uri=True, isolation_level=None, check_same_thread=False, timeout=LOCK_WAIT_S, factory=inherited.Connection
    )


def _touched(connection: inherited.Connection) -> inherited.Connection:
    """Have SQLite open what is beside the file now, inside the gate, and not when it is first read."""
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


@contextmanager
def snapshot(readers: Engine) -> Iterator[Connection]:
    """A short read transaction. What SQLite reports in it is raised as `ReadFailedError` or `NotADatabaseError`."""
    path = Path(readers.url.database or "")
    # Looked at before the pool is: a thread that a fork left behind may have held its lock.
    _connections[readers].check()
    try:
        with forks.busy(), readers.begin() as connection:
            yield connection
            driver = connection.connection.dbapi_connection
            if isinstance(driver, _AtRest) and not _rests(path, driver):
                raise ReadFailedError(str(path), "somebody opened it for writing meanwhile; ask again")
    except (DBAPIError, sqlite3.Error) as error:
        raise read_error(path, error) from error


def code_of(error: BaseException | None) -> int:
    """SQLite's own, without what it adds to some."""
    return int(getattr(getattr(error, "orig", error), "sqlite_errorcode", 0)) & 0xFF


def read_error(path: Path, error: DBAPIError | sqlite3.Error) -> NotADatabaseError | ReadFailedError:
    """What an error of SQLite means that came while the file was read."""
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
    """What an error of the operating system means that came while the files were looked at."""
    obstacle = _obstacle(path)
    if obstacle is not None:
        return NotADatabaseError(str(path), obstacle)
    return ReadFailedError(str(path), _shortage() or error.strerror or str(error))


def _mixture(path: Path) -> str:
    """What to know where the WAL beside the file may be another one's: SQLite reads it all the same."""
    try:
        if not Path(f"{path}-wal").stat().st_size:
            return ""
    except OSError:
        return ""
    return f"; if {path.name} was put there by hand, {path.name}-wal still belongs to the file before it"


def _obstacle(path: Path) -> str | None:
    """Why this process cannot read the file; None where nothing speaks against it."""
    for file in (path, Path(f"{path}-wal"), Path(f"{path}-shm")):
        if os.path.lexists(file) and not os.access(file, os.R_OK):
            return f"this user may not read {file.name}; ask its owner for the right to, or for a backup"
    if not os.path.lexists(path):
        return "there is no such file"
    if os.path.lexists(f"{path}-wal") and not _can_write(path.parent):
        return (
            f"there are commits in {path.name}-wal, and reading those takes a file beside it, which cannot be made in "
            f"this folder: copy {path.name} and {path.name}-wal into a folder of yours and read the copy, or have its "
            "owner close it or make a backup"
        )
    return None


def _shortage() -> str | None:
    """What this process has too few of for SQLite to open a file, which says no more than that it could not."""
    try:
        os.close(os.open("/", os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            return "too many open files; close some, or raise the limit (ulimit -n)"
    return None


def checkpoint(writer: Engine, mode: Literal["TRUNCATE", "FULL"] = "TRUNCATE") -> bool:
    """Bring the whole WAL into the file, and empty it (TRUNCATE), as far as readers allow; whether they allowed it."""
    raw = writer.raw_connection()
    try:
        busy, frames, done = raw.cursor().execute(f"PRAGMA wal_checkpoint({mode})").fetchone()
        return not busy and frames == done
    finally:
        raw.close()


def raw_rows(connection: Connection, statement: str, *parameters: object) -> Iterator[Any]:
    """Rows as the driver has them: SQLAlchemy's own take several times as long."""
    rows: Iterator[Any] = connection.connection.cursor().execute(statement, parameters)
    return rows
