"""Writing several variables at once."""

import uuid

import pytest

from dspex_persist.state.provider import StateProvider
from dspex_persist.testing.provider_contract.base import Contract


class BatchContract(Contract):
    """Writing several variables at once."""

    @pytest.fixture
    def bounded(self, provider: StateProvider) -> str:
        session_id = f"contract-{uuid.uuid4().hex}"
        provider.initialize_session(session_id)
        for name in ("x", "y", "z"):
            provider.register_variable(session_id, name, "integer", 0, constraints={"max": 9})
        return session_id

    @pytest.mark.parametrize("atomic", [True, False])
    def test_is_one_commit(self, provider: StateProvider, bounded: str, atomic: bool) -> None:
        z_id = provider.get_variable(bounded, "z").id
        outcome = provider.set_variables(bounded, {"x": 1, "y": 2, z_id: 3}, metadata={"by": "batch"}, atomic=atomic)
        assert (outcome.success, outcome.versions, outcome.errors) == (True, {"x": 1, "y": 1, z_id: 1}, {})
        newest = [provider.get_variable_history(bounded, name)[0] for name in ("x", "y", "z")]
        assert len({version.sequence for version in newest}) == 1
        assert [version.metadata for version in newest] == [{"by": "batch"}] * 3
        assert provider.get_value(bounded, "z") == 3

    def test_atomic_is_all_or_nothing(self, provider: StateProvider, bounded: str) -> None:
        before = provider.list_variables(bounded)
        outcome = provider.set_variables(bounded, {"x": 1, "y": 10, "unknown": 1}, atomic=True)
        assert (outcome.success, outcome.versions) == (False, {})
        assert set(outcome.errors) == {"y", "unknown"}
        assert "above maximum 9" in outcome.errors["y"]
        assert "not found" in outcome.errors["unknown"]
        assert provider.list_variables(bounded) == before
        assert len(provider.get_variable_history(bounded, "x")) == 1

    def test_otherwise_what_is_valid_is_applied(self, provider: StateProvider, bounded: str) -> None:
        outcome = provider.set_variables(bounded, {"x": 1, "y": 10, "unknown": 1, "z": "text"})
        assert (outcome.success, outcome.versions) == (True, {"x": 1})
        assert set(outcome.errors) == {"y", "z", "unknown"}
        assert [variable.version for variable in provider.list_variables(bounded)] == [1, 0, 0]

    def test_where_nothing_could_be_applied_it_failed(self, provider: StateProvider, bounded: str) -> None:
        outcome = provider.set_variables(bounded, {"y": 10, "unknown": 1})
        assert (outcome.success, outcome.versions) == (False, {})
        assert set(outcome.errors) == {"y", "unknown"}

    @pytest.mark.parametrize("atomic", [True, False])
    def test_an_empty_one_succeeds(self, provider: StateProvider, bounded: str, atomic: bool) -> None:
        assert provider.set_variables(bounded, {}, atomic=atomic).success

    def test_a_locked_variable_fails_alone_and_names_the_holder(self, provider: StateProvider, bounded: str) -> None:
        provider.start_optimization(bounded, "x", "optimizer")
        outcome = provider.set_variables(bounded, {"x": 1, "y": 1})
        assert outcome.versions == {"y": 1}
        assert "'optimizer'" in outcome.errors["x"]
        held = provider.set_variables(bounded, {"x": 1, "z": 1}, metadata={"optimizer_id": "optimizer"}, atomic=True)
        assert held.success
