"""Whose process is at the other end of a connection within this machine."""

import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from dspex_persist.infra.access import peers
from dspex_persist.infra.access.peers import ConnectionTables, Ends, PeerUsers, ask_kernel, can_tell_users, listeners_at

needs_linux = pytest.mark.skipif(not can_tell_users(), reason="this system does not say whose a connection is")
HEADER = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
OURS = (
    "   1: 0100007F:9D78 0100007F:C383 01 00000000:00000000 00:00000000 00000000  1000        0 1 1 0 20 4 30 10 -1\n"
)
OTHER_PORT = OURS.replace("9D78", "9D79").replace("C383", "0050")
IPV6 = OURS.replace("0100007F:", "00000000000000000000000001000000:").replace("1000 ", "1001 ")
OVER = OURS.replace(" 01 ", " 06 ").replace("9D78", "9D7A")
MAPPED = OURS.replace("0100007F:", "0000000000000000FFFF00000100007F:").replace("9D78", "9D7B")
OTHER_ADDRESS = OURS.replace("9D78", "9D7C").replace("0100007F:C383", "0200007F:C383")
PORT = 0xC383
UID = os.geteuid()
ASKED: dict[str, Callable[[], Callable[[Ends], int | None]]] = {
    "kernel": lambda: ask_kernel,
    "tables": lambda: ConnectionTables().user_of,
}


@needs_linux
@pytest.mark.parametrize(("host", "kind"), [("127.0.0.1", "ipv4"), ("::1", "ipv6"), ("localhost", "ipv4")])
@pytest.mark.parametrize("asks", ["kernel", "tables"])
def test_a_connection_of_our_own(host: str, kind: str, asks: str) -> None:
    family = socket.AF_INET6 if kind == "ipv6" else socket.AF_INET
    if kind == "ipv6" and not has_ipv6():
        pytest.skip("no IPv6 here")
    with socket.create_server((host, 0), family=family) as server:
        users = PeerUsers(host, server.getsockname()[1], ask=ASKED[asks]())
        with socket.create_connection(server.getsockname()[:2]) as client:
            port = client.getsockname()[1]
            peer = f"ipv6:%5B::1%5D:{port}" if kind == "ipv6" else f"ipv4:127.0.0.1:{port}"
            assert users.user_of(peer) == os.geteuid()
            assert users.user_of(peer.replace(str(port), "1")) is None
            assert users.user_of(peer.replace(str(port), str(server.getsockname()[1]))) is None, "it only listens"


@needs_linux
@pytest.mark.parametrize("asks", ["kernel", "tables"])
def test_a_connection_to_another_address_from_the_same_port(asks: str) -> None:
    """Two connections may have the same local end, and belong to two users."""
    with socket.create_server(("127.0.0.2", 0)) as other, socket.create_connection(other.getsockname()) as client:
        host, port = client.getsockname()
        assert PeerUsers("127.0.0.2", other.getsockname()[1], ask=ASKED[asks]()).user_of(f"ipv4:{host}:{port}") == UID
        assert PeerUsers("127.0.0.1", other.getsockname()[1], ask=ASKED[asks]()).user_of(f"ipv4:{host}:{port}") is None


@needs_linux
def test_the_kernel_keeps_nothing_of_a_connection_that_is_over() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        users = PeerUsers("127.0.0.1", server.getsockname()[1], ask=ask_kernel)
        with socket.create_connection(server.getsockname()) as client:
            peer = "ipv4:{}:{}".format(*client.getsockname())
            assert users.user_of(peer) == UID
            # At once, without a last farewell: the next one to have the port may be anybody.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert users.user_of(peer) is None


@needs_linux
def test_who_listens_at_an_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert listeners_at("127.0.0.1", port) == {UID}
        assert listeners_at("127.0.0.2", port) == frozenset()
        with socket.create_connection(server.getsockname()) as client:
            peer = "ipv4:{}:{}".format(*client.getsockname())
            for others in ((), (UID + 1,)):
                assert PeerUsers("127.0.0.1", port, others=others).are_we(peer)
            assert not PeerUsers("127.0.0.1", port, ask=lambda _: UID + 1).are_we(peer)
            assert PeerUsers("127.0.0.1", port, others=(UID + 1,), ask=lambda _: UID + 1).are_we(peer)
    assert listeners_at("127.0.0.1", port) == frozenset()


def test_tables_are_asked_where_the_kernel_may_not_be(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Ends] = []

    def refused(ends: Ends) -> None:
        asked.append(ends)
        raise OSError

    monkeypatch.setattr(peers, "ask_kernel", refused)
    monkeypatch.setattr(peers.ConnectionTables, "user_of", lambda _, __: 1002)
    assert PeerUsers("127.0.0.1", PORT).user_of("ipv4:127.0.0.1:40312") == 1002
    assert len(asked) == 1


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


def test_the_table_is_read_again_after_a_second_or_for_a_new_connection(tmp_path: Path) -> None:
    table, seconds = tmp_path / "tcp", [100.0]
    table.write_text(HEADER + OTHER_PORT + OURS + OVER + MAPPED + OTHER_ADDRESS)
    tables = ConnectionTables(now=lambda: seconds[0], tables=(table, tmp_path / "missing"))
    users, ipv6 = (PeerUsers(host, PORT, ask=tables.user_of) for host in ("127.0.0.1", "::1"))
    assert users.user_of("ipv4:127.0.0.1:40312") == 1000
    assert users.user_of("ipv4:127.0.0.1:40313") is None, "a connection to another port"
    assert users.user_of("ipv4:127.0.0.1:40316") is None, "one to another address"
    assert users.user_of("ipv4:127.0.0.1:40314") is None, "one that is over"
    assert users.user_of("ipv4:127.0.0.1:40315") == 1000, "an IPv6 socket"
    table.write_text(HEADER + OURS.replace("1000", "1002") + IPV6)
    assert users.user_of("ipv4:127.0.0.1:40312") == 1000
    assert ipv6.user_of("ipv6:[::1]:40312") == 1001
    table.write_text(HEADER)
    seconds[0] += 1.1
    assert users.user_of("ipv4:127.0.0.1:40312") is None


@pytest.mark.parametrize("peer", ["", "unix:", "unix:/tmp/a", "ipv4:host:1", "ipv4:127.0.0.1", "unknown"])
def test_what_is_no_connection_within_this_machine(peer: str) -> None:
    assert PeerUsers("127.0.0.1", PORT).user_of(peer) is None
