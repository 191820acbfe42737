"""Reading a file and leaving everything beside it as it was: whether it is one to open is found out so.

SQLite's own readers make a `-wal` and a `-shm` where there is none, write the `-shm` anew after a kill, and remove the
`-wal` of an empty file. Whoever may write has the WAL brought into the file, or removed, when it is closed. But what is
left of a file that has lost commits is evidence, and another program's file is none of our business.
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
"""The byte of a `-shm` that all who use it have locked, in SQLite's layout of it."""

R = TypeVar("R")


class _DisturbedError(Exception):
    """Something has changed while nothing was to change, or cannot be read so."""


def read_untouched(path: Path, read: Callable[[Connection], R], *, as_it_is: bool = False) -> R:
    """What `read` makes of the file in one short read transaction that leaves no trace.

    `as_it_is`: what is in the file itself, whatever is beside it. Where somebody writes meanwhile, it is read as other
    readers do. Raises what `read` raises, `ReadFailedError` and `NotADatabaseError`.
    """
    name = resolved(path)
    connections = inherited.Connections(name)
    connections.check()
    try:
        # All of a process that open a file share what SQLite has of its `-shm`: who came while that is open for reading
        # only could not write.
        with gate():
            return _read_untouched(name, connections, read, as_it_is)
    except _DisturbedError:
        # Somebody has it open, then, and leaves more traces than a reader does.
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
        connection.connection.cursor().execute("BEGIN")

    try:
        with engine.begin() as connection:
            found = read(connection)
    except BaseException as error:
        if _state_of(path) != before or (way == _READ_SHM and _is_barred(error)):
            raise _DisturbedError from error
        raise
    finally:
        if way == _MAKE_SHM and not has_shm:
            _remove_unused(shm)
    if _state_of(path) != before:
        raise _DisturbedError
    return found


def _remove_unused(shm: Path) -> None:
    """Remove a `-shm`, unless another process has begun to use it: SQLite has it hold a lock of one byte then.

    Nobody in this process does, inside the gate: closing it would drop all that the process has locked there.
    """
    with suppress(OSError):
        file = os.open(shm, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _SHM_IN_USE)
            shm.unlink()
        finally:
            os.close(file)


class _State(NamedTuple):
    """What tells a later state of the files from this one. `wal`: None where SQLite would read nothing of one."""

    file: tuple[int, ...]
    wal: tuple[int, ...] | None
    has_journal: bool


# What is added to the URI, for what nobody writes to, for what has a `-shm`, and for what has none: then SQLite makes
# one, with the owner and the mode that it should have.
_AT_REST, _READ_SHM, _MAKE_SHM = "&immutable=1", "&readonly_shm=1", ""


def _state_of(path: Path) -> _State:
    wal = None
    with suppress(FileNotFoundError), Path(f"{path}-wal").open("rb") as file:
        wal = _facts(os.fstat(file.fileno())) if _begins_wal(file.read(_WAL_HEADER.size + 1)) else None
    return _State(_facts(path.stat()), wal, os.path.lexists(f"{path}-journal"))


def _begins_wal(content: bytes) -> bool:
    """Whether a `-wal` that begins so has anything for SQLite: a header that holds, and something behind it.

    Without a `-shm` to write to, it tries one that has not for ten seconds.
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


def _facts(found: os.stat_result) -> tuple[int, ...]:
    return (*identity_of(found), found.st_size, found.st_mtime_ns)


def _way_to_read(state: _State, has_shm: bool) -> str:
    _, _, size_bytes, _ = state.file
    if state.has_journal:
        # Which may be half done, or the journal of somebody who is at work: SQLite knows.
        return _MAKE_SHM
    if state.wal is None or size_bytes == 0:
        return _AT_REST
    return _READ_SHM if has_shm else _MAKE_SHM


def is_half_written(error: ReadFailedError) -> bool:
    """Whether the file could not be read because of a journal beside it, which only a writer can roll back."""
    return code_of(error.__cause__) == sqlite3.SQLITE_READONLY


def _is_barred(error: BaseException) -> bool:
    """Whether SQLite cannot do without writing to the `-shm`."""
    return code_of(error) in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PROTOCOL)
