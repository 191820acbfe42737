"""What becomes of a commit if its answer is lost, or the store refuses it. Each proof finds a planted bug."""

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis

from dspex_persist.state.commands import (
    BeginExecution,
    CleanupSession,
    Command,
    InitializeSession,
    InterruptExecutions,
    ReadState,
    RegisterVariable,
    SetVariable,
)
from dspex_persist.state.errors import (
    DamagedSessionError,
    OutcomeUnknownError,
    StateError,
    StorageError,
    UnavailableError,
)
from dspex_persist.state.groups import Job
from dspex_persist.state.model import Origin, Value
from dspex_persist.state.shared import SharedGroups
from dspex_persist.state.valkey import address as addresses
from dspex_persist.state.valkey import connection, valkey_log
from dspex_persist.state.valkey.notices import Notices
from dspex_persist.state.valkey.valkey_log import ValkeyLog
from dspex_persist.state.valkey.valkey_state import ValkeyState
from tests.deadline import within
from tests.engines import Valkey, wait_until
from tests.valkey.conftest import Open
from tests.valkey.proxy import Proxy


@pytest.fixture
def proxy(valkey: str, tmp_path: Path) -> Iterator[Proxy]:
    proxy = Proxy(valkey.removeprefix("unix://"), tmp_path / "s")
    yield proxy
    proxy.close()


def content(client: redis.Redis, prefix: str) -> dict[bytes, bytes | None]:
    """All that is stored, but for the leases of servers."""
    kept: Any = client
    names = [key for key in kept.scan_iter("*{" + prefix + "}*") if not key.endswith((b":leases", b":servers"))]
    return {key: kept.dump(key) for key in names}


def begin(server: ValkeyState, session: str) -> None:
    server.initialize_session(session)
    server.register_variable(session, "x", "integer", 0)


