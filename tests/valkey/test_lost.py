"""A store that was put back to an older copy, or lost commits, is noticed."""

from typing import Any

import pytest
import redis

from dspex_persist.state.errors import LostCommitsError, StateError
from tests.engines import wait_until
from tests.valkey.conftest import Open


def copy_of(client: redis.Redis, prefix: str) -> dict[bytes, bytes]:
    kept: Any = client
    names = [key for key in kept.scan_iter("{" + prefix + "}*") if not key.endswith((b":servers", b":leases"))]
    return {key: kept.dump(key) for key in names}


def put_back(client: redis.Redis, prefix: str, copy: dict[bytes, bytes]) -> None:
    kept: Any = client
    for key in copy_of(client, prefix):
        kept.delete(key)
    for key, content in copy.items():
        kept.restore(key, 0, content)


def test_a_server_notices_that_its_store_was_put_back(
    open_server: Open, client: redis.Redis, valkey_prefix: str
) -> None:
    ended: list[BaseException] = []
    server = open_server(on_fatal=ended.append)
    server.initialize_session("s")
    before = copy_of(client, valkey_prefix)
    server.register_variable("s", "x", "integer", 0)
    put_back(client, valkey_prefix, before)
    with pytest.raises(StateError):
        server.register_variable("s", "y", "integer", 0)
    wait_until(lambda: bool(ended))
    assert "its last commit is 1, but it had 2" in str(ended[0])
    with pytest.raises(LostCommitsError):
        server.get_session("s")


def test_a_server_notices_that_another_one_has_written_on(
    open_server: Open, client: redis.Redis, valkey_prefix: str
) -> None:
    ended: list[BaseException] = []
    server = open_server(on_fatal=ended.append)
    server.initialize_session("s")
    before = copy_of(client, valkey_prefix)
    server.register_variable("s", "x", "integer", 0)
    put_back(client, valkey_prefix, before)
    other = open_server()
    for name in "abc":
        other.register_variable("s", name, "integer", 0)
    # It may have heard of them before.
    with pytest.raises(StateError):
        server.set_variable("s", "x", 1)
    wait_until(lambda: bool(ended))
    assert isinstance(ended[0], LostCommitsError)
    assert "commit 2 is gone, or is another one" in str(ended[0])


def test_a_server_notices_that_everything_is_gone(open_server: Open, client: redis.Redis, valkey_prefix: str) -> None:
    server = open_server()
    server.initialize_session("s")
    put_back(client, valkey_prefix, {})
    with pytest.raises(LostCommitsError, match="another database"):
        server._store.news()
