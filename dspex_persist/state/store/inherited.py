"""SQLite connections in a forked child of the process that opened them.

SQLite does not support forks. Using a connection in a child, or closing it there in the middle of a transaction, writes
unfinished changes of the parent. And while one is open in the child, SQLite mistakes the parent's locks for the child's
when the file is opened again. So a child closes the connections that it safely can, leaves the others untouched until
it ends, and uses none of them.
"""

import sqlite3
from pathlib import Path
from weakref import WeakSet

from dspex_persist.infra import forks
from dspex_persist.state.errors import ForkedProcessError

_untouchable: set[tuple[int, int]] = set()
"""The files (device, inode) to which this process has connections that it cannot close."""


class Connection(sqlite3.Connection):
    """A connection whose methods have no effect in a forked child."""

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
    """The connections of one engine to a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open: WeakSet[Connection] = WeakSet()
        self._inherited = False
        forks.register(self)

    def check(self) -> None:
        """Raise `ForkedProcessError` in a child, or if a connection of the parent is still open."""
        if self._inherited or (_untouchable and _identity(self._path) in _untouchable):
            raise ForkedProcessError(str(self._path))

    def add(self, connection: Connection) -> None:
        """Add a new connection."""
        self._open.add(connection)

    def forked(self, *, quiet: bool) -> None:
        """See `forks.ForkListener`."""
        self._inherited = True
        for connection in list(self._open):
            if quiet and not connection.in_transaction:
                # The parent has the file open, so closing writes nothing.
                connection.close()
            else:
                forks.keep_forever(connection)
                _untouchable.add(_identity(self._path))
            connection.inherited = True


def _identity(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return (0, 0)
    return (status.st_dev, status.st_ino)
