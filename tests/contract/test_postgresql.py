"""The contracts on servers that share a PostgreSQL database."""

from collections.abc import Iterator
from functools import partial

import pytest

from dspex_persist.state.distributed import DistributedState, PostgresState
from dspex_persist.state.shared import shared_groups
from dspex_persist.state.store.session_store import StoreOptions
from dspex_persist.testing.audit_contract import AuditContract
from dspex_persist.testing.fork_contract import ForkContract
from dspex_persist.testing.import_contract import ImportContract
from dspex_persist.testing.order_contract import OrderContract
from dspex_persist.testing.prune_contract import PruneContract
from dspex_persist.testing.recording_contract import EndedRecordingContract, RecordingContract
from dspex_persist.testing.restore_contract import RestoreContract
from dspex_persist.testing.tool_contract import ToolContract
from dspex_persist.testing.transaction_contract import TransactionContract
from tests.contract.two_servers import AllOfTwoServers, LeasesOfTwoServers, One, Opening, TwoServers


@pytest.fixture(scope="class")
def opening(postgresql_url: str) -> Opening:
    return Opening(partial(PostgresState, postgresql_url), partial(DistributedState, postgresql_url))


class TestTwoServers(TwoServers):
    """No group looks at the head before its end unless it is repeated: most of them are, as the calls alternate."""

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def optimistic(cls) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shared_groups, "QUIET", 0)
            yield


@pytest.mark.thorough
class TestAllOfTwoServers(AllOfTwoServers):
    pass


class TestLeasesOfTwoServers(LeasesOfTwoServers):
    pass


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
