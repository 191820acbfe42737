"""The contract on two servers that share a Redis or Valkey server, and whose calls alternate."""

from collections.abc import Iterator
from typing import ClassVar

import pytest
import redis

from dspex_persist.state.options import SessionOptions
from dspex_persist.state.provider import StateProvider
from dspex_persist.state.shared import SharedGroups, SharedState
from dspex_persist.state.tools.with_tools import WithTools
from dspex_persist.state.valkey.valkey_log import ValkeyLog
from dspex_persist.testing.contract_tools import CONTRACT_TOOLS
from dspex_persist.testing.provider_contract import (
    SMALL_LIMITS,
    ConcurrencyContract,
    DependencyContract,
    HistoryContract,
    IdempotencyContract,
    LeaseContract,
    ProviderContract,
    SessionContract,
    VariableContract,
    WatchContract,
)
from dspex_persist.testing.tool_contract import ToolContract
from dspex_persist.testing.transaction_contract import TransactionContract
from tests.contract.test_shared import Alternating


def open_servers(url: str, prefix: str, options: SessionOptions) -> list[SharedState]:
    logs = (ValkeyLog(lambda: redis.Redis.from_url(url), prefix=prefix) for _ in range(2))
    return [SharedState(SharedGroups(log, options)) for log in logs]


@pytest.fixture(scope="class")
def alternating(request: pytest.FixtureRequest, valkey: str, valkey_prefix: str) -> Iterator[Alternating]:
    with Alternating(open_servers(valkey, valkey_prefix, request.cls.options)) as provider:
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
):
    """What several servers, and this store, may break."""


@pytest.mark.thorough
class TestAllOfTwoServers(Two, ProviderContract):
    pass


class TestLeasesOfTwoServers(Two, LeaseContract):
    options = SessionOptions(optimization_lease_s=LeaseContract.lease_s)


@pytest.fixture(scope="class")
def with_tools(valkey: str, valkey_prefix: str) -> Iterator[WithTools]:
    engine, other = open_servers(valkey, valkey_prefix, SessionOptions())
    with WithTools(engine, CONTRACT_TOOLS) as provider, other:
        yield provider


class Tools:
    # This engine keeps no recordings.
    test_what_is_recorded_is_in_the_journal_however_it_ends = None

    @pytest.fixture
    def provider(self, with_tools: WithTools) -> StateProvider:
        return with_tools


class TestTransactions(Tools, TransactionContract):
    pass


@pytest.mark.thorough
class TestTools(Tools, ToolContract):
    pass
