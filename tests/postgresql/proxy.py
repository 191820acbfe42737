"""Stands between a server and its database, and loses what it is told to lose."""

import contextlib
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from psycopg.conninfo import conninfo_to_dict

from tests.deadline import within

Fault = Literal["before", "after"]


class Proxy:
    """Listens at a socket of its own, and passes everything on to the database.

    Args:
        url: The URL of the database.
        folder: Where to have the socket.
    """

    def __init__(self, url: str, folder: Path) -> None:
        facts = conninfo_to_dict(url)
        self.url = f"postgresql://{facts['user']}@/{facts['dbname']}?host={quote(str(folder), safe='')}"
        self._target = f"{facts['host']}/.s.PGSQL.{facts.get('port', 5432)}"
        self._fault: Fault | None = None
        self._stays_away = False
        self.is_away = False
        self.happened = threading.Event()
        self._muted: dict[socket.socket, threading.Event] = {}
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = self._new_socket()
        self._listener.bind(str(folder / ".s.PGSQL.5432"))
        self._listener.listen(64)
        self._start(self._accept)

    def lose(self, fault: Fault, *, stays_away: bool = False) -> None:
        """Cut the connection of the next COMMIT, once.

        Args:
            fault: "before" it arrives; "after" it was carried out, before the answer.
            stays_away: Whether the database cannot be reached from then on, until `is_away` is set to False.
        """
        self._fault, self._stays_away = fault, stays_away

    def close(self) -> None:
        for each in list(self._sockets):
            _end(each)
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _new_socket(self) -> socket.socket:
        self._sockets.append(socket.socket(socket.AF_UNIX))
        return self._sockets[-1]

    def _start(self, work: Callable[..., None], *arguments: socket.socket) -> None:
        self._threads.append(threading.Thread(target=work, args=arguments, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._sockets.append(client)
                if self.is_away:
                    _end(client)
                    continue
                database = self._new_socket()
                if database.connect_ex(self._target):
                    _end(client)
                    continue
                self._start(self._ask, client, database)
                self._start(self._answer, database, client)

    def _ask(self, client: socket.socket, database: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while message := client.recv(65536):
                if self._fault is not None and b"COMMIT" in message:
                    fault, self._fault = self._fault, None
                    self.is_away = self._stays_away
                    if fault == "after":
                        answered = self._muted[database] = threading.Event()
                        database.sendall(message)
                        assert answered.wait(within(10))
                    self.happened.set()
                    break
                database.sendall(message)
        _end(client)
        with contextlib.suppress(OSError):
            database.shutdown(socket.SHUT_WR)

    def _answer(self, database: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while message := database.recv(65536):
                if database in self._muted:
                    # Nobody gets the answer.
                    self._muted[database].set()
                else:
                    client.sendall(message)
        _end(client)
        _end(database)


def _end(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
