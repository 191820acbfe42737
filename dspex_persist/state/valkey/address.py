"""The addresses of stores: redis://, rediss:// and the same of Valkey, and their parameters."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

import redis

from dspex_persist.addresses import shown
from dspex_persist.spelling import quote
from dspex_persist.state.errors import InvalidArgumentError
from dspex_persist.state.valkey.connection import TIMEOUT_S
from dspex_persist.state.valkey.keys import PREFIX, Keys

FORM: Final = "redis://HOST:PORT/NUMBER?prefix=NAME"
_PLAIN, _TLS, _SOCKET = "redis", "rediss", "unix"
_KIND_OF: Final = {
    "redis": _PLAIN,
    "valkey": _PLAIN,
    "rediss": _TLS,
    "valkeys": _TLS,
    "redis+unix": _SOCKET,
    "valkey+unix": _SOCKET,
}
_OF_TLS: Final = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_OURS: Final = ("prefix", "assume")
_CONNECT_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Address:
    """Where a store is, and how to use it.

    Attributes:
        name: The address without a password: for errors and logs.
        prefix: What the keys begin with.
        assumes_durable: Whether the operator says that the store keeps what it has acknowledged, as it cannot be asked.
        options: How to connect.
    """

    name: str
    prefix: str
    assumes_durable: bool
    options: dict[str, Any] = field(repr=False)

    @classmethod
    def of(cls, url: str) -> "Address":
        """Return the address in a URL.

        Raises:
            InvalidArgumentError: It is none.
        """
        name = shown(url)
        try:
            return cls._of(url, name)
        except ValueError as error:
            # Not the error itself, which may quote the password.
            raise _invalid(name, f"it is not {FORM}: characters such as @ in a password are written %40") from error

    @classmethod
    def _of(cls, url: str, name: str) -> "Address":
        parts = urlsplit(url)
        kind = _KIND_OF.get(parts.scheme)
        if kind is None or parts.fragment or "@" in parts.path + parts.query:
            # What follows may quote a part of a password.
            raise ValueError
        given = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
        known = (*_OURS, *(("db",) if kind == _SOCKET else ()), *(_OF_TLS if kind == _TLS else ()))
        for parameter in given:
            if parameter not in known:
                raise _invalid(name, f"it has a parameter {quote(parameter)}; there are {', '.join(known)}")
        options = _place(name, kind, parts, given)
        if parts.username:
            options["username"] = unquote(parts.username)
        if parts.password:
            options["password"] = unquote(parts.password)
        if given.get("assume", "durable") != "durable":
            raise _invalid(name, "assume can only be durable")
        prefix = given.get("prefix", PREFIX)
        # Checked here: what is wrong with an address is said before anything is opened.
        Keys(prefix)
        return cls(name, prefix, "assume" in given, options)

    def client(self) -> redis.Redis:
        """Return a new client, which is not connected yet."""
        return redis.Redis(
            **self.options,
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=_CONNECT_S,
            client_name="dspex-persist",
            # An import may have brought half of a surrogate pair.
            encoding_errors="surrogatepass",
        )


def _place(name: str, kind: str, parts: SplitResult, given: Mapping[str, str]) -> dict[str, Any]:
    """Return where to connect to."""
    if kind == _SOCKET:
        if parts.hostname or not parts.path.strip("/"):
            raise _invalid(name, "a socket is redis+unix:///PATH")
        return {"unix_socket_path": unquote(parts.path), "db": _number(name, given.get("db", "0"))}
    if not parts.hostname:
        raise _invalid(name, f"it names no host: {FORM}")
    port = 6379 if parts.port is None else parts.port
    if not port:
        raise _invalid(name, "0 is no port of a server")
    options: dict[str, Any] = {"host": parts.hostname, "port": port, "socket_keepalive": True}
    options["db"] = _number(name, parts.path.strip("/") or "0")
    if kind == _TLS:
        for each in _OF_TLS:
            if each in given and not Path(given[each]).is_file():
                raise _invalid(name, f"{each} names no file: {quote(given[each])}")
        options |= {"ssl": True} | {each: given[each] for each in _OF_TLS if each in given}
    return options


def _number(name: str, text: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text):
        raise _invalid(name, f"{quote(text)} is not the number of a database: {FORM}")
    return int(text)


def _invalid(name: str, reason: str) -> InvalidArgumentError:
    return InvalidArgumentError("url", f"{quote(name)}: {reason}")
