"""Opens the channel to a server, with TLS or without.

Options that are not given come from the environment of the process, so that every program and command reaches the same
server without more arguments.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import grpc

from dspex_persist.infra.channels import Options, channel_options
from dspex_persist.infra.listen import TLS_SCHEME, target_of
from dspex_persist.infra.tls import TlsError, read_authorities, read_pair
from dspex_persist.settings import ENV_PREFIX
from dspex_persist.state.errors import InvalidArgumentError, quote

PathLike = str | os.PathLike[str]
_CA, _CERT, _KEY = "ca", "cert", "key"


@dataclass(frozen=True, slots=True)
class Peer:
    """A server, and how to reach it.

    Attributes:
        target: The gRPC target.
        shown: The target for errors, which tells whether TLS is used.
        credentials: For TLS; None without it.
    """

    target: str
    shown: str
    credentials: grpc.ChannelCredentials | None

    @classmethod
    def of(cls, address: str, *, ca: PathLike | None, cert: PathLike | None, key: PathLike | None) -> "Peer":
        """Return the server at an address or URL.

        Args:
            address: HOST:PORT, unix:PATH, or a URL of `connect`. Only grpcs://HOST:PORT has TLS.
            ca: A file with the certificates of the authorities to trust, as PEM. Without it: DSPEX_PERSIST_CA, and
                then the public authorities that gRPC knows.
            cert: A file with this client's certificate, for a server that demands one. Without it: DSPEX_PERSIST_CERT.
            key: A file with its private key. Without it: DSPEX_PERSIST_KEY.

        Raises:
            InvalidArgumentError: A file cannot be used, or is given for an address without TLS.
        """
        target = target_of(address)
        if address.startswith(TLS_SCHEME):
            return cls(target, TLS_SCHEME + target, _credentials(ca, cert, key))
        for name, given in ((_CA, ca), (_CERT, cert), (_KEY, key)):
            if given is not None:
                raise InvalidArgumentError(name, f"{quote(address)} has no TLS: it is for {TLS_SCHEME}HOST:PORT")
        return cls(target, target, None)

    @property
    def url(self) -> str:
        """The URL, for `connect`."""
        if self.credentials is not None:
            return self.shown
        return f"grpc+{self.target}" if self.target.startswith("unix:") else f"grpc://{self.target}"

    def channel(self, options: Options) -> grpc.Channel:
        """Return a channel with these options, in addition to the usual ones."""
        options = [*channel_options(self.target), *options]
        if self.credentials is None:
            return grpc.insecure_channel(self.target, options=options)
        return grpc.secure_channel(self.target, self.credentials, options=options)


def _credentials(ca: PathLike | None, cert: PathLike | None, key: PathLike | None) -> grpc.ChannelCredentials:
    authorities = _path(_CA, ca)
    pair = (_path(_CERT, cert), _path(_KEY, key))
    roots = None if authorities is None else _checked(_CA, authorities)
    match pair:
        case (None, None):
            return grpc.ssl_channel_credentials(roots)
        case (Path() as certificate, Path() as private):
            try:
                chain, own = read_pair(certificate, private)
            except TlsError as error:
                raise InvalidArgumentError(_CERT if error.path == str(certificate) else _KEY, str(error)) from error
            return grpc.ssl_channel_credentials(roots, own, chain)
    given, missing = (_CERT, _KEY) if pair[1] is None else (_KEY, _CERT)
    raise InvalidArgumentError(missing, f"a certificate and its private key go together: give it beside {given}")


def _path(name: str, given: PathLike | None) -> Path | None:
    if given is None:
        given = os.environ.get(ENV_PREFIX + name.upper()) or None
    if given is not None and not isinstance(given, str | os.PathLike):
        raise InvalidArgumentError(name, f"it must be the path of a file, not {type(given).__name__}")
    return None if given is None else Path(given)


def _checked(name: str, path: Path) -> bytes:
    try:
        return read_authorities(path)
    except TlsError as error:
        raise InvalidArgumentError(name, str(error)) from error
