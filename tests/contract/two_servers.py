"""Two servers on one database, for the contracts: their calls alternate, or one only follows the other.

A module that runs contracts on such a database has the fixture `opening`; conftest.py has the rest.
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import pytest

from dspex_persist.state.provider import StateProvider
from dspex_persist.state.shared import DatabaseState
from dspex_persist.state.store.session_store import StoreOptions
from dspex_persist.testing.hold_contract import HoldContract
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


class Opening(NamedTuple):
    """How to open a database: its engine, and the state that also executes tools, each with some options."""

    engine: Callable[[Any], DatabaseState]
    state: Callable[..., StateProvider]


class Two:
    """Two servers, whose calls alternate."""

    options: ClassVar[StoreOptions] = StoreOptions(limits=SMALL_LIMITS)

    @pytest.fixture
    def provider(self, alternating: StateProvider) -> StateProvider:
        return alternating


class TwoServers(
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


class AllOfTwoServers(Two, ProviderContract):
    """Everything."""


class LeasesOfTwoServers(Two, LeaseContract):
    options = StoreOptions(optimization_lease_s=LeaseContract.lease_s)


class One:
    """One of two servers: the other one only follows."""

    options: ClassVar[StoreOptions] = StoreOptions(limits=SMALL_LIMITS)

    @pytest.fixture
    def provider(self, single: StateProvider) -> StateProvider:
        return single
