"""Just enough HTTP/2 to misuse it: frames over a plain socket, which no library would send."""

import gzip
import socket
import struct
from types import TracebackType
from typing import Final, Self

_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS = 0, 1, 3, 4
_END_STREAM, _END_HEADERS = 1, 4
_CANCEL: Final = struct.pack(">I", 8)
_LARGEST_FRAME: Final = 16_384
_AT_ONCE: Final = 200
_TIMEOUT_S: Final = 20.0


class Connection:
    """A client connection that sends arbitrary frames, and discards all answers."""

    def __init__(self, port: int, *, preface: bytes = _PREFACE) -> None:
        """Connect and send the preface; an incomplete one leaves the connection half open."""
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=_TIMEOUT_S)
        self._next = 1
        self._socket.sendall(preface)
        if preface == _PREFACE:
            self._socket.sendall(_frame(_SETTINGS, 0, 0, b""))

    @classmethod
    def half_open(cls, port: int) -> "Connection":
        """Open a connection with an incomplete preface."""
        return cls(port, preface=_PREFACE[:10])

    def open_streams(self, path: str, count: int, *, reset: bool = False) -> bool:
        """Begin `count` calls and leave them open, or reset each at once; False if the server disconnects."""
        try:
            for at in range(0, count, _AT_ONCE):
                self._socket.sendall(b"".join(self._begin(path, reset) for _ in range(min(_AT_ONCE, count - at))))
                self._take_answers()
        except OSError:
            return False
        return True

    def _begin(self, path: str, reset: bool) -> bytes:
        stream, self._next = self._next, self._next + 2
        frames = _frame(_HEADERS, _END_HEADERS, stream, _headers(path))
        return frames + _frame(_RST_STREAM, 0, stream, _CANCEL) if reset else frames

    def call(self, path: str, message: bytes, *, compressed: bool = False) -> bool:
        """Send a whole call, in small frames; False if the server does not accept all of it."""
        body = gzip.compress(message, 9) if compressed else message
        content = struct.pack(">BI", compressed, len(body)) + body
        stream, self._next = self._next, self._next + 2
        try:
            self._socket.sendall(_frame(_HEADERS, _END_HEADERS, stream, _headers(path, compressed=compressed)))
            # The initial window is 65,535 bytes, and this client never reads window updates.
            if len(content) > 60_000:
                raise ValueError("the message does not fit the first window")
            for at in range(0, len(content), _LARGEST_FRAME):
                last = at + _LARGEST_FRAME >= len(content)
                part = content[at : at + _LARGEST_FRAME]
                self._socket.sendall(_frame(_DATA, _END_STREAM if last else 0, stream, part))
        except OSError:
            return False
        return True

    def _take_answers(self) -> None:
        """Read all answers, so that the server does not have to wait."""
        self._socket.setblocking(False)
        try:
            while self._socket.recv(65_536):
                pass
        except BlockingIOError:
            pass
        finally:
            self._socket.settimeout(_TIMEOUT_S)

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def _headers(path: str, *, compressed: bool = False) -> bytes:
    """A header block: literal fields, neither indexed nor compressed."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "localhost",
        "content-type": "application/grpc",
        "te": "trailers",
    }
    if compressed:
        fields["grpc-encoding"] = "gzip"
    return b"".join(b"\0" + _text(name) + _text(value) for name, value in fields.items())


def _text(text: str) -> bytes:
    assert len(text) < 127  # one byte holds the length
    return bytes((len(text),)) + text.encode()
