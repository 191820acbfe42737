"""Which user's process is at the other end of a connection within this machine. Linux only; knows no gRPC.

The kernel is asked about each connection by its two ends. Where this process may not ask (a service of systemd without
`AF_NETLINK`), the kernel's list of all connections says the same; it is read again after a second, or if a connection
is not in it.
"""

import ipaddress
import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final
from urllib.parse import unquote

_TABLES: Final = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_KEPT_S: Final = 1.0
_LOCAL, _REMOTE, _STATE, _UID = 1, 2, 3, 7
"""Columns of the tables."""
_WORD: Final = 4
_ESTABLISHED, _LISTENING = 1, 10
_IPV4: Final = 4
_ROOT: Final = 0

Ip = ipaddress.IPv4Address | ipaddress.IPv6Address
Ends = tuple[Ip, int, Ip, int]
"""The address and the port of the socket of which the user is asked, and those of the other one."""


def can_tell_users() -> bool:
    """Return whether this system says whose a connection is."""
    return os.access(_TABLES[0], os.R_OK)


class PeerUsers:
    """The users at the other ends of the connections to an address of this machine. Used on one thread.

    Args:
        host: The address, or a name for it.
        port: The port.
        others: Users that count as the one of this process, as root does.
        ask: Returns the user whose socket has both ends, or None; by default, it asks the system.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        others: Iterable[int] = (),
        ask: Callable[[Ends], int | None] | None = None,
    ) -> None:
        self._port = port
        self._ours = frozenset((_ROOT, os.geteuid(), *others))
        # A name may be one of several addresses, such as 127.0.0.1 and ::1.
        self._hosts = tuple(_resolved(host, port))
        self._ask = _asker() if ask is None else ask

    def are_we(self, peer: str) -> bool:
        """Return whether a connection is of a process of one of our users; see `user_of`."""
        return self.user_of(peer) in self._ours

    def user_of(self, peer: str) -> int | None:
        """Return the id of the user whose process has a connection, or None if there is none within this machine.

        Args:
            peer: The other end as gRPC names it: `ipv4:127.0.0.1:40312`, `ipv6:%5B::1%5D:40312`.
        """
        end = _end_of(peer)
        if end is None:
            return None
        found = (self._ask((*end, host, self._port)) for host in self._hosts if host.version == end[0].version)
        return next((user for user in found if user is not None), None)


def _resolved(host: str, port: int) -> Iterator[Ip]:
    for _, _, _, _, name in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        yield _unmapped(ipaddress.ip_address(name[0]))


def _unmapped(address: Ip) -> Ip:
    """Return the IPv4 address of a connection that a process has as one of IPv6."""
    return getattr(address, "ipv4_mapped", None) or address


def _end_of(peer: str) -> tuple[Ip, int] | None:
    host, _, port = unquote(peer).partition(":")[2].rpartition(":")
    try:
        return _unmapped(ipaddress.ip_address(host.strip("[]"))), int(port)
    except ValueError:
        return None


def _asker() -> Callable[[Ends], int | None]:
    try:
        ask_kernel((_NOBODY[_IPV4], 0, _NOBODY[_IPV4], 0))
    except OSError:
        return ConnectionTables().user_of
    return ask_kernel


_NOBODY: Final[Mapping[int, Ip]] = {4: ipaddress.IPv4Address(0), 6: ipaddress.IPv6Address(0)}
"""By the version of IP."""
_BY_FAMILY: Final = 20
_REQUEST: Final = 1
_HEADER: Final = struct.Struct("=IHHII")
_QUESTION: Final = struct.Struct("=BBBBI")
_PORTS: Final = struct.Struct("!HH")
_WHICHEVER: Final = struct.pack("=III", 0, 0xFFFFFFFF, 0xFFFFFFFF)
"""No interface, and no cookie: the socket with these ends."""
_STATE_AT: Final = _HEADER.size + 1
_UID_AT: Final = _HEADER.size + 64
_SOCK_DIAG: Final = 4
_ANSWER_BYTES: Final = 4096
_PATIENCE_S: Final = 1.0


def listeners_at(host: str, port: int) -> frozenset[int]:
    """Return the users whose processes listen at an address of this machine; none if the system does not say it."""
    try:
        found = {ask_kernel((each, port, _NOBODY[each.version], 0), _LISTENING) for each in _resolved(host, port)}
    except OSError:
        return frozenset()
    return frozenset(user for user in found if user is not None)


def ask_kernel(ends: Ends, state: int = _ESTABLISHED) -> int | None:
    """Return the user whose socket has these ends, or None if there is none (sock_diag of Linux).

    Args:
        ends: The ends.
        state: The state of the socket.

    Raises:
        OSError: This process may not ask, or got no answer.
    """
    address, port, other, other_port = ends
    family = socket.AF_INET if address.version == _IPV4 else socket.AF_INET6
    question = b"".join(
        (
            _QUESTION.pack(family, socket.IPPROTO_TCP, 0, 0, 1 << state),
            _PORTS.pack(port, other_port),
            address.packed.ljust(16, b"\0"),
            other.packed.ljust(16, b"\0"),
            _WHICHEVER,
        )
    )
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _SOCK_DIAG) as kernel:
        kernel.settimeout(_PATIENCE_S)
        kernel.send(_HEADER.pack(_HEADER.size + len(question), _BY_FAMILY, _REQUEST, 1, 0) + question)
        answer = kernel.recv(_ANSWER_BYTES)
    # Without a connection, it finds a socket that listens, or one that is over and names no user.
    if _HEADER.unpack_from(answer)[1] != _BY_FAMILY or answer[_STATE_AT] != state:
        return None
    user: int = struct.unpack_from("=I", answer, _UID_AT)[0]
    return user


class ConnectionTables:
    """The kernel's lists of connections. Used on one thread.

    Args:
        now: Returns a time in seconds that never goes back.
        tables: The lists.
    """

    def __init__(self, *, now: Callable[[], float] = time.monotonic, tables: Iterable[Path] = _TABLES) -> None:
        self._now = now
        self._tables = tuple(tables)
        self._users: dict[tuple[str, str], int] = {}
        self._read_at = float("-inf")

    def user_of(self, ends: Ends) -> int | None:
        """Return the user whose socket has these ends, or None if there is none."""
        address, port, other, other_port = ends
        key = (_written(address, port), _written(other, other_port))
        now = self._now()
        if now - self._read_at > _KEPT_S or key not in self._users:
            self._users, self._read_at = self._read(), now
        return self._users.get(key)

    def _read(self) -> dict[tuple[str, str], int]:
        users: dict[tuple[str, str], int] = {}
        for table in self._tables:
            try:
                lines = table.read_text().splitlines()[1:]
            except OSError:
                # A kernel without IPv6.
                continue
            for line in lines:
                columns = line.split(maxsplit=_UID + 1)
                # Others, such as those that are over, name no user.
                if int(columns[_STATE], 16) == _ESTABLISHED:
                    ends = (columns[each].removeprefix(_MAPPED) for each in (_LOCAL, _REMOTE))
                    users[next(ends), next(ends)] = int(columns[_UID])
        return users


def _written(address: Ip, port: int) -> str:
    """Return an end of a connection as the tables write it: words of the address in this machine's byte order."""
    return f"{_words(address.packed)}:{port:04X}"


def _words(packed: bytes) -> str:
    words = (packed[place : place + _WORD] for place in range(0, len(packed), _WORD))
    return "".join(f"{int.from_bytes(word, sys.byteorder):08X}" for word in words)


_MAPPED: Final = _words(bytes(10) + b"\xff\xff")
"""What comes before the IPv4 address of a connection that a process has as one of IPv6."""
