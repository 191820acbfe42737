"""The contract on a real server process over gRPC. Reopening means SIGKILL and a new process on the same file."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, ClassVar

import pytest

from dspex_persist.infra.process import ProcessFailedError
from dspex_persist.state.bridged import BridgedState
from dspex_persist.state.provider import StateProvider
from dspex_persist.testing.audit_contract import AuditContract
from dspex_persist.testing.durable_contract import DurableContract, DurableLeaseContract
from dspex_persist.testing.fork_contract import ForkContract
from dspex_persist.testing.hold_contract import HoldContract
from dspex_persist.testing.import_contract import ImportContract
from dspex_persist.testing.provider_contract import (
    DEADLINE_S,
    SMALL_LIMITS,
    ClosingContract,
    LeaseContract,
    ProviderContract,
    Reopen,
)
from dspex_persist.testing.prune_contract import PruneContract
from dspex_persist.testing.recording_contract import EndedRecordingContract, RecordingContract
from dspex_persist.testing.restore_contract import RestoreContract
from dspex_persist.testing.server import ServedDatabase
from dspex_persist.testing.stream_contract import StreamContract
from dspex_persist.testing.tool_contract import ToolContract
from dspex_persist.testing.transaction_contract import TransactionContract


@pytest.fixture(scope="class")
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedDatabase]:
    """One server for a class, whose tests use separate sessions."""
    path = tmp_path_factory.mktemp("bridged") / "sessions.db"
    with ServedDatabase(path, request.cls.settings) as served:
        yield served


class Bridged:
    """The fixtures that the contract requires."""

    settings: ClassVar[dict[str, Any]] = asdict(SMALL_LIMITS)

    @pytest.fixture
    def provider(self, served: ServedDatabase) -> Iterator[StateProvider]:
        if served.process.exit_code is not None:
            # A test has crashed the server: only that test fails, not those after it.
            served.restart()
        with BridgedState(served.target, timeout_s=DEADLINE_S) as provider:
            yield provider

    @pytest.fixture
    def reopened(self, served: ServedDatabase) -> Iterator[Reopen]:
        opened: list[BridgedState] = []

        def reopen() -> StateProvider:
            served.restart()
            opened.append(BridgedState(served.target, timeout_s=DEADLINE_S))
            return opened[-1]

        yield reopen
        for provider in opened:
            provider.close()


class TestBridged(Bridged, ProviderContract, DurableContract):
    """The whole provider contract."""


class Cached(Bridged):
    """The same, by a client that keeps what it has read."""

    @pytest.fixture
    def provider(self, served: ServedDatabase) -> Iterator[StateProvider]:
        if served.process.exit_code is not None:
            served.restart()
        with BridgedState(served.target, timeout_s=DEADLINE_S, cache=True) as provider:
            yield provider


@pytest.mark.thorough
class TestCached(Cached, ProviderContract):
    """The whole provider contract."""


class TestCachedClosing(Cached, ClosingContract):
    """The contract of closing."""


class TestCachedLeases(Cached, LeaseContract):
    """The contract of leases that expire."""

    settings: ClassVar[dict[str, Any]] = {"optimization_lease_s": LeaseContract.lease_s}


class TestBridgedHistory(
    Bridged,
    AuditContract,
    RecordingContract,
    EndedRecordingContract,
    ImportContract,
    ForkContract,
    RestoreContract,
    PruneContract,
):
    """The contract of recordings, imports, forks and audits."""

    settings: ClassVar[dict[str, Any]] = {**Bridged.settings, "audit_reveal": True, "audit_prune": True}


class TestBridgedHolds(Bridged, HoldContract):
    """The contract of holds."""


class TestBridgedClosing(Bridged, ClosingContract):
    """The contract of closing."""


class TestBridgedLeases(Bridged, DurableLeaseContract):
    """The contract of leases that expire."""

    settings: ClassVar[dict[str, Any]] = {"optimization_lease_s": DurableLeaseContract.lease_s}


class TestBridgedTools(Bridged, ToolContract):
    """The contract of tools, which run in the server."""

    settings: ClassVar[dict[str, Any]] = {"tools": "dspex_persist.testing.contract_tools"}


class TestBridgedTransactions(Bridged, TransactionContract):
    """The contract of transactions."""

    settings: ClassVar[dict[str, Any]] = TestBridgedTools.settings


class TestBridgedStreams(Bridged, StreamContract):
    """The contract of streaming tools."""

    settings: ClassVar[dict[str, Any]] = TestBridgedTools.settings


def test_a_server_that_cannot_start_says_why(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("no-database") / "sessions.db"
    path.write_bytes(b"no database at all" * 100)
    with pytest.raises(ProcessFailedError, match=r"sessions\.db"):
        ServedDatabase(path)
