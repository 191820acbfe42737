"""The contract of every StateProvider, as tests. A backend subclasses `ProviderContract` and provides `provider`:

    class TestMine(ProviderContract):
        @pytest.fixture
        def provider(self) -> Iterator[StateProvider]:
            with MyState(limits=self.limits) as provider:
                yield provider

The provider may be shared with other tests, even concurrent ones: each test creates a new session. `LeaseContract` is
for a provider with short optimization leases, `ClosingContract` for one that is created for each test. The abilities
that only some backends have are covered by the suites next to this package, one for each ability.

No test depends on which backend it runs on.
"""

from dspex_persist.testing.checks import DEADLINE_S
from dspex_persist.testing.provider_contract.arguments import ArgumentContract
from dspex_persist.testing.provider_contract.base import SMALL_LIMITS, Contract, Reopen
from dspex_persist.testing.provider_contract.batches import BatchContract
from dspex_persist.testing.provider_contract.closing import ClosingContract
from dspex_persist.testing.provider_contract.concurrency import ConcurrencyContract
from dspex_persist.testing.provider_contract.constraining import ConstrainingContract
from dspex_persist.testing.provider_contract.dependencies import DependencyContract
from dspex_persist.testing.provider_contract.history import HistoryContract
from dspex_persist.testing.provider_contract.hostile import HostileInputContract
from dspex_persist.testing.provider_contract.idempotency import IdempotencyContract
from dspex_persist.testing.provider_contract.leases import LeaseContract
from dspex_persist.testing.provider_contract.limits import LimitContract
from dspex_persist.testing.provider_contract.optimization import OptimizationContract
from dspex_persist.testing.provider_contract.rules import RuleContract
from dspex_persist.testing.provider_contract.schemas import SchemaContract
from dspex_persist.testing.provider_contract.sessions import SessionContract
from dspex_persist.testing.provider_contract.sharing import SharingContract
from dspex_persist.testing.provider_contract.values import ValueContract
from dspex_persist.testing.provider_contract.variables import VariableContract
from dspex_persist.testing.provider_contract.watches import WatchContract
from dspex_persist.testing.provider_contract.who import WhoContract

__all__ = [
    "DEADLINE_S",
    "SMALL_LIMITS",
    "ArgumentContract",
    "BatchContract",
    "ClosingContract",
    "ConcurrencyContract",
    "ConstrainingContract",
    "Contract",
    "DependencyContract",
    "HistoryContract",
    "HostileInputContract",
    "IdempotencyContract",
    "LeaseContract",
    "LimitContract",
    "OptimizationContract",
    "ProviderContract",
    "Reopen",
    "RuleContract",
    "SchemaContract",
    "SessionContract",
    "SharingContract",
    "ValueContract",
    "VariableContract",
    "WatchContract",
    "WhoContract",
]


class ProviderContract(
    SessionContract,
    ValueContract,
    SchemaContract,
    ConstrainingContract,
    RuleContract,
    VariableContract,
    BatchContract,
    HistoryContract,
    WhoContract,
    DependencyContract,
    OptimizationContract,
    IdempotencyContract,
    WatchContract,
    LimitContract,
    HostileInputContract,
    ArgumentContract,
    SharingContract,
    ConcurrencyContract,
):
    """The whole contract of a provider."""
