"""Ping servers in separate processes, and channels to them."""

from collections.abc import Iterator
from contextlib import ExitStack

import grpc
import pytest

from dspex_persist.infra.process import ServerProcess
from tests.infra.ping import OpenChannel, PingClient, StartServer, open_channel_to, start_ping_server


@pytest.fixture
def start_server() -> Iterator[StartServer]:
    """Starts servers that end with the test at the latest."""
    with ExitStack() as stack:
        yield lambda *arguments: stack.enter_context(start_ping_server(*arguments))


@pytest.fixture
def open_channel() -> Iterator[OpenChannel]:
    """Opens channels that close with the test."""
    with ExitStack() as stack:
        yield lambda target: stack.enter_context(open_channel_to(target))


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    """One server for all tests of the module that do not change it."""
    with start_ping_server() as process:
        yield process


@pytest.fixture(scope="module")
def channel(server: ServerProcess) -> Iterator[grpc.Channel]:
    with open_channel_to(f"127.0.0.1:{server.port}") as channel:
        yield channel


@pytest.fixture(scope="module")
def client(channel: grpc.Channel) -> PingClient:
    return PingClient(channel)
