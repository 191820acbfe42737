"""Which addresses this process may call, when somebody else names them. Knows no gRPC."""

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass

from dspex_persist.infra.listen import ListenError, TcpAddress, UnixAddress, is_loopback, parse_callee, parse_listen

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class _Entry:
    """One entry: a network or the name of a host, and a port; None for any port."""

    network: Network | None
    host: str
    port: int | None

    def has(self, address: TcpAddress) -> bool:
        if self.port not in (None, address.port):
            return False
        if self.network is None:
            return address.host.lower() == self.host
        try:
            return ipaddress.ip_address(address.host) in self.network
        except ValueError:
            return False


class AllowedAddresses:
    """Addresses of this machine, and those of a list.

    Args:
        entries: Hosts by name, IP addresses or networks (`10.1.0.0/16`), each with a port (`HOST:PORT`,
            `[IPv6]:PORT`) or for all ports. A name stands for itself: it is not looked up.

    Raises:
        ValueError: An entry is none of these.
    """

    def __init__(self, entries: Iterable[str]) -> None:
        self._entries = tuple(map(_entry, entries))

    def allows(self, address: str) -> bool:
        """Return whether an address of `parse_callee` may be called. Raises `ListenError` if it is none."""
        parsed, _ = parse_callee(address)
        if isinstance(parsed, UnixAddress) or is_loopback(str(parsed)):
            return True
        return any(entry.has(parsed) for entry in self._entries)


def _entry(text: str) -> _Entry:
    host, port = text, None
    try:
        network = ipaddress.ip_network(text)
    except ValueError:
        network = None
    if network is None and ":" in text:
        try:
            parsed = parse_listen(text)
        except ListenError as error:
            raise ValueError(f"{text!r} is invalid: {error.reason}") from None
        if isinstance(parsed, UnixAddress):
            raise ValueError(f"{text!r} needs no entry: Unix sockets are of this machine")
        host, port = parsed.host, parsed.port
        try:
            network = ipaddress.ip_network(host)
        except ValueError:
            network = None
    if network is None and (not host or "/" in host or "*" in host or any(each.isspace() for each in host)):
        raise ValueError(f"{text!r} is invalid: expected a host, HOST:PORT, or a network such as 10.1.0.0/16")
    return _Entry(network, host.lower(), port)
