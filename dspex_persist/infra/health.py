"""Asks a server's health service (grpc.health.v1) whether it serves, without gRPC.

A supervisor asks every few seconds, each time by a new process, and importing gRPC would take longer than all the rest.
The request is a few fixed frames of HTTP/2, and the answer one byte in another one.
"""

import socket
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dspex_persist.infra.listen import Address, TcpAddress

if TYPE_CHECKING:
    import ssl

_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _GO_AWAY = 0, 1, 3, 4, 6, 7
_ACK, _END_STREAM, _END_HEADERS, _PADDED = 1, 1, 4, 8
_FRAME_MAX_BYTES: Final = 16_384
_PATH: Final = b"/grpc.health.v1.Health/Check"
_NO_SERVICE: Final = b"\0\0\0\0\0"
"""An empty message: the server as a whole is meant."""
_SERVING: Final = 1
_HOST: Final = "localhost"
"""What servers at a Unix socket are called."""
# Longer texts would need another form.
_TEXT_MAX: Final = 126
_TLS_ALERT: Final = b"\x15\x03"


@dataclass(frozen=True, slots=True)
class Tls:
    """How to speak TLS.

    Attributes:
        host: The name or IP address that the server's certificate has to have.
        ca: The certificates of the authorities to trust (PEM); without it, the system's.
        cert: This side's certificate, for a server that demands one.
        key: Its private key.
        verify: Whether to check the certificate of the server. A process that asks its own server need not.
    """

    host: str
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    verify: bool = True


class NoAnswerError(Exception):
    """There was no answer to the question whether the server serves.

    Attributes:
        reason: What was wrong.
        kind: "refused" (nothing listens), "missing" (no such socket), "plain" (the server has no TLS), "tls" (it seems
            to have), "trust" (its certificate is not trusted), "certificate" (it demands one), "strange" (it is another
            kind of server), "slow", "other".
    """

    def __init__(self, reason: str, kind: str = "other") -> None:
        super().__init__(reason)
        self.reason = reason
        self.kind = kind


def serves(address: Address, tls: Tls | None, timeout_s: float) -> bool:
    """Return whether the server at an address says that it serves.

    Args:
        address: Where it listens.
        tls: For a server with TLS.
        timeout_s: How long to wait for the answer, in seconds.

    Raises:
        NoAnswerError: It could not be asked, or its answer was not understood.
        TlsError: A file for TLS cannot be used.
    """
    deadline = time.monotonic() + timeout_s
    authority = str(address)[:_TEXT_MAX] if isinstance(address, TcpAddress) else _HOST
    # Before the connection, so that its errors are of the files.
    context = None if tls is None else _context(tls)
    try:
        with _connect(address, timeout_s) as plain:
            plain.settimeout(max(0.001, deadline - time.monotonic()))
            if tls is None or context is None:
                return _Exchange(plain, deadline, has_tls=False).ask(authority)
            with context.wrap_socket(plain, server_hostname=tls.host) as encrypted:
                return _Exchange(encrypted, deadline, has_tls=True).ask(authority)
    except TimeoutError as error:
        raise NoAnswerError(f"no answer within {timeout_s:g} s", "slow") from error
    except OSError as error:
        raise _explained(error) from error


def _context(tls: Tls) -> "ssl.SSLContext":
    import ssl

    from dspex_persist.infra.access.tls import read_authorities, read_pair

    context = ssl.create_default_context(cadata=None if tls.ca is None else read_authorities(tls.ca).decode("ascii"))
    context.set_alpn_protocols(["h2"])
    if not tls.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if tls.cert is not None and tls.key is not None:
        # What is wrong with them, this says best.
        read_pair(tls.cert, tls.key)
        context.load_cert_chain(tls.cert, tls.key)
    return context


def _connect(address: Address, timeout_s: float) -> socket.socket:
    if isinstance(address, TcpAddress):
        return socket.create_connection((address.host, address.port), timeout_s)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout_s)
        connection.connect(address.path)
    except BaseException:
        connection.close()
        raise
    return connection


def _explained(error: OSError) -> NoAnswerError:
    reason = error.strerror or str(error)
    if isinstance(error, ConnectionRefusedError):
        return NoAnswerError("nothing listens there", "refused")
    if isinstance(error, FileNotFoundError):
        return NoAnswerError("there is no such socket", "missing")
    if isinstance(error, socket.gaierror):
        return NoAnswerError(f"the host is unknown: {reason}")
    if isinstance(error, PermissionError):
        return NoAnswerError("this user may not connect to it")
    if type(error).__module__ == "ssl":
        return _explained_tls(error)
    return NoAnswerError(reason[:1].lower() + reason[1:])


