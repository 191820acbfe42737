"""Opens the channel to a server, with TLS or without.

Options that are not given come from the environment of the process, so that every program and command reaches the same
server without more arguments.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import grpc

from dspex_persist.infra.access.tls import TlsError, read_authorities, read_pair
from dspex_persist.infra.channels import Options, channel_options, is_here
from dspex_persist.infra.listen import TLS_SCHEME, grpc_name, names_tls, target_of
from dspex_persist.opening import ENV_PREFIX
from dspex_persist.state.errors import InvalidArgumentError, quote

PathLike = str | os.PathLike[str]
_CA, _CERT, _KEY, _TOKEN = "ca", "cert", "key", "token"


@dataclass(frozen=True, slots=True)
class Peer:
    """A server, and how to reach it.

    Attributes:
        target: The gRPC target.
        shown: The target for errors, which tells whether TLS is used.
        credentials: For TLS; None without it.
        token: What the server knows this client by, if it demands that.
    """

    target: str
    shown: str
    credentials: grpc.ChannelCredentials | None
    token: str | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls, address: str, *, ca: PathLike | None, cert: PathLike | None, key: PathLike | None, token: str | None = None
    ) -> "Peer":
        """Return the server at an address or URL.

        Args:
            address: HOST:PORT, unix:PATH, or a URL of `connect`. Only grpcs://HOST:PORT has TLS.
            ca: A file with the certificates of the authorities to trust, as PEM. Without it: DSPEX_PERSIST_CA, and
                then the public authorities that gRPC knows.
            cert: A file with this client's certificate, for a server that demands one. Without it: DSPEX_PERSIST_CERT.
            key: A file with its private key. Without it: DSPEX_PERSIST_KEY.
            token: The client's token. Without it: DSPEX_PERSIST_TOKEN.

        Raises:
            InvalidArgumentError: A file cannot be used, or is given for an address without TLS; or the token would
                cross the network without encryption.
        """
        target, token = target_of(address), _token(token)
        if names_tls(address):
            return cls(target, TLS_SCHEME + target, _credentials(ca, cert, key), token)
        for name, given in ((_CA, ca), (_CERT, cert), (_KEY, key)):
            if given is not None:
                raise InvalidArgumentError(name, f"{quote(address)} has no TLS: it is for {TLS_SCHEME}HOST:PORT")
        if token is not None and not is_here(target):
            reason = f"everybody on the way to {quote(address)} could read it: it needs TLS, {TLS_SCHEME}HOST:PORT"
            raise InvalidArgumentError(_TOKEN, reason)
        return cls(target, target, None, token)

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
            channel = grpc.insecure_channel(grpc_name(self.target), options=options)
        else:
            channel = grpc.secure_channel(self.target, self.credentials, options=options)
        return channel if self.token is None else _WithToken(channel, self.token)


class _WithToken(grpc.Channel):  # type: ignore[misc, unused-ignore]
    """A channel that sends a token with each call. gRPC's own interceptors cost several times as much."""

    def __init__(self, channel: grpc.Channel, token: str) -> None:
        self._channel = channel
        self._header = ("authorization", f"Bearer {token}")

    def unary_unary(self, method: str, *args: Any, **options: Any) -> Any:
        return _Method(self._channel.unary_unary(method, *args, **options), self._header)

    def unary_stream(self, method: str, *args: Any, **options: Any) -> Any:
        return _Method(self._channel.unary_stream(method, *args, **options), self._header)

    def stream_unary(self, method: str, *args: Any, **options: Any) -> Any:
        return _Method(self._channel.stream_unary(method, *args, **options), self._header)

    def stream_stream(self, method: str, *args: Any, **options: Any) -> Any:
        return _Method(self._channel.stream_stream(method, *args, **options), self._header)

    def subscribe(self, callback: Any, try_to_connect: bool = False) -> None:
        self._channel.subscribe(callback, try_to_connect)

    def unsubscribe(self, callback: Any) -> None:
        self._channel.unsubscribe(callback)

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Method:
    """A method of a channel, with one more header."""

    def __init__(self, method: Any, header: tuple[str, str]) -> None:
        self._method = method
        self._header = header

    def __call__(self, request: Any, timeout: float | None = None, metadata: Any = None, **options: Any) -> Any:
        return self._method(request, timeout=timeout, metadata=(*(metadata or ()), self._header), **options)

    def with_call(self, request: Any, timeout: float | None = None, metadata: Any = None, **options: Any) -> Any:
        return self._method.with_call(request, timeout=timeout, metadata=(*(metadata or ()), self._header), **options)

    def future(self, request: Any, timeout: float | None = None, metadata: Any = None, **options: Any) -> Any:
        return self._method.future(request, timeout=timeout, metadata=(*(metadata or ()), self._header), **options)


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


def _token(given: object) -> str | None:
    token = given if given is not None else os.environ.get(ENV_PREFIX + _TOKEN.upper()) or None
    if token is None:
        return None
    if isinstance(token, str) and (stripped := token.strip()) and stripped.isascii() and stripped.isprintable():
        return stripped
    raise InvalidArgumentError(_TOKEN, "it must be a token: printable ASCII characters")


def _checked(name: str, path: Path) -> bytes:
    try:
        return read_authorities(path)
    except TlsError as error:
        raise InvalidArgumentError(name, str(error)) from error
