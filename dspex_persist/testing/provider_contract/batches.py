"""Writing or registering several variables at once."""

import uuid

import pytest

from dspex_persist.state import commands, errors
from dspex_persist.state.commands import RegisterVariable
from dspex_persist.state.model import Value
from dspex_persist.state.provider import StateProvider
from dspex_persist.testing.provider_contract.base import Contract


class BatchContract(Contract):
    """Writing or registering several variables at once."""

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

    def test_one_that_raises_fails_as_a_single_write_does(self, provider: StateProvider, bounded: str) -> None:
        refused: dict[str, Value] = {"x": Value("10"), "unknwn": Value("1"), "y": Value('"text"')}
        for name, value in refused.items():
            with pytest.raises(errors.StateError) as single:
                provider.submit(commands.SetVariable(bounded, name, value)).result()
            batch = commands.SetVariables(bounded, {name: value, "z": Value("1")}, atomic=True, raises=True)
            with pytest.raises(errors.StateError) as whole:
                provider.submit(batch).result()
            assert (type(whole.value), str(whole.value)) == (type(single.value), str(single.value))
        # Of several it is always the same one, as a map has no order.
        with pytest.raises(errors.VariableNotFoundError):
            provider.submit(
                commands.SetVariables(bounded, refused | {"a": Value("1")}, atomic=True, raises=True)
            ).result()
        assert [provider.get_value(bounded, name) for name in "xyz"] == [0, 0, 0]
        fits = commands.SetVariables(bounded, {"x": Value("1"), "y": Value("2")}, atomic=True, raises=True)
        assert dict(provider.submit(fits).result().versions) == {"x": 1, "y": 1}
        # Without `atomic` it changes nothing.
        partly = commands.SetVariables(bounded, {"x": Value("2"), "unknown": Value("1")}, raises=True)
        assert provider.submit(partly).result().errors.keys() == {"unknown"}

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

    def test_registers_several_in_one_commit(self, provider: StateProvider, bounded: str) -> None:
        new = [
            RegisterVariable(bounded, "n", "integer", Value("1"), '{"max": 5}', {"m": "1"}),
            RegisterVariable(bounded, "x", "integer", Value("7"), '{"max": 9}'),
            RegisterVariable(bounded, "t", "tensor", Value('{"shape": [2], "data": [1, 2]}')),
        ]
        ids = provider.register_variables(bounded, new)
        assert list(ids) == [provider.get_variable(bounded, name).id for name in "nxt"]
        assert provider.get_value(bounded, "x") == 0, "it was there, and keeps its value"
        assert provider.get_variable(bounded, "n").metadata == {"m": "1"}
        first = [provider.get_variable_history(bounded, name)[-1] for name in "nt"]
        assert len({version.sequence for version in first}) == 1

    def test_registers_all_or_none(self, provider: StateProvider, bounded: str) -> None:
        before = provider.list_variables(bounded)
        good = RegisterVariable(bounded, "n", "integer", Value("1"))
        for bad in (
            RegisterVariable(bounded, "m", "integer", Value('"no"')),
            RegisterVariable(bounded, "x", "float", Value("1")),
            RegisterVariable(bounded, "", "float", Value("1")),
        ):
            with pytest.raises(errors.StateError):
                provider.register_variables(bounded, [good, bad])
        with pytest.raises(errors.InvalidArgumentError, match="session"):
            provider.register_variables(bounded, [RegisterVariable("other", "n", "integer", Value("1"))])
        assert provider.list_variables(bounded) == before
