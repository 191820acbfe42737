"""Changing the constraints of a variable, with a value that satisfies them, in one commit."""

import json
from typing import Any

import pytest

from dspex_persist.state import errors
from dspex_persist.state.provider import StateProvider
from dspex_persist.testing.checks import check_refused, take
from dspex_persist.testing.provider_contract.base import Contract


def _version(number: int, key: str) -> dict[str, Any]:
    return {"schema": {"type": "object", "required": [key]}, "schema_version": number}


class ConstrainingContract(Contract):
    """Changing the constraints of a variable."""

    @pytest.fixture
    def person(self, provider: StateProvider, session: str) -> str:
        """The session, with a variable whose schema has version 1."""
        provider.register_variable(session, "profile", "map", {"name": "Ada"}, constraints=_version(1, "name"))
        return session

    def test_constraints_and_value_change_together(self, provider: StateProvider, person: str) -> None:
        assert provider.constrain_variable(person, "profile", _version(2, "first"), {"first": "Ada"}) == 1
        variable = provider.get_variable(person, "profile")
        assert (json.loads(variable.constraints), variable.version) == (_version(2, "first"), 1)
        newest, first = provider.get_variable_history(person, "profile")
        assert newest.cause == "migration profile 1->2"
        assert first.cause == "RegisterVariable"
        with check_refused(errors.InvalidValueError, '"first" is a required property'):
            provider.set_variable(person, "profile", {"name": "Ada"})

    def test_what_does_not_fit_changes_nothing(self, provider: StateProvider, person: str) -> None:
        before = provider.get_variable(person, "profile")
        with check_refused(errors.InvalidValueError, '"first" is a required property'):
            provider.constrain_variable(person, "profile", _version(2, "first"), {"second": 1})
        with check_refused(errors.InvalidValueError, '"first" is a required property'):
            provider.constrain_variable(person, "profile", _version(2, "first"))
        with check_refused(errors.InvalidConstraintsError, "schema_version must be"):
            provider.constrain_variable(person, "profile", {"schema_version": 0})
        with check_refused(errors.VersionConflictError, "expected version 7"):
            provider.constrain_variable(person, "profile", {}, {}, expected_version=7)
        with pytest.raises(errors.VariableNotFoundError):
            provider.constrain_variable(person, "unknown", {})
        assert provider.get_variable(person, "profile") == before

    def test_the_current_value_may_stay(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 5, constraints={"max": 9})
        assert provider.constrain_variable(session, "x", {"max": 5}) == 1
        assert provider.constrain_variable(session, "x", {"max": 5}) == 1, "nothing changes"
        with check_refused(errors.InvalidValueError, "above maximum 5"):
            provider.set_variable(session, "x", 6)
        assert provider.constrain_variable(session, "x", None, 100) == 2
        assert provider.get_variable(session, "x").constraints == ""
        assert provider.get_variable_history(session, "x")[0].cause == "ConstrainVariable"

    def test_a_lock_holds(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 5)
        provider.start_optimization(session, "x", "mipro")
        with pytest.raises(errors.VariableLockedError):
            provider.constrain_variable(session, "x", {"max": 9})
        assert provider.constrain_variable(session, "x", {"max": 9}, metadata={"optimizer_id": "mipro"}) == 1

    def test_watchers_see_it(self, provider: StateProvider, person: str) -> None:
        with provider.watch(person, ["profile"]) as watch:
            provider.constrain_variable(person, "profile", _version(2, "first"), {"first": "Ada"}, reason="tidier")
            (update,) = take(watch, 1)
        assert update.variable.value.json == '{"first":"Ada"}'
        assert json.loads(update.variable.constraints)["schema_version"] == 2
        assert update.version is not None
        assert (update.version.cause, update.version.reason) == ("migration profile 1->2", "tidier")

    def test_a_key_changes_them_once(self, provider: StateProvider, person: str) -> None:
        for _ in range(2):
            number = provider.constrain_variable(
                person, "profile", _version(2, "first"), {"first": "Ada"}, idempotency_key="k"
            )
            assert number == 1
        with pytest.raises(errors.IdempotencyConflictError):
            provider.constrain_variable(person, "profile", _version(3, "first"), idempotency_key="k")
