"""Read a file without changing it or any file next to it, to decide whether to open it.

SQLite's read-only connections create missing `-wal` and `-shm` files, rewrite the `-shm` after a crash, and remove the
`-wal` of an empty file. Connections that can write merge or remove the WAL when they close. But the remains of a file
that has lost commits are evidence, and another program's file must stay as it is.
"""

import fcntl
import os
import sqlite3
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from sqlalchemy import Connection, create_engine, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from dspex_persist.state.errors import ReadFailedError
from dspex_persist.state.store import inherited
from dspex_persist.state.store.engine import (
    code_of,
    connect_to,
    driver_of,
    gate,
    identity_of,
    looking_error,
    open_readers,
    read_error,
    resolved,
    snapshot,
    uri_of,
)

_WAL_HEADER: Final = struct.Struct(">8I")
_WAL_MAGIC: Final = 0x377F0682
_SHM_IN_USE: Final = 128
"""The byte of a `-shm` that SQLite locks while it uses the file."""

R = TypeVar("R")


class _DisturbedError(Exception):
    """The file changed while it was read, or cannot be read without leaving traces."""


def read_untouched(path: Path, read: Callable[[Connection], R], *, as_it_is: bool = False) -> R:
    """Call `read` in one short read transaction that leaves no trace.

    If another process writes meanwhile, the file is read in the usual way instead.

    Args:
        path: The file.
        read: Reads from the connection. Its exceptions are passed on.
        as_it_is: Read only the file itself, and ignore the WAL and the journal.

    Returns:
        The result of `read`.

    Raises:
        ReadFailedError: The file could not be read.
        NotADatabaseError: The file is damaged, or this process may not read it.
    """
    name = resolved(path)
    connections = inherited.Connections(name)
    connections.check()
    try:
        # All connections of a process to a file share SQLite's `-shm`: one opened while that is read-only could not
        # write.
        with gate():
            return _read_untouched(name, connections, read, as_it_is)
    except _DisturbedError:
        # Another process has it open, so the traces of a reader do not matter.
        readers = open_readers(name, size=1)
    except (DBAPIError, sqlite3.Error) as error:
        raise read_error(name, error) from error
    except OSError as error:
        raise looking_error(name, error) from error
    try:
        with snapshot(readers) as connection:
            return read(connection)
    finally:
        readers.dispose()


def _read_untouched(
    path: Path, connections: inherited.Connections, read: Callable[[Connection], R], as_it_is: bool
) -> R:
    before = _state_of(path)
    shm = Path(f"{path}-shm")
    has_shm = os.path.lexists(shm)
    way = _AT_REST if as_it_is else _way_to_read(before, has_shm)

    def connect() -> sqlite3.Connection:
        connection = connect_to(f"{uri_of(path)}{way}")
        connections.add(connection)
        return connection

    engine = create_engine("sqlite://", creator=connect, poolclass=NullPool)

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        driver_of(connection).execute("BEGIN")

    try:
        with engine.begin() as connection:
            result = read(connection)
    except BaseException as error:
        if _state_of(path) != before or (way == _READ_SHM and _is_barred(error)):
            raise _DisturbedError from error
        raise
    finally:
        if way == _MAKE_SHM and not has_shm:
            _remove_unused(shm)
    if _state_of(path) != before:
        raise _DisturbedError
    return result


def _remove_unused(shm: Path) -> None:
    """Remove a `-shm` unless another process uses it, which then holds a lock on one byte.

    Inside the gate, no connection of this process uses it. Otherwise closing it would drop that connection's locks.
    """
    with suppress(OSError):
        file = os.open(shm, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _SHM_IN_USE)
            shm.unlink()
        finally:
            os.close(file)


class _State(NamedTuple):
    """Values that change when the files are written to. `wal`: None if there is no WAL with contents."""

    file: tuple[int, ...]
    wal: tuple[int, ...] | None
    has_journal: bool


# Appended to the URI: for a file that no process writes to, for one with a `-shm`, and for one without. In the last
# case SQLite creates the `-shm` with the right owner and mode.
_AT_REST, _READ_SHM, _MAKE_SHM = "&immutable=1", "&readonly_shm=1", ""


def _state_of(path: Path) -> _State:
    wal = None
    with suppress(FileNotFoundError), Path(f"{path}-wal").open("rb") as file:
        wal = _facts(os.fstat(file.fileno())) if _begins_wal(file.read(_WAL_HEADER.size + 1)) else None
    return _State(_facts(path.stat()), wal, os.path.lexists(f"{path}-journal"))


def _begins_wal(content: bytes) -> bool:
    """Whether a `-wal` with this beginning has contents: a valid header, and data after it.

    With an invalid one, SQLite retries for ten seconds if it may not write to the `-shm`.
    """
    header, rest = content[: _WAL_HEADER.size], content[_WAL_HEADER.size :]
    if not rest:
        return False
    magic, *_, first, second = _WAL_HEADER.unpack(header)
    if magic & ~1 != _WAL_MAGIC:
        return False
    sums = (0, 0)
    for pair in struct.iter_unpack(">II" if magic & 1 else "<II", header[:24]):
        one = (sums[0] + pair[0] + sums[1]) & 0xFFFFFFFF
        sums = (one, (sums[1] + pair[1] + one) & 0xFFFFFFFF)
    return sums == (first, second)


def _facts(status: os.stat_result) -> tuple[int, ...]:
    return (*identity_of(status), status.st_size, status.st_mtime_ns)


def _way_to_read(state: _State, has_shm: bool) -> str:
    _, _, size_bytes, _ = state.file
    if state.has_journal:
        # Left by a crash, or in use by another process: SQLite finds out.
        return _MAKE_SHM
    if state.wal is None or size_bytes == 0:
        return _AT_REST
    return _READ_SHM if has_shm else _MAKE_SHM


def is_half_written(error: ReadFailedError) -> bool:
    """Whether the file could not be read because it has a journal that only a writer can roll back."""
    return code_of(error.__cause__) == sqlite3.SQLITE_READONLY


def _is_barred(error: BaseException) -> bool:
    """Whether SQLite cannot read without writing to the `-shm`."""
    return code_of(error) in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PROTOCOL)
