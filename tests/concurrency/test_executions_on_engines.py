"""Tools on two servers that share a real engine: PostgreSQL, and Redis or Valkey."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from dspex_persist.infra.access.tokens import Allowance
from dspex_persist.state.commands import ExecuteTool, ReadState
from dspex_persist.state.errors import (
    ExecutionElsewhereError,
    ExecutionNotFoundError,
    QuotaExceededError,
    SessionBusyError,
)
from dspex_persist.state.log_store import FencedError
from dspex_persist.state.model import ExecutionStatus, Origin
from dspex_persist.state.shared import SharedGroups, SharedState
from dspex_persist.state.shared_log import SharedLog
from dspex_persist.state.tools.runner import ToolRunner
from dspex_persist.state.tools.with_tools import WithTools
from dspex_persist.state.values import encode_arguments
from tests.concurrency.test_shared_executions import SESSION, Stage, ended, outcome_of, toolbox
from tests.deadline import within

Open = Callable[..., SharedLog]


@pytest.fixture(params=["postgresql", "valkey"])
def open_log(request: pytest.FixtureRequest) -> Open:
    """Opens the log of another server, with a lease of some seconds."""
    if request.param == "postgresql":
        from dspex_persist.state.store.postgres.postgres_log import PostgresLog

        url = request.getfixturevalue("postgresql_url")
        return lambda lease_s: PostgresLog(url, lease_s=lease_s)
    import redis

    from dspex_persist.state.valkey.valkey_log import ValkeyLog

    url, prefix = request.getfixturevalue("valkey"), request.getfixturevalue("valkey_prefix")
    return lambda lease_s: ValkeyLog(lambda: redis.Redis.from_url(url), prefix=prefix, lease_s=lease_s)


class Two:
    """Two servers with tools."""

    def __init__(self, open_log: Open, lease_s: float) -> None:
        self.stage = Stage()
        self.engines = [SharedState(SharedGroups(open_log(lease_s)), sweep_interval_s=0.05) for _ in range(2)]
        self.servers = [WithTools(each, toolbox(self.stage)) for each in self.engines]
        self.servers[0].initialize_session(SESSION)
        self.servers[0].register_variable(SESSION, "n", "integer", 0)

    def execute(self, server: int, name: str, key: str | None = None, **arguments: object) -> Any:
        command = ExecuteTool(SESSION, name, encode_arguments(arguments), {}, None)
        return self.servers[server].submit(command, Origin("test", "ExecuteTool", idempotency_key=key))

    def running(self) -> list[str]:
        return list(self.servers[1].run(ReadState(SESSION)).executions)

    def seek(self, server: int, execution_id: str) -> str:
        runner = self.servers[server].runner
        return runner.start(runner.running.seek(execution_id)).result(within(10)).execution_id


@contextmanager
def two(open_log: Open, lease_s: float = 30.0) -> Iterator[Two]:
    servers = Two(open_log, lease_s)
    try:
        yield servers
    finally:
        servers.stage.go.set()
        for each in servers.servers:
            each.close()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + within(10)
    while not condition():
        assert time.monotonic() < deadline, "it has not happened"
        time.sleep(0.01)


def test_executions_of_another_server(open_log: Open) -> None:
    with two(open_log) as servers:
        servers.engines[0].announce("10.0.0.7:50051")
        servers.engines[0]._shared.log.renew()
        held = servers.execute(0, "hold", key="k", value=7)
        servers.stage.wait_begun()
        (execution_id,) = servers.running()
        assert servers.seek(0, execution_id) == execution_id
        with pytest.raises(ExecutionElsewhereError) as raised:
            servers.seek(1, execution_id)
        assert raised.value.address == "10.0.0.7:50051"
        for unknown in (f"{execution_id}0", "exec_1_ab", "no id\0"):
            with pytest.raises(ExecutionNotFoundError):
                servers.seek(1, unknown)
        again = servers.execute(1, "hold", key="k", value=7)
        servers.stage.go.set()
        assert outcome_of(held).execution_id == outcome_of(again).execution_id == execution_id


@pytest.mark.parametrize("waits_on", [0, 1])
def test_who_waits_for_an_execution_that_fails_has_its_failure(
    open_log: Open, waits_on: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the server that runs it as on another one; who comes later tries again."""
    joins, join = threading.Event(), ToolRunner._join

    async def noted(*arguments: Any) -> Any:
        joins.set()
        return await join(*arguments)

    monkeypatch.setattr(ToolRunner, "_join", noted)
    with two(open_log) as servers:
        held = servers.execute(0, "hold_and_fail", key="k")
        servers.stage.wait_begun()
        (execution_id,) = servers.running()
        again = servers.execute(waits_on, "hold_and_fail", key="k")
        assert joins.wait(within(10))
        servers.stage.go.set()
        for outcome in map(outcome_of, (held, again)):
            assert (outcome.status, outcome.execution_id) == (ExecutionStatus.FAILED, execution_id)
            assert (outcome.error_code, str(outcome.error)) == ("TOOL_FAILED", "ValueError: no luck")
        assert servers.stage.ended == ["hold_and_fail"]
        later = outcome_of(servers.execute(waits_on, "hold_and_fail", key="k"))
        assert later.execution_id != execution_id


