"""Commands that only read: a user who may not write can use them, and the servers do not hear of them."""

import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from dspex_persist.state.commands import GetVariables, SetVariable
from dspex_persist.state.errors import SessionNotFoundError, UnsupportedError
from dspex_persist.state.model import Value
from dspex_persist.state.options import SessionOptions
from dspex_persist.state.valkey.databases import open_sessions
from tests.addressed import Run
from tests.end_to_end.old_style import wait_until
from tests.valkey.conftest import Open, address

RIGHTS = ("+@read", "+@connection", "+fcall_ro")
"""Those that docs/valkey.md names."""


@pytest.fixture
def reader(valkey: str, valkey_prefix: str, client: redis.Redis) -> Iterator[str]:
    """The address for a user who may only read."""
    name = f"reader-{uuid.uuid4().hex[:8]}"
    admin: Any = client
    admin.execute_command("ACL", "SETUSER", name, "on", ">geheim", f"~{{{valkey_prefix}}}:*", *RIGHTS)
    yield address(valkey, valkey_prefix).replace("://", f"://{name}:geheim@", 1)
    admin.execute_command("ACL", "DELUSER", name)


def contents(client: Any, prefix: str) -> dict[bytes, bytes]:
    return {key: client.dump(key) for key in client.scan_iter(f"*{prefix}*", count=1000)}


def test_who_may_only_read_can_use_what_only_reads(
    open_server: Open, reader: str, valkey_prefix: str, client: redis.Redis, run: Run
) -> None:
    state = open_server()
    state.initialize_session("s")
    state.register_variable("s", "x", "integer", 1)
    state.register_variable("s", "key", "string", "hush", metadata={"sensitive": "true"})
    state.register_variable("s", "long", "string", "y" * 100_000)
    state.close()
    before = contents(client, valkey_prefix)
    assert run("get", "s", "x", "--db", reader) == (0, "1\n")
    assert run("get", "s", "long", "--db", reader) == (0, "y" * 100_000 + "\n")
    code, printed = run("get", "s", "--db", reader)
    assert (code, "hush" in printed) == (0, False), printed
    for words in (
        ("program", "list", "s"),
        ("session", "export", "s", "-o", "s.jsonl"),
        ("db", "check"),
    ):
        code, printed = run(*words, "--db", reader)
        assert code == 0, printed
    code, printed = run("get", "nobody", "--db", reader)
    assert (code, "session not found" in printed) == (1, True), printed
    code, printed = run("get", "s", "keys", "--db", reader)
    assert (code, "did you mean 'key'?" in printed) == (1, True), printed
    assert contents(client, valkey_prefix) == before
    user = reader.partition("://")[2].partition(":")[0]
    client.execute_command("ACL", "SETUSER", user, "-fcall_ro")
    code, printed = run("get", "s", "--db", reader)
    assert (code, f"{user}:***@" in printed, "fcall_ro" in printed) == (1, True, True), printed
    code, printed = run("set", "s", "x", "2", "--db", reader)
    assert (code, "docs/valkey.md" in printed) == (1, True), printed
    assert contents(client, valkey_prefix) == before


def test_a_reader_sees_what_is_stored_at_each_moment(open_server: Open, valkey: str, valkey_prefix: str) -> None:
    state = open_server()
    open_server(options=SessionOptions(session_ttl_s=0.05)).initialize_session("t")
    state.initialize_session("u")
    state.register_variable("u", "x", "integer", 1)
    with open_sessions(address(valkey, valkey_prefix), SessionOptions()) as reader:
        assert reader.run(GetVariables("u", ["x"])).variables["x"].value.json == "1"
        state.set_variable("u", "x", 2)
        assert reader.run(GetVariables("u", ["x", "y"])).variables["x"].value.json == "2"
        # Nobody has ended it yet.
        wait_until(lambda: not _is_live(reader, "t"), "the session expires")
        with pytest.raises(UnsupportedError):
            reader.run(SetVariable("u", "x", Value("3")))


def _is_live(reader: Any, session: str) -> bool:
    try:
        reader.run(GetVariables(session, []))
    except SessionNotFoundError:
        return False
    return True
