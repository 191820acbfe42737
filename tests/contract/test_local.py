"""The contract on session state in memory."""

import os
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import ClassVar

import pytest
from freezegun import freeze_time

from dspex_persist import Context, EmbeddedState, LocalState, clock, connect, errors, open_audit
from dspex_persist.audit import CommitQuery, ExecutionQuery, HistoryQuery, SessionQuery
from dspex_persist.audit.report import gather, render
from dspex_persist.clock import EARLIEST
from dspex_persist.cognitive.errors import ContextClosedError
from dspex_persist.state.abilities import Durable, Importable, KeepsOrder, Prunable
from dspex_persist.state.commands import ReadState, SetVariable
from dspex_persist.state.model import Value
from dspex_persist.state.options import SessionOptions
from dspex_persist.state.provider import StateProvider
from dspex_persist.testing.audit_contract import AuditContract, write_x
from dspex_persist.testing.contract_tools import CONTRACT_TOOLS
from dspex_persist.testing.derive_contract import DeriveContract
from dspex_persist.testing.fork_contract import ForkContract
from dspex_persist.testing.hold_contract import HoldContract
from dspex_persist.testing.import_contract import ImportContract
from dspex_persist.testing.order_contract import OrderContract
from dspex_persist.testing.provider_contract import SMALL_LIMITS, ClosingContract, LeaseContract, ProviderContract
from dspex_persist.testing.recording_contract import RecordingContract
from dspex_persist.testing.restore_contract import RestoreContract
from dspex_persist.testing.stream_contract import StreamContract
from dspex_persist.testing.tool_contract import ToolContract
from dspex_persist.testing.transaction_contract import TransactionContract


@pytest.fixture(scope="class")
def shared(request: pytest.FixtureRequest) -> Iterator[LocalState]:
    """One for a class, whose tests use separate sessions."""
    with LocalState(request.cls.options) as provider:
        yield provider


class Local:
    """The fixtures that the contract requires."""

    options: ClassVar[SessionOptions] = SessionOptions(limits=SMALL_LIMITS)

    @pytest.fixture
    def provider(self, shared: LocalState) -> StateProvider:
        return shared


class TestLocal(Local, ProviderContract, OrderContract):
    """The provider contract without the tests that need durability."""


class TestLocalLeases(Local, LeaseContract):
    """The contract of leases that expire."""

    options = SessionOptions(optimization_lease_s=LeaseContract.lease_s)


class TestLocalHistory(
    Local, AuditContract, DeriveContract, RecordingContract, ImportContract, HoldContract, ForkContract, RestoreContract
):
    """The contract of audits, recordings, imports, holds and forks."""


class TestLocalAudits(Local, AuditContract):
    """The contract of audits, of sessions that were imported."""

    @pytest.fixture
    def audited(self, provider: StateProvider, session: str) -> str:
        imported = f"{session}-imported"
        with LocalState() as source:
            source.initialize_session(imported)
            write_x(source, imported)
            header, commits = source.record(imported)
            Importable.of(provider).import_session(header, commits)
        return imported


class TestLocalClosing(ClosingContract):
    """The contract of closing."""

    @pytest.fixture
    def provider(self) -> Iterator[StateProvider]:
        with LocalState() as provider:
            yield provider


@pytest.fixture(scope="class")
def with_tools() -> Iterator[LocalState]:
    """One for a class, with the contract's tools."""
    with LocalState(tools=CONTRACT_TOOLS) as provider:
        yield provider


class TestLocalTools(ToolContract):
    """The contract of tools, which run in this process."""

    @pytest.fixture
    def provider(self, with_tools: LocalState) -> StateProvider:
        return with_tools


class TestLocalTransactions(TransactionContract):
    """The contract of transactions."""

    @pytest.fixture
    def provider(self, with_tools: LocalState) -> StateProvider:
        return with_tools


class TestLocalStreams(StreamContract):
    """The contract of streaming tools."""

    @pytest.fixture
    def provider(self, with_tools: LocalState) -> StateProvider:
        return with_tools


