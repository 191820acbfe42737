"""Each option of our servers and channels has its effect."""

import socket
import time
from pathlib import Path

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from grpc._cython import cygrpc

from dspex_persist.infra import calls
from dspex_persist.infra.channels import channel_options
from dspex_persist.infra.process import ServerProcess
from dspex_persist.infra.server import ServerOptions
from dspex_persist.infra.server.life import _channel_options
from dspex_persist.state.bridge.client import state as client
from tests.deadline import within
from tests.infra import ping
from tests.infra.frames import GOAWAY, MAX_CONCURRENT_STREAMS, RawConnection, begun_and_reset
from tests.infra.ping import OpenChannel, PingClient, StartServer


def test_grpc_knows_every_option() -> None:
    known = Path(cygrpc.__file__).read_bytes()
    options = [
        *_channel_options(ServerOptions("127.0.0.1:0")),
        *channel_options("127.0.0.1:1"),
        *client._RECONNECTING,
        *calls._options("127.0.0.1:1", 1.0),
    ]
    # The library contains the names of its options, each followed by a NUL.
    assert [name for name, _ in options if name.encode() + b"\0" not in known] == []
    assert b"grpc.http2.min_recv_ping_interval_without_data_ms\0" not in known


@pytest.mark.parametrize(
    "target",
    [
        "127.0.0.1:50051",
        "127.9.9.9:1",
        "localhost:1",
        "[::1]:1",
        "unix:/tmp/x.sock",
        "unix:///tmp/x.sock",
        "unix:x.sock",
        "unix-abstract:x",
        "dns:///127.0.0.1:1",
        "ipv4:127.0.0.1:1",
    ],
)
def test_no_proxy_is_used_for_this_machine(target: str) -> None:
    assert dict(channel_options(target))["grpc.enable_http_proxy"] == 0


@pytest.mark.parametrize("target", ["10.0.0.1:1", "db.example.org:50051", "dns:///db:1", "[2001:db8::1]:1", "nonsense"])
def test_a_proxy_may_be_used_for_another_machine(target: str) -> None:
    assert dict(channel_options(target))["grpc.enable_http_proxy"] == 1
    assert dict(channel_options(target, proxies=False))["grpc.enable_http_proxy"] == 0


def test_an_idle_client_may_ping_at_the_interval_of_the_server(start_server: StartServer) -> None:
    server = start_server("--client-ping-interval-s", "0.1")
    with RawConnection(server.port) as connection:
        for _ in range(10):
            assert connection.ping().kind != GOAWAY
            # Not a wait for anything: the time between two pings is what this tests.
            time.sleep(0.15)


def test_an_idle_client_that_pings_too_often_is_disconnected(start_server: StartServer) -> None:
    server = start_server("--client-ping-interval-s", "60")
    with RawConnection(server.port) as connection:
        answers = (connection.ping() for _ in range(10))
        refused = next(answer for answer in answers if answer.kind == GOAWAY)
    assert b"too_many_pings" in refused.payload


def test_a_connection_has_a_limited_number_of_calls(start_server: StartServer) -> None:
    server = start_server("--streams-per-connection", "123")
    with RawConnection(server.port) as connection:
        assert connection.settings()[MAX_CONCURRENT_STREAMS] == 123


def test_calls_that_are_begun_and_reset_cost_the_server_little(
    start_server: StartServer, open_channel: OpenChannel
) -> None:
    server = start_server()
    client = PingClient(open_channel(f"127.0.0.1:{server.port}"))
    assert client("Ping", "before") == "before"
    before = _rss_mib(server)
    with RawConnection(server.port) as connection:
        for first in range(1, 80_000, 400):
            connection.send(b"".join(begun_and_reset(first + 2 * each) for each in range(200)))
        assert client("Ping", "meanwhile") == "meanwhile"
    # Without a limit, each of the 40,000 calls would take some 15 KiB.
    assert _rss_mib(server) - before < 150


def test_compressed_requests_are_refused_before_they_are_inflated(
    start_server: StartServer, open_channel: OpenChannel
) -> None:
    server = start_server()
    channel = open_channel(f"127.0.0.1:{server.port}")
    client = PingClient(channel)
    assert client("Ping", "before") == "before"
    before = _rss_mib(server)
    bomb = StringValue(value="a" * 30 * ping.MIB).SerializeToString()
    compressed = channel.unary_unary(f"/{ping.SERVICE}/Ping")
    calls = [compressed.future(bomb, compression=grpc.Compression.Gzip) for _ in range(10)]
    for call in calls:
        assert call.code() is grpc.StatusCode.UNIMPLEMENTED
    assert _rss_mib(server) - before < 50
    assert client("Ping", "after") == "after"


def test_a_connection_without_a_handshake_is_closed_and_an_idle_one_is_not(start_server: StartServer) -> None:
    server = start_server("--handshake-timeout-s", "1")
    with RawConnection(server.port) as idle, socket.create_connection(("127.0.0.1", server.port)) as half_open:
        half_open.sendall(b"PRI * HTTP")
        half_open.settimeout(within(30))
        while half_open.recv(65536):
            pass
        assert idle.ping().kind != GOAWAY


def _rss_mib(server: ServerProcess) -> int:
    status = Path(f"/proc/{server.pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) // 1024