def test_a_store_that_takes_connections_and_answers_nothing(
    open_own: Open, own_valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(addresses, "TIMEOUT_S", 0.3)
    monkeypatch.setattr(valkey_log, "SETTLE_S", 0.3)
    server = open_own()
    begin(server, "s")
    assert server.set_variable("s", "x", 2) == 1
    with own_valkey.stopped():
        with pytest.raises(UnavailableError, match="Timeout"):
            server.get_variable("s", "x")
        for _ in range(2):
            with pytest.raises((UnavailableError, OutcomeUnknownError)):
                server.set_variable("s", "x", 3, idempotency_key="once")
    wait_until(lambda: _succeeds(server))
    assert server.get_variable("s", "x").version == 2
    with own_valkey.stopped():
        server.close()


def _succeeds(server: ValkeyState) -> bool:
    try:
        server.set_variable("s", "x", 3, idempotency_key="once")
    except (UnavailableError, OutcomeUnknownError, StorageError):
        return False
    return True


@pytest.mark.parametrize(
    "command",
    [SetVariable("theirs", "x", Value("1")), InterruptExecutions("theirs", ()), CleanupSession("theirs")],
    ids=lambda command: type(command).__name__,
)
def test_a_write_that_has_to_read_first_while_the_store_is_away(
    command: Command[Any], open_own: Open, own_valkey: Valkey
) -> None:
    """What a commit stores of a session that another server began is not all in memory."""
    other, server = open_own(), open_own()
    begin(other, "theirs")
    if isinstance(command, InterruptExecutions):
        begun = other.run(BeginExecution("theirs", "tool"))
        command = replace(command, executions=(begun.execution_id,))
    begin(server, "own")
    assert server.get_variable("theirs", "x").version == 0
    # From here on this server takes the log for the one that it knows, until it stores something.
    server.set_variable("own", "x", 1)
    own_valkey.take_away()
    with pytest.raises((UnavailableError, OutcomeUnknownError, StorageError)):
        server.run(command)
    own_valkey.bring_back()
    wait_until(lambda: _carried_out(server, command))


def _carried_out(server: ValkeyState, command: Command[Any]) -> bool:
    try:
        server.run(command)
    except (UnavailableError, OutcomeUnknownError, StorageError):
        return False
    return True


# Notices


def test_notices_that_were_missed_are_made_up_for(valkey: str, client: redis.Redis) -> None:
    heard = threading.Semaphore(0)
    own = redis.Redis(unix_socket_path=valkey.removeprefix("unix://"), client_name="to-be-cut")
    notices = Notices(own, "channel", "server", heard.release)
    try:
        assert heard.acquire(timeout=within(10))
        kept: Any = client
        for each in kept.client_list():
            if each["name"] == "to-be-cut":
                kept.client_kill_filter(_id=each["id"])
        # Nobody has sent anything.
        assert heard.acquire(timeout=within(10))
    finally:
        notices.close()


# An answer that is lost


def versions_after(server: ValkeyState, proxy: Proxy, session: str, fault: Any) -> tuple[str, list[int]]:
    """What a caller is told whose write meets a fault, and the versions that there are then."""
    proxy.lose(fault)
    try:
        told = str(server.set_variable(session, "x", 1, expected_version=0))
    except StateError as error:
        told = type(error).__name__
    assert proxy.happened.is_set()
    return told, [version.version for version in server.get_variable_history(session, "x")]


def test_a_commit_whose_answer_is_lost_is_found(open_server: Open, proxy: Proxy) -> None:
    server = open_server(proxy.url)
    begin(server, "after")
    assert versions_after(server, proxy, "after", "after") == ("1", [1, 0])


def test_a_commit_that_did_not_arrive_can_be_repeated(open_server: Open, proxy: Proxy) -> None:
    server = open_server(proxy.url)
    begin(server, "before")
    assert versions_after(server, proxy, "before", "before") == ("StorageError", [0])
    assert server.set_variable("before", "x", 1, expected_version=0) == 1


def test_a_client_that_sends_again_would_be_noticed(
    open_server: Open, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: the connections that append keep the retries of the driver, which repeats what was carried out."""
    set_retry = connection.Connection.__init__

    def keep(self: connection.Connection, client: redis.Redis, *, retries: int) -> None:
        set_retry(self, client, retries=3)

    monkeypatch.setattr(connection.Connection, "__init__", keep)
    server = open_server(proxy.url)
    begin(server, "again")
    told, versions = versions_after(server, proxy, "again", "after")
    assert (told, versions) == ("VersionConflictError", [1, 0]), "refused, they say, but it stands"


def arrives_late(server: ValkeyState, other: ValkeyState, proxy: Proxy, session: str) -> list[int]:
    """Have an append arrive after its caller was told that nothing was stored. Return the versions that there are."""
    begin(server, session)
    proxy.lose("held")
    with pytest.raises(StorageError):
        server.set_variable(session, "x", 1)
    proxy.release()
    return [version.version for version in other.get_variable_history(session, "x")]


def test_a_call_that_arrives_after_it_was_settled_is_refused(open_server: Open, proxy: Proxy) -> None:
    server, other = open_server(proxy.url), open_server()
    assert arrives_late(server, other, proxy, "late") == [0]
    assert server.set_variable("late", "x", 1) == 1


def test_settling_without_the_fence_would_be_noticed(
    open_server: Open, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: what was not answered is looked up, but may still arrive."""
    server, other = open_server(proxy.url), open_server()
    call = connection.Connection.call

    def without(self: connection.Connection, function: str, *words: Any) -> Any:
        return server._store._leases.token.encode() if function == "settle" else call(self, function, *words)

    monkeypatch.setattr(connection.Connection, "call", without)
    assert arrives_late(server, other, proxy, "unfenced") == [1, 0], "nothing was written, they say, but it stands"


def test_executions_go_on_when_a_commit_was_settled(open_server: Open, proxy: Proxy) -> None:
    server, other = open_server(proxy.url), open_server()
    begin(server, "running")
    server.run(BeginExecution("running", "tool"))
    proxy.lose("after")
    server.set_variable("running", "x", 1)
    assert proxy.happened.is_set()
    other._shared.sweep()
    assert len(other.run(ReadState("running")).executions) == 1


# Keys that somebody else has written to


def test_the_function_checks_everything_before_it_writes(
    open_server: Open, client: redis.Redis, valkey_prefix: str
) -> None:
    assert_refused_whole(open_server(), client, valkey_prefix)


def assert_refused_whole(server: ValkeyState, client: redis.Redis, prefix: str) -> None:
    """Have one of the last keys that a commit writes be of another type."""
    begin(server, "mine")
    (key,) = client.scan_iter(f"{{{prefix}}}:q:*")
    client.set(key, "not a hash")
    before = content(client, prefix)
    with pytest.raises(DamagedSessionError, match="is a string"):
        server.set_variable("mine", "x", 1)
    assert content(client, prefix) == before
    client.delete(key)
    assert server.set_variable("mine", "x", 1) == 1


def test_a_function_that_writes_before_it_checks_would_be_noticed(
    open_server: Open, client: redis.Redis, valkey_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = "    local fault = fault_of(command, seen)\n    if fault then return nil, fault end\n"
    written = "    commands[#commands + 1] = command\n"
    assert checked in connection._SOURCE
    assert written in connection._SOURCE
    planted = connection._SOURCE.replace(written, "    redis.call(unpack(command))\n")
    monkeypatch.setattr(connection, "_SOURCE", planted)
    monkeypatch.setattr(connection, "_LIBRARY", "dspex_planted")
    with pytest.raises(AssertionError):
        assert_refused_whole(open_server(), client, valkey_prefix)


def test_an_entry_of_another_program_is_noticed(open_server: Open, client: redis.Redis, valkey_prefix: str) -> None:
    server = open_server()
    begin(server, "trimmed")
    state = server.run(ReadState("trimmed"))
    client.xadd(f"{{{valkey_prefix}}}:h:{state.session.sequence}", {"what": "ever"}, id="99999999-0")
    before = content(client, valkey_prefix)
    with pytest.raises(
        DamagedSessionError, match=r"in the database is damaged \(.*has an entry.*a check of the database"
    ):
        server.set_variable("trimmed", "x", 1)
    assert content(client, valkey_prefix) == before


def test_functions_that_are_gone_are_loaded_again(open_server: Open, client: redis.Redis) -> None:
    server = open_server()
    begin(server, "functions")
    for library in client.function_list():
        client.function_delete(library[1])
    assert server.set_variable("functions", "x", 1) == 1


# Size


def test_a_group_is_cut_into_calls_that_are_not_too_large(
    valkey: str, valkey_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = ValkeyLog(lambda: redis.Redis.from_url(valkey), prefix=valkey_prefix)
    groups, origin = SharedGroups(log), Origin("ada", "test")

    def write(commands: Iterable[Command[Any]]) -> list[Any]:
        return [outcome.result for outcome in groups.write_group([Job(command, origin) for command in commands])]

    try:
        write([InitializeSession("large")])
        write(RegisterVariable("large", name, "string", Value('""')) for name in "abcdefgh")
        sizes: list[int] = []
        append = ValkeyLog._append

        def count(self: ValkeyLog, commands: Any, *words: Any, **named: Any) -> None:
            sizes.append(commands.size_bytes)
            append(self, commands, *words, **named)

        monkeypatch.setattr(ValkeyLog, "_append", count)
        monkeypatch.setattr(valkey_log, "CALL_BYTES", 30_000)
        assert write(SetVariable("large", name, Value(f'"{"x" * 9_000}"')) for name in "abcdefgh") == [1] * 8
        assert len(sizes) == 4
        assert max(sizes) < 30_000
    finally:
        groups.close()


# Servers that overtake each other


def test_a_server_that_others_always_overtake_gets_its_turn(open_server: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast = open_server(), open_server()
    begin(slow, "s")
    log = slow._shared.log
    assert isinstance(log, ValkeyLog)
    store, written = log._store, list[Future[Any]]()

    def be_overtaken() -> None:
        written.append(fast.submit(SetVariable("s", "x", Value("1"))))
        # While the turn is the slow one's, this waits.
        with suppress(TimeoutError):
            written[-1].result(0.5)
        store()

    monkeypatch.setattr(log, "_store", be_overtaken)
    slow.register_variable("s", "y", "integer", 0)
    assert len(written) == valkey_log._OFTEN + 1
    assert [each.exception(within(10)) for each in written] == [None] * len(written)
    assert fast.get_variable("s", "x").version == len(written)
