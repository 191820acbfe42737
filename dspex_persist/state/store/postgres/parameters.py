"""The parameters of libpq in a URL: what is wrong with one is said before anything is connected to.

An error that says that a database is away has its caller try again, and a service manager start a server again.
"""

import ipaddress
import re
from collections.abc import Mapping
from typing import Final

from psycopg import pq
from psycopg.conninfo import make_conninfo

from dspex_persist.addresses import is_harmless
from dspex_persist.spelling import quote

# libpq reads them only when it is connected by TCP, and psycopg the first of them.
_NUMBERS: Final = (
    "connect_timeout",
    "keepalives",
    "keepalives_idle",
    "keepalives_interval",
    "keepalives_count",
    "tcp_user_timeout",
)
_NUMBER: Final = re.compile(r"\s*[+-]?[0-9]{1,9}\s*")
# Our texts, and what the driver has of the statements, are in no other.
_ENCODINGS: Final = ("utf8", "unicode", "auto")
_OFF: Final = ("off", "false", "no", "0")
# Nothing can be in it: connecting fails at once, and only after libpq has read everything else.
_NOWHERE: Final = "/dev/null/dspex-persist"


def fault_of(given: Mapping[str, str]) -> str | None:
    """Return what is wrong with parameters for libpq, whatever is at the address; None if nothing is."""
    for name in _NUMBERS:
        if name in given and not _NUMBER.fullmatch(given[name]):
            return f"{name} is no number: {quote(given[name])}"
    if re.sub("[^a-z0-9]", "", given.get("client_encoding", "auto").lower()) not in _ENCODINGS:
        return "client_encoding can only be UTF8"
    if given.get("replication", "off").lower() not in _OFF:
        return "replication is not for connections with sessions"
    return _fault_of_addresses(given) or _fault_by_libpq(given)


def _fault_of_addresses(given: Mapping[str, str]) -> str | None:
    addresses, hosts = (given.get(name, "").split(",") for name in ("hostaddr", "host"))
    for each in filter(None, addresses):
        try:
            ipaddress.ip_address(each)
        except ValueError:
            return f"hostaddr has no IP address: {quote(each)}"
    if "" not in (given.get("hostaddr", ""), given.get("host", "")) and len(addresses) != len(hosts):
        return f"hostaddr has {len(addresses)} addresses, and host {len(hosts)}"
    return None


def _fault_by_libpq(given: Mapping[str, str]) -> str | None:
    """Have libpq read the parameters: it connects to nothing, and so does not wait."""
    hosts = next((given[name] for name in ("host", "hostaddr", "port") if given.get(name)), "").split(",")
    # A socket has no GSSAPI; its encryption is asked for elsewhere.
    wanted = given.get("gssencmode", "")
    elsewhere = {
        "host": ",".join([_NOWHERE] * len(hosts)),
        "hostaddr": "",
        # Of those in the environment, there may be as many as there are hosts.
        "port": given.get("port", ""),
        "gssencmode": "disable" if wanted in ("", "prefer", "require") else wanted,
    }
    connection = pq.PGconn.connect_start(make_conninfo("", **{**given, **elsewhere}).encode())
    said = connection.error_message.decode("utf-8", "replace").strip()
    connection.finish()
    faults = [line for line in said.splitlines() if line[:1].strip() and _NOWHERE not in line]
    if not faults or said.count(_NOWHERE) >= len(hosts):
        return None
    secrets = [value for name, value in given.items() if value and not is_harmless(name)]
    return "a parameter of it has no such value" if any(each in faults[-1] for each in secrets) else faults[-1]
