"""A proxy between a server and its database, which cuts connections at the moments that matter."""

import contextlib
import enum
import re
import socket
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tests.deadline import within

# What stores a group: PostgreSQL's COMMIT, or a call of the function that appends to a log in Valkey.
_STORES: Final = re.compile(rb"\bCOMMIT\b|\bFCALL\r\n\$\d+\r\n\w*append\w*\r\n")
_BYTES: Final = 1 << 16


class Cut(enum.Enum):
    """When a connection is cut."""

    BEFORE = enum.auto()
    """The database never gets the commit."""
    AFTER = enum.auto()
    """The database has committed, and nobody gets its answer."""
    LATE = enum.auto()
    """The server's side is cut at once; the database gets the commit only when `CuttingProxy.deliver` is called."""


class CuttingProxy:
    """Passes connections on to a Unix socket. It listens on one of the same name, in a folder of its own.

    Args:
        target: The socket of the database.

    Attributes:
        socket: Where it listens.
        cuts_made: How many of the cuts that were asked for have been made.
    """

    def __init__(self, target: Path) -> None:
        self.cuts_made = threading.Semaphore(0)
        self.delivered = threading.Event()
        self._late_answered = threading.Semaphore(0)
        self._target = target
        self._folder = tempfile.TemporaryDirectory(prefix="dspex-proxy-", dir="/tmp")
        self.socket = Path(self._folder.name) / target.name
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.socket))
        self._listener.listen(64)
        self._lock = threading.Lock()
        self._next: Cut | None = None
        self._goes_away = False
        self._open = set[socket.socket]()
        self._is_away = False
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def cut(self, when: Cut, *, goes_away: bool = False) -> None:
        """Cut the connection that commits next; `goes_away`: and all others with it, until `bring_back`."""
        self.delivered.clear()
        self._goes_away = goes_away
        self._next = when

    def made(self) -> None:
        """Note that a cut has been made, of which the server does not know yet."""
        if self._goes_away:
            self.take_away()
        self.cuts_made.release()

    def deliver(self) -> None:
        """Pass on the commit that `Cut.LATE` has kept back, and wait until the database has done with it."""
        self.delivered.set()
        assert self._late_answered.acquire(timeout=within(30))

    def late_answered(self) -> None:
        """Note that the database has done with what `Cut.LATE` kept back."""
        self._late_answered.release()

    def cut_all(self) -> None:
        """Cut all connections at once."""
        with self._lock:
            for each in self._open:
                _shut(each)

    def take_away(self) -> None:
        """Cut all connections, and accept none until `bring_back`."""
        self._is_away = True
        self.cut_all()

    def bring_back(self) -> None:
        self._is_away = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _shut(self._listener)
        self._thread.join()
        self.delivered.set()
        self.take_away()
        self._folder.cleanup()

    def take(self) -> Cut | None:
        """Return what to do with a commit that has come by."""
        with self._lock:
            when, self._next = self._next, None
        return when

    def forget(self, each: socket.socket) -> None:
        with self._lock:
            self._open.discard(each)
        each.close()

    def _accept(self) -> None:
        with self._listener:
            while True:
                try:
                    client, _ = self._listener.accept()
                except OSError:
                    return
                server = socket.socket(socket.AF_UNIX)
                if self._is_away or server.connect_ex(str(self._target)):
                    client.close()
                    server.close()
                    continue
                with self._lock:
                    self._open |= {client, server}
                _Link(self, client, server)


class _Link:
    """One connection, with a thread for each direction."""

    def __init__(self, proxy: CuttingProxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy = proxy
        self._client = client
        self._server = server
        self._answers_are_lost = False
        self._answered = threading.Event()
        threads = [threading.Thread(target=each, daemon=True) for each in (self._up, self._down)]
        for each in threads:
            each.start()

    def _up(self) -> None:
        with contextlib.suppress(OSError):
            while data := self._client.recv(_BYTES):
                when = self._proxy.take() if _STORES.search(data) is not None else None
                if when is None:
                    self._server.sendall(data)
                else:
                    self._cut(when, data)
                    break
        _shut(self._server)
        self._proxy.forget(self._client)

    def _cut(self, when: Cut, data: bytes) -> None:
        self._answers_are_lost = True
        if when is Cut.LATE:
            _shut(self._client)
            self._proxy.made()
            self._proxy.delivered.wait(within(30))
        if when is not Cut.BEFORE:
            self._server.sendall(data)
            self._answered.wait(within(30))
        if when is Cut.LATE:
            self._proxy.late_answered()
        else:
            self._proxy.made()

    def _down(self) -> None:
        with contextlib.suppress(OSError):
            while data := self._server.recv(_BYTES):
                if self._answers_are_lost:
                    self._answered.set()
                else:
                    self._client.sendall(data)
        self._answered.set()
        _shut(self._client)
        self._proxy.forget(self._server)


def _shut(each: socket.socket) -> None:
    with contextlib.suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)
