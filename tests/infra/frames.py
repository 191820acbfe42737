"""A raw HTTP/2 connection, for frames that no gRPC client lets a test send."""

import socket
import struct
from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple, Self

from tests.infra import ping

HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY = 1, 3, 4, 6, 7
ACK, END_HEADERS = 1, 4
MAX_CONCURRENT_STREAMS = 3
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_CANCEL = struct.pack(">I", 8)


class Frame(NamedTuple):
    """A received frame."""

    kind: int
    flags: int
    payload: bytes


class RawConnection:
    """A connection whose frames the test writes and reads itself."""

    def __init__(self, port: int, timeout_s: float = 20.0) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=timeout_s)
        self._received = b""
        self._socket.sendall(_PREFACE + frame(SETTINGS))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def send(self, frames: bytes) -> None:
        self._socket.sendall(frames)

    def frames(self) -> Iterator[Frame]:
        """Yield the received frames, until the server closes the connection."""
        while True:
            while len(self._received) < 9 or len(self._received) < 9 + _length_of(self._received):
                content = self._socket.recv(65536)
                if not content:
                    return
                self._received += content
            end = 9 + _length_of(self._received)
            kind, flags, payload = self._received[3], self._received[4], self._received[9:end]
            self._received = self._received[end:]
            yield Frame(kind, flags, payload)

    def settings(self) -> dict[int, int]:
        """The settings that the server sends."""
        settings = next(each for each in self.frames() if each.kind == SETTINGS and not each.flags & ACK)
        return dict(struct.iter_unpack(">HI", settings.payload))

    def ping(self) -> Frame:
        """Send a ping and return the answer: an acknowledgement, or GOAWAY."""
        self.send(frame(PING, payload=b"are you?"))
        return next(each for each in self.frames() if each.kind == GOAWAY or (each.kind == PING and each.flags & ACK))


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def begun_and_reset(stream: int) -> bytes:
    """The frames of a call that is reset as soon as it begins."""
    return frame(HEADERS, END_HEADERS, stream, _CALL) + frame(RST_STREAM, 0, stream, _CANCEL)


def _length_of(header: bytes) -> int:
    return int.from_bytes(header[:3])


def _literal(name: str, value: str) -> bytes:
    """A header field, neither indexed nor compressed."""
    return b"".join((b"\0", *(bytes([len(text)]) + text.encode() for text in (name, value))))


_CALL = b"".join(
    _literal(name, value)
    for name, value in (
        (":method", "POST"),
        (":scheme", "http"),
        (":path", f"/{ping.SERVICE}/Ping"),
        (":authority", "x"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    )
)
