"""A check of the whole log finds whatever somebody else has changed."""

from collections.abc import Callable
from typing import Any

import pytest
import redis

from dspex_persist.state.commands import BeginExecution, ReadState
from dspex_persist.state.errors import NotADatabaseError
from dspex_persist.state.valkey.databases import open_recording, verify
from dspex_persist.state.valkey.valkey_state import ValkeyState
from tests.valkey.conftest import Open, address


@pytest.fixture
def log(open_server: Open, valkey: str, valkey_prefix: str) -> Callable[[], list[str]]:
    """A log of several sessions. Returns what a check of it finds."""
    server = open_server()
    fill(server)

    def check() -> list[str]:
        commits, problems = verify(address(valkey, valkey_prefix))
        assert commits >= 12
        return [f"{where}: {what}" for where, what in problems]

    assert check() == []
    return check


def fill(server: ValkeyState) -> None:
    server.initialize_session("s")
    server.register_variable("s", "x", "string", "", metadata={"unit": "m"})
    server.register_variable("s", "y", "embedding", [0.5, 0.25])
    server.add_dependency("s", "y", "x", "uses")
    server.set_variables("s", {"x": "long" * 5_000, "y": [0.5, 0.75]})
    server.set_variable("s", "x", "short")
    server.run(BeginExecution("s", "tool"))
    server.initialize_session("ended")
    server.register_variable("ended", "x", "integer", 0)
    server.cleanup_session("ended")
    header, commits = server.record("s", reveal=True)
    server.import_session(header, tuple(commits), session_id="imported")
    server.delete_variable("s", "y")


def names(client: redis.Redis, prefix: str, kind: str) -> list[bytes]:
    kept: Any = client
    return sorted(kept.scan_iter(f"{{{prefix}}}:{kind}:*"))


def test_a_version_that_was_removed(log: Any, client: Any, valkey_prefix: str) -> None:
    name = names(client, valkey_prefix, "w")[0]
    client.xdel(name, client.xrange(name)[1][0])
    assert any("is missing" in found for found in log())


def test_a_version_that_was_replaced(log: Any, client: Any, valkey_prefix: str) -> None:
    name = names(client, valkey_prefix, "w")[0]
    rows = client.xrange(name)
    client.delete(name)
    for id_, row in rows:
        client.xadd(name, {**row, b"j": b'"forged"'} if b"j" in row else row, id=id_)
    assert any("does not match its hash" in found for found in log())


def test_a_commit_that_was_removed(log: Any, client: Any, valkey_prefix: str) -> None:
    name = names(client, valkey_prefix, "h")[0]
    client.xdel(name, client.xrange(name)[2][0])
    assert any(found.endswith("it is missing") for found in log())


def test_the_end_of_the_log(log: Any, client: Any, valkey_prefix: str) -> None:
    name = f"{{{valkey_prefix}}}:log"
    client.xdel(name, client.xrevrange(name)[0][0])
    assert any("are missing" in found for found in log())


def test_a_head_that_is_gone(open_server: Open, log: Any, client: Any, valkey: str, valkey_prefix: str) -> None:
    name, there = f"{{{valkey_prefix}}}:head", address(valkey, valkey_prefix)
    identity = client.hget(name, "database_id")
    client.delete(name)
    for use in (open_server, lambda: verify(there)):
        with pytest.raises(NotADatabaseError, match="head is missing, which says where the log ends"):
            use()
    assert not client.exists(name)
    # That of a log which has just begun.
    client.hset(name, "database_id", identity)
    assert "the head: it ends the log at commit 0, but the log goes on to commit" in "\n".join(
        f"{where}: {what}" for where, what in verify(there)[1]
    )


def test_an_entry_that_no_commit_has(log: Any, client: Any, valkey_prefix: str) -> None:
    name = names(client, valkey_prefix, "w")[0]
    client.xadd(name, client.xrevrange(name)[0][1], id="777-0")
    assert any("are of commits" in found for found in log())


def test_a_current_value_that_was_changed(log: Any, client: Any, valkey_prefix: str) -> None:
    for name in names(client, valkey_prefix, "s"):
        for field, content in client.hgetall(name).items():
            if field.startswith(b"v:") and b'\\"short\\"' in content:
                client.hset(name, field, content.replace(b"short", b"later"))
    assert any("variable x is not as its version 2 left it" in found for found in log())


def test_a_session_that_was_taken_out(log: Any, client: Any, valkey_prefix: str) -> None:
    client.hdel(f"{{{valkey_prefix}}}:live", "s")
    assert any("session s: it has not ended" in found for found in log())


def test_servers_may_write_meanwhile(open_server: Open, valkey: str, valkey_prefix: str) -> None:
    server = open_server()
    fill(server)
    url = address(valkey, valkey_prefix)
    commits, problems = verify(url, lambda *_: server.set_variable("s", "x", "again"))
    assert (commits, problems) == (server.run(ReadState("s")).sequence - 1, ())


def test_a_log_that_is_not_there(valkey: str) -> None:
    with pytest.raises(NotADatabaseError, match="no sessions under the prefix nobody"):
        verify(address(valkey, "nobody"))


def test_a_recording_without_a_server(open_server: Open, valkey: str, valkey_prefix: str) -> None:
    server = open_server()
    fill(server)
    header, commits = server.record("ended")
    with open_recording(address(valkey, valkey_prefix), "ended") as (same, others):
        assert (same, list(others)) == (header, list(commits))
