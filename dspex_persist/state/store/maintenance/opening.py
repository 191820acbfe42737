"""Open a file to read or to change it, and refuse the files that this release cannot use."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from dspex_persist.state import anchor as anchors
from dspex_persist.state.anchor import Head
from dspex_persist.state.errors import (
    Hint,
    InvalidArgumentError,
    NotADatabaseError,
    ReadFailedError,
    StorageError,
)
from dspex_persist.state.store import migrate, recovery
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
def translated_errors(path: Path) -> Iterator[None]:
    """Translate errors of the driver and the operating system into errors of this package."""
    try:
        yield
    except (DBAPIError, sqlite3.Error) as error:
        original = getattr(error, "orig", error)
        if (getattr(original, "sqlite_errorcode", 0) & 0xFF) in _NOT_OURS:
            raise NotADatabaseError(str(path), str(original)) from error
        raise StorageError(str(original)) from error
    except UnicodeDecodeError as error:
        # The driver raises this for a message in which SQLite quotes a damaged schema.
        raise NotADatabaseError(str(path), "its schema is damaged") from error
    except OSError as error:
        raise NotADatabaseError(str(path), error.strerror or str(error)) from error


def refuse_missing(path: Path, advice: Hint = Hint.MAKE_FILE) -> None:
    refuse_name(path)
    # In a folder that may not be searched, no name exists either: opening the file then reports the permissions.
    if not os.path.lexists(path) and os.access(path.parent, os.X_OK):
        raise NotADatabaseError(str(path), "there is no such file").advising(advice)
    if not path.is_file():
        raise NotADatabaseError(str(path), "it is a folder" if path.is_dir() else "it is not a regular file")


def refuse_owned(path: Path) -> Path:
    """Return the file's resolved path; raise `DatabaseInUseError` if a process owns it. Creates no files."""
    with translated_errors(path):
        if path.is_file():
            OwnershipLock(path).release()
    return resolved(path)


@contextmanager
def reading(path: Path) -> Iterator[Engine]:
    """Open one read-only connection to the file, which a server may have open."""
    with translated_errors(path):
        refuse_missing(path)
        readers = open_readers(path, size=1)
        try:
            yield readers
        finally:
            readers.dispose()


@contextmanager
def owning(path: Path) -> Iterator[Engine]:
    """Open the connection that writes, under the ownership lock; checkpoint the WAL at the end.

    A file that a server would refuse is refused before anything is changed.
    """
    with translated_errors(path):
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
    """Return the file's revision, at most this release's; None for an empty file. Leaves the file untouched."""
    try:
        revision = read_untouched(path, migrate.current_revision)
    except ReadFailedError as error:
        if not is_half_written(error):
            raise
        recovery.refuse_half_written(path, path)
        raise NotADatabaseError(str(path), "a crash left it half made").advising(Hint.MEND_FILE) from error
    if revision is not None:
        migrate.refuse_newer(path, revision)
    return revision


def refuse_older(path: Path) -> None:
    """Raise `NotADatabaseError` unless the file has this release's revision; `NewerSchemaError` for a newer one."""
    revision = find_revision(path)
    if revision is None:
        raise NotADatabaseError(str(path), "it is empty").advising(Hint.MAKE_TABLES)
    if revision != REVISION:
        reason = f"its schema is {revision}, this release reads {REVISION}"
        raise NotADatabaseError(str(path), reason).advising(Hint.UPGRADE_FILE)


def side_file(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def read_anchor(path: Path) -> Head | None:
    with translated_errors(path):
        return anchors.remembered(path)


def refuse_files_of(path: Path, output: Path, field: str) -> None:
    """Raise `InvalidArgumentError` for the argument `field` if `output` is the database or one of its side files."""
    database = resolved(path)
    target = resolved(output)
    for own in (database, *(Path(f"{database}{suffix}") for suffix in swap.SIDE_SUFFIXES)):
        with suppress(OSError):
            if target == own or target.samefile(own):
                reason = f"{output} is {'the database itself' if own == database else 'a file of the database'}"
                raise InvalidArgumentError(field, f"{reason}, {path}: give another name")
