"""Copy a file as of one moment."""

import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Final

from sqlalchemy import Connection

from dspex_persist.state.errors import InvalidArgumentError, StorageError
from dspex_persist.state.provider import Progress
from dspex_persist.state.store import log_reader
from dspex_persist.state.store.engine import sqlite_of
from dspex_persist.state.store.maintenance import swap
from dspex_persist.state.store.maintenance.opening import side_file, translated_errors

_BACKUP_PAGES: Final = 1024
_MOST_BUSY: Final = 40
"""How many times in a row a copy tries to lock its target, a quarter of a second apart."""


@contextmanager
def partial_file(target: Path) -> Iterator[Path]:
    """Create a private file next to `target` to write to. It is removed at the end, unless it was renamed."""
    try:
        file, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
    except OSError as error:
        raise not_written(target, error.strerror or str(error)) from error
    os.close(file)
    partial = Path(name)
    try:
        yield partial
    finally:
        _clear_away(partial, target)


def _clear_away(partial: Path, target: Path) -> None:
    """Remove the partial file and SQLite's files for it: all that can be removed, even if one of them cannot."""
    try:
        with ExitStack() as removing:
            for suffix in ("", "-journal", "-wal", "-shm"):
                file = side_file(partial, suffix)
                # `partial` may have been renamed to the target.
                if os.path.lexists(file):
                    removing.callback(file.unlink, missing_ok=True)
    except OSError as error:
        cause = error.strerror or error
        reason = f"{partial.name} next to it could not be removed ({cause}); remove the files whose names begin with it"
        raise not_written(target, reason) from error


def not_written(target: Path, reason: str) -> InvalidArgumentError:
    return InvalidArgumentError("target", f"cannot write {target}: {reason}")


def copy_pages(connection: Connection, partial: Path, progress: Progress) -> None:
    busy = 0

    def on_pages(status: int, remaining: int, in_all: int) -> None:
        nonlocal busy
        busy = 0 if status in (sqlite3.SQLITE_OK, sqlite3.SQLITE_DONE) else busy + 1
        if busy == _MOST_BUSY:
            # The driver would retry forever, and hold its snapshot meanwhile.
            raise StorageError(f"{partial.parent} allows no locks (on a network file system?): use another folder")
        progress("copying pages", in_all - remaining, in_all)

    # Reading begins a transaction. Without one, each write of a server would restart the copy.
    log_reader.head(connection)
    source = sqlite_of(connection)
    with translated_errors(partial), closing(sqlite3.connect(partial, isolation_level=None, timeout=0)) as copy:
        source.backup(copy, pages=_BACKUP_PAGES, progress=on_pages)
        # Without a WAL, the copy is one file that can be read from read-only media.
        (mode,) = copy.execute("PRAGMA journal_mode = DELETE").fetchone()
        if mode != "delete":
            raise StorageError(f"the end of the copy could not be written to {partial.parent}: check that disk")


def publish(partial: Path, target: Path) -> None:
    """Give the copy its name, durably, unless the name is taken by now."""
    swap.sync(partial)
    try:
        os.link(partial, target)
    except FileExistsError as error:
        raise not_written(target, "it exists already, and a backup overwrites nothing") from error
    swap.sync(target.parent)
