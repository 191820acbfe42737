"""Tools on several servers that share a log: of servers that die, that seem dead to others, and of those others."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest

from dspex_persist import connect
from dspex_persist.cognitive.tool_context import ToolContext
from dspex_persist.cognitive.toolbox import Toolbox
from dspex_persist.cognitive.tools import tool
from dspex_persist.state.abilities import Derives, Holdable, Importable
from dspex_persist.state.commands import ExecuteTool, ReadState
from dspex_persist.state.errors import (
    ExecutionElsewhereError,
    ExecutionNotFoundError,
    SessionBusyError,
    StateError,
    ToolInterruptedError,
    ToolTimedOutError,
    TransactionEndedError,
    UnavailableError,
    UnsupportedError,
)
from dspex_persist.state.model import ExecutionStatus, Origin, ToolOutcome
from dspex_persist.state.tools.session import LM_CALLS, current_session
from dspex_persist.state.tools.with_tools import WithTools
from dspex_persist.state.values import encode_arguments
from dspex_persist.testing.shared_memory_log import SharedMemoryLog
from tests.concurrency.shared_servers import Chaos, Servers
from tests.deadline import within

SESSION = "session"
SHORT: dict[str, Any] = {"lease_s": 0.5, "sweep_s": 0.03}
"""Leases of servers that may be taken for dead. Those of other tests hold for longer than these take."""


@dataclass
class Stage:
    """What the tools of a test wait for, and what they have done."""

    begun: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    go: threading.Event = field(default_factory=threading.Event)
    ended: list[str] = field(default_factory=list)
    running: int = 0
    most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def counted(self) -> Iterator[None]:
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
        yield
        with self.lock:
            self.running -= 1

    def wait_begun(self) -> None:
        assert self.begun.acquire(timeout=within(10)), "no tool has begun"


def toolbox(stage: Stage) -> Toolbox:
    @tool
    def hold(ctx: ToolContext, value: int) -> int:
        ctx["n"] = value
        stage.begun.release()
        assert stage.go.wait(within(30))
        stage.ended.append("hold")
        return value

    @tool
    def hold_and_fail() -> None:
        stage.begun.release()
        assert stage.go.wait(within(30))
        stage.ended.append("hold_and_fail")
        raise ValueError("no luck")

    @tool
    async def hold_async(ctx: ToolContext, value: int) -> int:
        ctx["n"] = value
        stage.begun.release()
        try:
            while not stage.go.is_set():  # noqa: ASYNC110 -- a thread sets it
                await asyncio.sleep(0.005)
        except asyncio.CancelledError:
            stage.ended.append("cancelled")
            raise
        return value

    @tool(concurrency="queue")
    def in_turn(ctx: ToolContext, waits: bool = False) -> int:
        with stage.counted():
            stage.begun.release()
            assert not waits or stage.go.wait(within(30))
            ctx["n"] += 1
            return int(ctx["n"])

    @tool(concurrency="reject")
    def alone(ctx: ToolContext) -> int:
        return int(ctx["n"])

    @tool(retries=100)
    def increment(ctx: ToolContext) -> int:
        ctx["n"] += 1
        return int(ctx["n"])

    @tool
    def ask_model(ctx: ToolContext) -> int:
        session = current_session.get()
        assert session is not None
        session.check_budgets()
        session.record(LM_CALLS, {"model": "m", "usage": {"m": {"prompt_tokens": 40, "completion_tokens": 20}}})
        return 60

    return Toolbox.of([hold, hold_and_fail, hold_async, in_turn, alone, increment, ask_model])


class Tools:
    """Servers with tools."""

    def __init__(self, servers: Servers, stage: Stage) -> None:
        self.servers = servers
        self.stage = stage
        self.with_tools = [WithTools(state, toolbox(stage)) for state in servers.states]
        self.wait_until(self._has_begun)

    def _has_begun(self) -> bool:
        # On a busy machine it, too, may be taken for dead.
        with suppress(UnavailableError):
            self.with_tools[0].initialize_session(SESSION)
            self.with_tools[0].register_variable(SESSION, "n", "integer", 0)
            return True
        return False

    def commits(self, server: int, name: str = "increment") -> bool:
        """Whether an execution commits."""
        return ended(self.execute(server, name)) is ExecutionStatus.COMMITTED

    def execute(
        self, server: int, name: str, *, key: str | None = None, timeout_s: float | None = None, **arguments: object
    ) -> "Future[ToolOutcome]":
        command = ExecuteTool(SESSION, name, encode_arguments(arguments), {}, timeout_s)
        return self.with_tools[server].submit(command, Origin("test", "ExecuteTool", idempotency_key=key))

    def value(self) -> object:
        return self.with_tools[-1].get_variable(SESSION, "n").value.json

    def running(self) -> list[str]:
        return list(self.with_tools[-1].run(ReadState(SESSION)).executions)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + within(10)
        while not condition():
            assert time.monotonic() < deadline, "it has not happened"
            time.sleep(0.005)


@contextmanager
def serving(count: int = 2, **options: Any) -> Iterator[Tools]:
    with Servers(count, **options) as servers:
        tools = Tools(servers, Stage())
        try:
            yield tools
        finally:
            tools.stage.go.set()
            for log in servers.logs:
                log.go_on()
            for each in tools.with_tools:
                each.close()


def outcome_of(future: "Future[ToolOutcome]") -> ToolOutcome:
    return future.result(within(20))


# --- Servers that have died, and those that only seemed to ---


def test_the_executions_of_a_dead_server_are_interrupted_by_another() -> None:
    with serving(**SHORT) as tools:
        tools.execute(0, "hold", value=1)
        tools.stage.wait_begun()
        assert len(tools.running()) == 1
        tools.servers.logs[0].stop()
        tools.wait_until(lambda: not tools.running())
        assert tools.value() == "0"
        tools.wait_until(lambda: tools.commits(1))


@pytest.mark.parametrize("name", ["hold", "hold_async"])
def test_a_server_that_seemed_dead_stops_its_tools_and_goes_on(name: str) -> None:
    with serving(**SHORT) as tools:
        held = tools.execute(0, name, value=1)
        tools.stage.wait_begun()
        tools.servers.logs[0].stop()
        tools.wait_until(lambda: not tools.running())
        tools.servers.logs[0].go_on()
        outcome = outcome_of(held)
        assert outcome.status is ExecutionStatus.INTERRUPTED
        assert isinstance(outcome.error, ToolInterruptedError)
        assert "dead" in str(outcome.error)
        tools.stage.go.set()
        tools.wait_until(lambda: tools.commits(0))
        assert tools.value() == "1"
        tools.wait_until(lambda: tools.stage.ended == ["cancelled" if name == "hold_async" else "hold"])


def test_the_end_of_an_execution_is_refused_that_others_have_interrupted() -> None:
    """Its code has returned before its server heard of anything."""
    with serving(**SHORT) as tools:
        held = tools.execute(0, "hold", value=1)
        tools.stage.wait_begun()
        tools.servers.logs[0].stop()
        tools.wait_until(lambda: not tools.running())
        tools.stage.go.set()
        tools.wait_until(lambda: tools.stage.ended == ["hold"])
        tools.servers.logs[0].go_on()
        with suppress(StateError):
            assert outcome_of(held).status is ExecutionStatus.INTERRUPTED
        assert tools.value() == "0"


def test_a_transaction_of_a_server_that_seemed_dead_has_ended() -> None:
    with serving(**SHORT) as tools:
        transaction = tools.with_tools[0].begin_transaction(SESSION)
        tools.servers.logs[0].stop()
        tools.wait_until(lambda: not tools.running())
        tools.servers.logs[0].go_on()
        tools.wait_until(lambda: transaction.status != "")
        with pytest.raises(TransactionEndedError):
            transaction.commit()


def test_a_session_that_ends_on_one_server_ends_what_runs_on_another() -> None:
    with serving() as tools:
        held = tools.execute(0, "hold_async", value=1)
        tools.stage.wait_begun()
        tools.with_tools[1].cleanup_session(SESSION)
        outcome = outcome_of(held)
        assert outcome.status is ExecutionStatus.INTERRUPTED
        assert "the session ended while the tool ran" in str(outcome.error)
        tools.wait_until(lambda: tools.stage.ended == ["cancelled"])


def executions_after_a_pause(tools: Tools) -> ExecutionStatus | None:
    """Return how an execution ends that begins on a server that was taken for dead, while others sweep."""
    log, other = tools.servers.logs
    log.stop()
    tools.wait_until(lambda: not log.has_lease())
    log.go_on()
    tools.wait_until(lambda: log.has_lease())
    held = tools.execute(0, "hold", value=1)
    tools.stage.wait_begun()
    sweeps, fence = threading.Semaphore(0), other.fence

    def counted() -> Sequence[str]:
        fenced = fence()
        sweeps.release()
        return fenced

    other.fence = counted  # type: ignore[method-assign]
    for _ in range(3):
        assert sweeps.acquire(timeout=within(10))
    tools.stage.go.set()
    return outcome_of(held).status


def test_a_server_that_seemed_dead_runs_tools_under_another_lease() -> None:
    with serving(**SHORT) as tools:
        assert executions_after_a_pause(tools) is ExecutionStatus.COMMITTED


def test_a_lease_without_an_epoch_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    has_lease = SharedMemoryLog.has_lease
    with serving(**SHORT) as tools:
        monkeypatch.setattr(SharedMemoryLog, "_check_lease", lambda _: None)
        log, _ = tools.servers.logs
        # It goes on as if nothing had happened.
        stopped = threading.Event()
        monkeypatch.setattr(log, "has_lease", lambda: has_lease(log) or stopped.is_set(), raising=False)
        monkeypatch.setattr(log, "go_on", lambda go_on=log.go_on: (stopped.set(), go_on()))
        monkeypatch.setattr(log, "renew", lambda: None)
        assert executions_after_a_pause(tools) is ExecutionStatus.INTERRUPTED


def test_increments_are_counted_once_while_servers_stop_and_lose_answers() -> None:
    with serving(3, lease_s=0.2, sweep_s=0.05) as tools:
        with Chaos(tools.servers, seed=1, most_s=0.03, losses=0.2) as chaos:
            futures = [tools.execute(number % 3, "increment") for number in range(24)]
            ends = [ended(future) for future in futures]
        count = int(str(tools.value()))
        committed = ends.count(ExecutionStatus.COMMITTED)
        assert committed <= count <= committed + ends.count(None)
        assert committed > 0
        assert chaos.stops > 0
        tools.wait_until(lambda: not tools.running())


def ended(future: "Future[ToolOutcome]") -> ExecutionStatus | None:
    """How an execution has ended, if its caller knows."""
    try:
        return outcome_of(future).status
    except StateError:
        return None


# --- Executions on other servers ---


def test_an_execution_is_named_with_the_server_that_runs_it() -> None:
    with serving() as tools:
        tools.servers.states[0].announce("10.0.0.7:50051")
        held = tools.execute(0, "hold", value=1)
        tools.stage.wait_begun()
        (execution_id,) = tools.running()

        def seek(server: int) -> Any:
            runner = tools.with_tools[server].runner
            return runner.start(runner.running.seek(execution_id)).result(within(10))

        assert seek(0).execution_id == execution_id
        with pytest.raises(ExecutionElsewhereError, match=r"another server, 10\.0\.0\.7:50051") as raised:
            seek(1)
        assert raised.value.address == "10.0.0.7:50051"
        assert "advertise" in str(raised.value)
        tools.servers.states[0].announce("")
        with pytest.raises(ExecutionElsewhereError, match=r"runs on another server[^,]"):
            seek(1)
        tools.stage.go.set()
        outcome_of(held)
        with pytest.raises(ExecutionNotFoundError):
            seek(1)


def test_a_key_is_executed_once_whichever_servers_are_asked() -> None:
    with serving() as tools:
        first = tools.execute(0, "hold", key="k", value=7)
        tools.stage.wait_begun()
        again = tools.execute(1, "hold", key="k", value=7)
        late = tools.execute(1, "hold", key="k", value=7, timeout_s=0.05)
        assert isinstance(outcome_of(late).error, ToolTimedOutError)
        assert not again.done()
        tools.stage.go.set()
        one, other = outcome_of(first), outcome_of(again)
        assert (one.execution_id, one.result) == (other.execution_id, other.result)
        assert (one.repeated, other.repeated) == (False, True)
        assert tools.stage.ended == ["hold"]


def test_a_key_of_a_dead_server_is_executed_again() -> None:
    with serving(**SHORT) as tools:
        tools.execute(0, "hold", key="k", value=7)
        tools.stage.wait_begun()
        tools.servers.logs[0].stop()
        again = tools.execute(1, "hold", key="k", value=7)
        tools.stage.wait_begun()
        tools.stage.go.set()
        assert outcome_of(again).status is ExecutionStatus.COMMITTED


def test_turns_are_taken_across_servers() -> None:
    with serving(3) as tools:
        outcomes = [outcome_of(each) for each in [tools.execute(number % 3, "in_turn") for number in range(12)]]
        assert {each.status for each in outcomes} == {ExecutionStatus.COMMITTED}
        assert [each.attempts for each in outcomes] == [1] * 12, "they have met"
        assert (tools.stage.most, tools.value()) == (1, "12")


def test_a_tool_that_does_not_wait_is_refused_while_another_server_has_the_turn() -> None:
    with serving() as tools:
        held = tools.execute(0, "in_turn", waits=True)
        tools.stage.wait_begun()
        refused = outcome_of(tools.execute(1, "alone"))
        assert isinstance(refused.error, SessionBusyError)
        assert "on another server" in str(refused.error)
        late = outcome_of(tools.execute(1, "in_turn", timeout_s=0.05))
        assert isinstance(late.error, ToolTimedOutError)
        assert "on another server" in str(late.error)
        # It takes no turns.
        assert outcome_of(tools.execute(1, "increment")).status is ExecutionStatus.COMMITTED
        tools.stage.go.set()
        outcome_of(held)
        assert outcome_of(tools.execute(1, "alone")).status is ExecutionStatus.COMMITTED


def test_a_session_that_demands_turns_has_them_across_servers() -> None:
    with serving() as tools:
        one, other = tools.with_tools
        one.initialize_session(SESSION, {"dspex.concurrency": "reject"})
        recording = one.begin_recording(SESSION, "notes")
        assert outcome_of(tools.execute(1, "increment")).status is ExecutionStatus.COMMITTED
        recording.commit()
        with one.begin_transaction(SESSION):
            assert isinstance(outcome_of(tools.execute(1, "increment")).error, SessionBusyError)
            with pytest.raises(SessionBusyError):
                other.begin_transaction(SESSION)
        assert outcome_of(tools.execute(1, "increment")).status is ExecutionStatus.COMMITTED


def test_a_budget_counts_what_other_servers_have_used() -> None:
    with serving() as tools:
        tools.with_tools[0].initialize_session(SESSION, {"dspex.max_tokens": "150"})
        ends = [outcome_of(tools.execute(server, "ask_model")) for server in (0, 1, 0, 1)]
        assert [each.status for each in ends] == [*[ExecutionStatus.COMMITTED] * 3, ExecutionStatus.FAILED]
        assert "have used 180 tokens of a budget of 150" in str(ends[3].error)
        assert "have used 180 tokens" in str(outcome_of(tools.execute(0, "ask_model")).error)


# --- What takes one owner of the log ---


def test_functions_of_one_process_derive_nothing_from_what_others_write() -> None:
    with serving() as tools:
        with pytest.raises(UnsupportedError, match="derived variables"):
            Derives.of(tools.with_tools[0])
        with pytest.raises(UnsupportedError):
            Holdable.of(tools.with_tools[0])


@pytest.mark.parametrize("optimistic", [False, True], ids=["locking", "optimistic"])
def test_a_session_is_imported_while_others_write(monkeypatch: pytest.MonkeyPatch, optimistic: bool) -> None:
    with connect("memory:") as source, serving(optimistic=optimistic) as tools:
        source.initialize_session("moved")
        source.register_variable("moved", "a", "integer", 1)
        source.set_variable("moved", "a", 2)
        header, commits = source.record("moved")
        importing = Importable.of(tools.with_tools[0]).begin_import(header)
        for commit in commits:
            importing.add(commit)
        one, other = tools.with_tools
        log = tools.servers.logs[0]
        note_import = log.note_import

        def overtaken(first: int, last: int) -> None:
            """In the middle of it, unless the log is locked, others commit: once."""
            monkeypatch.setattr(log, "note_import", note_import)
            if optimistic:
                other.set_variable(SESSION, "n", 5)

        monkeypatch.setattr(log, "note_import", overtaken)
        importing.finish()
        assert other.get_variable("moved", "a").value.json == "2"
        other.set_variable("moved", "a", 3)
        assert one.get_variable("moved", "a").value.json == "3"
