"""Each backend passes the suite of each ability that it claims, and of no other."""

from collections.abc import Mapping
from types import ModuleType

import pytest

from dspex_persist import BridgedState, EmbeddedState, LocalState
from dspex_persist.state.abilities import (
    Ability,
    Auditable,
    Derives,
    Durable,
    ExecutesTools,
    Forkable,
    Holdable,
    Importable,
    KeepsOrder,
    Prunable,
    Recordable,
    Restorable,
    StreamsTools,
    Transacts,
)
from dspex_persist.state.distributed import DistributedState
from dspex_persist.state.valkey.valkey_state import RedisState
from dspex_persist.testing.audit_contract import AuditContract
from dspex_persist.testing.derive_contract import DeriveContract
from dspex_persist.testing.durable_contract import DurableContract
from dspex_persist.testing.fork_contract import ForkContract
from dspex_persist.testing.hold_contract import HoldContract
from dspex_persist.testing.import_contract import ImportContract
from dspex_persist.testing.order_contract import OrderContract
from dspex_persist.testing.prune_contract import PruneContract
from dspex_persist.testing.recording_contract import RecordingContract
from dspex_persist.testing.restore_contract import RestoreContract
from dspex_persist.testing.stream_contract import StreamContract
from dspex_persist.testing.tool_contract import ToolContract
from dspex_persist.testing.transaction_contract import TransactionContract
from tests.contract import test_bridged, test_documented, test_embedded, test_local

SUITES: Mapping[type[Ability], type] = {
    Derives: DeriveContract,
    Durable: DurableContract,
    KeepsOrder: OrderContract,
    Auditable: AuditContract,
    Recordable: RecordingContract,
    Importable: ImportContract,
    Holdable: HoldContract,
    Forkable: ForkContract,
    Prunable: PruneContract,
    Restorable: RestoreContract,
    ExecutesTools: ToolContract,
    StreamsTools: StreamContract,
    Transacts: TransactionContract,
}


def provider_of_the_page() -> type:
    """The backend of the documented program, which has the abilities of its engine."""
    return type("Documented", (test_documented.engine, StreamsTools, Transacts), {})


@pytest.mark.parametrize(
    ("provider", "tests"),
    [
        (LocalState, test_local),
        (EmbeddedState, test_embedded),
        (BridgedState, test_bridged),
        (provider_of_the_page(), test_documented),
    ],
    ids=["local", "embedded", "bridged", "documented"],
)
def test_each_has_the_suites_of_its_abilities(provider: type, tests: ModuleType) -> None:
    classes = [each for name, each in vars(tests).items() if name.startswith("Test") and isinstance(each, type)]
    run = {ability for ability, suite in SUITES.items() if any(issubclass(each, suite) for each in classes)}
    assert run == {ability for ability in SUITES if issubclass(provider, ability)}


def test_there_is_a_suite_for_every_ability() -> None:
    known, left = set[type[Ability]](), [Ability]
    while left:
        for each in left.pop().__subclasses__():
            if each.__module__ == Ability.__module__:
                known.add(each)
                left.append(each)
    assert known == set(SUITES)


@pytest.mark.parametrize("ability", [Auditable, Forkable, Importable, Prunable, Recordable])
def test_what_commands_ask_for_too_is_not_advised_in_python(ability: type[Ability]) -> None:
    """Nobody can call `connect` at a command line."""
    assert "(" not in ability.instead


def test_who_lacks_an_ability_on_valkey_hears_of_postgresql() -> None:
    lacking = [each for each in SUITES if issubclass(DistributedState, each) and not issubclass(RedisState, each)]
    assert {Auditable, Forkable, Prunable, Restorable} <= set(lacking)
    assert [each for each in lacking if "PostgreSQL" not in each.instead] == []
