"""The contracts on servers that share a PostgreSQL database. Of the first two, each call goes to another server."""

from collections.abc import Iterator
from typing import ClassVar

import pytest

from dspex_persist.state.distributed import DistributedState, PostgresState
from dspex_persist.state.provider import StateProvider
from dspex_persist.state.store.session_store import StoreOptions
from dspex_persist.testing.audit_contract import AuditContract
from dspex_persist.testing.contract_tools import CONTRACT_TOOLS
from dspex_persist.testing.fork_contract import ForkContract
from dspex_persist.testing.hold_contract import HoldContract
from dspex_persist.testing.import_contract import ImportContract
from dspex_persist.testing.order_contract import OrderContract
from dspex_persist.testing.provider_contract import (
    SMALL_LIMITS,
    ConcurrencyContract,
    HistoryContract,
    IdempotencyContract,
    LeaseContract,
    ProviderContract,
    SessionContract,
    VariableContract,
    WatchContract,
)
from dspex_persist.testing.prune_contract import PruneContract
from dspex_persist.testing.recording_contract import EndedRecordingContract, RecordingContract
from dspex_persist.testing.restore_contract import RestoreContract
from dspex_persist.testing.tool_contract import ToolContract
from dspex_persist.testing.transaction_contract import TransactionContract
from tests.contract.test_shared import Alternating


@pytest.fixture(scope="class")
def alternating(request: pytest.FixtureRequest, postgresql_url: str) -> Iterator[Alternating]:
    with Alternating([PostgresState(postgresql_url, request.cls.options) for _ in range(2)]) as provider:
        yield provider


@pytest.fixture(scope="class")
def single(request: pytest.FixtureRequest, postgresql_url: str) -> Iterator[DistributedState]:
    options = request.cls.options
    with DistributedState(postgresql_url, options, tools=CONTRACT_TOOLS) as provider, PostgresState(postgresql_url):
        yield provider


class Two:
    """Two servers, whose calls alternate."""

    options: ClassVar[StoreOptions] = StoreOptions(limits=SMALL_LIMITS)

    @pytest.fixture
    def provider(self, alternating: Alternating) -> StateProvider:
        return alternating


class TestTwoServers(
    Two,
    SessionContract,
    VariableContract,
    HistoryContract,
    IdempotencyContract,
    WatchContract,
    ConcurrencyContract,
    HoldContract,
):
    """What several servers may break."""


@pytest.mark.thorough
class TestAllOfTwoServers(Two, ProviderContract):
    pass


class TestLeasesOfTwoServers(Two, LeaseContract):
    options = StoreOptions(optimization_lease_s=LeaseContract.lease_s)


class One:
    """One of two servers: the other one only follows."""

    options: ClassVar[StoreOptions] = StoreOptions(limits=SMALL_LIMITS)

    @pytest.fixture
    def provider(self, single: DistributedState) -> StateProvider:
        return single


class TestOrder(One, OrderContract):
    pass


@pytest.mark.thorough
class TestTools(One, ToolContract, TransactionContract):
    options = StoreOptions()


class TestPast(
    One,
    AuditContract,
    RecordingContract,
    EndedRecordingContract,
    ImportContract,
    ForkContract,
    RestoreContract,
    PruneContract,
):
    pass
