"""Servers on one log in Valkey."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from dspex_persist.state.valkey.valkey_state import ValkeyState
from tests.addressed import run  # noqa: F401 - a fixture

Open = Callable[..., ValkeyState]


def address(url: str, prefix: str) -> str:
    return f"{url.replace('unix://', 'redis+unix://')}?prefix={prefix}"


def opener(url: str, prefix: str) -> Iterator[Open]:
    servers: list[ValkeyState] = []

    def open_one(url: str = url, **options: Any) -> ValkeyState:
        # The sweeps and the polls of servers do not come in between.
        servers.append(ValkeyState(address(url, prefix), sweep_interval_s=3600, **options))
        return servers[-1]

    yield open_one
    for each in servers:
        each.close()


@pytest.fixture
def open_server(valkey: str, valkey_prefix: str) -> Iterator[Open]:
    """Opens servers on one log."""
    yield from opener(valkey, valkey_prefix)


@pytest.fixture
def open_own(own_valkey: Any) -> Iterator[Open]:
    """Opens servers on a log of which the test may stop and set up the store."""
    yield from opener(own_valkey.url(), "own")


@pytest.fixture
def client(valkey: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(valkey) as client:
        yield client


@pytest.fixture
def own_client(own_valkey: Any) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(own_valkey.url()) as client:
        yield client
