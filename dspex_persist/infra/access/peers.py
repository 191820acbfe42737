"""Which user's process is at the other end of a connection within this machine. Linux only; knows no gRPC.

The kernel lists the connections with the user of each socket. The list is read again after a second, or if a connection
is not in it.
"""

import ipaddress
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final
from urllib.parse import unquote

_TABLES: Final = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_KEPT_S: Final = 1.0
_LOCAL, _REMOTE, _STATE, _UID = 1, 2, 3, 7
"""Columns of the tables."""
_WORD: Final = 4
_ESTABLISHED: Final = "01"
_MAPPED: Final = "".join(f"{int.from_bytes(word, sys.byteorder):08X}" for word in (bytes(4), bytes(4), b"\0\0\xff\xff"))
"""What comes before the IPv4 address of a connection that a process has as one of IPv6."""


def can_tell_users() -> bool:
    """Return whether this system says whose a connection is."""
    return os.access(_TABLES[0], os.R_OK)


class PeerUsers:
    """The users at the other ends of the connections to a port of this machine. Used on one thread.

    Args:
        port: The port.
        now: Returns a time in seconds that never goes back.
        tables: The kernel's lists.
    """

    def __init__(
        self, port: int, *, now: Callable[[], float] = time.monotonic, tables: Iterable[Path] = _TABLES
    ) -> None:
        self._suffix = f":{port:04X}"
        self._now = now
        self._tables = tuple(tables)
        self._users: dict[str, int] = {}
        self._read_at = float("-inf")

    def user_of(self, peer: str) -> int | None:
        """Return the id of the user whose process has a connection, or None if there is none within this machine.

        Args:
            peer: The other end as gRPC names it: `ipv4:127.0.0.1:40312`, `ipv6:%5B::1%5D:40312`.
        """
        key = _key_of(peer)
        if key is None:
            return None
        now = self._now()
        if now - self._read_at > _KEPT_S or key not in self._users:
            self._users, self._read_at = self._read(), now
        return self._users.get(key)

    def _read(self) -> dict[str, int]:
        users: dict[str, int] = {}
        for table in self._tables:
            try:
                lines = table.read_text().splitlines()[1:]
            except OSError:
                # A kernel without IPv6.
                continue
            for line in lines:
                columns = line.split(maxsplit=_UID + 1)
                # Others, such as those that are over, name no user.
                if columns[_REMOTE].endswith(self._suffix) and columns[_STATE] == _ESTABLISHED:
                    users[columns[_LOCAL].removeprefix(_MAPPED)] = int(columns[_UID])
        return users


def _key_of(peer: str) -> str | None:
    """Return an end of a connection as the tables write it: words of the address in this machine's byte order."""
    host, _, port = unquote(peer).partition(":")[2].rpartition(":")
    try:
        packed = ipaddress.ip_address(host.strip("[]")).packed
        number = int(port)
    except ValueError:
        return None
    words = (packed[place : place + _WORD] for place in range(0, len(packed), _WORD))
    address = "".join(f"{int.from_bytes(word, sys.byteorder):08X}" for word in words)
    return f"{address}:{number:04X}"
