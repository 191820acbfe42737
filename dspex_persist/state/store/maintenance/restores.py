"""Replace a file with a backup."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection

from dspex_persist.state.anchor import Head
from dspex_persist.state.errors import (
    Hint,
    LostCommitsError,
    NotADatabaseError,
    ReadFailedError,
    StorageError,
)
from dspex_persist.state.provider import Progress, silent
from dspex_persist.state.store import log_reader, migrate, recovery
from dspex_persist.state.store.engine import OwnershipLock, checkpoint, open_writer, resolved, snapshot
from dspex_persist.state.store.maintenance import swap
from dspex_persist.state.store.maintenance.checks import check_opened
from dspex_persist.state.store.maintenance.copies import copy_pages, partial_file
from dspex_persist.state.store.maintenance.opening import (
    find_revision,
    read_anchor,
    reading,
    refuse_files_of,
    refuse_missing,
    size_of,
    translated_errors,
)
from dspex_persist.state.store.schema import REVISION
from dspex_persist.state.store.untouched import read_untouched
from dspex_persist.state.store.verify import Problem


@dataclass(frozen=True, slots=True)
class RestoreReport:
    """A backup that took the place of `path`. If the backup has `problems`, nothing was changed.

    `revision` is the backup's; an older one was upgraded on the way. `aside` is the new name of the file that was at
    `path` before, whose side files were renamed along with it; None if there was no file.
    """

    path: Path
    backup: Path
    revision: str
    size_bytes: int
    commits: int
    aside: Path | None
    problems: tuple[Problem, ...]


def restore(backup: Path, path: Path, progress: Progress = silent) -> RestoreReport:
    """Replace the database at `path`, which no process may have open, with a checked copy of `backup`.

    The old file is renamed, never deleted. After a crash at any moment, either the old database or the restored one can
    be opened at `path`.

    Args:
        backup: A copy that `backup` made. It is only read.
        path: The database to replace; it need not exist.
        progress: Called with the pages copied and the commits checked so far.

    Raises:
        InvalidArgumentError: Both are the same file.
        DatabaseInUseError: A process owns the database.
    """
    refuse_files_of(path, backup, "backup")
    refuse_missing(backup, Hint.NAME_BACKUP)
    anchor = read_anchor(backup)
    with reading(backup) as readers, _taking_over(path) as (lock, made):
        revision = find_revision(backup)
        if revision is None:
            raise NotADatabaseError(str(backup), "it is empty, so it is not a backup")
        with partial_file(resolved(path)) as partial:
            with snapshot(readers) as connection:
                copy_pages(connection, partial, progress)
            if revision != REVISION:
                _upgrade_copy(partial)
            with reading(partial) as copies:
                report = check_opened(partial, copies, anchor, progress)
                with snapshot(copies) as connection:
                    head = log_reader.head(connection)
            size = size_of(partial)
            aside = None if report.problems else _replace(path, partial, head, lock, made)
    return RestoreReport(path, backup, revision, size, report.commits, aside, report.problems)


@contextmanager
def _taking_over(path: Path) -> Iterator[tuple[OwnershipLock, bool]]:
    """Own the file in whatever state it is; yield the lock, and whether the file was created for it.

    A file that was created is removed at the end if it is still empty.
    """
    made = not os.path.lexists(path)
    with translated_errors(path):
        lock = OwnershipLock(path, create=True, replace=True)
    try:
        yield lock, made
    finally:
        if made and size_of(path) == 0:
            path.unlink(missing_ok=True)
        lock.release()


def _upgrade_copy(copy: Path) -> None:
    with translated_errors(copy):
        writer = open_writer(copy)
        try:
            migrate.upgrade(writer, copy, is_copy=True)
            checkpoint(writer)
        finally:
            writer.dispose()


def _replace(path: Path, partial: Path, head: Head, lock: OwnershipLock, made: bool) -> Path | None:
    """Move `partial` to the place of the file; return the new name of the old one."""
    name = resolved(path)
    can_open = _can_open(path)
    lock.announce()
    if can_open:
        _empty_wal(name)
    try:
        aside = swap.take_place(partial, name, head, can_open=can_open)
    except OSError as error:
        raise StorageError(f"{error.filename or path}: {error.strerror or error}") from error
    if made:
        aside.unlink()
        return None
    return path.with_name(aside.name)


def _can_open(path: Path) -> bool:
    """Whether a server would start on the file as it is. Only reads, so that a damaged file stays as it is."""
    if not size_of(path):
        return False
    anchor = read_anchor(path)

    def is_foreign(connection: Connection) -> bool:
        if migrate.is_foreign(connection):
            return True
        recovery.recover(connection, anchor, path)
        return False

    try:
        refused = read_untouched(path, is_foreign)
    except (NotADatabaseError, ReadFailedError, LostCommitsError, ValueError):
        return False
    if refused:
        reason = "it is another program's database and stays as it is"
        raise NotADatabaseError(str(path), reason).advising(Hint.ANOTHER_FILE)
    return True


def _empty_wal(path: Path) -> None:
    with translated_errors(path):
        writer = open_writer(path)
        try:
            if not checkpoint(writer):
                raise StorageError(f"another program has been reading {path} for too long: end it, then try again")
        finally:
            writer.dispose()
