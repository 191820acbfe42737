"""Whose process is at the other end of a connection within this machine."""

import os
import socket
from pathlib import Path

import pytest

from dspex_persist.infra.access.peers import PeerUsers, can_tell_users

needs_linux = pytest.mark.skipif(not can_tell_users(), reason="this system does not say whose a connection is")
HEADER = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
OURS = (
    "   1: 0100007F:9D78 0100007F:C383 01 00000000:00000000 00:00000000 00000000  1000        0 1 1 0 20 4 30 10 -1\n"
)
OTHER_PORT = OURS.replace("9D78", "9D79").replace("C383", "0050")
IPV6 = OURS.replace("0100007F:9D78", "00000000000000000000000001000000:9D78").replace("1000 ", "1001 ")
OVER = OURS.replace(" 01 ", " 06 ").replace("9D78", "9D7A")
MAPPED = OURS.replace("0100007F:9D78", "0000000000000000FFFF00000100007F:9D7B")
PORT = 0xC383


@needs_linux
@pytest.mark.parametrize(("host", "kind"), [("127.0.0.1", "ipv4"), ("::1", "ipv6")])
def test_a_connection_of_our_own(host: str, kind: str) -> None:
    family = socket.AF_INET6 if kind == "ipv6" else socket.AF_INET
    if kind == "ipv6" and not has_ipv6():
        pytest.skip("no IPv6 here")
    with socket.create_server((host, 0), family=family) as server:
        users = PeerUsers(server.getsockname()[1])
        with socket.create_connection(server.getsockname()[:2]) as client:
            port = client.getsockname()[1]
            peer = f"ipv6:%5B::1%5D:{port}" if kind == "ipv6" else f"ipv4:127.0.0.1:{port}"
            assert users.user_of(peer) == os.geteuid()
            assert users.user_of(peer.replace(str(port), "1")) is None


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


def test_the_table_is_read_again_after_a_second_or_for_a_new_connection(tmp_path: Path) -> None:
    table, seconds = tmp_path / "tcp", [100.0]
    table.write_text(HEADER + OTHER_PORT + OURS + OVER + MAPPED)
    users = PeerUsers(PORT, now=lambda: seconds[0], tables=(table, tmp_path / "missing"))
    assert users.user_of("ipv4:127.0.0.1:40312") == 1000
    assert users.user_of("ipv4:127.0.0.1:40313") is None, "a connection to another port"
    assert users.user_of("ipv4:127.0.0.1:40314") is None, "one that is over"
    assert users.user_of("ipv4:127.0.0.1:40315") == 1000, "an IPv6 socket"
    table.write_text(HEADER + OURS.replace("1000", "1002") + IPV6)
    assert users.user_of("ipv4:127.0.0.1:40312") == 1000
    assert users.user_of("ipv6:[::1]:40312") == 1001
    table.write_text(HEADER)
    seconds[0] += 1.1
    assert users.user_of("ipv4:127.0.0.1:40312") is None


@pytest.mark.parametrize("peer", ["", "unix:", "unix:/tmp/a", "ipv4:host:1", "ipv4:127.0.0.1", "unknown"])
def test_what_is_no_connection_within_this_machine(peer: str) -> None:
    assert PeerUsers(PORT).user_of(peer) is None