@pytest.mark.parametrize("url", ["memory:", ":memory:"])
def test_connect_opens_an_empty_one_each_time(url: str) -> None:
    with connect(url, session_ttl_s=60, tools=CONTRACT_TOOLS) as first, connect(url) as second:
        assert isinstance(first, LocalState)
        assert isinstance(first, KeepsOrder)
        assert not isinstance(first, Durable | Prunable)
        assert "audit" in first.capabilities
        first.initialize_session("s")
        first.register_variable("s", "a", "integer", 1)
        assert first.execute_tool("s", "add", {"amount": 2}).success
        assert first.get_value("s", "a") == 3
        assert not second.heartbeat("s")
    with pytest.raises(errors.EngineClosedError):
        first.get_session("s")
    first.close()


def test_missing_abilities_are_reported() -> None:
    with pytest.raises(TypeError, match="a state in memory has no option durability; the options are actor, limits"):
        connect("memory:", durability="full")
    with pytest.raises(errors.InvalidArgumentError, match="sweep_interval_s"):
        connect("memory:", sweep_interval_s=0)
    with pytest.raises(
        errors.InvalidArgumentError,
        match=r"only the process that has a state in memory can query it: provider\.audit\(\)",
    ):
        open_audit("memory:")


@pytest.mark.parametrize("name", ["memory:", ":memory:"])
def test_its_name_never_creates_a_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for opens in (EmbeddedState, lambda path: connect(Path(path)), lambda path: open_audit(Path(path))):
        with pytest.raises(errors.NotADatabaseError, match=r"use LocalState\(\) or connect\('memory:'\) instead"):
            opens(name)
    assert list(tmp_path.iterdir()) == []
    connect(name).close()
    with (
        connect("memory:") as state,
        pytest.raises(errors.UnsupportedError, match="pruning; keep the sessions in a dat"),
    ):
        Prunable.of(state)


def test_a_session_lives_for_its_ttl() -> None:
    with freeze_time("2030-01-01") as frozen, LocalState(SessionOptions(session_ttl_s=100)) as state:
        state.initialize_session("s")
        state.register_variable("s", "x", "integer", 1)
        for _ in range(3):
            frozen.tick(timedelta(seconds=99))
            assert state.get_value("s", "x") == 1
        watch = state.watch("s")
        frozen.tick(timedelta(seconds=100))
        assert state.heartbeat("s") is False
        state.initialize_session("s")
        with pytest.raises(errors.SessionNotFoundError):
            watch.pull()


def test_an_ended_session_is_kept_only_for_its_watches() -> None:
    with LocalState() as state:
        log = state.engine._groups.log
        state.initialize_session("s")
        state.register_variable("s", "x", "integer", 0)
        session = state.run(ReadState("s"))
        watch = state.watch("s")
        written = [state.submit(SetVariable("s", "x", Value(str(number)))) for number in range(1000)]
        assert [future.result() for future in written] == list(range(1, 1001))
        state.cleanup_session("s")
        log.reclaim(EARLIEST, state.engine._groups.hub.is_watched)
        assert [update.variable.version for update in watch] == list(range(1, 1001))
        watch.close()
        assert log.changes_after(session, 0)
        log.reclaim(EARLIEST, state.engine._groups.hub.is_watched)
        assert not log.changes_after(session, 0)


def test_the_history_of_an_ended_session_can_be_queried_until_the_next_sweep_but_one() -> None:
    with LocalState() as state, state.audit() as audit:
        state.initialize_session("s")
        state.cleanup_session("s")
        state.engine._groups.sweep()
        assert [each.ended_sequence for each in audit.iterate(SessionQuery(session="s"))] == [2]
        state.engine._groups.sweep()
        with pytest.raises(errors.NotInHistoryError):
            list(audit.iterate(SessionQuery(session="s")))
        assert audit.head() == 2


def test_a_session_that_has_moved_is_audited_at_both_places(tmp_path: Path) -> None:
    with LocalState() as state, Context("s", state) as ctx:
        ctx.define("x", 1, reason="begin")
        ctx.set("x", 2, actor="ada")
        ctx.ensure_persistent(tmp_path / "s.db")
        ctx.set("x", 3)
        with state.audit() as before, open_audit(tmp_path / "s.db") as after:
            entries = [list(audit.iterate(HistoryQuery(session="s", newest_first=False))) for audit in (before, after)]
            shown = [[(each.value, each.actor, each.reason, each.created_at) for each in some] for some in entries]
            assert shown[1][:2] == shown[0]
            (ended,) = before.iterate(SessionQuery(session="s"))
            assert ended.ended_sequence == before.head()


