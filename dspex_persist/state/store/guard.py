"""Whether the open database still is what has its name, and whether anybody else has written to it.

SQLite does not notice that its file was removed, renamed or replaced, or its WAL: it goes on with what it has open, and
what is acknowledged goes nowhere. So the names are looked at around every group and about once a second, and SQLite is
asked whether another connection has written, which none may.
"""

import os
from pathlib import Path
from typing import Final

from sqlalchemy import Connection

from dspex_persist.infra.logs import get_logger
from dspex_persist.state.errors import FileChangedError, Hint
from dspex_persist.state.store import log_reader
from dspex_persist.state.store.anchor import Head
from dspex_persist.state.store.engine import WAL_LIMIT_BYTES, Identity, identity_of

_logger: Final = get_logger(__name__)

# Where a database says how it is written, and what it says there as long as it has a WAL. A backup has none.
_MODE_AT: Final = 18
_WAL_MODE: Final = b"\2\2"
LARGE_WAL_BYTES: Final = 256 * 1024 * 1024
WAL_IS_HELD: Final = (
    "another program goes on reading an old state of the file, and until it ends its transaction SQLite cannot bring "
    "what is written into the file: look for one that keeps it open, such as a shell of sqlite3 or a long query"
)
"""What keeps a WAL from becoming small again."""

_FOREIGN: Final = "another program has written to it while it was open, which must not be"


class FileGuard:
    """What the files of an open database were when it was last sure that they were its own."""

    def __init__(self, path: Path, name: Path, connection: Connection, file: int | None) -> None:
        """In a transaction of the connection that writes, once SQLite has made the files beside it.

        `name`: what errors call it. `file`: a descriptor of the database that stays open, where there is one.
        """
        self._path = path
        self._file = file
        # Of a file that was put beside the WAL of another one, it is told by the WAL alone at first.
        self._mode = self._read_mode()
        self._name = name
        # Text, and `os.stat`: they are looked at around every group, and a `Path` takes several times as long.
        self._names = [f"{path}{suffix}" for suffix in ("", "-wal", "-shm")]
        found = [os.stat(name) for name in self._names]  # noqa: PTH116
        self._files: list[Identity] = [identity_of(each) for each in found]
        self._size, self._wal_size = found[0].st_size, found[1].st_size
        self._wal_is_large = False
        self._data_version = data_version(connection)

    def look(self) -> str | None:
        """What has become of a file whose name is another one's by now, or nobody's; None if all are as they were."""
        for name, known in zip(self._names, self._files, strict=True):
            try:
                found = os.stat(name)  # noqa: PTH116
            except FileNotFoundError:
                return f"{Path(name).name} was removed or renamed while it was open"
            except OSError:
                # Nobody can look just now; that says nothing about the file.
                continue
            if identity_of(found) != known:
                return f"{Path(name).name} was replaced by another file while it was open"
        return f"{self._path.name} was overwritten while it was open" if self._is_overwritten() else None

    def _is_overwritten(self) -> bool:
        """Whether somebody has copied another database over it: all that nobody has open are in another mode."""
        # Of one that was cut short, `look_inside` says so.
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
        """Whether it is the database itself that `look` misses, and not only what is beside it."""
        try:
            return identity_of(self._path.stat()) != self._files[0] or self._is_overwritten()
        except OSError:
            return True

    def look_inside(self, connection: Connection, head: Head) -> None:
        """In a transaction, before it writes: raise `FileChangedError` where others have written, or cut a file."""
        size, wal_size = self._measured()
        version = data_version(connection)
        if version != self._data_version:
            # Another program may have had SQLite empty the WAL into the file, which changes nothing.
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
        """Outside of a transaction: whether it is worth while to `look_inside`."""
        return self._measured() != (self._size, self._wal_size) or data_version(connection) != self._data_version

    def note_written(self) -> None:
        """After a transaction of this process."""
        self._size, self._wal_size = self._measured()
        is_large = self._wal_size > LARGE_WAL_BYTES
        if is_large and not self._wal_is_large:
            _logger.warning("WAL is large", size_bytes=self._wal_size, hint=WAL_IS_HELD)
        self._wal_is_large = is_large

    def _measured(self) -> tuple[int, int]:
        try:
            return os.stat(self._names[0]).st_size, os.stat(self._names[1]).st_size  # noqa: PTH116
        except OSError:
            # `look` says what has become of a file that is gone.
            return self._size, self._wal_size


def data_version(connection: Connection) -> int:
    """A number that changes when another connection has written."""
    return int(connection.connection.cursor().execute("PRAGMA data_version").fetchone()[0])
