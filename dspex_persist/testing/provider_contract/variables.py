"""Variables can be registered, read, written, listed and deleted."""

import json
import uuid
from datetime import UTC
from typing import Any

import pytest

from dspex_persist.state import commands, errors
from dspex_persist.state.commands import Command
from dspex_persist.state.model import Origin, Source, Value
from dspex_persist.state.provider import StateProvider
from dspex_persist.testing.checks import names_of, refused
from dspex_persist.testing.provider_contract.base import Contract


class VariableContract(Contract):
    """Variables can be registered, read, written, listed and deleted."""

    def test_registering_gives_an_id_and_version_0(self, provider: StateProvider, session: str) -> None:
        variable_id = provider.register_variable(
            session, "temperature", "float", 0.5, constraints={"min": 0}, metadata={"unit": "none"}
        )
        prefix, _, unique = variable_id.rpartition("_")
        assert prefix == "var_temperature"
        assert unique
        variable = provider.get_variable(session, "temperature")
        assert (variable.id, variable.name, variable.type) == (variable_id, "temperature", "float")
        assert (variable.version, variable.metadata) == (0, {"unit": "none"})
        assert json.loads(variable.constraints) == {"min": 0}
        assert variable.updated_at.tzinfo is UTC
        assert provider.get_variable(session, variable_id) == variable

    def test_again_the_same_resumes_it_with_its_current_value(self, provider: StateProvider, session: str) -> None:
        first = provider.register_variable(session, "x", "integer", 1, constraints='{"min": 0, "max": 9}')
        provider.set_variable(session, "x", 5)
        assert provider.register_variable(session, "x", "integer", 1, constraints='{"max":9,"min":0}') == first
        assert provider.get_value(session, "x") == 5
        assert provider.get_variable(session, "x").version == 1

    @pytest.mark.parametrize(
        ("type_name", "constraints", "difference"),
        [
            ("float", '{"min":0}', "its type is integer, not float"),
            ("integer", '{"min":1}', 'its constraints are {"min":0}, not {"min":1}'),
            ("integer", "", 'its constraints are {"min":0}, not none'),
        ],
    )
    def test_again_as_something_else_says_what_differs(
        self, provider: StateProvider, session: str, type_name: str, constraints: str, difference: str
    ) -> None:
        provider.register_variable(session, "x", "integer", 1, constraints='{"min":0}')
        with pytest.raises(errors.VariableExistsError) as error:
            provider.register_variable(session, "x", type_name, 1, constraints=constraints)
        assert "already exists" in str(error.value)
        assert difference in str(error.value)

    def test_every_request_for_a_missing_variable_fails(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 1)
        requests: list[Command[Any]] = [
            commands.GetVariable(session, "none"),
            commands.SetVariable(session, "none", Value("1")),
            commands.DeleteVariable(session, "none"),
            commands.GetVariableHistory(session, "none"),
            commands.RollbackVariable(session, "none", 0),
            commands.AddDependency(session, "x", "none"),
            commands.AddDependency(session, "none", "x"),
            commands.StartOptimization(session, "none", "optimizer"),
            commands.StopOptimization(session, "none"),
        ]
        for command in requests:
            error = refused(provider.submit(command))
            assert isinstance(error, errors.VariableNotFoundError), command
            assert "not found" in str(error)
            assert error.identifier == "none"

    def test_sessions_do_not_see_each_other_s_variables(self, provider: StateProvider, session: str) -> None:
        provider.initialize_session(other := uuid.uuid4().hex)
        variable_id = provider.register_variable(session, "x", "integer", 1)
        for identifier in ("x", variable_id):
            with pytest.raises(errors.VariableNotFoundError):
                provider.get_variable(other, identifier)
        provider.register_variable(other, "x", "string", "mine")
        assert provider.get_value(session, "x") == 1

    def test_writing_counts_the_version_on(self, provider: StateProvider, session: str) -> None:
        variable_id = provider.register_variable(session, "x", "integer", 1)
        assert provider.set_variable(session, "x", 2) == 1
        assert provider.set_variable(session, variable_id, 2) == 2
        variable = provider.get_variable(session, "x")
        assert (variable.version, variable.value) == (2, Value("2"))

    def test_the_current_version_may_be_expected(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 1)
        assert provider.set_variable(session, "x", 2) == 1
        assert provider.set_variable(session, "x", 3, expected_version=1) == 2
        with pytest.raises(errors.VersionConflictError) as error:
            provider.set_variable(session, "x", 4, expected_version=1)
        assert (error.value.expected, error.value.actual) == (1, 2)
        assert "expected version 1" in str(error.value)
        assert "current version is 2" in str(error.value)
        assert provider.get_value(session, "x") == 3
        with pytest.raises(errors.VersionConflictError):
            provider.set_variable(session, "x", 4, expected_version=0)
        assert provider.set_variable(session, "x", 4, expected_version=None) == 3

    def test_version_0_may_be_expected(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 1)
        mine = theirs = provider.get_variable(session, "x")
        assert provider.set_variable(session, "x", 2, expected_version=mine.version) == 1
        with pytest.raises(errors.VersionConflictError) as error:
            provider.set_variable(session, "x", 3, expected_version=theirs.version)
        assert (error.value.expected, error.value.actual) == (0, 1)
        assert provider.get_value(session, "x") == 2

    def test_metadata_merges(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 1, metadata={"a": "1", "b": "1"})
        provider.set_variable(session, "x", 2, metadata={"b": "2", "c": "2"})
        provider.set_variable(session, "x", 3)
        assert provider.get_variable(session, "x").metadata == {"a": "1", "b": "2", "c": "2"}

    @pytest.mark.parametrize("key", ["commit_sequence", "dspex.actor", "dspex.anything"])
    def test_the_server_s_own_metadata_keys_are_refused(self, provider: StateProvider, session: str, key: str) -> None:
        with pytest.raises(errors.InvalidArgumentError, match=key):
            provider.register_variable(session, "x", "integer", 1, metadata={key: "1"})
        provider.register_variable(session, "x", "integer", 1)
        with pytest.raises(errors.InvalidArgumentError, match=key):
            provider.set_variable(session, "x", 2, metadata={key: "1"})

    @pytest.mark.parametrize("caller", list(Source))
    def test_the_source_is_from_metadata_or_else_from_the_caller(
        self, provider: StateProvider, session: str, caller: Source
    ) -> None:
        provider.register_variable(session, "x", "integer", 0)
        origin = Origin("ada", "SetVariable", caller)
        sources = {"python": Source.PYTHON, "elixir": Source.ELIXIR, "Elixir": Source.ELIXIR, "cobol": caller}
        cases = [({"source": text}, source) for text, source in sources.items()]
        for metadata, source in [*cases, ({}, caller)]:
            provider.submit(commands.SetVariable(session, "x", Value("1"), metadata), origin).result()
            assert provider.get_variable(session, "x").source is source
            assert provider.get_variable_history(session, "x", 1)[0].source is source

    def test_several_are_read_as_they_were_asked_for(self, provider: StateProvider, session: str) -> None:
        for name in ("a", "b", "c"):
            provider.register_variable(session, name, "string", name)
        b_id = provider.get_variable(session, "b").id
        batch = provider.get_variables(session, ("no", "c", b_id, "a", "nor"))
        assert batch.missing == ("no", "nor")
        assert list(batch.variables) == ["c", b_id, "a"]
        assert {each: variable.name for each, variable in batch.variables.items()} == {"a": "a", b_id: "b", "c": "c"}
        assert provider.get_variables(session, ()).variables == {}

    def test_a_read_may_go_past_every_cache(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 1)
        provider.set_variable(session, "x", 2)
        current = provider.get_variable(session, "x")
        assert provider.submit(commands.GetVariable(session, "x", bypass_cache=True)).result() == current
        batch = provider.submit(commands.GetVariables(session, ("x", "y"), bypass_cache=True)).result()
        assert (batch.variables, batch.missing) == ({"x": current}, ("y",))

    def test_listed_by_glob_oldest_first(self, provider: StateProvider, session: str) -> None:
        names = ["model.b", "model.a", "temperature", "top_p", "Model.c", "x[1]"]
        for name in names:
            provider.register_variable(session, name, "integer", 0)
        provider.set_variable(session, "model.b", 1)
        listed = {
            pattern: names_of(provider.list_variables(session, pattern))
            for pattern in ("", "*", "model.*", "*.?", "t*p*", "tempe", "x[1]", "x[*]", "?", "*.*", "[a-z]*")
        }
        assert listed == {
            "": names,
            "*": names,
            "model.*": ["model.b", "model.a"],
            "*.?": ["model.b", "model.a", "Model.c"],
            "t*p*": ["temperature", "top_p"],
            "tempe": [],
            "x[1]": ["x[1]"],
            "x[*]": ["x[1]"],
            "?": [],
            "*.*": ["model.b", "model.a", "Model.c"],
            "[a-z]*": [],
        }

    def test_deleting_takes_it_away_and_frees_its_name(self, provider: StateProvider, session: str) -> None:
        first = provider.register_variable(session, "x", "integer", 1)
        provider.register_variable(session, "y", "integer", 1)
        provider.delete_variable(session, first)
        for identifier in ("x", first):
            with pytest.raises(errors.VariableNotFoundError):
                provider.get_variable(session, identifier)
            with pytest.raises(errors.VariableNotFoundError):
                provider.delete_variable(session, identifier)
        assert provider.get_session(session).variable_count == 1
        second = provider.register_variable(session, "x", "string", "new")
        assert second != first
        assert provider.get_variable(session, "x").version == 0
        assert names_of(provider.list_variables(session)) == ["y", "x"]