def _explained_tls(error: OSError) -> NoAnswerError:
    reason = str(getattr(error, "reason", "") or "")
    if message := getattr(error, "verify_message", ""):
        return NoAnswerError(f"its certificate is not trusted: {message.rstrip('.')}", "trust")
    if reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNEXPECTED_MESSAGE", "RECORD_LAYER_FAILURE"):
        return NoAnswerError("the server does not use TLS", "plain")
    if "CERTIFICATE" in reason:
        return NoAnswerError("the server demands a certificate that it trusts", "certificate")
    return NoAnswerError(f"TLS failed: {reason.replace('_', ' ').lower() or error}")


class _Exchange:
    """One call of the health service over a connection."""

    def __init__(self, connection: socket.socket, deadline: float, *, has_tls: bool) -> None:
        self._connection = connection
        self._deadline = deadline
        self._has_tls = has_tls
        self._received = b""

    def ask(self, authority: str) -> bool:
        """Return whether the server serves."""
        try:
            self._connection.sendall(_PREFACE + _frame(_SETTINGS, 0, 0) + _request(authority, self._has_tls))
            return self._answer()
        except ConnectionError:
            raise self._closed() from None

    def _answer(self) -> bool:
        message = b""
        is_first = True
        while True:
            kind, flags, payload = self._next(is_first=is_first)
            is_first = False
            if kind in (_SETTINGS, _PING) and not flags & _ACK:
                self._connection.sendall(_frame(kind, _ACK, 0, payload if kind == _PING else b""))
            elif kind == _DATA:
                if len(message) > _FRAME_MAX_BYTES:
                    raise NoAnswerError("its answer is not one of gRPC", "strange")
                message += payload[1 : len(payload) - payload[0]] if flags & _PADDED else payload
                if len(message) >= len(_NO_SERVICE) + _length_of(message):
                    return _status_in(message) == _SERVING
            elif kind in (_RESET, _GO_AWAY):
                raise NoAnswerError("it refused the question", "strange")
            if kind == _HEADERS and flags & _END_STREAM:
                raise NoAnswerError("it has no health service, or refuses to answer", "strange")

    def _next(self, *, is_first: bool) -> tuple[int, int, bytes]:
        """Return the type, the flags and the payload of the next frame."""
        head = self._read(9)
        size_bytes, kind, flags = int.from_bytes(head[:3], "big"), head[3], head[4]
        if is_first and (kind != _SETTINGS or size_bytes > _FRAME_MAX_BYTES):
            if head.startswith(_TLS_ALERT) and not self._has_tls:
                raise NoAnswerError("the server uses TLS", "tls")
            raise NoAnswerError("what answers there does not speak gRPC", "strange")
        if size_bytes > _FRAME_MAX_BYTES:
            raise NoAnswerError("its answer is not one of gRPC", "strange")
        return kind, flags, self._read(size_bytes)

    def _read(self, count: int) -> bytes:
        # Also if there is always something to read.
        if time.monotonic() > self._deadline:
            raise TimeoutError
        while len(self._received) < count:
            self._connection.settimeout(max(0.001, self._deadline - time.monotonic()))
            chunk = self._connection.recv(65_536)
            if not chunk:
                raise self._closed()
            self._received += chunk
        taken, self._received = self._received[:count], self._received[count:]
        return taken

    def _closed(self) -> NoAnswerError:
        if self._has_tls:
            text = "the server closed the connection, as it does without a certificate that it trusts"
            return NoAnswerError(text, "certificate")
        return NoAnswerError("the server closed the connection, as one with TLS does", "tls")


def _length_of(message: bytes) -> int:
    """Return the length of the message that begins with this prefix; more than any has if that is incomplete."""
    return struct.unpack(">I", message[1:5])[0] if len(message) >= len(_NO_SERVICE) else _FRAME_MAX_BYTES


def _status_in(message: bytes) -> int:
    """Return the status in a HealthCheckResponse: its first field, a number."""
    body = message[len(_NO_SERVICE) :]
    return body[1] if len(body) == 2 and body[0] == 0x08 else 0


def _frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _request(authority: str, has_tls: bool) -> bytes:
    # Fields of HPACK's static table by their numbers, and texts as they are: no compression, nothing to remember.
    fields = (
        b"\x83",  # :method POST
        b"\x87" if has_tls else b"\x86",  # :scheme
        b"\x04" + _text(_PATH),
        b"\x01" + _text(authority.encode("ascii", "replace")),
        b"\x0f\x10" + _text(b"application/grpc"),
        b"\x00" + _text(b"te") + _text(b"trailers"),
    )
    return _frame(_HEADERS, _END_HEADERS, 1, b"".join(fields)) + _frame(_DATA, _END_STREAM, 1, _NO_SERVICE)


def _text(text: bytes) -> bytes:
    return bytes([len(text)]) + text
