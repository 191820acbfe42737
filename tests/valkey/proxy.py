"""Stands between a server and its store, and loses what it is told to lose."""

import contextlib
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

from tests.deadline import within

APPEND: Final = b"_append\r\n"
Fault = Literal["before", "after", "held"]


class Proxy:
    """Listens at a socket of its own, and passes everything on to the store's.

    Args:
        target: The socket of the store.
        path: The socket to listen at.
    """

    def __init__(self, target: str, path: Path) -> None:
        self.url = f"unix://{path}"
        self._target = target
        self._fault: Fault | None = None
        self._function = APPEND
        self._held: list[tuple[socket.socket, bytes]] = []
        self._answered: list[threading.Event] = []
        self._waiting: dict[socket.socket, threading.Event] = {}
        self.happened = threading.Event()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = self._new_socket()
        self._listener.bind(str(path))
        self._listener.listen(64)
        self._start(self._accept)

    def _new_socket(self) -> socket.socket:
        self._sockets.append(socket.socket(socket.AF_UNIX))
        return self._sockets[-1]

    def _start(self, work: Callable[..., None], *arguments: socket.socket) -> None:
        self._threads.append(threading.Thread(target=work, args=arguments))
        self._threads[-1].start()

    def lose(self, fault: Fault, function: bytes = APPEND) -> None:
        """Cut the connection of the next append, or call of another function, once.

        Args:
            fault: "before" it arrives; "after" it was carried out, before the answer; or "held": it arrives when
                `release` is called.
            function: The end of the line with its name.
        """
        self.happened.clear()
        self._fault, self._function = fault, function

    def release(self) -> None:
        """Let the appends arrive that are held, and wait until the store has answered them, whatever it says."""
        for store, message in self._held:
            store.sendall(message)
        for answered in self._answered:
            assert answered.wait(within(10))
        self._held.clear()

    def close(self) -> None:
        _cut(*self._sockets)
        for thread in self._threads:
            thread.join()
        for each in self._sockets:
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._sockets.append(client)
                store = self._new_socket()
                if store.connect_ex(self._target):
                    # The store is away: somebody asks again.
                    _cut(client)
                    continue
                self._start(self._requests, client, store)
                self._start(self._answers, client, store)

    def _requests(self, client: socket.socket, store: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while message := client.recv(1 << 20):
                if self._fault is not None and self._function in message:
                    self._lose(client, store, message)
                    return
                store.sendall(message)
        _cut(client, store)

    def _lose(self, client: socket.socket, store: socket.socket, message: bytes) -> None:
        fault, self._fault = self._fault, None
        if fault == "after":
            answered = self._waiting.setdefault(store, threading.Event())
            store.sendall(message)
            assert answered.wait(within(10))
            client.shutdown(socket.SHUT_RDWR)
        elif fault == "held":
            self._held.append((store, message))
            self._answered.append(self._waiting.setdefault(store, threading.Event()))
            client.shutdown(socket.SHUT_RDWR)
        else:
            _cut(client, store)
        self.happened.set()

    def _answers(self, client: socket.socket, store: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while message := store.recv(1 << 20):
                if store in self._waiting:
                    # Nobody gets the answer.
                    self._waiting[store].set()
                else:
                    client.sendall(message)


def _cut(*sockets: socket.socket) -> None:
    for each in sockets:
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
