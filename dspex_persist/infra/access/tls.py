"""Certificates and keys for TLS: reads them, says what is wrong with them, and notices new ones. Knows no gRPC."""

import contextlib
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dspex_persist.errors import DspexError
from dspex_persist.infra.logs import get_logger

_CERTIFICATE: Final = b"-----BEGIN CERTIFICATE-----"
_KEY: Final = b"PRIVATE KEY-----"
_PASSPHRASE: Final = b"ENCRYPTED"
_NOT_YET_VALID, _EXPIRED, _WRONG_PURPOSE = 9, 10, 26
"""OpenSSL's numbers for faults of a certificate (X509_V_ERR_...)."""
_FAULTS: Final = {
    _NOT_YET_VALID: "the certificate is not valid yet: compare its dates with the clock of this machine",
    _EXPIRED: "the certificate has expired",
    _WRONG_PURPOSE: "the certificate is not one for servers (extended key usage)",
}
_log: Final = get_logger(__name__)

Signature = tuple[tuple[int, int, int], ...]


@dataclass(eq=False)
class TlsError(DspexError):
    """A file with a certificate or a key cannot be used, for the given `reason`."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """The files of one side of a connection, all PEM.

    Attributes:
        cert: The certificate, followed by those of intermediate authorities.
        key: Its private key, without a passphrase.
        ca: The certificates of the authorities that the other side's certificate must come from; None to demand none.
    """

    cert: Path
    key: Path
    ca: Path | None = None


@dataclass(frozen=True, slots=True)
class Material:
    """The contents of `TlsFiles`."""

    cert: bytes
    key: bytes
    ca: bytes | None


@dataclass(frozen=True, slots=True)
class CallerFiles:
    """The files of whoever calls others with TLS, all PEM. They are read for each new connection.

    Attributes:
        ca: The certificates of the authorities to trust; None for the public ones.
        cert: The caller's own certificate, for those who demand one; None for none.
        key: Its private key.
    """

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def read(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """Return the authorities, the key and the certificate.

        Raises:
            TlsError: A file cannot be used, or they do not belong together.
        """
        ca = None if self.ca is None else read_authorities(self.ca)
        if self.cert is None or self.key is None:
            return ca, None, None
        cert, key = read_pair(self.cert, self.key)
        return ca, key, cert


def read_authorities(path: Path) -> bytes:
    """Return the PEM certificates of authorities in a file.

    Raises:
        TlsError: It cannot be read, or has no certificates.
    """
    content = _read(path)
    if _CERTIFICATE not in content:
        raise TlsError(str(path), "it has no certificate in PEM (-----BEGIN CERTIFICATE-----)")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=content.decode("ascii", "replace"))
    except (ssl.SSLError, ValueError) as error:
        raise TlsError(str(path), "its certificate is damaged, or not PEM") from error
    return content


def read_pair(cert: Path, key: Path) -> tuple[bytes, bytes]:
    """Return the certificate and its private key.

    Raises:
        TlsError: One cannot be read or used, or the key belongs to another certificate.
    """
    return _pair(cert, key)[1]


def read_material(files: TlsFiles) -> Material:
    """Return the contents of a server's files.

    Raises:
        TlsError: One cannot be read or used, they do not belong together, or the certificate is not valid now.
    """
    context, (cert, key) = _pair(files.cert, files.key)
    _check_valid(context, files.cert, cert)
    return Material(cert, key, None if files.ca is None else read_authorities(files.ca))


def _pair(cert: Path, key: Path) -> tuple[ssl.SSLContext, tuple[bytes, bytes]]:
    contents = read_authorities(cert), _read(key)
    if _KEY not in contents[1]:
        raise TlsError(str(key), "it has no private key in PEM (-----BEGIN PRIVATE KEY-----)")
    if _PASSPHRASE in contents[1]:
        raise TlsError(str(key), "the key has a passphrase, which nobody could type: save it without one")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(cert, key, password="")
    except ssl.SSLError as error:
        mismatch = error.reason == "KEY_VALUES_MISMATCH"
        reason = f"it is not the key of the certificate in {cert}" if mismatch else "the key is damaged, or not PEM"
        raise TlsError(str(key), reason) from error
    except OSError as error:
        raise TlsError(str(key), _reason(error)) from error
    return context, contents


def _check_valid(server: ssl.SSLContext, path: Path, cert: bytes) -> None:
    """Refuse a certificate that every client would refuse: have a client look at it that trusts it as such."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cadata=cert.decode("ascii", "replace"))
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = (
        context.wrap_bio(to_client, to_server),
        server.wrap_bio(to_server, to_client, server_side=True),
    )
    try:
        for _ in range(2):
            for side in sides:
                with contextlib.suppress(ssl.SSLWantReadError):
                    side.do_handshake()
    except ssl.SSLCertVerificationError as error:
        if error.verify_code in _FAULTS:
            raise TlsError(str(path), _FAULTS[error.verify_code]) from error
    except ssl.SSLError:
        # What gRPC's own library makes of it decides.
        return


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TlsError(str(path), _reason(error)) from error


def _reason(error: OSError) -> str:
    return f"cannot read it: {error.strerror or error}"


def _is_of_system(error: TlsError) -> bool:
    return isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, ssl.SSLError)


class Certificates:
    """A server's certificates, which are read again when their files change. Usable from any thread.

    Args:
        files: The files.

    Attributes:
        files: The files.

    Raises:
        TlsError: They cannot be used. Files that become unusable later are only logged, and what was read before stays.
    """

    def __init__(self, files: TlsFiles) -> None:
        self.files = files
        self._lock = threading.Lock()
        self._seen = self._signature()
        self._fault = ""
        self.material = read_material(files)

    @property
    def asks_clients(self) -> bool:
        """Whether clients have to show a certificate."""
        return self.files.ca is not None

    def changed(self) -> Material | None:
        """Return the contents of the files if they changed since the last call, and can be used."""
        with self._lock:
            now = self._signature()
            if now == self._seen:
                return None
            try:
                material = read_material(self.files)
            except TlsError as error:
                # Certificate and key are replaced one after the other: this may be the moment in between. What the
                # system refused, as without a free descriptor, it may allow the next time.
                if not _is_of_system(error):
                    self._seen = now
                if error.reason != self._fault:
                    self._fault = error.reason
                    _log.warning(
                        "the new certificate cannot be used: the old one stays", file=error.path, reason=error.reason
                    )
                return None
            self._fault = ""
            if now != self._signature():
                return None  # They are being replaced: the next connection looks again.
            self._seen, self.material = now, material
        _log.info("read the new certificate", file=str(self.files.cert))
        return material

    def _signature(self) -> Signature:
        return tuple(_signature(path) for path in (self.files.cert, self.files.key, self.files.ca) if path is not None)


def _signature(path: Path) -> tuple[int, int, int]:
    try:
        status = path.stat()
    except OSError:
        return (0, 0, 0)
    return (status.st_ino, status.st_mtime_ns, status.st_size)
