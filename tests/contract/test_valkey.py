"""The contract on two servers that share a Redis or Valkey server, and whose calls alternate."""

from collections.abc import Iterator
from typing import ClassVar

import pytest

from dspex_persist.state.options import SessionOptions
from dspex_persist.state.provider import StateProvider
from dspex_persist.state.valkey.valkey_state import RedisState, ValkeyState
from dspex_persist.testing.contract_tools import CONTRACT_TOOLS
from dspex_persist.testing.durable_contract import DurableContract, DurableLeaseContract
from dspex_persist.testing.hold_contract import HoldContract
from dspex_persist.testing.import_contract import ImportContract
from dspex_persist.testing.order_contract import OrderContract
from dspex_persist.testing.provider_contract import (
    SMALL_LIMITS,
    ConcurrencyContract,
    DependencyContract,
    HistoryContract,
    IdempotencyContract,
    LeaseContract,
    ProviderContract,
    Reopen,
    SessionContract,
    VariableContract,
    WatchContract,
)
from dspex_persist.testing.recording_contract import EndedRecordingContract, RecordingContract
from dspex_persist.testing.tool_contract import ToolContract
from dspex_persist.testing.transaction_contract import TransactionContract
from tests.contract.test_shared import Alternating


def address(url: str, prefix: str) -> str:
    return f"{url.replace('unix://', 'redis+unix://')}?prefix={prefix}"


@pytest.fixture(scope="class")
def alternating(request: pytest.FixtureRequest, valkey: str, valkey_prefix: str) -> Iterator[Alternating]:
    url = address(valkey, valkey_prefix)
    with Alternating([ValkeyState(url, request.cls.options) for _ in range(2)]) as provider:
        yield provider


@pytest.fixture(scope="class")
def single(request: pytest.FixtureRequest, valkey: str, valkey_prefix: str) -> Iterator[RedisState]:
    url = address(valkey, valkey_prefix)
    with RedisState(url, request.cls.options, tools=CONTRACT_TOOLS) as provider, ValkeyState(url):
        yield provider


class Two:
    """Two servers, whose calls alternate."""

    options: ClassVar[SessionOptions] = SessionOptions(limits=SMALL_LIMITS)

    @pytest.fixture
    def provider(self, alternating: Alternating) -> StateProvider:
        return alternating


class TestTwoServers(
    Two,
    SessionContract,
    VariableContract,
    HistoryContract,
    IdempotencyContract,
    DependencyContract,
    WatchContract,
    ConcurrencyContract,
    HoldContract,
):
    """What several servers, and this store, may break."""


@pytest.mark.thorough
class TestAllOfTwoServers(Two, ProviderContract):
    pass


class TestLeasesOfTwoServers(Two, LeaseContract):
    options = SessionOptions(optimization_lease_s=LeaseContract.lease_s)


class One:
    """One of two servers: the other one only follows."""

    options: ClassVar[SessionOptions] = SessionOptions(limits=SMALL_LIMITS)

    @pytest.fixture
    def provider(self, single: RedisState) -> StateProvider:
        return single


class TestTransactions(One, OrderContract, TransactionContract):
    options = SessionOptions()


@pytest.mark.thorough
class TestTools(One, ToolContract):
    options = SessionOptions()


class TestRecordings(One, RecordingContract, EndedRecordingContract):
    options = SessionOptions()


class TestImports(One, ImportContract):
    pass


class Owner:
    """A server that can be restarted while another one goes on."""

    def __init__(self, url: str, options: SessionOptions) -> None:
        self._open = lambda: RedisState(url, options)
        self.provider = self._open()

    def reopen(self) -> RedisState:
        self.provider.close()
        self.provider = self._open()
        return self.provider


class TestReopened(DurableContract, DurableLeaseContract):
    options: ClassVar[SessionOptions] = SessionOptions(optimization_lease_s=DurableLeaseContract.lease_s)

    @pytest.fixture
    def owner(self, valkey: str, valkey_prefix: str) -> Iterator[Owner]:
        url = address(valkey, valkey_prefix)
        owner = Owner(url, self.options)
        with ValkeyState(url):
            yield owner
        owner.provider.close()

    @pytest.fixture
    def provider(self, owner: Owner) -> StateProvider:
        return owner.provider

    @pytest.fixture
    def reopened(self, owner: Owner) -> Reopen:
        return owner.reopen