def test_turns_on_two_servers(open_log: Open) -> None:
    with two(open_log) as servers:
        turn = servers.execute(0, "in_turn", waits=True)
        servers.stage.wait_begun()
        assert isinstance(outcome_of(servers.execute(1, "alone")).error, SessionBusyError)
        waiting = servers.execute(1, "in_turn")
        servers.stage.go.set()
        assert [outcome_of(each).status for each in (turn, waiting)] == [ExecutionStatus.COMMITTED] * 2
        assert servers.stage.most == 1
        assert outcome_of(servers.execute(1, "alone")).status is ExecutionStatus.COMMITTED


def test_limits_of_an_identity_count_what_it_has_on_other_servers(open_log: Open) -> None:
    with two(open_log) as servers:
        for engine in servers.engines:
            engine.limit_storage(lambda _: Allowance(sessions=2))
        one, other = servers.servers
        one.initialize_session("a", actor="ada")
        other.initialize_session("b", actor="ada")
        for server in (one, other):
            with pytest.raises(QuotaExceededError):
                server.initialize_session("c", actor="ada")
        other.cleanup_session("a")
        one.initialize_session("c", actor="ada")


def test_a_server_that_does_not_renew_its_lease(open_log: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    with two(open_log, lease_s=1.0) as servers:
        held = servers.execute(0, "hold_async", value=7)
        servers.stage.wait_begun()
        monkeypatch.setattr(servers.engines[0]._shared.log, "renew", lambda: None)
        wait_until(lambda: not servers.running())
        # Until then nothing need have told it that it seems dead.
        monkeypatch.undo()
        assert ended(held) is ExecutionStatus.INTERRUPTED
        wait_until(lambda: servers.stage.ended == ["cancelled"])
        wait_until(lambda: ended(servers.execute(0, "increment")) is ExecutionStatus.COMMITTED)
        assert servers.servers[1].get_variable(SESSION, "n").value.json == "1"


def test_who_looks_for_servers_that_have_died_never_finds_itself(open_log: Open) -> None:
    """It may be the only one that lives, and late because the database was away."""
    opened = [open_log(0.1) for _ in range(2)]
    one, died = opened
    try:
        died.announce("10.0.0.7:50051")
        died.renew()
        found: list[str] = []
        wait_until(lambda: bool(found.extend(one.fence()) or found))
        assert found == ["10.0.0.7:50051"]
        # Its lease began before, and is over, too.
        one.renew()
        with pytest.raises(FencedError):
            died.renew()
    finally:
        for each in opened:
            each.close()
