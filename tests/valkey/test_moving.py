"""Sessions of contexts that move to a store and away from it, and holds that end in other ways than they should."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis

from dspex_persist.state.errors import (
    StorageError,
    UnavailableError,
)
from tests.deadline import within
from tests.engines import remove_keys
from tests.moving import Moving
from tests.valkey.conftest import Open, address
from tests.valkey.proxy import Proxy
from tests.valkey.test_imports import recorded


@pytest.fixture
def url(valkey: str, valkey_prefix: str) -> str:
    return address(valkey, valkey_prefix)


@pytest.fixture
def elsewhere(valkey: str, valkey_prefix: str) -> Iterator[str]:
    """Another log in the same store."""
    prefix = f"{valkey_prefix}.elsewhere"
    yield address(valkey, prefix)
    remove_keys(valkey, prefix)


@pytest.fixture
def proxy(valkey: str, tmp_path: Path) -> Iterator[Proxy]:
    proxy = Proxy(valkey.removeprefix("unix://"), tmp_path / "s")
    yield proxy
    proxy.close()


def held(client: Any, prefix: str) -> int:
    """How many holds the store has."""
    return int(client.hlen(f"{{{prefix}}}:holds"))


class TestMoving(Moving):
    overtaken = (StorageError,)

    @pytest.fixture(autouse=True)
    def _leaves_no_hold(self, client: redis.Redis, valkey_prefix: str) -> Iterator[None]:
        yield
        assert held(client, valkey_prefix) == 0


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + within(15)
    while not condition():
        assert time.monotonic() < deadline, "it has not happened"
        time.sleep(0.01)


def test_holds_end_with_the_leases_of_their_servers(open_server: Open, client: redis.Redis, valkey_prefix: str) -> None:
    server, dying, leaving = open_server(), open_server(), open_server()
    for name in ("of the dead", "of one that leaves"):
        server.initialize_session(name)
    hold = dying.hold_session("of the dead")
    other_hold = leaving.hold_session("of one that leaves")
    assert held(client, valkey_prefix) == 2
    leaving.close()
    other_hold.close()
    assert held(client, valkey_prefix) == 1
    client.zadd(f"{{{valkey_prefix}}}:leases", {dying._store._leases.server: 0})
    server._store.fence()
    assert held(client, valkey_prefix) == 0
    server.register_variable("of the dead", "x", "integer", 0)
    with pytest.raises(UnavailableError, match="took this one for dead"):
        hold.move("the moon")
    hold.close()
    assert server.heartbeat("of the dead")


def test_a_hold_that_the_store_has_lost_is_not_taken_for_another_one(
    open_server: Open, client: redis.Redis, valkey_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, other = open_server(), open_server()
    for name in ("lost", "held later"):
        server.initialize_session(name)
    client.hdel(f"{{{valkey_prefix}}}:head", "holds")
    hold = server.hold_session("lost")
    server._shared.follow()
    monkeypatch.setattr(server._shared, "follow", lambda: None)
    # As many changes later.
    client.hdel(f"{{{valkey_prefix}}}:head", "holds")
    client.delete(f"{{{valkey_prefix}}}:holds")
    later = other.hold_session("held later")
    other.register_variable("lost", "x", "integer", 0)
    with pytest.raises(UnavailableError, match="was not moved"):
        hold.move("the moon")
    monkeypatch.undo()
    for each in (hold, later):
        each.close()
    assert other.heartbeat("lost")


@pytest.mark.parametrize("fault", ["before", "after", "held"])
def test_a_hold_whose_answer_was_lost_holds_nothing(
    open_server: Open, proxy: Proxy, client: redis.Redis, valkey_prefix: str, fault: Any
) -> None:
    server, other = open_server(proxy.url), open_server()
    other.initialize_session(fault)
    proxy.lose(fault, b"_hold\r\n")
    with pytest.raises(UnavailableError):
        server.hold_session(fault)
    assert proxy.happened.is_set()
    wait_until(lambda: not server._shared.released)
    # It arrives, and is refused.
    proxy.release()
    assert held(client, valkey_prefix) == 0
    other.register_variable(fault, "x", "integer", 0)
    server.hold_session(fault).close()


@pytest.mark.parametrize("step", ["begins", "becomes full"])
def test_a_hold_waits_for_the_import_of_another_server(open_server: Open, step: str) -> None:
    server, other = open_server(), open_server()
    recorded(server, step, 0)
    if step == "becomes full":
        other._store.hold(step, "id")
    server._store.prepare_import()
    with ThreadPoolExecutor() as threads:
        if step == "begins":
            holding = threads.submit(other._by_writer, lambda: other._store.hold(step, "id"))
        else:
            holding = threads.submit(other._by_writer, lambda: other._store.fill_hold("id"))
        with pytest.raises(TimeoutError):
            holding.result(0.2)
        server._store._give_up(server._store._import)
        holding.result(within(10))
    other._store.end_hold("id")


def test_an_import_does_not_begin_again_because_a_hold_ends(open_server: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    server, other = open_server(), open_server()
    header, commits = recorded(server, "again", 5)
    server.initialize_session("held meanwhile")
    hold = other.hold_session("held meanwhile")
    finish, finished = server._store._finish_import, []

    def end_before(importing: Any) -> None:
        hold.close()
        finished.append(importing)
        finish(importing)

    monkeypatch.setattr(server._store, "_finish_import", end_before)
    assert server.import_session(header, commits, session_id="imported").commits == len(commits)
    assert len(finished) == 1