def test_a_context_asks_its_backend_about_the_past(tmp_path: Path) -> None:
    with Context("s", tools={"add": CONTRACT_TOOLS["add"]}) as ctx:
        ctx.define("a", 1, reason="begin")
        ctx.call("add", amount=2)
        audits = [ctx.audit()]
        shown = [[(each.value, each.tool, each.reason) for each in audits[0].iterate(HistoryQuery(session="s"))]]
        report = render(gather(audits[0], "s"))
        assert "The hash of commit" not in report
        ctx.ensure_persistent(tmp_path / "s.db")
        audits.append(ctx.audit())
        shown.append([(each.value, each.tool, each.reason) for each in audits[1].iterate(HistoryQuery(session="s"))])
        assert "The hash of commit" in render(gather(audits[1], "s"))
        assert shown[0] == shown[1] == [(Value("3"), "add", None), (Value("1"), None, "begin")]
        with pytest.raises(errors.EngineClosedError):
            audits[0].head()
    with pytest.raises(ContextClosedError):
        ctx.audit()


def test_an_audit_ends_with_the_sessions() -> None:
    state = LocalState()
    audit = state.audit()
    state.close()
    for ask in (audit.head, lambda: audit.state("s"), lambda: audit.page(SessionQuery()), state.audit):
        with pytest.raises(errors.EngineClosedError):
            ask()


def test_audits_while_others_write() -> None:
    with LocalState(tools=CONTRACT_TOOLS) as state, state.audit() as audit:
        state.initialize_session("s")
        state.register_variable("s", "a", "integer", 0)
        ends = threading.Event()

        def write() -> None:
            for number in range(200):
                state.execute_tool("s", "add", {"amount": 1})
                state.register_variable("s", f"v{number}", "integer", number)
            ends.set()

        writer = threading.Thread(target=write)
        writer.start()
        while not ends.is_set():
            head = audit.head()
            versions = [
                each.version for each in audit.iterate(HistoryQuery(session="s", variable="a", until=str(head)))
            ]
            assert versions == list(range(len(versions) - 1, -1, -1))
            assert len(audit.state("s", str(head))) >= 1
            assert all(each.sequence <= head for each in audit.iterate(CommitQuery(until=str(head))))
        writer.join()
        assert len(list(audit.iterate(ExecutionQuery(session="s")))) == 200


def test_outcomes_are_kept_for_a_while() -> None:
    with freeze_time("2030-01-01") as frozen, LocalState() as state:
        state.initialize_session("s")
        state.register_variable("s", "x", "integer", 0)
        assert [state.set_variable("s", "x", 1, idempotency_key="k") for _ in range(2)] == [1, 1]
        frozen.tick(timedelta(days=8))
        state.engine._groups.log.reclaim(clock.now() - timedelta(days=7), lambda _: False)
        assert state.set_variable("s", "x", 1, idempotency_key="k") == 2


def test_many_threads_write_one_after_the_other() -> None:
    with LocalState() as state:
        state.initialize_session("s")
        state.register_variable("s", "x", "integer", 0)
        versions: list[int] = []

        def write() -> None:
            versions.extend(state.set_variable("s", "x", number) for number in range(50))

        threads = [threading.Thread(target=write) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(versions) == list(range(1, 401))
        assert [entry.version for entry in state.get_variable_history("s", "x", 500)] == list(range(400, -1, -1))


def test_a_forked_child_is_refused() -> None:
    with LocalState() as state:
        state.initialize_session("s")
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                state.initialize_session("s")
                os.write(writer, b"answered")
            except errors.ForkedProcessError as error:
                os.write(writer, str(error).encode())
            finally:
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as output:
            assert output.read().startswith(b"session state in memory belongs to the process")
        os.waitpid(child, 0)
        assert state.heartbeat("s")
