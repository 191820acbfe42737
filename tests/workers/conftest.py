"""Fixtures for tests of workers: a client of the module's `server`, and a session with the integer a, which is 0."""

from collections.abc import Iterator

import pytest

from dspex_persist.infra.process import ServerProcess
from dspex_persist.state.bridged import BridgedState
from tests.end_to_end.gates import DEADLINE_S
from tests.end_to_end.old_style import target_of


@pytest.fixture
def provider(server: ServerProcess) -> Iterator[BridgedState]:
    with BridgedState(target_of(server), timeout_s=DEADLINE_S) as provider:
        yield provider


@pytest.fixture
def session(provider: BridgedState, request: pytest.FixtureRequest) -> str:
    name = str(request.node.name)
    provider.initialize_session(name)
    provider.register_variable(name, "a", "integer", 0)
    return name
