"""The contract on the engine in this process, and tests that need a frozen clock."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest
from freezegun.api import FrozenDateTimeFactory

from dspex_persist.state import commands
from dspex_persist.state.embedded import EmbeddedState
from dspex_persist.state.errors import SessionNotFoundError, StateError, VariableLockedError, VersionConflictError
from dspex_persist.state.model import CommitChanges, Value
from dspex_persist.state.provider import StateProvider
from dspex_persist.state.store.session_store import StoreOptions
from dspex_persist.state.watch import Watch
from dspex_persist.testing.audit_contract import AuditContract
from dspex_persist.testing.contract_tools import CONTRACT_TOOLS
from dspex_persist.testing.derive_contract import DeriveContract
from dspex_persist.testing.durable_contract import DurableContract, DurableLeaseContract
from dspex_persist.testing.fork_contract import ForkContract
from dspex_persist.testing.hold_contract import HoldContract
from dspex_persist.testing.import_contract import ImportContract
from dspex_persist.testing.order_contract import OrderContract
from dspex_persist.testing.provider_contract import SMALL_LIMITS, ClosingContract, ProviderContract, Reopen
from dspex_persist.testing.prune_contract import PruneContract
from dspex_persist.testing.recording_contract import EndedRecordingContract, RecordingContract
from dspex_persist.testing.restore_contract import RestoreContract
from dspex_persist.testing.stream_contract import StreamContract
from dspex_persist.testing.tool_contract import ToolContract
from dspex_persist.testing.transaction_contract import TransactionContract
from tests.clocks import pass_s


class Owner:
    """The current owner of the database file."""

    def __init__(self, path: Path, options: StoreOptions) -> None:
        self._path = path
        self._options = options
        self.provider = self._open()

    def _open(self) -> EmbeddedState:
        return EmbeddedState(self._path, self._options)

    def reopen(self) -> EmbeddedState:
        """Close it and open it again."""
        self.provider.close()
        self.provider = self._open()
        return self.provider

    def get_open(self) -> EmbeddedState:
        """The provider; a new one if a test has crashed the last one, so that only that test fails."""
        with suppress(StateError):
            self.provider.check_open()
            return self.provider
        return self.reopen()


@pytest.fixture(scope="class")
def owner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Owner]:
    """One database file for a class, whose tests use separate sessions."""
    owner = Owner(tmp_path_factory.mktemp("embedded") / "sessions.db", request.cls.options)
    yield owner
    owner.provider.close()


class Embedded:
    """The fixtures that the contract requires."""

    options: ClassVar[StoreOptions] = StoreOptions(limits=SMALL_LIMITS)

    @pytest.fixture
    def provider(self, owner: Owner) -> StateProvider:
        return owner.get_open()

    @pytest.fixture
    def reopened(self, owner: Owner) -> Reopen:
        return owner.reopen


class TestEmbedded(Embedded, ProviderContract, DurableContract, OrderContract):
    """The whole provider contract."""


class TestEmbeddedLeases(Embedded, DurableLeaseContract):
    """The contract of leases that expire."""

    options = StoreOptions(optimization_lease_s=DurableLeaseContract.lease_s)


class TestEmbeddedHistory(
    Embedded,
    AuditContract,
    RecordingContract,
    EndedRecordingContract,
    ImportContract,
    HoldContract,
    DeriveContract,
    ForkContract,
    RestoreContract,
    PruneContract,
):
    """The contract of recordings, imports, holds, forks and audits."""


class TestEmbeddedClosing(ClosingContract):
    """The contract of closing."""

    @pytest.fixture
    def provider(self, tmp_path: Path) -> Iterator[StateProvider]:
        with EmbeddedState(tmp_path / "sessions.db") as provider:
            yield provider


@pytest.fixture(scope="class")
def with_tools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedState]:
    """One database file for a class, opened with the tools of the contract."""
    with EmbeddedState(tmp_path_factory.mktemp("tools") / "sessions.db", tools=CONTRACT_TOOLS) as provider:
        yield provider


class TestEmbeddedTools(ToolContract):
    """The contract of tools, which run in this process."""

    @pytest.fixture
    def provider(self, with_tools: EmbeddedState) -> StateProvider:
        return with_tools


class TestEmbeddedTransactions(TransactionContract):
    """The contract of transactions."""

    @pytest.fixture
    def provider(self, with_tools: EmbeddedState) -> StateProvider:
        return with_tools


class TestEmbeddedStreams(StreamContract):
    """The contract of streaming tools."""

    @pytest.fixture
    def provider(self, with_tools: EmbeddedState) -> StateProvider:
        return with_tools


class TestEmbeddedTime:
    """Behaviour that only shows while the clock stands still."""

    @pytest.fixture
    def owner(self, frozen: FrozenDateTimeFactory, tmp_path: Path) -> Iterator[Owner]:
        owner = Owner(tmp_path / "sessions.db", StoreOptions(session_ttl_s=100))
        owner.provider.initialize_session("s")
        owner.provider.register_variable("s", "x", "integer", 1)
        yield owner
        owner.provider.close()

    def test_a_session_lives_exactly_for_its_ttl(self, frozen: FrozenDateTimeFactory, owner: Owner) -> None:
        pass_s(frozen, 99.999)
        assert owner.provider.heartbeat("s")
        pass_s(frozen, 99.999)
        assert owner.provider.heartbeat("s")
        pass_s(frozen, 100)
        assert owner.provider.heartbeat("s") is False
        with pytest.raises(SessionNotFoundError):
            owner.provider.set_variable("s", "x", 2)

    @pytest.mark.parametrize(
        "touch",
        [
            commands.Heartbeat("s"),
            commands.GetSession("s"),
            commands.GetVariable("s", "x"),
            commands.GetVariable("s", "x", bypass_cache=True),
            commands.GetVariables("s", ("x",)),
            commands.ListVariables("s"),
            commands.GetVariableHistory("s", "x"),
            commands.SetVariable("s", "x", Value("1")),
            commands.InitializeSession("s"),
        ],
        ids=lambda command: command.cause,
    )
    def test_any_call_keeps_it_alive_across_restarts(
        self, frozen: FrozenDateTimeFactory, owner: Owner, touch: commands.Command[Any]
    ) -> None:
        for number in range(8):
            pass_s(frozen, 60)
            owner.provider.submit(touch).result()
            # Not cached, so it goes through the writer, which first finishes the jobs queued before.
            owner.provider.heartbeat("missing")
            if number % 2:
                owner.reopen()
        assert owner.provider.heartbeat("s")

    def test_a_failed_command_renews_the_ttl_too(self, frozen: FrozenDateTimeFactory, owner: Owner) -> None:
        for _ in range(3):
            pass_s(frozen, 60)
            with pytest.raises(VersionConflictError):
                owner.provider.set_variable("s", "x", 2, expected_version=9)
            owner.reopen()
        assert owner.provider.heartbeat("s")

    def test_a_watch_ends_when_its_session_is_found_to_have_expired(
        self, frozen: FrozenDateTimeFactory, owner: Owner
    ) -> None:
        with owner.provider.watch("s") as watch:
            pass_s(frozen, 100)
            assert not owner.provider.initialize_session("s").resumed
            with pytest.raises(SessionNotFoundError):
                watch.pull()

    def test_a_lease_ends_on_time_across_a_restart(self, frozen: FrozenDateTimeFactory, owner: Owner) -> None:
        owner.provider.initialize_session("s", {"ttl_seconds": "0"})
        owner.provider.start_optimization("s", "x", "optimizer")
        pass_s(frozen, 299.999)
        provider = owner.reopen()
        with pytest.raises(VariableLockedError, match="'optimizer'"):
            provider.set_variable("s", "x", 2)
        pass_s(frozen, 0.001)
        assert provider.get_variable("s", "x").optimization is None
        assert provider.set_variable("s", "x", 2) == 1


def test_no_part_of_the_contract_hides_another_one() -> None:
    """Parts are combined by inheritance, where one of two tests or fixtures with the same name would be lost."""

    class Everything(
        ProviderContract,
        DurableContract,
        OrderContract,
        AuditContract,
        RecordingContract,
        EndedRecordingContract,
        ImportContract,
        HoldContract,
        DeriveContract,
        ForkContract,
        RestoreContract,
        PruneContract,
    ):
        """The limits of one backend."""

    for contract in (Everything, ToolContract):
        names = [name for part in contract.__mro__[:-1] for name in vars(part) if not name.startswith("__")]
        assert len(names) > 50
        assert sorted(names) == sorted(set(names))


def pulled_versions(watch: Watch) -> list[int]:
    """The versions in all updates that are available."""
    versions: list[int] = []
    while updates := watch.pull():
        versions.extend(update.variable.version for update in updates)
    return versions


class TestRacesOfWatchesAndTheWriter:
    """Moments that a test with many threads would hit once in a million times, enforced."""

    @pytest.fixture
    def provider(self, tmp_path: Path) -> Iterator[EmbeddedState]:
        with EmbeddedState(tmp_path / "sessions.db") as provider:
            provider.initialize_session("s")
            provider.register_variable("s", "x", "integer", 0)
            yield provider

    def test_a_watch_that_resumes_while_a_commit_is_being_published(
        self, provider: EmbeddedState, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It joins right after the writer has checked for watches."""
        hub, head = provider.engine._groups.hub, provider.head_sequence
        watches: list[Watch] = []
        is_watched = hub.is_watched

        def joined_too_late(first_sequence: int) -> bool:
            answer = is_watched(first_sequence)
            if not watches:
                watches.append(provider.watch("s", after_sequence=head))
            return answer

        provider.initialize_session("other")
        with provider.watch("other"):
            # Without any watch, the writer would not check.
            monkeypatch.setattr(hub, "is_watched", joined_too_late)
            provider.set_variable("s", "x", 1)
            provider.set_variable("s", "x", 2)
        (watch,) = watches
        with watch:
            assert pulled_versions(watch) == [1, 2]

    def test_a_watch_that_reads_the_file_while_a_large_group_is_written(
        self, provider: EmbeddedState, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It has read the whole file; meanwhile the feed has moved on."""
        changes_after = provider.engine._store.changes_after
        written: list[int] = []

        def overtaken(*arguments: Any) -> list[CommitChanges]:
            changes = changes_after(*arguments)
            if not changes and not written:
                pending = [provider.submit(commands.SetVariable("s", "x", Value(str(n)))) for n in range(400)]
                written.extend(future.result() for future in pending)
            return changes

        monkeypatch.setattr(provider.engine._store, "changes_after", overtaken)
        provider.initialize_session("other")
        position = provider.get_variable_history("s", "x")[0].sequence
        with provider.watch("s", after_sequence=position) as watch:
            assert pulled_versions(watch) == list(range(1, 401))
        assert written
