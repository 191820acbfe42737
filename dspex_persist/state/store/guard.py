"""Detect that the open database was moved or replaced, or that another program has written to it.

SQLite does not notice if its database or WAL is removed, renamed or replaced: it continues with the open files, and
acknowledged commits would be lost. So the names are checked around every group and about once a second, and SQLite is
asked whether another connection has written, which is not allowed.
"""

import os
from pathlib import Path
from typing import Final

from sqlalchemy import Connection

from dspex_persist.infra.file_status import status_of
from dspex_persist.infra.logs import get_logger
from dspex_persist.state.anchor import Head
from dspex_persist.state.errors import FileChangedError, Hint
from dspex_persist.state.store import log_reader
from dspex_persist.state.store.engine import WAL_LIMIT_BYTES, driver_of, identity_of

_logger: Final = get_logger(__name__)

# The offset of the file format version in a database, and its value in WAL mode. A backup is not in WAL mode.
_MODE_AT: Final = 18
_WAL_MODE: Final = b"\2\2"
LARGE_WAL_BYTES: Final = 256 * 1024 * 1024
WAL_IS_HELD: Final = (
    "another program is still reading an old state of the file, and until it ends its transaction SQLite cannot move "
    "the WAL's contents into the file: look for a program that keeps it open, such as a sqlite3 shell or a long query"
)
"""The reason why a WAL stays large."""

_FOREIGN: Final = "another program has written to it while it was open, which is not allowed"


class FileGuard:
    """Remembers the identities and sizes of the files of an open database as of the last check."""

    def __init__(self, path: Path, name: Path, connection: Connection, file: int | None) -> None:
        """Create the guard in a transaction of the writing connection, after SQLite has created the other files.

        Args:
            path: The database.
            name: Its name in errors.
            connection: The writing connection.
            file: A descriptor of the database that stays open, if there is one.
        """
        self._path = path
        self._file = file
        # A file that was put next to the WAL of another one may not be in WAL mode until the WAL is checkpointed.
        self._mode = self._read_mode()
        self._name = name
        # Strings, because they are checked around every group, and `Path` is several times slower.
        self._names = [f"{path}{suffix}" for suffix in ("", "-wal", "-shm")]
        statuses = [status_of(name) for name in self._names]
        self._files = [status.identity for status in statuses]
        self._size, self._wal_size = statuses[0].size, statuses[1].size
        # As of the last `look`, which takes the status of each file anyway.
        self._sizes = (self._size, self._wal_size)
        self._wal_is_large = False
        self._data_version = data_version(connection)

    def look(self) -> str | None:
        """Return how a file was moved, replaced or overwritten; None if the files are unchanged."""
        sizes = [self._size, self._wal_size, 0]
        for index, (name, known) in enumerate(zip(self._names, self._files, strict=True)):
            try:
                status = status_of(name)
            except FileNotFoundError:
                return f"{Path(name).name} was removed or renamed while it was open"
            except OSError:
                # The check is impossible at the moment, which says nothing about the file.
                continue
            if status.identity != known:
                return f"{Path(name).name} was replaced by another file while it was open"
            sizes[index] = status.size
        self._sizes = (sizes[0], sizes[1])
        return f"{self._path.name} was overwritten while it was open" if self._is_overwritten() else None

    def _is_overwritten(self) -> bool:
        """Whether another database was copied over it: one that is not open is usually not in WAL mode."""
        # `look_inside` detects a truncated file.
        mode = self._read_mode()
        return len(mode) == len(_WAL_MODE) and mode not in (_WAL_MODE, self._mode)

    def _read_mode(self) -> bytes:
        if self._file is None:
            return b""
        try:
            return os.pread(self._file, len(_WAL_MODE), _MODE_AT)
        except OSError:
            return b""

    def has_moved(self) -> bool:
        """Whether `look` failed because of the database itself, and not only of the files next to it."""
        try:
            return identity_of(self._path.stat()) != self._files[0] or self._is_overwritten()
        except OSError:
            return True

    def look_inside(self, connection: Connection, head: Head) -> None:
        """Raise `FileChangedError` if others have written to the database or truncated a file.

        Called after `look`, in a transaction, before its first write.
        """
        size, wal_size = self._sizes
        version = data_version(connection)
        if version != self._data_version:
            # Another program may have checkpointed the WAL, which is harmless. Only now is its size certain.
            size, wal_size = self._measured()
            if wal_size or log_reader.head(connection) != head:
                raise FileChangedError(str(self._name), _FOREIGN).advising(Hint.CHECK_FILE)
            self._data_version = version
        elif wal_size < min(self._wal_size, WAL_LIMIT_BYTES):
            self._refuse_cut(self._names[1])
        if size < self._size:
            self._refuse_cut(self._names[0])
        self._size, self._wal_size = size, wal_size

    def _refuse_cut(self, name: str) -> None:
        raise FileChangedError(str(self._name), f"{Path(name).name} was cut short while it was open")

    def has_news(self, connection: Connection) -> bool:
        """Whether `look_inside` may find a change. Called outside a transaction."""
        return self._measured() != (self._size, self._wal_size) or data_version(connection) != self._data_version

    def note_written(self) -> None:
        """Remember the sizes of the last `look`, which was after a transaction of this process."""
        self._size, self._wal_size = self._sizes
        is_large = self._wal_size > LARGE_WAL_BYTES
        if is_large and not self._wal_is_large:
            _logger.warning("WAL is large", size_bytes=self._wal_size, hint=WAL_IS_HELD)
        self._wal_is_large = is_large

    def _measured(self) -> tuple[int, int]:
        try:
            return status_of(self._names[0]).size, status_of(self._names[1]).size
        except OSError:
            # `look` reports a missing file.
            return self._size, self._wal_size


def data_version(connection: Connection) -> int:
    """Return a number that changes when another connection writes."""
    return int(driver_of(connection).execute("PRAGMA data_version").fetchone()[0])
