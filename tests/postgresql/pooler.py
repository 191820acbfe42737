"""A pooler with one connection to the database, which each client has for a transaction, or until it leaves."""

import contextlib
import socket
import struct
import threading
from pathlib import Path
from urllib.parse import quote

from psycopg.conninfo import conninfo_to_dict

_GREETING = (
    (b"R", struct.pack(">I", 0)),
    (b"S", b"server_version\x0018.0\0"),
    (b"S", b"client_encoding\0UTF8\0"),
    (b"S", b"standard_conforming_strings\0on\0"),
    # The key of the pooler, not of the database.
    (b"K", struct.pack(">II", 7, 7)),
    (b"Z", b"I"),
)


class Pooler:
    """Listens at a socket in a folder.

    Args:
        url: The URL of the database.
        folder: Where to have the socket.
        by_session: Whether each client has a connection of its own until it leaves.
    """

    def __init__(self, url: str, folder: Path, *, by_session: bool) -> None:
        facts = {name: str(fact) for name, fact in conninfo_to_dict(url).items()}
        self.url = f"postgresql://{facts['user']}@/{facts['dbname']}?host={quote(str(folder), safe='')}"
        self._facts, self._by_session = facts, by_session
        self._turn = threading.Lock()
        self._shared = None if by_session else self._connect()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / ".s.PGSQL.5432"))
        self._listener.listen(16)
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for each in (self._listener, self._shared):
            if each is not None:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
                each.close()

    def __enter__(self) -> "Pooler":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _connect(self) -> socket.socket:
        database = socket.socket(socket.AF_UNIX)
        database.connect(f"{self._facts['host']}/.s.PGSQL.{self._facts.get('port', 5432)}")
        body = f"user\0{self._facts['user']}\0database\0{self._facts['dbname']}\0\0".encode()
        database.sendall(struct.pack(">II", len(body) + 8, 196608) + body)
        while _message(database)[0] != b"Z":
            pass
        return database

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client:
            (length,) = struct.unpack(">I", _exactly(client, 4))
            _exactly(client, length - 4)
            for kind, body in _GREETING:
                client.sendall(_packed(kind, body))
            if self._by_session:
                with self._connect() as database:
                    while self._transaction(client, database):
                        pass
            while self._shared is not None and self._transaction(client, self._shared):
                pass

    def _transaction(self, client: socket.socket, database: socket.socket) -> bool:
        """Pass one transaction of a client on; return whether there may be another."""
        kind, body = _message(client)
        with self._turn if self._shared is not None else contextlib.nullcontext():
            while kind != b"X":
                database.sendall(_packed(kind, body))
                if kind in (b"Q", b"S") and self._answer(client, database) == b"I":
                    return True
                kind, body = _message(client)
        return False

    @staticmethod
    def _answer(client: socket.socket, database: socket.socket) -> bytes:
        while True:
            kind, body = _message(database)
            client.sendall(_packed(kind, body))
            if kind == b"Z":
                return body


def _packed(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack(">I", len(body) + 4) + body


def _message(source: socket.socket) -> tuple[bytes, bytes]:
    kind = _exactly(source, 1)
    (length,) = struct.unpack(">I", _exactly(source, 4))
    return kind, _exactly(source, length - 4)


def _exactly(source: socket.socket, count: int) -> bytes:
    read = b""
    while len(read) < count:
        chunk = source.recv(count - len(read))
        if not chunk:
            raise ConnectionResetError
        read += chunk
    return read
