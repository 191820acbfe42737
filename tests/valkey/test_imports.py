"""Imports are written ahead: nobody sees a part of one, and nothing of one that ends early is left."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis

from dspex_persist.state.valkey import valkey_log
from dspex_persist.state.valkey.valkey_state import ValkeyState
from tests.deadline import within
from tests.valkey.conftest import Open
from tests.valkey.test_lost import copy_of


def recorded(server: ValkeyState, session: str, commits: int = 300) -> Any:
    server.initialize_session(session)
    server.register_variable(session, "x", "string", "")
    for number in range(commits):
        server.set_variable(session, "x", f"{number:-<500}")
    header, found = server.record(session, reveal=True)
    return header, tuple(found)


def test_an_import_of_many_calls_is_there_as_a_whole(open_server: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    server, other = open_server(), open_server()
    header, commits = recorded(server, "long")
    monkeypatch.setattr(valkey_log, "CALL_BYTES", 20_000)
    imported = other.import_session(header, commits, session_id="copy")
    assert imported.commits == len(commits)
    assert server.content_hash("copy") == server.content_hash("long")
    assert server.set_variable("copy", "x", "next") == 301
    assert [version.version for version in other.get_variable_history("copy", "x", limit=2)] == [301, 300]


def test_others_wait_for_an_import(open_server: Open) -> None:
    server, other = open_server(), open_server()
    recorded(server, "source", 0)
    server._store.prepare_import()
    with ThreadPoolExecutor() as threads:
        write = threads.submit(other.set_variable, "source", "x", "waits")
        with pytest.raises(TimeoutError):
            write.result(0.2)
        server._store._give_up(server._store._import)
        assert write.result(within(10)) == 1


def test_what_was_staged_for_too_long_is_deleted_and_the_import_begins_again(
    open_server: Open, client: redis.Redis, valkey_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, other = open_server(), open_server()
    header, commits = recorded(server, "source", 20)
    before = set(copy_of(client, valkey_prefix))
    finishing, over = threading.Event(), threading.Event()

    def wait(self: Any, importing: Any) -> None:
        finishing.set()
        assert over.wait(within(10))
        finish(self, importing)

    finish = valkey_log.ValkeyLog._finish_import
    monkeypatch.setattr(valkey_log.ValkeyLog, "_finish_import", wait)
    with ThreadPoolExecutor() as threads:
        importing = threads.submit(server.import_session, header, commits, session_id="half")
        assert finishing.wait(within(10))
        assert copy_of(client, valkey_prefix).keys() - before
        # Its time is over.
        client.delete(f"{{{valkey_prefix}}}:turn")
        other.set_variable("source", "x", "on")
        assert not copy_of(client, valkey_prefix).keys() - before
        over.set()
        assert importing.result(within(10)).commits == len(commits)
    assert other.content_hash("half") == importing.result().content_hash
    assert server.set_variable("source", "x", "on") == 22
