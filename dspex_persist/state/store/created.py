"""The files that opening a database creates, and how they are removed again when nothing is to be kept."""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from dspex_persist.state.errors import DatabaseInUseError
from dspex_persist.state.store import log_reader
from dspex_persist.state.store.engine import OwnershipLock, open_readers, snapshot

_SUFFIXES: Final = ("", "-wal", "-shm", ".anchor", ".lock")


def missing(path: Path) -> list[Path]:
    """Return the files that opening the database would create: none if it exists."""
    if os.path.lexists(path):
        return []
    files = [path.with_name(path.name + suffix) for suffix in _SUFFIXES]
    return [file for file in files if not file.exists()]


def remove(path: Path, made: Sequence[Path], sequence: int = 0) -> None:
    """Remove files that were created for nothing, unless another process uses them, or has written since.

    Args:
        path: The database, which is closed.
        made: What `missing` returned before it was opened.
        sequence: The number of its last commit when it was closed.
    """
    if not made:
        return
    with suppress(DatabaseInUseError):
        lock = OwnershipLock(path)
        try:
            if _last_sequence(path) == sequence:
                for each in made:
                    each.unlink(missing_ok=True)
        finally:
            lock.release()


def _last_sequence(path: Path) -> int:
    readers = open_readers(path, size=1)
    try:
        with snapshot(readers) as connection:
            return log_reader.head(connection).sequence
    finally:
        readers.dispose()
