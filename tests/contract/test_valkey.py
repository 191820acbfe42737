"""The contract on two servers that share a Redis or Valkey server."""

from collections.abc import Iterator
from functools import partial
from typing import ClassVar

import pytest

from dspex_persist.state.options import SessionOptions
from dspex_persist.state.provider import StateProvider
from dspex_persist.state.store.session_store import StoreOptions
from dspex_persist.state.valkey.valkey_state import RedisState, ValkeyState
from dspex_persist.testing.durable_contract import DurableContract, DurableLeaseContract
from dspex_persist.testing.import_contract import ImportContract
from dspex_persist.testing.order_contract import OrderContract
from dspex_persist.testing.provider_contract import DependencyContract, Reopen
from dspex_persist.testing.recording_contract import EndedRecordingContract, RecordingContract
from dspex_persist.testing.tool_contract import ToolContract
from dspex_persist.testing.transaction_contract import TransactionContract
from tests.contract.two_servers import AllOfTwoServers, LeasesOfTwoServers, One, Opening, TwoServers
from tests.valkey.conftest import address


@pytest.fixture(scope="class")
def opening(valkey: str, valkey_prefix: str) -> Opening:
    url = address(valkey, valkey_prefix)
    return Opening(partial(ValkeyState, url), partial(RedisState, url))


class TestTwoServers(TwoServers, DependencyContract):
    """What several servers, and this store, may break."""


@pytest.mark.thorough
class TestAllOfTwoServers(AllOfTwoServers):
    pass


class TestLeasesOfTwoServers(LeasesOfTwoServers):
    pass


class TestTransactions(One, OrderContract, TransactionContract):
    options = StoreOptions()


@pytest.mark.thorough
class TestTools(One, ToolContract):
    options = StoreOptions()


class TestRecordings(One, RecordingContract, EndedRecordingContract):
    options = StoreOptions()


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
