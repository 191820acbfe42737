"""Addresses to listen on: parses and checks them, and says why one is not available. Knows no gRPC."""

import errno
import ipaddress
import os
import re
import socket
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from dspex_persist.errors import DspexError

TLS_SCHEME: Final = "grpcs://"
UNIX_PATH_MAX_BYTES: Final = 107
_SCHEME: Final = re.compile(r"\A(?:grpcs?://|(?:grpc\+)?unix:)", re.IGNORECASE)
_PROBE_TIMEOUT_S: Final = 1.0
_HOST_PORT: Final = re.compile(r"(?:\[(?P<bracketed>[^\[\]]+)\]|(?P<plain>[^\[\]:]+)):(?P<port>[0-9]{1,5})")


@dataclass(eq=False)
class ListenError(DspexError):
    """A server cannot listen on the address `listen`, for the given `reason`."""

    listen: str
    reason: str

    def __str__(self) -> str:
        return f"cannot listen on {self.listen}: {self.reason}"


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A host (name or IP address, without brackets) and a port; port 0 takes a free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """The path of a Unix socket in the file system."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


Address = TcpAddress | UnixAddress


def in_small_letters(address: str) -> str:
    """Return an address with its scheme, if it has one, in small letters: any may be written."""
    return _SCHEME.sub(lambda scheme: scheme[0].lower(), address)


def parse_listen(listen: str) -> Address:
    """Parse `HOST:PORT`, `[IPv6]:PORT`, `unix:PATH` or `unix:///PATH`; `ListenError` for anything else."""
    listen = in_small_letters(listen)
    if listen.startswith("unix:"):
        return UnixAddress(_unix_path(listen))
    match = _HOST_PORT.fullmatch(listen)
    if match is None:
        raise ListenError(listen, "expected HOST:PORT, [IPv6]:PORT or unix:PATH")
    port = int(match["port"])
    if port > 65535:
        raise ListenError(listen, f"port {port} is above 65535")
    return TcpAddress(match["bracketed"] or match["plain"], port)


def parse_callee(address: str) -> tuple[Address, bool]:
    """Parse an address to call: one that `parse_listen` takes, or grpcs://HOST:PORT.

    Returns:
        The address, and whether it is called with TLS.

    Raises:
        ListenError: It is no address.
    """
    has_tls = names_tls(address)
    parsed = parse_listen(in_small_letters(address).removeprefix(TLS_SCHEME))
    if has_tls and isinstance(parsed, UnixAddress):
        raise ListenError(address, "a Unix socket has no TLS")
    return parsed, has_tls


def target_of(address: str) -> str:
    """Return the gRPC target of an address, which may be a URL: grpc(s)://HOST:PORT, grpc+unix:/PATH."""
    address = in_small_letters(address)
    if address.startswith("grpc+unix:"):
        return f"unix:{re.sub('^//(?=/)', '', address.removeprefix('grpc+unix:'))}"
    return address.removeprefix("grpc://").removeprefix(TLS_SCHEME)


def names_tls(address: str) -> bool:
    """Whether an address is a URL of a server with TLS: grpcs://HOST:PORT."""
    return in_small_letters(address).startswith(TLS_SCHEME)


def grpc_name(target: str) -> str:
    """Return a target as gRPC wants it: as a URL, in which `%`, `?` and `#` of a path would mean something else."""
    return f"unix:{quote(os.fsencode(target.removeprefix('unix:')))}" if target.startswith("unix:") else target


def is_loopback(listen: str) -> bool:
    """Return whether only this machine can reach `listen`: 127.0.0.0/8, ::1, localhost, or a Unix socket.

    Host names are not looked up. Raises `ListenError` for an address that `parse_listen` refuses.
    """
    address = parse_listen(listen)
    if isinstance(address, UnixAddress) or address.host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(address.host).is_loopback
    except ValueError:
        return False


def settled(address: Address) -> Address:
    """Return the address with an absolute path, unless that is too long for a socket."""
    if isinstance(address, TcpAddress):
        return address
    path = os.path.abspath(address.path)  # noqa: PTH100 -- `resolve` would follow a link that has the socket's name
    return UnixAddress(path) if len(os.fsencode(path)) <= UNIX_PATH_MAX_BYTES else address


def prepare(address: Address) -> None:
    """Check that `address` is available, and remove the socket file that a dead server left there.

    Another process may still take the address before it is bound: two servers that must exclude each other need
    another lock.

    Raises:
        ListenError: The address is in use or cannot exist.
    """
    try:
        if isinstance(address, UnixAddress):
            _prepare_path(address)
        else:
            _check_port(address)
    except OSError as error:
        raise ListenError(str(address), _reason(error)) from error
    except UnicodeError as error:
        raise ListenError(str(address), "the host name is not valid") from error


def _unix_path(listen: str) -> str:
    path = listen.removeprefix("unix:")
    if path.startswith("//"):
        path = path[2:]
    if not path or "\0" in path:
        raise ListenError(listen, "expected a path after unix:")
    return path


def _reason(error: OSError) -> str:
    text = error.strerror or str(error)
    return text[:1].lower() + text[1:]


def _prepare_path(address: UnixAddress) -> None:
    path, size_bytes = Path(address.path), len(os.fsencode(address.path))
    if size_bytes > UNIX_PATH_MAX_BYTES:
        reason = f"the path has {size_bytes} bytes, a Unix socket's has at most {UNIX_PATH_MAX_BYTES}"
        raise ListenError(str(address), reason)
    if not path.parent.is_dir():
        raise ListenError(str(address), f"the directory {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise ListenError(str(address), f"this user may not create files in {path.parent}")
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ListenError(str(address), "the path exists and is not a socket")
    _remove_if_dead(address)


def _remove_if_dead(address: UnixAddress) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_TIMEOUT_S)
        try:
            probe.connect(address.path)
        except ConnectionRefusedError:
            Path(address.path).unlink()
            return
        except (TimeoutError, BlockingIOError):
            pass  # A server holds the socket and is too busy to answer, so it is alive.
    raise ListenError(str(address), "another server is listening there")


def _check_port(address: TcpAddress) -> None:
    # All addresses of the host: gRPC is content with one of several, so two servers would share a port.
    addresses = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    errors = [error for family, _, _, _, name in addresses if (error := _bind_error(family, name))]
    for error in errors:
        # A host name may include an address that this machine lacks (::1 without IPv6): one that works is enough.
        if error.errno in (errno.EADDRINUSE, errno.EACCES) or len(errors) == len(addresses):
            raise error


def _bind_error(family: socket.AddressFamily, name: tuple[Any, ...]) -> OSError | None:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(name)
    except OSError as error:
        return error
    return None
