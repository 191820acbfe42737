"""Opening a file to read it or to change it, and what is refused."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from dspex_persist.state.errors import (
    Hint,
    InvalidArgumentError,
    NotADatabaseError,
    ReadFailedError,
    StorageError,
)
from dspex_persist.state.store import anchor as anchors
from dspex_persist.state.store import migrate, recovery
from dspex_persist.state.store.anchor import Head
from dspex_persist.state.store.engine import (
    OwnershipLock,
    checkpoint,
    open_readers,
    open_writer,
    refuse_name,
    resolved,
)
from dspex_persist.state.store.maintenance import swap
from dspex_persist.state.store.schema import REVISION
from dspex_persist.state.store.untouched import is_half_written, read_untouched

_NOT_OURS: Final = frozenset(
    {sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM}
)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Say what the driver and the operating system report of writing in the terms of this package."""
    try:
        yield
    except (DBAPIError, sqlite3.Error) as error:
        original = getattr(error, "orig", error)
        if (getattr(original, "sqlite_errorcode", 0) & 0xFF) in _NOT_OURS:
            raise NotADatabaseError(str(path), str(original)) from error
        raise StorageError(str(original)) from error
    except UnicodeDecodeError as error:
        # What the driver makes of a message of SQLite that quotes a damaged schema.
        raise NotADatabaseError(str(path), "its schema is damaged") from error
    except OSError as error:
        raise NotADatabaseError(str(path), error.strerror or str(error)) from error


def refuse_missing(path: Path, advice: Hint = Hint.MAKE_FILE) -> None:
    refuse_name(path)
    # Where the folder may not be looked into, too: whoever opens the file says so.
    if not os.path.lexists(path) and os.access(path.parent, os.X_OK):
        raise NotADatabaseError(str(path), "there is no such file").advising(advice)
    if not path.is_file():
        raise NotADatabaseError(str(path), "it is a folder" if path.is_dir() else "it is not a regular file")


def refuse_owned(path: Path) -> Path:
    """The file's one name, where it is; `DatabaseInUseError` if somebody owns it. Makes nothing where it is missing."""
    with explained(path):
        if path.is_file():
            OwnershipLock(path).release()
    return resolved(path)


@contextmanager
def reading(path: Path) -> Iterator[Engine]:
    """One read-only connection to the file, which a server may have open."""
    with explained(path):
        refuse_missing(path)
        readers = open_readers(path, size=1)
        try:
            yield readers
        finally:
            readers.dispose()


@contextmanager
def owning(path: Path) -> Iterator[Engine]:
    """The one connection that writes, under the ownership lock; the WAL is brought into the file at the end.

    What a server would refuse, is refused before anything is touched.
    """
    with explained(path):
        refuse_missing(path)
        lock = OwnershipLock(path)
        try:
            recovery.inspect(resolved(path), path)
            lock.announce()
            writer = open_writer(path)
            try:
                yield writer
                checkpoint(writer)
            finally:
                writer.dispose()
        finally:
            lock.release()


def find_revision(path: Path) -> str | None:
    """The file's revision, at most this release's; None in an empty file. Before it is opened: see `read_untouched`."""
    try:
        found = read_untouched(path, migrate.current_revision)
    except ReadFailedError as error:
        if not is_half_written(error):
            raise
        recovery.refuse_half_written(path, path)
        raise NotADatabaseError(str(path), "a crash has left it half made").advising(Hint.MEND_FILE) from error
    if found is not None:
        migrate.refuse_newer(path, found)
    return found


def refuse_older(path: Path) -> None:
    """Let only files of this release's revision pass."""
    found = find_revision(path)
    if found is None:
        raise NotADatabaseError(str(path), "it is empty").advising(Hint.MAKE_TABLES)
    if found != REVISION:
        reason = f"its schema is {found}, this release reads {REVISION}"
        raise NotADatabaseError(str(path), reason).advising(Hint.UPGRADE_FILE)


def beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def read_anchor(path: Path) -> Head | None:
    with explained(path):
        return anchors.remembered(path)


def refuse_files_of(path: Path, output: Path, field: str) -> None:
    """Raise `InvalidArgumentError` where `output` is the database, by whatever name, or belongs to one beside it."""
    database = resolved(path)
    meant = resolved(output)
    for own in (database, *(Path(f"{database}{suffix}") for suffix in swap.BESIDE)):
        with suppress(OSError):
            if meant == own or meant.samefile(own):
                reason = f"{output} is {'the database itself' if own == database else 'a file of the database'}"
                raise InvalidArgumentError(field, f"{reason}, {path}: give another name")
