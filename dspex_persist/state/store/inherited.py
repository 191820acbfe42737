"""SQLite's connections in a process that was forked from the one that opened them.

SQLite knows nothing of forks. A connection that is used in a child, or closed there half done, writes what its parent
has not finished; and as long as one is open in the child, SQLite takes the parent's locks for its own when the file is
opened again. So the child closes what it can, keeps the rest untouched to its end, and uses none of them.
"""

import sqlite3
from pathlib import Path
from weakref import WeakSet

from dspex_persist.infra import forks
from dspex_persist.state.errors import ForkedProcessError

_untouchable: set[tuple[int, int]] = set()
"""Files (device, inode) of which this process has connections that it cannot close."""


class Connection(sqlite3.Connection):
    """A connection that may find itself in a child; whoever still holds it there does nothing to it."""

    inherited = False

    def rollback(self) -> None:
        """See sqlite3."""
        if not self.inherited:
            super().rollback()

    def close(self) -> None:
        """See sqlite3."""
        if not self.inherited:
            super().close()


class Connections:
    """The connections that one engine has to a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open: WeakSet[Connection] = WeakSet()
        self._inherited = False
        forks.register(self)

    def check(self) -> None:
        """Raise `ForkedProcessError` in a child, or where one of the parent's is still open."""
        if self._inherited or (_untouchable and _identity(self._path) in _untouchable):
            raise ForkedProcessError(str(self._path))

    def add(self, connection: Connection) -> None:
        """Take in a connection that was opened."""
        self._open.add(connection)

    def forked(self, *, quiet: bool) -> None:
        """See `forks.ForkListener`."""
        self._inherited = True
        for connection in list(self._open):
            if quiet:
                # Nothing is under way on it, and the parent has the file open: this writes nothing.
                connection.close()
            else:
                forks.keep_forever(connection)
                _untouchable.add(_identity(self._path))
            connection.inherited = True


def _identity(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return (0, 0)
    return (found.st_dev, found.st_ino)
